"""GroupNorm followed by SiLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """silu(group_norm(x)); x is [B, C, *spatial], weight and bias are [C]."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))
