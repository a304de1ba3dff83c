"""A prepared dataset on shared storage or an object store, copied to each node's disk once, for all processes there.

The copies are folders of `$DOGVAE_CACHE/datasets`, named by fingerprint. Beside each lies a lock, which every process
that uses the copy holds to its end, and whose time says when that began.
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
from dogvae.data.manifest import MANIFEST, read_manifest, shards_of
from dogvae.errors import UsageError
from dogvae.storage import Storage, cache_folder, is_uri

LIMIT, DEFAULT_GB = "DOGVAE_CACHE_GB", "50"
AT_ONCE = 4  # shards
RETRIES, PAUSE_S = 3, 1.0  # after a failed read; the pauses grow
SHOWN_S = 0.5

_in_use: dict[Path, int] = {}  # copies that this process uses, and its hold on their locks


def local_copy(data: str | Path, fingerprint: str = "", damaged: Collection[str] = ()) -> Path:
    """The folder on this node of a prepared dataset: a path itself, of a URI the copy, which is made if need be.

    One process of a node fetches, the others wait for it. A node that has the dataset of the `fingerprint` wanted asks
    nobody. Shards called `damaged` are fetched though they are there. Raises UsageError.
    """
    if not is_uri(data):
        return Path(data)
    cache, limit = cache_folder() / "datasets", _limit()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if fingerprint and not damaged and _is_whole(folder := _use(cache / fingerprint)):
            return folder
        manifest = read_manifest(data, fingerprint)
        folder = _use(cache / manifest["fingerprint"])
        if damaged or not _is_whole(folder):
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


def outlook(manifest: dict[str, Any]) -> str:
    """Whether this node has a copy of the dataset, or what it takes to fetch one; UsageError if it cannot hold it."""
    cache, limit = cache_folder() / "datasets", _limit()
    folder = cache / manifest["fingerprint"]
    if _is_whole(folder):
        return f"fetched already: {folder}"
    parent = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(f"DOGVAE_CACHE: {cache} cannot be written to: name a folder on a disk of this node")
    with ExitStack() as locks:
        _leaving(folder, manifest, limit, locks)
    return f"{_size(sum(shard['bytes'] for shard in _missing(folder, manifest)))} to fetch"


def _limit() -> int:
    """The bytes that all copies together may have."""
    text = os.environ.get(LIMIT) or DEFAULT_GB
    with suppress(ValueError, OverflowError):
        if math.isfinite(limit := float(text)) and limit > 0:
            return int(limit * 2**30)
    raise UsageError(f"{LIMIT}: {text!r} is no number of gigabytes above 0, such as {DEFAULT_GB}")


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


def _use(folder: Path) -> Path:
    """Keep the copy from being deleted as long as this process lives, and note that it is used."""
    if folder not in _in_use:
        _in_use[folder] = _lock(folder.with_suffix(".lock"), fcntl.LOCK_SH)
    os.utime(_in_use[folder])
    return folder


def _missing(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that are not there in their full length; those that are were compared with their checksum."""

    def is_there(shard: dict[str, Any]) -> bool:
        with suppress(FileNotFoundError):
            return (folder / shard["file"]).stat().st_size == shard["bytes"]
        return False

    return [shard for shard in shards_of(manifest) if not is_there(shard)]


def _is_whole(folder: Path) -> bool:
    try:
        return not _missing(folder, read_manifest(folder, folder.name))
    except UsageError:
        return False


def _leaving(folder: Path, manifest: dict[str, Any], limit: int, locks: ExitStack) -> list[Path]:
    """The copies, least recently used first, that have to go before `folder` can hold the dataset; they are locked.

    UsageError if it would not fit although all went that nobody uses.
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
        others_use = f", beside {_size(used)} that are in use" if used else ""
        raise UsageError(
            f"{LIMIT}: the dataset has {_size(whole)}{others_use}, and {folder.parent} may have {_size(limit)}: "
            f"set {LIMIT} higher"
        )
    if missing > free + can_go:
        raise UsageError(
            f"DOGVAE_CACHE: {folder.parent} has {_size(free + can_go)} to spare, the dataset needs {_size(missing)}: "
            "name a folder on a larger disk, or free some space"
        )
    excess = max(whole + used + can_go - limit, missing - free)
    leaving = []
    for other, size in unused:
        if excess <= 0:
            break
        leaving.append(other)
        excess -= size
    return leaving


def _last_used(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return folder.with_suffix(".lock").stat().st_mtime
    return 0.0


def _fetch(source: Storage, manifest: dict[str, Any], folder: Path, damaged: Collection[str], limit: int) -> None:
    """Make the copy whole: shards under their names once they are known to be right, the manifest last."""
    with ExitStack() as locks:
        for other in _leaving(folder, manifest, limit, locks):
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    missing = _missing(folder, manifest)
    wanted = [*missing, *(s for s in shards_of(manifest) if s["file"] in damaged and s not in missing)]
    total, got, stop = sum(shard["bytes"] for shard in wanted), dict.fromkeys((s["file"] for s in wanted), 0), Event()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        with Progress("fetching") as line:
            pending = {pool.submit(_fetch_shard, source, shard, folder, got, stop) for shard in wanted}
            while pending:
                done, pending = wait(pending, SHOWN_S, "FIRST_COMPLETED")
                for future in done:
                    future.result()
                line.update(sum(got.values()), total, f"{_size(sum(got.values()))} of {_size(total)} of {source}")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    Storage(folder).write(MANIFEST, json.dumps(manifest, indent=1).encode())


def _fetch_shard(source: Storage, shard: dict[str, Any], folder: Path, got: dict[str, int], stop: Event) -> None:
    name, digest = shard["file"], hashlib.sha256()
    partial = folder / f".{name}.partial"  # one process fetches: nobody else has it
    with partial.open("wb") as file:
        for block in _blocks(source, name):
            if stop.is_set():
                return
            file.write(block)
            digest.update(block)
            got[name] += len(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != shard["sha256"]:
        partial.unlink()
        raise UsageError(f"{source.uri_of(name)} is not what was prepared (its checksum differs): put it there again")
    partial.replace(folder / name)  # those who have mapped a damaged one keep it, and nobody finds none


def _blocks(source: Storage, name: str) -> Iterator[bytes]:
    """The bytes of a file, going on where reading failed."""
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
