"""Write the files of a prepared dataset: shards of uint8 images, index, list of rejected files, manifest."""

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

from dogvae.data.atomic import sync_file
from dogvae.data.duplicates import NearDuplicates
from dogvae.data.manifest import FORMAT, MANIFEST, VERSION, fingerprint
from dogvae.data.photos import HEIC_EXTRA, Box
from dogvae.data.split import assign_splits
from dogvae.errors import UsageError

SHARD_BYTES = 64 * 2**20  # of pixels; one shard of each split is in memory while a dataset is written


class Row(NamedTuple):
    """An image of the dataset, or a rejected file."""

    path: str
    box: Box | None
    digest: bytes
    """SHA-256 of the photo's bytes, which decides its split; for a near-duplicate that of the first such photo."""
    pixels: np.ndarray | str
    """(3, size, size) uint8; for a rejected file the reason."""
    signature: bytes = b""
    """What `duplicates.signatures` gives for the pixels; empty for drawn dogs, which are all different."""
    bad_profile: bool = False
    """Whether this is the first image of a photo whose colour profile was ignored."""
    duplicate_of: str = ""
    """Path of the first photo that this one resembles."""


class _SplitWriter:
    """The shards of one split; each is written when it is full."""

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
        """Write the images that are not written yet, as the last shard."""
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
            sync_file(file)
        shard = {"file": path.name, "count": len(rows), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        self.shards.append(shard)
        self._used = 0


def write_dataset(
    folder: Path, rows: Iterable[Row], source: dict[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Write `rows` into the existing `folder`, in their order; returns the manifest, which is written last.

    At least one photo is for validation (see `assign_splits`). Raises UsageError if there is none for training.
    """
    size, val_fraction = settings["size"], settings["val_fraction"]
    splits = {name: _SplitWriter(folder, name, size) for name in ("train", "val")}
    rejected = bad_profiles = 0
    example: Row | None = None
    grouped = NearDuplicates(rows, val_fraction)
    with (
        _table(folder / "index.csv", "image_id", "source_path", "box", "split", "duplicate_of") as index,
        _table(folder / "rejected.csv", "path", "reason") as reasons,
    ):

        def usable() -> Iterator[Row]:
            nonlocal rejected, bad_profiles, example
            for row in grouped:
                if isinstance(row.pixels, str):
                    reasons.writerow([row.path, row.pixels])
                    rejected += 1
                    # Of a folder of HEIC photos and their sidecar files, a photo shows what to do.
                    if example is None or (HEIC_EXTRA in row.pixels and HEIC_EXTRA not in str(example.pixels)):
                        example = row
                else:
                    bad_profiles += row.bad_profile
                    yield row

        for split, row in assign_splits(usable(), val_fraction):
            assert not isinstance(row.pixels, str)
            box = " ".join(map(str, row.box)) if row.box else ""
            index.writerow([splits[split].add(row.pixels), row.path, box, split, row.duplicate_of])
    if not splits["val"].count:
        why = f": all {rejected} files were rejected, for example {example.path}: {example.pixels}" if example else ""
        raise UsageError(f"SOURCE {source['name']} has no usable photo{why}")
    if not splits["train"].count:
        raise UsageError(
            f"SOURCE {source['name']}: all {splits['val'].count} usable images were assigned to validation;"
            " give at least two different photos, or lower --val-fraction"
        )
    for writer in splits.values():
        writer.flush()
    described = {name: {"count": writer.count, "shards": writer.shards} for name, writer in splits.items()}
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
        "near_duplicates": grouped.count,
        "bad_profiles": bad_profiles,
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        sync_file(file)
    return manifest


@contextmanager
def _table(path: Path, *columns: str) -> Iterator[Any]:
    # File names can be any bytes: those that are not valid UTF-8 are written escaped.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        yield table
        sync_file(file)
