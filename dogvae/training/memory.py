"""How this process allocates memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in this process instead of returning it to the system.

    Every step allocates the same large tensors. If they are returned, the system clears their pages again for the next
    step, which took a quarter of the time at K = 10. Applies to the first thread and to threads started after this
    call. Does nothing with other C libraries.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)  # arenas other than the first cannot hold more than 64 MB
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
