"""Raw photos to a dataset: uint8 shards, an index, a list of what was rejected, a manifest. Ray does the decoding.

from dogvae.data.prepare import prepare
prepare("photos/", "dataset", size=64)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from dogvae.cluster.connect import connect
from dogvae.cluster.nodes import is_one_machine
from dogvae.config import CROPS, IMAGE_SIZES
from dogvae.console import Progress, say
from dogvae.data.atomic import appearing
from dogvae.data.decode import crops
from dogvae.data.manifest import MANIFEST, UPLOADING, existing
from dogvae.data.photos import Photo, Rejected, Source, Unread
from dogvae.data.source import open_source
from dogvae.data.writer import Row, write_dataset
from dogvae.errors import UsageError
from dogvae.storage import Storage, cache_folder

BATCH_PHOTOS, BATCH_BYTES = 32, 8 * 2**20  # of one task: about 30 ms, much more than Ray takes to start it

UPLOADS = 4  # files at once
STAGED = "prepared"  # in the cache: what is not yet uploaded

Batch = list["Photo | Unread | Rejected"]


def prepare(
    source: str,
    out: str | Path,
    *,
    size: int = 64,
    crop: str = "center",
    val_fraction: float = 0.05,
    workers: int | None = None,
) -> Path | str:
    """Prepare the photos of `source` (see `open_source`) into `out`, a folder or a URI, and return it.

    `size` is the edge in pixels (32, 64 or 128), `crop` what is cut from a photo ("center", or "box" for each bounding
    box), `val_fraction` the share of photos for validation. `workers` is how many tasks decode at once (default: all
    CPUs of the cluster); the result is the same for any number. An `out` that was prepared from the same source with
    the same settings is left as it is. Raises UsageError, and then leaves nothing behind.
    """
    settings = _settings(size, crop, val_fraction, workers)
    place = Storage(out)
    target = Path(os.path.realpath(place.local)) if place.local else place
    existing(target)  # before a long listing of the source: may raise
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
    """As `prepare`, into a folder of `cache_dir` that is named by source and settings: a later call finds it there."""
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
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: must be between 0 and 1, as 0.05")
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
    manifest = existing(out)
    if manifest:
        _must_match(out, manifest, described, settings)
        say(f"{out} is prepared already: {_counts(manifest)}")
        return
    folder, speed = out if isinstance(out, Path) else _staged(out, _key(signature, settings)), ""
    if not existing(folder):  # else an upload of it was interrupted
        rows = _Decoding(source, settings["size"], workers)
        with appearing(folder) as partial:
            write_dataset(partial, rows, described, settings)
        speed = f", {rows.done / rows.seconds:.0f} images/s"
    if isinstance(out, Storage):
        upload(folder, out)
        shutil.rmtree(folder, ignore_errors=True)
    manifest = existing(out)
    assert manifest, "it has just appeared"
    _must_match(out, manifest, described, settings)  # another run may have been first
    say(f"{out}: {_counts(manifest)}{speed}")
    if manifest["rejected"]:
        reasons = out / "rejected.csv" if isinstance(out, Path) else out.uri_of("rejected.csv")
        say(f"{reasons} lists the {manifest['rejected']} rejected files and why")


def _staged(out: Storage, key: str) -> Path:
    """Where a dataset lies until it is uploaded. UsageError if `out` cannot be written: better now than afterwards."""
    try:
        if UPLOADING not in out.names():
            out.write(UPLOADING, b"")
            out.delete(UPLOADING)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error}") from error
    return cache_folder() / STAGED / key


def upload(folder: Path, out: Storage) -> None:
    """Put a prepared dataset on an object store, its manifest last, going on where an upload of it was interrupted.

    Raises UsageError if it cannot be written.
    """
    manifest = (folder / MANIFEST).read_bytes()
    try:
        there = set(out.names())
        if UPLOADING not in there or out.read(UPLOADING) != manifest:
            out.write(UPLOADING, manifest)
            there = set()  # what there is belongs to another dataset, whose upload has not ended
        paths = sorted(path for path in folder.iterdir() if path.name not in {*there, MANIFEST})
        with ThreadPoolExecutor(UPLOADS) as pool, Progress("uploading") as line:
            for done, _ in enumerate(pool.map(lambda path: out.write(path.name, path.read_bytes()), paths), 1):
                line.update(done, len(paths), f"{done} of {len(paths)} files to {out}")
        out.write(MANIFEST, manifest)
        out.delete(UPLOADING)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error}") from error


def _counts(manifest: dict[str, Any]) -> str:
    train, val = (manifest["splits"][split]["count"] for split in ("train", "val"))
    return f"{train} train + {val} val images, {manifest['rejected']} rejected"


def _must_match(
    out: Path | Storage, manifest: dict[str, Any], source: dict[str, str], settings: dict[str, Any]
) -> None:
    differs = [
        f"--{name.replace('_', '-')} {manifest['settings'].get(name)}, not {wanted}"
        for name, wanted in settings.items()
        if manifest["settings"].get(name) != wanted
    ]
    if manifest["source"]["signature"] != source["signature"]:
        was = manifest["source"]["name"]
        differs.append(f"another SOURCE, {was}" if was != source["name"] else "a SOURCE that has changed since")
    if differs:
        raise UsageError(f"OUT {out} was prepared with {'; '.join(differs)}: name another folder, or delete this one")


def decode_batch(batch: Batch, size: int) -> list[Row]:
    """What a task does: the rows of each photo, in order."""
    rows = []
    for given in batch:
        photo = given.read() if isinstance(given, Unread) else given
        if isinstance(photo, Rejected):
            rows.append(Row(photo.path, None, b"", photo.reason))
            continue
        data = photo.data if isinstance(photo.data, bytes) else str(photo.data).encode()
        digest = hashlib.sha256(data).digest()
        rows += [Row(photo.path, box, digest, pixels) for box, pixels in crops(photo, size)]
    return rows


class _Decoding:
    """Iterate for the rows of `source`: in its order, however many tasks work on it.

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
        connect()  # only now: a source that turns out to be wrong should not first wait for Ray
        import ray

        # What is read there need not be sent there. Other machines may not have the source's files.
        self._source.unread = is_one_machine()
        # A task that dies is not retried as it is: one photo may have killed it, and `_result` finds out which.
        decode = ray.remote(num_cpus=1, max_retries=0)(decode_batch)
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        # Two batches for each CPU, so that none waits for this process. But fewer workers than CPUs can only be had by
        # submitting no more tasks than that.
        most = 2 * cpus if self._workers is None or self._workers >= cpus else self._workers
        pending: deque[tuple[Any, Batch]] = deque()
        upcoming = chain([first], batches)

        def submit() -> None:
            while len(pending) < most and (batch := next(upcoming, None)) is not None:
                pending.append((decode.remote(batch, self._size), batch))

        started = time.monotonic()
        with Progress("preparing") as progress:
            submit()
            while pending:
                rows = self._result(decode, *pending.popleft())
                submit()
                self.done += sum(not isinstance(row.pixels, str) for row in rows)
                self.seconds = time.monotonic() - started
                progress.update(
                    self._source.share, 1.0, f"{self.done} images prepared, {self.done / self.seconds:.0f} images/s"
                )
                yield from rows

    def _result(self, decode: Any, task: Any, batch: Batch, alone: bool = False) -> list[Row]:
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
        if isinstance(photo, Unread):
            used += photo.entry.size
        elif isinstance(photo, Photo) and isinstance(photo.data, bytes):
            used += len(photo.data)
        if len(batch) == BATCH_PHOTOS or used >= BATCH_BYTES:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch
