"""Losses of the final training. Shape suffixes: B batch, K classes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError


def label_smoothing_cross_entropy(logits_BK: Tensor, target_B: Tensor, smoothing: float) -> Tensor:
    """Cross entropy against (1 - smoothing) x one-hot + smoothing / K, averaged over the batch (ImageNet: 0.1).

    Args:
        logits_BK: float.
        target_B: int64 class indices.
        smoothing: in [0, 1); 0 is the plain cross entropy.

    Returns:
        A scalar.

    Raises:
        UserError: `smoothing` is outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise UserError(f"label smoothing {smoothing}: expected a number from 0 to below 1")
    log_p_BK = F.log_softmax(logits_BK, dim=1)
    right_B = -log_p_BK.gather(1, target_B[:, None]).squeeze(1)
    uniform_B = -log_p_BK.mean(dim=1)
    return ((1 - smoothing) * right_B + smoothing * uniform_B).mean()


def final_loss(
    logits_BK: Tensor,
    auxiliary_BK: Tensor | None,
    target_B: Tensor,
    auxiliary_weight: float,
    smoothing: float,
) -> Tensor:
    """Loss of the final networks: smoothed cross entropy plus `auxiliary_weight` (0.4) x that of the auxiliary head."""
    loss = label_smoothing_cross_entropy(logits_BK, target_B, smoothing)
    if auxiliary_BK is not None:
        loss = loss + auxiliary_weight * label_smoothing_cross_entropy(auxiliary_BK, target_B, smoothing)
    return loss
