"""What makes training on CPUs faster without changing a number: process settings, and sizes that repeat."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

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


def few_sizes(count: int, per_octave: int = 8) -> int:
    """The next of `per_octave` (a power of two) sizes an octave, at least a multiple of 8.

    oneDNN compiles and keeps a matrix product for every size that it meets: where every batch has another number of
    rows, that costs time in each step and megabytes for each size. Filling up to few sizes is at most one part in
    `per_octave` more work.
    """
    step = max(8, (1 << max(0, (count - 1).bit_length() - 1)) // per_octave)
    return -(-count // step) * step


def cpu_name() -> str:
    """The processor in words, for example "Intel Xeon @ 2.70GHz"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|CPU|Processor", "", names[0])) if names else platform.machine()


def cpu_kind() -> str:
    """What decides how this machine rounds: the processor and the instructions that torch takes there, for example
    "AMD EPYC, AVX512". Two kinds differ in the last bits of `exp`, `sin` and sums, which training then carries on."""
    import torch

    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
