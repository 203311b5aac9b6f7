"""Learning rates and drop-path probability as functions of the epoch.

Epochs count from 0, and epoch e uses the value of e: the first epoch of a cosine has the full rate.
"""

from __future__ import annotations

import math

from common.errors import UserError

SCHEDULES = ("cosine", "imagenet_search", "imagenet_final")


def cosine(epoch: int, epochs: int, lr: float, minimum: float = 0.0) -> float:
    """Half a cosine from `lr` down to `minimum` (CIFAR search and final training)."""
    _check(epoch, epochs)
    return minimum + (lr - minimum) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def imagenet_search(epoch: int, epochs: int, lr: float, warmup: int = 5) -> float:
    """The cosine, whose first `warmup` epochs are replaced by lr/warmup, 2 lr/warmup, ..., lr (ImageNet search)."""
    _check(epoch, epochs)
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return cosine(epoch, epochs, lr)


def imagenet_final(epoch: int, epochs: int, lr: float, warmup: int = 5) -> float:
    """Linear warm-up, linear decay, a five times gentler slope in the last five epochs (ImageNet final training)."""
    _check(epoch, epochs)
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    left = epochs - epoch
    if left > 5:
        return lr * (left - 5) / (epochs - 5)
    return lr * left / (5 * (epochs - 5))


def drop_path_ramp(epoch: int, epochs: int, maximum: float) -> float:
    """Probability of dropping a path, linear from 0 at the first epoch towards `maximum`."""
    _check(epoch, epochs)
    return maximum * epoch / epochs


def rate(name: str, epoch: int, epochs: int, lr: float, minimum: float = 0.0, warmup: int = 5) -> float:
    """The rate of a named schedule; `minimum` counts for the cosine, `warmup` for the two ImageNet schedules.

    Raises:
        UserError: no such schedule, or the epoch is outside the run.
    """
    if name == "cosine":
        return cosine(epoch, epochs, lr, minimum)
    if name == "imagenet_search":
        return imagenet_search(epoch, epochs, lr, warmup)
    if name == "imagenet_final":
        return imagenet_final(epoch, epochs, lr, warmup)
    raise UserError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")


def _check(epoch: int, epochs: int) -> None:
    if not 0 <= epoch < epochs:
        raise UserError(f"epoch {epoch} is outside a schedule of {epochs} epochs; expected 0 to {epochs - 1}")
