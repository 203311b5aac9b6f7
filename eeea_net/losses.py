"""Losses of training.

Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def training_loss(
    logits_BK: Tensor,
    auxiliary_BK: Tensor | None,
    y_B: Tensor,
    auxiliary: float,
    others_B: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """Cross-entropy of the classifier plus `auxiliary` times that of the auxiliary head.

    Args:
        others_B, share: of pictures mixed by CutMix: the classes of the pasted parts, and the share of the area that
            is the pictures' own.
    """

    def one(values_BK: Tensor) -> Tensor:
        own = F.cross_entropy(values_BK, y_B)
        return own if others_B is None else share * own + (1 - share) * F.cross_entropy(values_BK, others_B)

    loss = one(logits_BK)
    return loss if auxiliary_BK is None else loss + auxiliary * one(auxiliary_BK)
