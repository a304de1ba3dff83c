"""The cache of datasets on a node: a dataset named by a URI is copied to the node's disk once, for all its processes.

The copies are folders of `$DOGVAE_CACHE/datasets`, named by the dataset's fingerprint. Beside each copy is a lock file.
Each process that uses the copy holds the lock until the process ends, so that nobody deletes the copy meanwhile. The
lock file's modification time says when the copy was last opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event
from typing import Any

from dogvae.console import Progress
from dogvae.data.atomic import sync_file
from dogvae.data.manifest import MANIFEST, read_manifest, shards_of
from dogvae.errors import UsageError
from dogvae.storage import Storage, cache_folder, is_uri

LIMIT, DEFAULT_GB = "DOGVAE_CACHE_GB", "50"
PARALLEL_SHARDS = 4
RETRIES, PAUSE_S = 3, 1.0  # after a failed read; the second pause is twice as long as the first, and so on
PROGRESS_S = 0.5  # between updates of the progress line

_in_use: dict[Path, int] = {}  # copies that this process uses -> file descriptor of the lock


def local_copy(data: str | Path, fingerprint: str = "", damaged: Collection[str] = ()) -> Path:
    """The folder on this node of the prepared dataset `data`: a path itself, for a URI its copy.

    A missing copy is fetched by one process of the node while the others wait. If `fingerprint` is given and its copy
    is complete, no other machine is asked. Shards named in `damaged` are fetched even if they exist. Raises UsageError.
    """
    if not is_uri(data):
        return Path(data)
    cache, limit = cache_folder() / "datasets", _limit()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if fingerprint and not damaged and _is_complete(folder := _hold(cache / fingerprint)):
            return folder
        manifest = read_manifest(data, fingerprint)
        folder = _hold(cache / manifest["fingerprint"])
        if damaged or not _is_complete(folder):
            fetching = _lock(cache / "fetching", fcntl.LOCK_EX)
            try:
                _fetch(Storage(data), manifest, folder, damaged, limit)
            finally:
                os.close(fetching)
    except OSError as error:
        raise UsageError(
            f"DOGVAE_CACHE: {cache} cannot be used ({error}): name a folder on a disk of this node"
        ) from error
    return folder


def copy_status(manifest: dict[str, Any]) -> str:
    """Whether this node has a copy of the dataset, or how much it has to fetch; UsageError if it cannot hold a copy."""
    cache, limit = cache_folder() / "datasets", _limit()
    folder = cache / manifest["fingerprint"]
    if _is_complete(folder):
        return f"fetched already: {folder}"
    parent = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(f"DOGVAE_CACHE: {cache} cannot be written to: name a folder on a disk of this node")
    with ExitStack() as locks:
        _copies_to_delete(folder, manifest, limit, locks)
    return f"{_size(sum(shard['bytes'] for shard in _missing(folder, manifest)))} to fetch"


def _limit() -> int:
    """The most bytes that all copies together may take."""
    text = os.environ.get(LIMIT) or DEFAULT_GB
    with suppress(ValueError, OverflowError):
        if math.isfinite(limit := float(text)) and limit > 0:
            return int(limit * 2**30)
    raise UsageError(f"{LIMIT}: {text!r} is not a number of gigabytes above 0, such as {DEFAULT_GB}")


def _size(n: float) -> str:
    return f"{n / 2**20:,.1f} MB" if n < 2**30 else f"{n / 2**30:,.1f} GB"


def _lock(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _hold(folder: Path) -> Path:
    """Keep other processes from deleting the copy until this process ends, and mark it as just used."""
    if folder not in _in_use:
        _in_use[folder] = _lock(folder.with_suffix(".lock"), fcntl.LOCK_SH)
    os.utime(_in_use[folder])
    return folder


def _missing(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that are missing or of another length. Checksums were compared when the shards were fetched."""

    def is_there(shard: dict[str, Any]) -> bool:
        with suppress(FileNotFoundError):
            return (folder / shard["file"]).stat().st_size == shard["bytes"]
        return False

    return [shard for shard in shards_of(manifest) if not is_there(shard)]


def _is_complete(folder: Path) -> bool:
    try:
        return not _missing(folder, read_manifest(folder, folder.name))
    except UsageError:
        return False


