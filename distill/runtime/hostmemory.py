"""How a process on a CPU holds on to its memory between steps."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process's allocator keep what is freed, for what is asked for next; whether it could be told so.

    By default glibc gives large blocks back at once and every step pays for them again, a page fault per 4 KB: on
    virtual machines that is a second for 1.3 GB, which a step of a small model asks for. PyTorch does the same on CUDA.
    Nothing happens where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
