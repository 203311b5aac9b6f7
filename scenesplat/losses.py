"""What pre-training asks of predicted features (section 3.3): to be the text features of what is seen there.

Shape suffixes: N Gaussians, V of them with a target, D width of the text space, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scenesplat.config import LossConfig

LEAST = 100  # Gaussians of a class in a batch, below which it has no part in the contrastive loss (released code)


def cosine_loss(pred_VD: Tensor, target_VD: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or sum) of 1 - cos; of none it is 0."""
    return _reduced(1 - F.cosine_similarity(pred_VD, target_VD, dim=1), reduction)


def l2_loss(pred_VD: Tensor, target_VD: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or sum) of squared distances; of none it is 0, of unit vectors twice the cosine loss."""
    return _reduced((pred_VD - target_VD).square().sum(1), reduction)


def _reduced(values_V: Tensor, reduction: str) -> Tensor:
    return values_V.sum() if reduction == "sum" else values_V.sum() / max(1, len(values_V))


def halves_of(
    segment_V: Tensor, permute: Callable[[int], Tensor], least: int = LEAST
) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """Classes with enough Gaussians, and the two random halves of each.

    Args:
        segment_V: class of each Gaussian, negative for none.
        permute: n -> a permutation of n.
    """
    classes = [int(k) for k in segment_V.unique() if k >= 0]
    members = {k: (segment_V == k).nonzero().squeeze(1) for k in classes}
    classes = [k for k in classes if len(members[k]) >= least]
    halves = []
    for k in classes:
        mixed = members[k][permute(len(members[k])).to(segment_V.device)]
        halves.append((mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]))
    return classes, halves


def contrastive_loss(
    pred_VD: Tensor, halves: Sequence[tuple[Tensor, Tensor]], temperature: float = 0.2, reduction: str = "mean"
) -> Tensor:
    """Aggregated contrastive loss: the two halves of a class resemble each other more than other classes' halves.

    Unit features are summed over each half; symmetric cross-entropy of their cosines over the temperature.
    """
    if not halves:
        return pred_VD.sum() * 0
    a_KD, b_KD = (F.normalize(torch.stack([pred_VD[half[i]].sum(0) for half in halves]), dim=1) for i in (0, 1))
    logits_KK = a_KD @ b_KD.t() / temperature
    right_K = torch.arange(len(halves), device=pred_VD.device)
    sides = (F.cross_entropy(logits, right_K, reduction=reduction) for logits in (logits_KK, logits_KK.t()))
    return sum(sides, start=logits_KK.new_zeros(())) / 2


def is_active(schedule: str, progress: float) -> bool:
    """Whether the contrastive loss counts at this share of the training: `all`, `skip` (never) or `last_N` percent."""
    if schedule in ("all", "skip"):
        return schedule == "all"
    return progress > 1 - float(schedule.removeprefix("last_")) / 100


def language_losses(
    pred_VD: Tensor,
    target_VD: Tensor,
    segment_V: Tensor,
    options: LossConfig,
    progress: float,
    permute: Callable[[int], Tensor],
) -> dict[str, Tensor]:
    """Each loss by its name, and `loss`, their weighted sum.

    Args:
        pred_VD, target_VD: unit rows of the Gaussians that have a target.
        segment_V: class of each, negative for none.
        progress: share of the training that is over.
        permute: n -> a permutation of n.
    """
    if not len(pred_VD):  # a batch without a target
        nothing = pred_VD.sum()
        return dict.fromkeys(("loss", "cosine", "l2", "contrastive"), nothing)
    found = {"cosine": cosine_loss(pred_VD, target_VD), "l2": l2_loss(pred_VD, target_VD)}
    found["contrastive"] = pred_VD.sum() * 0
    if options.contrastive and is_active(options.schedule, progress):
        _, halves = halves_of(segment_V, permute, options.least)
        found["contrastive"] = contrastive_loss(pred_VD, halves, options.temperature)
    total = sum((getattr(options, name) * value for name, value in found.items()), start=pred_VD.new_zeros(()))
    return {"loss": total, **found}


def lovasz_loss(probability_NK: Tensor, segment_N: Tensor) -> Tensor:
    """Lovasz-softmax over the classes that occur (Berman et al. 2018): a convex stand-in of 1 - mIoU; of none 0."""
    if not len(segment_N):
        return probability_NK.sum()
    losses = []
    for k in segment_N.unique().tolist():
        truth = (segment_N == k).to(probability_NK.dtype)
        error, order = (truth - probability_NK[:, k]).abs().sort(descending=True)
        truth = truth[order]
        intersection, union = truth.sum() - truth.cumsum(0), truth.sum() + (1 - truth).cumsum(0)
        jaccard = 1 - intersection / union
        losses.append((error * torch.diff(jaccard, prepend=jaccard.new_zeros(1))).sum())
    return torch.stack(losses).mean()
