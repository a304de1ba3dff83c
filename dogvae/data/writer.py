"""Writing a prepared dataset, which appears whole or not at all: uint8 shards, index, list of rejects, manifest."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dogvae.console import UsageError
from dogvae.data.photos import Box
from dogvae.storage import Storage

MANIFEST, FORMAT, VERSION = "manifest.json", "dogvae-dataset", 1
UPLOADING = ".uploading.json"  # on an object store: the manifest of the dataset that is being put there
SHARD_BYTES = 64 * 2**20  # of pixels, so that a shard is a good piece to copy and to map, and two fit any memory


class Row(NamedTuple):
    """One image of the dataset (`pixels` (3, size, size) uint8), or why there is none (`pixels` is the reason)."""

    path: str
    box: Box | None
    digest: bytes
    """SHA-256 of the photo's bytes: its split depends on nothing else."""
    pixels: np.ndarray | str


def is_val(digest: bytes, val_fraction: float) -> bool:
    """Whether the photo with this SHA-256 is for validation: stable when photos come or go, the same for duplicates."""
    return int.from_bytes(digest[:8], "big") / 2**64 < val_fraction


class _Split:
    """The shards of one split, written as they fill."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        self._folder, self._name = folder, name
        self._rows = np.empty((SHARD_BYTES // (3 * size * size), 3, size, size), np.uint8)
        self._used = 0
        self.count = 0
        self.shards: list[dict[str, Any]] = []

    def add(self, pixels: np.ndarray) -> str:
        """Append an image; returns its id, `split/row`."""
        self._rows[self._used] = pixels
        self._used, self.count = self._used + 1, self.count + 1
        if self._used == len(self._rows):
            self.flush()
        return f"{self._name}/{self.count - 1}"

    def flush(self) -> None:
        """Write what is not yet written as the last shard."""
        if not self._used:
            return
        rows = self._rows[: self._used]
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
        path, digest = self._folder / f"{self._name}-{len(self.shards):05d}.npy", hashlib.sha256()
        with path.open("wb") as file:
            for part in (header.getvalue(), rows.reshape(-1).data):
                file.write(part)
                digest.update(part)
            _sync(file)
        shard = {"file": path.name, "count": len(rows), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        self.shards.append(shard)
        self._used = 0


def write_dataset(
    folder: Path, rows: Iterable[Row], source: dict[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Write `rows` into the existing `folder`, in their order, and return the manifest, which is written last.

    At least one photo is for validation: until some hash falls there, that of the smallest hash is held back for it.
    Raises UsageError if there is nothing to train on.
    """
    size, val_fraction = settings["size"], settings["val_fraction"]
    splits = {name: _Split(folder, name, size) for name in ("train", "val")}
    rejected = 0
    example: Row | None = None
    held: list[Row] = []  # of one photo and its duplicates
    with (
        _table(folder / "index.csv", "image_id", "source_path", "box", "split") as index,
        _table(folder / "rejected.csv", "path", "reason") as reasons,
    ):

        def put(split: str, rows: Iterable[Row]) -> None:
            for row in rows:
                assert not isinstance(row.pixels, str)
                box = " ".join(map(str, row.box)) if row.box else ""
                index.writerow([splits[split].add(row.pixels), row.path, box, split])

        for row in rows:
            if isinstance(row.pixels, str):
                reasons.writerow([row.path, row.pixels])
                rejected, example = rejected + 1, example or row
            elif is_val(row.digest, val_fraction):
                put("train", held)
                held = []
                put("val", [row])
            elif splits["val"].count or (held and row.digest > held[0].digest):
                put("train", [row])
            elif held and row.digest == held[0].digest:
                held.append(row)
            else:
                put("train", held)
                held = [row]
        put("val", held)
    if not splits["val"].count:
        why = f", all {rejected} files were rejected, as {example.path}: {example.pixels}" if example else ""
        raise UsageError(f"SOURCE {source['name']} has no usable photo{why}")
    if not splits["train"].count:
        raise UsageError(
            f"SOURCE {source['name']}: all {splits['val'].count} usable images fell to validation;"
            " give at least two different photos, or lower --val-fraction"
        )
    for split in splits.values():
        split.flush()
    described = {name: {"count": split.count, "shards": split.shards} for name, split in splits.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "size": size,
        "channels": 3,
        "splits": described,
        "fingerprint": fingerprint(size, described),
        "settings": settings,
        "source": source,
        "rejected": rejected,
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        _sync(file)
    return manifest


def fingerprint(size: int, splits: dict[str, Any]) -> str:
    """SHA-256 of what the images are: their size, and each split's count and checksums of shards, as sorted JSON."""
    parts = {name: [split["count"], *(shard["sha256"] for shard in split["shards"])] for name, split in splits.items()}
    return hashlib.sha256(json.dumps([size, parts], sort_keys=True).encode()).hexdigest()


def shards_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All shards: file, count of images, bytes, SHA-256."""
    return [shard for split in ("train", "val") for shard in manifest["splits"][split]["shards"]]


def read_manifest(data: str | Path, fingerprint: str = "") -> dict[str, Any]:
    """The checked manifest of the prepared dataset at a path or URI, and of no other than `fingerprint`, if given.

    Raises UsageError that says what is wrong with it.
    """
    storage = Storage(data)
    where = storage.uri_of(MANIFEST)
    try:
        manifest = json.loads(storage.read(MANIFEST))
    except FileNotFoundError as error:
        raise UsageError(
            f"{data} is no prepared dataset: it has no {MANIFEST}; to make one of photos: dogvae prepare PHOTOS {data}"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{data} is no prepared dataset: its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{where} is not the manifest of a prepared dataset")
    if manifest.get("version") != VERSION:
        raise UsageError(
            f"{where} has format version {manifest.get('version')}, this dogvae reads {VERSION}: "
            "prepare the photos again"
        )
    try:
        shards = shards_of(manifest)
        complete = all({"file", "count", "bytes", "sha256"} <= set(shard) for shard in shards)
        complete = complete and {"size", "fingerprint", "settings", "source", "rejected"} <= set(manifest)
        # Files are written, and folders deleted, by these names: they must not lead elsewhere.
        complete = complete and all(re.fullmatch(r"\w[\w.-]*", shard["file"]) for shard in shards)
        complete = complete and bool(re.fullmatch("[0-9a-f]{64}", manifest["fingerprint"]))
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UsageError(f"{where} is incomplete: prepare the photos again")
    if fingerprint and manifest["fingerprint"] != fingerprint:
        raise UsageError(f"--data: {data} is not what this run was trained on (its fingerprint differs)")
    return manifest


def existing(out: Path | Storage) -> dict[str, Any] | None:
    """The manifest of the dataset in `out`, None if nothing is there yet; UsageError if something else is."""
    if isinstance(out, Path):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        out = Storage(out)
    else:
        try:
            names = out.names()
        except OSError as error:
            raise UsageError(f"OUT {out} cannot be read: {error}") from error
        if not names or (UPLOADING in names and MANIFEST not in names):
            return None
    try:
        manifest = json.loads(out.read(MANIFEST))
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise UsageError(f"OUT {out} exists and is not a dataset of this version: name another folder, or empty it")
    return dict(manifest)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that is renamed to it when the block ends well, and removed when it does not.

    A lock on it tells other runs that it is in use; those that killed runs have left are removed. If somebody else has
    made `out` in the meantime, theirs stays. Raises UsageError if it cannot be written.
    """
    prefix = f".{out.name}.partial-"
    if out.is_mount():
        raise UsageError(f"OUT {out} is a mount point, which cannot be replaced: name a folder inside it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(out.parent):
            if name.startswith(prefix):
                _remove_unlocked(out.parent / name)
        folder, lock = _new_locked_folder(out.parent, prefix)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error.strerror}") from error
    try:
        yield folder
        _sync_folder(folder)
        try:
            folder.rename(out)
        except OSError:
            if existing(out) is None:
                raise
        _sync_folder(out.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EBUSY):
            raise
        raise UsageError(f"OUT {out} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some network file systems lock no folders: there, leftovers stay
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # another run can take it for a leftover until it is locked
            return folder, lock
        os.close(lock)


def _remove_unlocked(folder: Path) -> None:
    with suppress(OSError):  # in use, or just gone
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


@contextmanager
def _table(path: Path, *columns: str) -> Iterator[Any]:
    # File names can be any bytes: what is no UTF-8 is written as \xNN would be, and stops nothing.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        yield table
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
