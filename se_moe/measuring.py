"""What a training step costs, counted the same way for every arm: tensor bytes at its peak, and CPU seconds."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def live_tensor_bytes(exclude: Iterable[int] = ()) -> int:
    """Bytes of all tensor storages that Python can reach, each counted once.

    Args:
        exclude: data pointers of storages that do not count (host memory of the expert cache, for example).
    """
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        # type() and not isinstance: proxies of other libraries answer isinstance by doing things.
        if type(item) is Tensor or issubclass(type(item), torch.nn.Parameter):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            if item.is_leaf and item.grad is not None:
                found[item.grad.untyped_storage().data_ptr()] = item.grad.untyped_storage().nbytes()
    found.pop(0, None)
    for pointer in exclude:
        found.pop(pointer, None)
    return sum(found.values())


@contextmanager
def _quiet_errors() -> Iterator[None]:
    """The profiler's native code announces itself on stderr, past Python; what it says is of no use here."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which `work` raises the allocated CPU memory at its highest point.

    Only allocations of the calling thread count; on CUDA use torch.cuda.max_memory_allocated instead.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_errors(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    kineto = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


def peak_tensor_bytes(work: Callable[[], object], device: torch.device, exclude: Iterable[int] = ()) -> int:
    """Bytes of tensors at the highest point of `work`: what was there before, and what it adds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    return live_tensor_bytes(exclude) + peak_growth(work)
