"""Process settings that make CPU training faster without changing any number."""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h>, the same on every glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def tune_allocator() -> bool:
    """Let glibc keep freed memory for the next step instead of returning it to the kernel.

    By default every tensor above some 32 MiB is mapped afresh, and the free top of the heap is given back: the kernel
    then maps and clears the same pages in every training step. What is freed stays with the process until it ends, so
    the peak hardly changes. MALLOC_* variables of the environment take precedence.

    Returns:
        Whether anything was changed: False outside Linux with glibc, or where the environment decides already.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
        libc.gnu_get_libc_version  # noqa: B018 (other C libraries lack it, and their mallopt differs)
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # Older glibc refuses a mapping threshold above 32 MiB.
    done = [mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25)]
    done += [mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_M_TOP_PAD, 1 << 26)]
    return any(done)
