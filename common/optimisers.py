"""AdamW as the distillations here use it: a linear warm-up, then a constant rate or a cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    warmup: int,
    schedule: Literal["constant", "cosine"],
    steps: int,
) -> dict[str, Any]:
    """What Lightning's `configure_optimizers` returns: AdamW on what is trained of `parameters`, and its rate.

    Args:
        warmup: steps over which the rate rises linearly to `lr`.
        steps: of the run, at the end of which a cosine reaches zero.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, foreach=True)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, warmup))
        if schedule == "constant":
            return rise
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": rate, "interval": "step"}}