def _copies_to_delete(folder: Path, manifest: dict[str, Any], limit: int, locks: ExitStack) -> list[Path]:
    """The copies that must be deleted before `folder` can hold the dataset, least recently used first.

    Copies in use are never among them; the others stay locked until `locks` closes. Raises UsageError if the dataset
    would not fit even without the unused copies.
    """
    unused, used = [], 0
    others = (path for path in folder.parent.glob("*") if re.fullmatch("[0-9a-f]{64}", path.name) and path != folder)
    for other in sorted((path for path in others if not path.is_symlink()), key=_last_used):
        size = sum(file.stat().st_size for file in other.iterdir())
        try:
            locks.callback(os.close, _lock(other.with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB))
            unused.append((other, size))
        except BlockingIOError:
            used += size
    whole, missing = (sum(s["bytes"] for s in part) for part in (shards_of(manifest), _missing(folder, manifest)))
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    free, can_go = shutil.disk_usage(disk).free, sum(size for _, size in unused)
    if whole + used > limit:
        copies_in_use = f", other copies that are in use take {_size(used)}" if used else ""
        raise UsageError(
            f"{LIMIT}: the dataset takes {_size(whole)}{copies_in_use}, and all copies in {folder.parent} together "
            f"may take {_size(limit)}: set {LIMIT} higher"
        )
    if missing > free + can_go:
        raise UsageError(
            f"DOGVAE_CACHE: {folder.parent} has room for {_size(free + can_go)}, the dataset needs {_size(missing)}: "
            "name a folder on a larger disk, or free some space"
        )
    excess = max(whole + used + can_go - limit, missing - free)
    to_delete = []
    for other, size in unused:
        if excess <= 0:
            break
        to_delete.append(other)
        excess -= size
    return to_delete


def _last_used(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return folder.with_suffix(".lock").stat().st_mtime
    return 0.0


def _fetch(source: Storage, manifest: dict[str, Any], folder: Path, damaged: Collection[str], limit: int) -> None:
    """Complete the copy. A shard gets its name when its checksum has been compared; the manifest is written last."""
    with ExitStack() as locks:
        for other in _copies_to_delete(folder, manifest, limit, locks):
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    missing = _missing(folder, manifest)
    wanted = [*missing, *(s for s in shards_of(manifest) if s["file"] in damaged and s not in missing)]
    total, got, stop = sum(shard["bytes"] for shard in wanted), dict.fromkeys((s["file"] for s in wanted), 0), Event()
    pool = ThreadPoolExecutor(PARALLEL_SHARDS)
    try:
        with Progress("fetching") as line:
            pending = {pool.submit(_fetch_shard, source, shard, folder, got, stop) for shard in wanted}
            while pending:
                done, pending = wait(pending, PROGRESS_S, "FIRST_COMPLETED")
                for future in done:
                    future.result()
                line.update(sum(got.values()), total, f"{_size(sum(got.values()))} of {_size(total)} of {source}")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    Storage(folder).write(MANIFEST, json.dumps(manifest, indent=1).encode())


def _fetch_shard(source: Storage, shard: dict[str, Any], folder: Path, got: dict[str, int], stop: Event) -> None:
    name, digest = shard["file"], hashlib.sha256()
    partial = folder / f".{name}.partial"  # a fixed name: the lock lets only one process fetch
    with partial.open("wb") as file:
        for block in _blocks(source, name):
            if stop.is_set():
                return
            file.write(block)
            digest.update(block)
            got[name] += len(block)
        sync_file(file)
    if digest.hexdigest() != shard["sha256"]:
        partial.unlink()
        raise UsageError(f"{source.uri_of(name)} is not what was prepared (its checksum differs): put it there again")
    partial.replace(folder / name)  # atomic: processes that have mapped a damaged shard keep it, and the name stays


def _blocks(source: Storage, name: str) -> Iterator[bytes]:
    """The bytes of a file, block by block. After a failed read it goes on at the same byte, up to `RETRIES` times."""
    at = failures = 0
    while True:
        try:
            for block in source.blocks(name, at):
                at += len(block)
                yield block
            return
        except OSError as error:
            failures += 1
            if failures > RETRIES or isinstance(error, FileNotFoundError):
                raise UsageError(f"{source.uri_of(name)} cannot be read: {error}") from error
        time.sleep(failures * PAUSE_S)
