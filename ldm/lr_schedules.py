"""Learning-rate multipliers of the authors' configurations, as functions of the optimiser step for `LambdaLR`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from common.errors import UserError

Multiplier = Callable[[int], float]


def scaled_lr(base_lr: float, batch_size: int, devices: int = 1, accumulation: int = 1) -> float:
    """The authors' rule: base_lr x batch per device x devices x accumulated batches."""
    return base_lr * batch_size * devices * accumulation


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(min(progress, 1.0) * math.pi))


def warmup_cosine(
    warm_up_steps: int, lr_min: float, lr_max: float, lr_start: float, max_decay_steps: int
) -> Multiplier:
    """Library. Linear from lr_start to lr_max, then half a cosine to lr_min at max_decay_steps (inpainting config)."""

    def multiplier(step: int) -> float:
        if step < warm_up_steps:
            return lr_start + (lr_max - lr_start) / warm_up_steps * step
        return _half_cosine(lr_max, lr_min, (step - warm_up_steps) / max(max_decay_steps - warm_up_steps, 1))

    return multiplier


def warmup_cycles(
    warm_up_steps: Sequence[int],
    f_min: Sequence[float],
    f_max: Sequence[float],
    f_start: Sequence[float],
    cycle_lengths: Sequence[float],
    decay: Literal["linear", "cosine"] = "linear",
) -> Multiplier:
    """Library. Cycles, each a linear warm-up from f_start to f_max and then a decay towards f_min at the cycle's end.

    With one endless cycle and f_min = f_max it is a plain warm-up (LSUN-Churches and text-to-image configurations).
    A step on a boundary belongs to the earlier cycle; after the last cycle its final value stays.
    """
    lists = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
    if len({len(values) for values in lists}) != 1 or not cycle_lengths:
        raise UserError("a cyclic learning-rate schedule needs one entry per cycle in every list")

    def multiplier(step: int) -> float:
        cycle, local = 0, float(step)
        while local > cycle_lengths[cycle] and cycle + 1 < len(cycle_lengths):
            local -= cycle_lengths[cycle]
            cycle += 1
        length, warm = cycle_lengths[cycle], warm_up_steps[cycle]
        local = min(local, length)
        if local < warm:
            return f_start[cycle] + (f_max[cycle] - f_start[cycle]) / warm * local
        if decay == "cosine":
            return _half_cosine(f_max[cycle], f_min[cycle], (local - warm) / max(length - warm, 1))
        # The authors count the linear decay from the cycle's start, not from the end of its warm-up.
        return f_min[cycle] + (f_max[cycle] - f_min[cycle]) * (length - local) / length

    return multiplier


def warmup_then(schedule: Literal["constant", "cosine"], warmup: int, max_steps: int) -> Multiplier:
    """`warmup` linear steps to 1 (the first one is not lost: it runs at 1 / warmup), then constant or cosine to 0."""
    if schedule not in ("constant", "cosine"):
        raise UserError(f"learning-rate schedule {schedule!r} is unknown: use constant or cosine")

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        return _half_cosine(1.0, 0.0, (step - warmup) / max(max_steps - warmup, 1))

    return multiplier
