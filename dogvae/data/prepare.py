"""Prepare photos as a dataset: shards of uint8 images, an index, a list of rejected files, a manifest.

    from dogvae.data.prepare import prepare
    prepare("photos/", "dataset", size=64)

Ray tasks decode the photos; this process reads the source and writes the dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.cluster.connect import connect, why_no_process_starts
from dogvae.cluster.nodes import is_one_machine
from dogvae.config import CROPS, IMAGE_SIZES, VAL_FRACTION, check
from dogvae.console import Progress, say
from dogvae.data.atomic import atomic_folder
from dogvae.data.decode import decode
from dogvae.data.duplicates import signatures
from dogvae.data.manifest import existing_manifest
from dogvae.data.photos import Photo, Rejected, Source, UnreadPhoto
from dogvae.data.source import open_source
from dogvae.data.upload import check_writable, upload
from dogvae.data.writer import Row, write_dataset
from dogvae.errors import UsageError
from dogvae.storage import Storage, cache_folder

BATCH_PHOTOS, BATCH_BYTES = 32, 8 * 2**20  # the most for one task: about 30 ms, far more than Ray's overhead
START_S = 20  # until it is looked why no task has ended
STAGING = "prepared"  # in the cache: datasets that are not uploaded yet

Batch = list["Photo | UnreadPhoto | Rejected"]


def prepare(
    source: str,
    out: str | Path,
    *,
    size: int = 64,
    crop: str = "center",
    val_fraction: float = 0.05,
    workers: int | None = None,
) -> Path | str:
    """Prepare the photos of `source` (see `open_source`) into `out`, a folder or a URI, and return `out`.

    `size`: side of the images in pixels (32, 64 or 128). `crop`: "center" for the centre square of each photo, or "box"
    for that of each bounding box. `val_fraction`: share of the photos for validation, at most 0.9. `workers`: how many
    tasks decode at the same time (default: one per CPU of the cluster); the result does not depend on it.

    An `out` that was prepared from the same source with the same settings is left as it is. Raises UsageError, and then
    leaves nothing behind.
    """
    settings = _settings(size, crop, val_fraction, workers)
    place = Storage(out)
    target = Path(os.path.realpath(place.local)) if place.local else place
    existing_manifest(target)  # may raise: checked before the source, whose listing can take long
    opened = open_source(source, crop)
    if isinstance(target, Path):
        _must_be_outside(target, opened)
    _prepare(opened, opened.signature(), target, settings, workers)
    return target if isinstance(target, Path) else str(out)


def cached(
    source: str,
    cache_dir: str | Path,
    *,
    size: int = 64,
    crop: str = "center",
    val_fraction: float = 0.05,
    workers: int | None = None,
) -> Path:
    """Like `prepare`, into a folder of `cache_dir` named by source and settings. A later call returns that folder."""
    settings = _settings(size, crop, val_fraction, workers)
    folder = Path(os.path.realpath(cache_dir))
    opened = open_source(source, crop)
    _must_be_outside(folder, opened)
    signature = opened.signature()
    out = folder / _key(signature, settings)
    _prepare(opened, signature, out, settings, workers)
    return out


def _key(signature: str, settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([signature, settings]).encode()).hexdigest()[:16]


def _settings(size: int, crop: str, val_fraction: float, workers: int | None) -> dict[str, Any]:
    if size not in IMAGE_SIZES:
        raise UsageError(f"--size {size}: must be one of {', '.join(map(str, IMAGE_SIZES))}")
    if crop not in CROPS:
        raise UsageError(f"--crop {crop}: must be one of {', '.join(CROPS)}")
    check("val_fraction", val_fraction, float, VAL_FRACTION)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    return {"size": size, "crop": crop, "val_fraction": val_fraction}


def _must_be_outside(out: Path, source: Source) -> None:
    if Path(os.path.realpath(source.name)) in (out, *out.parents):
        raise UsageError(f"OUT {out} is inside SOURCE {source.name}: name a folder outside it")


def _prepare(
    source: Source, signature: str, out: Path | Storage, settings: dict[str, Any], workers: int | None
) -> None:
    described = {"kind": source.kind, "name": source.name, "signature": signature}
    manifest = existing_manifest(out)
    if manifest:
        _must_match(out, manifest, described, settings)
        say(f"{out} is already prepared: {_counts(manifest)}")
        return
    if isinstance(out, Storage):
        check_writable(out)
        folder = cache_folder() / STAGING / _key(signature, settings)
    else:
        folder = out
    speed = ""
    if not existing_manifest(folder):  # else it was prepared before, and its upload was interrupted
        rows = _DecodedRows(source, settings["size"], workers)
        with atomic_folder(folder) as partial:
            write_dataset(partial, rows, described, settings)
        speed = f", {rows.done / rows.seconds:.0f} images/s"
    if isinstance(out, Storage):
        upload(folder, out)
        shutil.rmtree(folder, ignore_errors=True)
    manifest = existing_manifest(out)
    assert manifest, "it was written above"
    _must_match(out, manifest, described, settings)  # another process may have written `out` first
    say(f"{out}: {_counts(manifest)}{speed}")
    if manifest["rejected"]:
        reasons = out / "rejected.csv" if isinstance(out, Path) else out.uri_of("rejected.csv")
        say(f"{reasons} lists the {manifest['rejected']} rejected files and why")


def _counts(manifest: dict[str, Any]) -> str:
    train, val = (manifest["splits"][split]["count"] for split in ("train", "val"))
    near, bad = (manifest.get(name, 0) for name in ("near_duplicates", "bad_profiles"))
    notes = f", {near} near-duplicate{'s' * (near > 1)} kept on one side" if near else ""
    notes += f", {bad} damaged colour profiles ignored" if bad else ""
    return f"{train} train + {val} val images{notes}, {manifest['rejected']} rejected"


def _must_match(
    out: Path | Storage, manifest: dict[str, Any], source: dict[str, str], settings: dict[str, Any]
) -> None:
    differs = [
        f"--{name.replace('_', '-')} {manifest['settings'].get(name)}, not {wanted}"
        for name, wanted in settings.items()
        if manifest["settings"].get(name) != wanted
    ]
    if manifest["source"].get("signature") != source["signature"]:
        was = manifest["source"].get("name")
        differs.append(f"another SOURCE, {was}" if was != source["name"] else "a SOURCE that has changed since")
    if differs:
        raise UsageError(f"OUT {out} was prepared with {'; '.join(differs)}: name another folder, or delete this one")


def decode_batch(batch: Batch, size: int) -> list[Row]:
    """Read and decode the photos; returns their rows, in order. A Ray task runs this."""
    rows: list[Row] = []
    images: dict[int, np.ndarray] = {}  # number of the row -> pixels of a photo
    for item in batch:
        photo = item.read() if isinstance(item, UnreadPhoto) else item
        if isinstance(photo, Rejected):
            rows.append(Row(photo.path, None, b"", photo.reason))
            continue
        data = photo.data if isinstance(photo.data, bytes) else str(photo.data).encode()
        digest = hashlib.sha256(data).digest()
        crops, bad_profile = decode(photo, size)
        for number, (box, pixels) in enumerate(crops):
            if isinstance(photo.data, bytes) and not isinstance(pixels, str):
                images[len(rows)] = pixels
            rows.append(Row(photo.path, box, digest, pixels, bad_profile=bad_profile and number == 0))
    # All at once: that takes a third of the time.
    for number, signature in zip(images, signatures(list(images.values())), strict=True):
        rows[number] = rows[number]._replace(signature=signature)
    return rows


class _DecodedRows:
    """Iterate for the rows of `source`, decoded by Ray tasks, in the order of the source.

    Afterwards `done` is the number of images, and `seconds` the time from the first task to the last result.
    """

    def __init__(self, source: Source, size: int, workers: int | None) -> None:
        self._source, self._size, self._workers = source, size, workers
        self.done = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Row]:
        batches = _batches(self._source)
        first = next(batches, None)
        if first is None:
            return
        connect()  # only now, so that errors in the source are reported without waiting for Ray
        import ray

        # On one machine the tasks read the files themselves. Other machines may not have the files.
        self._source.defer_reading = is_one_machine()
        # Ray does not retry a task that dies: a photo may have killed it, and `_result` finds out which one.
        decode = ray.remote(num_cpus=1, max_retries=0)(decode_batch)
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        # Two batches per CPU, so that no CPU waits for this process. To run fewer tasks at a time than there are CPUs,
        # no more than that are submitted.
        most = 2 * cpus if self._workers is None or self._workers >= cpus else self._workers
        pending: deque[tuple[Any, Batch]] = deque()
        upcoming = chain([first], batches)

        def submit() -> None:
            while len(pending) < most and (batch := next(upcoming, None)) is not None:
                pending.append((decode.remote(batch, self._size), batch))

        started = time.monotonic()
        with Progress("preparing") as progress:
            submit()
            first, _ = pending[0]
            if not ray.wait([first], timeout=START_S)[0] and (why := why_no_process_starts()):
                raise UsageError(f"Ray has started no process within {START_S} s: {why}")
            while pending:
                rows = self._result(decode, *pending.popleft())
                submit()
                self.done += sum(not isinstance(row.pixels, str) for row in rows)
                self.seconds = time.monotonic() - started
                progress.update(
                    self._source.progress, 1.0, f"{self.done} images prepared, {self.done / self.seconds:.0f} images/s"
                )
                yield from rows

    def _result(self, decode: Any, task: Any, batch: Batch, alone: bool = False) -> list[Row]:
        """The rows of a task. If it died, each of its photos is decoded `alone`, and rejected if that dies too."""
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

        try:
            rows: list[Row] = ray.get(task)
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError):
            if alone:
                return [Row(batch[0].path, None, b"", "its decoder crashed")]
            rows = []
            for photo in batch:
                rows += self._result(decode, decode.remote([photo], self._size), [photo], alone=True)
        return rows


def _batches(source: Source) -> Iterator[Batch]:
    batch: Batch = []
    used = 0
    for photo in source:
        batch.append(photo)
        if isinstance(photo, UnreadPhoto):
            used += photo.entry.size
        elif isinstance(photo, Photo) and isinstance(photo.data, bytes):
            used += len(photo.data)
        if len(batch) == BATCH_PHOTOS or used >= BATCH_BYTES:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch
