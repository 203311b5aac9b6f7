"""How good predictions are: average precision as COCO defines it, mean IoU, share of right keypoints.

COCO's numbers come from faster-coco-eval (extra `transfer`). Shape suffixes: N objects, P keypoints, K classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

OKS_SIGMA = 0.05  # of every keypoint: between COCO's eyes (0.025) and hips (0.107)
PCK_SHARE = 0.1  # of the longer side of an object's box
INSTALL = "make setup EXTRAS=dev,transfer installs it"


def installed() -> bool:
    """Whether COCO's numbers can be computed."""
    return importlib.util.find_spec("faster_coco_eval") is not None


def check_installed() -> None:
    """Raise UserError where it is missing: before anything is trained."""
    if not installed():
        raise UserError(f"faster-coco-eval, which computes COCO's average precision, is missing; {INSTALL}")


@dataclass(frozen=True)
class Found:
    """Objects in one picture.

    Attributes:
        boxes_N4: x0 y0 x1 y1 in pixels. labels_N: classes from 0 on.
        scores_N: how sure they are; None for the truth.
    """

    boxes_N4: Tensor
    labels_N: Tensor
    scores_N: Tensor | None = None


def _evaluated(truth: dict[str, Any], found: list[dict[str, Any]], kind: str, **options: Any) -> list[float]:
    """COCO's summary of detections (annotations as in its files)."""
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: object) -> None:
        return None

    known = COCO(truth, print_function=silent)
    evaluation = COCOeval_faster(known, known.loadRes(found), kind, print_function=silent, **options)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def _annotation(number: int, picture: int, label: int, box: Sequence[float]) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    area = {"area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
    return {"id": number, "image_id": picture, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], **area}


def box_precision(found: Sequence[Found], truth: Sequence[Found], classes: Sequence[str]) -> dict[str, float]:
    """COCO's `ap` (IoU 0.50 to 0.95), `ap50`, `ap75`, and `ar` with at most 100 boxes a picture, all 0..1."""
    number = 0
    listed: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    for picture, (theirs, ours) in enumerate(zip(truth, found, strict=True)):
        for box, label in zip(theirs.boxes_N4.tolist(), theirs.labels_N.tolist()):
            number += 1
            listed.append(_annotation(number, picture, label, box))
        assert ours.scores_N is not None
        for box, label, score in zip(ours.boxes_N4.tolist(), ours.labels_N.tolist(), ours.scores_N.tolist()):
            guesses.append({**_annotation(len(guesses) + 1, picture, label, box), "score": score})
    if not guesses:
        return dict.fromkeys(("ap", "ap50", "ap75", "ar"), 0.0)
    stats = _evaluated(_file(len(truth), classes, listed), guesses, "bbox")
    return {"ap": max(stats[0], 0.0), "ap50": max(stats[1], 0.0), "ap75": max(stats[2], 0.0), "ar": max(stats[8], 0.0)}


def _file(pictures: int, classes: Sequence[str], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    images = [{"id": picture, "height": 1, "width": 1} for picture in range(pictures)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return {"images": images, "categories": categories, "annotations": annotations, "info": {}}


def keypoint_precision(found_NP2: Tensor, scores_N: Tensor, truth_NP3: Tensor, extents_N2: Tensor) -> dict[str, float]:
    """COCO's `ap`, `ap50`, `ap75` and `ar` by object keypoint similarity, one object a crop, all 0..1.

    Args:
        found_NP2: predicted points in pixels. scores_N: how sure they are.
        truth_NP3: x, y in pixels, and 1 where there is such a point.
        extents_N2: sides of the objects' boxes in pixels: their product is the area that the similarity asks for.
    """
    listed, guesses = [], []
    for number, (ours, theirs, extent) in enumerate(zip(found_NP2, truth_NP3, extents_N2)):
        box = [0.0, 0.0, *extent.tolist()]
        base = _annotation(number + 1, number, 0, box)
        seen = torch.cat([theirs[:, :2], 2 * theirs[:, 2:]], 1)
        listed.append({**base, "keypoints": seen.flatten().tolist(), "num_keypoints": int(theirs[:, 2].sum())})
        guess = torch.cat([ours, torch.full_like(ours[:, :1], 2)], 1)
        guesses.append({**base, "keypoints": guess.flatten().tolist(), "score": float(scores_N[number])})
    sigmas = [OKS_SIGMA] * truth_NP3.shape[1]
    stats = _evaluated(_file(len(listed), ["object"], listed), guesses, "keypoints", kpt_oks_sigmas=sigmas)
    return {"ap": max(stats[0], 0.0), "ap50": max(stats[1], 0.0), "ap75": max(stats[2], 0.0), "ar": max(stats[5], 0.0)}


def right_points(found_NP2: Tensor, truth_NP3: Tensor, extents_N2: Tensor) -> float:
    """PCK: share of the points that lie within a tenth of the longer side of their object's box."""
    distance_NP = (found_NP2 - truth_NP3[..., :2]).norm(dim=-1)
    near_NP = distance_NP <= PCK_SHARE * extents_N2.amax(1, keepdim=True)
    there_NP = truth_NP3[..., 2] > 0
    return float((near_NP & there_NP).sum() / there_NP.sum().clamp_min(1))


def confusion(found: Tensor, truth: Tensor, classes: int) -> Tensor:
    """How often (row: true class, column: predicted one), int64 [K, K]."""
    pairs = truth.flatten() * classes + found.flatten()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def mean_iou(confusion_KK: Tensor) -> tuple[float, list[float | None]]:
    """Mean over the classes that there are of true positives over all that are true or predicted; None for others."""
    hit_K = confusion_KK.diagonal().double()
    union_K = confusion_KK.sum(0) + confusion_KK.sum(1) - confusion_KK.diagonal()
    there_K = confusion_KK.sum(1) > 0
    each = [float(hit / union) if there else None for hit, union, there in zip(hit_K, union_K, there_K)]
    known = [value for value in each if value is not None]
    return sum(known) / max(len(known), 1), each
