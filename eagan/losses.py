"""The adversarial losses and the linear decay of the learning rate.

Equations 1 to 3 of the paper write the original game; the authors train by the hinge form.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real_B1: Tensor, fake_B1: Tensor) -> Tensor:
    """mean relu(1 - D(x)) + mean relu(1 + D(G(z)))."""
    return F.relu(1 - real_B1).mean() + F.relu(1 + fake_B1).mean()


def generator_loss(fake_B1: Tensor) -> Tensor:
    """-mean D(G(z))."""
    return -fake_B1.mean()


def decayed(lr: float, step: int, end: int) -> float:
    """Linear to nothing at step `end`, which no published script switches on."""
    return lr * max(0.0, 1 - step / end)
