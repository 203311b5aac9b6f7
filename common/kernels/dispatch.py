"""Triton where there is one, and whether a call runs on its kernels.

A file of kernels imports `triton` and `tl` from here and defines its kernels under `if triton is not None`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels beyond Linux; the CPU path does not need it
    triton = tl = None

__all__ = ["INTERPRET", "tl", "triton", "use_kernels"]

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def use_kernels(x: Tensor, *others: Tensor) -> bool:
    """Interpreted kernels stand in for compiled ones only where TRITON_INTERPRET asks for them."""
    return triton is not None and (x.is_cuda or INTERPRET) and all(t.dtype in _DTYPES for t in (x, *others))
