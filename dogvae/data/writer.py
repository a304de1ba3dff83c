"""Writing a prepared dataset, which appears whole or not at all: uint8 shards, index, list of rejects, manifest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dogvae.data.atomic import _sync
from dogvae.data.manifest import FORMAT, MANIFEST, VERSION, fingerprint
from dogvae.data.photos import Box
from dogvae.errors import UsageError

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


@contextmanager
def _table(path: Path, *columns: str) -> Iterator[Any]:
    # File names can be any bytes: what is no UTF-8 is written as \xNN would be, and stops nothing.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        yield table
        _sync(file)
