"""The zero-shot protocol: features to classes by text, votes of neighbours and of instances, two sets of metrics.

Shape suffixes: N Gaussians, Q points that are asked about, K classes, D width of the text space.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

IGNORED = -1
VOTERS = 25  # nearest Gaussians that a point asks (section 5.1)


def classify(features_ND: Tensor, texts_KD: Tensor, threshold: float = 0.0, ignored: int = IGNORED) -> Tensor:
    """The class [N] of the nearest text.

    Args:
        threshold: of sigmoid(cos), below which there is no class. The released 0.1 never is: a cosine's sigmoid is at
            least 0.27.
    """
    score_N, class_N = torch.sigmoid(features_ND @ texts_KD.t()).max(1)
    return torch.where(score_N < threshold, ignored, class_N)


def neighbour_vote(
    labels_N: Tensor,
    places_N3: Tensor,
    asked_Q3: Tensor,
    classes: int,
    k: int = VOTERS,
    valid_N: Tensor | None = None,
    ignored: int = IGNORED,
) -> Tensor:
    """Majority [Q] among the `k` nearest Gaussians of those in `valid_N`; ties go to the lowest class.

    Votes of Gaussians without a class do not count; a point that gets none has none. Where nobody may vote, Gaussians
    that are asked about themselves keep their classes (the released code).
    """
    voters_N = torch.ones(len(labels_N), dtype=torch.bool) if valid_N is None else valid_N
    if not bool(voters_N.any()):
        return labels_N.clone() if torch.equal(asked_Q3, places_N3) else torch.full((len(asked_Q3),), ignored)
    labels_N, places_N3 = labels_N[voters_N], places_N3[voters_N]
    k = min(k, len(labels_N))
    _, nearest = cKDTree(places_N3.double().numpy()).query(asked_Q3.double().numpy(), k)
    votes_QV = labels_N[torch.from_numpy(np.asarray(nearest).reshape(len(asked_Q3), k))]
    votes_V, asked_V = votes_QV.reshape(-1), torch.arange(len(asked_Q3)).repeat_interleave(k)
    counted = (votes_V >= 0) & (votes_V < classes) & (votes_V != ignored)
    count_Q, found_Q = _majority(votes_V[counted], asked_V[counted], len(asked_Q3), classes)
    return torch.where(count_Q > 0, found_Q, ignored)


def instance_vote(labels_Q: Tensor, instance_Q: Tensor, ignored: int = IGNORED) -> Tensor:
    """Every point gets the majority of its instance; points without an instance keep their own.

    Here "no class" is a vote like any other, as in the released code.

    Args:
        ignored: the instance of points without one.
    """
    inside = instance_Q != ignored
    names, group = instance_Q[inside].unique(return_inverse=True)
    classes, votes = labels_Q[inside].unique(return_inverse=True)
    found = labels_Q.clone()
    if len(names):
        found[inside] = classes[_majority(votes, group, len(names), len(classes))[1]][group]
    return found


def _majority(labels_V: Tensor, group_V: Tensor, groups: int, classes: int) -> tuple[Tensor, Tensor]:
    """Votes [groups] for the class that has most of them, and the class, the lowest of equals."""
    table = torch.bincount(group_V * classes + labels_V, minlength=groups * classes)
    count, found = table.view(groups, classes).max(1)
    return count, found


@dataclass
class Counts:
    """Points of each class: predicted right, predicted or true, true, and those of the true ones that got a class."""

    intersection_K: Tensor
    union_K: Tensor
    target_K: Tensor
    answered_K: Tensor

    @classmethod
    def of(cls, found_Q: Tensor, truth_Q: Tensor, classes: int, ignored: int = IGNORED) -> Counts:
        """Points without a true class do not count."""
        known = truth_Q != ignored
        found_Q, truth_Q = found_Q[known], truth_Q[known]
        right = torch.bincount(truth_Q[found_Q == truth_Q], minlength=classes)
        target = torch.bincount(truth_Q, minlength=classes)
        given = found_Q != ignored
        answered = torch.bincount(truth_Q[given], minlength=classes)
        return cls(right, torch.bincount(found_Q[given], minlength=classes) + target - right, target, answered)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.intersection_K + other.intersection_K,
            self.union_K + other.union_K,
            self.target_K + other.target_K,
            self.answered_K + other.answered_K,
        )

    def metrics(self, excluded: Collection[int] = (), present_only: bool = False) -> dict[str, float]:
        """Shares of 1: `miou`, `macc`, `f_miou`, `f_macc` (without the excluded classes) and `accuracy`.

        Args:
            present_only: average over the classes that occur, and leave points that got no class out of the
                accuracies (the hook of the released training); else IoU is averaged over all classes that were
                predicted or occur (the released tester). The two differ by many points.
        """
        inside = torch.ones(len(self.target_K), dtype=torch.bool)
        inside[list(excluded)] = False
        occurs = self.target_K > 0
        counted = occurs if present_only else self.union_K > 0
        iou = self.intersection_K / self.union_K.clamp(min=1)
        asked = self.answered_K if present_only else self.target_K
        accuracy = self.intersection_K / asked.clamp(min=1)
        return {
            "miou": _mean(iou[counted]),
            "macc": _mean(accuracy[occurs]),
            "f_miou": _mean(iou[counted & inside]),
            "f_macc": _mean(accuracy[occurs & inside]),
            "accuracy": float(self.intersection_K.sum() / asked.sum().clamp(min=1)),
        }


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def excluded_classes(names: Sequence[str], excluded: Collection[str]) -> list[int]:
    """Numbers of the classes that f-mIoU leaves out."""
    return [number for number, name in enumerate(names) if name in excluded]
