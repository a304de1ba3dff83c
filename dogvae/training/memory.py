"""The memory of a process: kept by it between steps."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees.

    Every step allocates the same large tensors. glibc gives each back to the system when it is freed, which clears the
    pages again for the next step: a quarter of the time at K = 10. Holds for the process's first thread, and for those
    that are started afterwards. Other C libraries have no such switch.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)  # other arenas than the first hold nothing of more than 64 MB
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
