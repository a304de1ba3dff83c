"""Write a folder atomically: other processes see all of it or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dogvae.data.manifest import existing_manifest
from dogvae.errors import UsageError


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; rename it to `out` on success, delete it on failure.

    A lock marks the temporary folder as in use. Unlocked ones, left by processes that were killed, are deleted. If
    another process has written a dataset to `out` in the meantime, that dataset stays. Raises UsageError if `out`
    cannot be written.
    """
    prefix = f".{out.name}.partial-"
    if out.is_mount():
        raise UsageError(f"OUT {out} is a mount point, which cannot be replaced: name a folder inside it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(out.parent):
            if name.startswith(prefix):
                _delete_if_unlocked(out.parent / name)
        folder, lock = _new_locked_folder(out.parent, prefix)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error.strerror}") from error
    try:
        yield folder
        sync_folder(folder)
        try:
            folder.rename(out)
        except OSError:
            if existing_manifest(out) is None:
                raise
        sync_folder(out.parent)
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
        # Until it is locked, another process may delete it as a leftover.
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # some network file systems cannot lock folders: leftovers stay there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _delete_if_unlocked(folder: Path) -> None:
    with suppress(OSError):  # locked by another process, or already deleted
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def sync_file(file: IO[Any]) -> None:
    """Wait until everything written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
