"""A folder that appears whole or not at all."""

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

from dogvae.data.manifest import existing
from dogvae.errors import UsageError


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


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
