"""How this process keeps its memory."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, instead of giving it back to the system.

    Each step of a training frees its tensors and asks for the same sizes again. glibc gives those
    of more than 32 MB back at once, so the system clears every page of them anew, which can take
    longer than all computing. Memory then stays at its peak until the process ends. Other C
    libraries are left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
