"""Opens the files that users name. A path can lead to a device, a pipe or a file that never ends: those are refused."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import lru_cache, partial
from typing import IO

MAX_BYTES = 256 * 2**20  # of a photo: links lead anywhere, and an archive can declare any size


def refusal(status: os.stat_result) -> str | None:
    """Why a file or folder of this status is not opened; None if it is stored on a disk."""
    if status.st_dev in _kernel_devices():  # their files can block, and never end
        return "a file of /proc or /sys"
    return None if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else "not a regular file"


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file to read it, links followed. Raises OSError, also for everything that is not a stored file."""
    status = os.stat(path)  # first: opening a device can start it
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    descriptor = -1
    if not (reason := refusal(status)):
        # What `path` names can change meanwhile. O_NONBLOCK: opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if reason := refusal(os.fstat(descriptor)):
            os.close(descriptor)
    if reason:
        raise OSError(errno.EINVAL, reason)
    return open(descriptor, "rb")


def read_at_most(opener: Callable[[], IO[bytes]], size: int, limit: int) -> bytes:
    """The bytes of a file that declares `size`. ValueError if it has none or over `limit`, whatever it declares."""
    if size <= limit:
        with opener() as file:
            data = file.read(limit + 1)
    if size > limit or len(data) > limit:
        raise ValueError(f"over {limit // 2**20} MB")
    if not data:
        raise ValueError("empty file")
    return data


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES`. Raises OSError or ValueError."""
    return read_at_most(partial(open_file, path), os.stat(path).st_size, MAX_BYTES)


@lru_cache(maxsize=1)
def _kernel_devices() -> set[int]:
    return {os.stat(mount).st_dev for mount in ("/proc", "/sys") if os.path.ismount(mount)}
