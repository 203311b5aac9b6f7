"""Laws of masks, guidance and learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from common.errors import UserError


def mask_law(least: float = 0.7, centre: float = 1.0, spread: float = 0.25) -> Any:
    """The share of masked tokens: a normal law around `centre`, cut to [least, 1] (section 4.1, from MAR)."""
    from scipy.stats import truncnorm

    return truncnorm((least - centre) / spread, (1.0 - centre) / spread, loc=centre, scale=spread)


def masked_count(tokens: int, share: float) -> int:
    """How many of the tokens are masked."""
    return min(tokens, math.ceil(tokens * share))


def remaining_after(tokens: int, iterations: int) -> Iterator[int]:
    """Masked tokens after each iteration but the last, which draws what is left: a cosine, at least one a step while
    there are more than one (equation 5 of MAR).
    """
    now = tokens
    for step in range(iterations):
        target = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / iterations))
        now = max(1, min(now - 1, target))
        yield now


def guidance_at(scale: float, schedule: str, tokens: int, remaining: int) -> float:
    """The guidance of an iteration after which `remaining` tokens are masked.

    Raises:
        UserError: another schedule.
    """
    if schedule == "linear":
        return 1 + (scale - 1) * (tokens - remaining) / tokens
    if schedule != "constant":
        raise UserError(f"guidance schedule {schedule!r}: expected constant or linear")
    return scale


def learning_rate(
    progress: float, total: float, warmup: float, lr: float, schedule: str = "constant", least: float = 0.0
) -> float:
    """Linear warm-up, then constant, or a half cosine down to `least`; progress, total and warmup in one unit.

    Raises:
        UserError: another schedule.
    """
    if progress < warmup:
        return lr * progress / warmup
    if schedule == "cosine":
        rest = (progress - warmup) / max(total - warmup, 1e-9)
        return least + (lr - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))
    if schedule != "constant":
        raise UserError(f"learning rate schedule {schedule!r}: expected constant or cosine")
    return lr
