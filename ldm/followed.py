"""Whether drawn pictures show what their condition asks for: boxes, label maps and classes.

Every share stands beside that of the true pictures (`real`): the most that the reader of pictures can find.

Shape suffixes: N pictures, K slots for objects, H, W sides in pixels, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from common.data.shapes_verifier import FOREGROUND_DISTANCE, colour_in_boxes, objects_in_boxes
from common.metrics.features import Extractor, extract
from ldm.streaming import ShardStream

if TYPE_CHECKING:
    from ldm.config import LdmConfig
    from ldm.tasks import Task

PROBED = 4000  # training pictures that the probe of classes learns from


def followed(
    task: Task, config: LdmConfig, columns: dict[str, Tensor], fake: Tensor, real: Tensor, judge: Extractor
) -> dict[str, float]:
    """Shares of the conditions that the pictures show.

    Args:
        columns: the conditions, in the pictures' order.
        fake, real: uint8 [N, 3, H, W], drawn and true.

    Returns:
        Layouts of Shapes: `object_in_box` (a box holds its shape in its colour), `colour_in_box`. Label maps of Shapes:
        `object_in_map`, `map_overlap` (intersection over union of what is no background). Classes: `class_right`, by a
        linear probe of the judge's features. Each also with `_real`. Nothing for other tasks and data.
    """
    if task.name == "class":
        if isinstance(task.train, ShardStream):
            return {}
        rows = torch.linspace(0, len(task.train) - 1, min(len(task.train), PROBED)).long().tolist()
        known = task.train.__getitems__(rows)
        if len(known["label"].unique()) < 2:
            return {}
        probe = ClassProbe(extract(known["image"], judge), known["label"])
        return {
            "class_right": probe.right(extract(fake, judge), columns["label"]),
            "class_right_real": probe.right(extract(real, judge), columns["label"]),
        }
    result: dict[str, float] = {}
    for images, suffix in ((fake, ""), (real, "_real")):
        if task.name == "layout" and config.data.name == "shapes":
            boxes, classes, colours = columns["boxes"], columns["classes"], columns["colours"]
            result[f"object_in_box{suffix}"] = float(np.nanmean(objects_in_boxes(images, boxes, classes, colours)))
            result[f"colour_in_box{suffix}"] = float(np.nanmean(colour_in_boxes(images, boxes, colours)))
        elif task.name == "semantic" and config.data.name == "shapes":
            regions, shapes = boxes_of_maps(columns["label_map"])
            result[f"object_in_map{suffix}"] = float(np.nanmean(objects_in_boxes(images, regions, shapes)))
            result[f"map_overlap{suffix}"] = map_overlap(images, columns["label_map"])
    return result


class ClassProbe:
    """A linear classifier of a judge's features [N, D], to tell the class of drawn pictures."""

    def __init__(self, features_ND: Tensor, labels_N: Tensor) -> None:
        self.mean, self.spread = features_ND.mean(0), features_ND.std(0) + 1e-6
        self.probe = LogisticRegression(max_iter=300, C=0.1)
        self.probe.fit(self._scaled(features_ND), labels_N.numpy())

    def _scaled(self, features_ND: Tensor) -> NDArray[np.float32]:
        return ((features_ND - self.mean) / self.spread).numpy()

    def right(self, features_ND: Tensor, labels_N: Tensor) -> float:
        """Share of the pictures that the probe sees in their class."""
        return float((self.probe.predict(self._scaled(features_ND)) == labels_N.numpy()).mean())


def boxes_of_maps(maps_NHW: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Boxes [N, K, 4] (x0, y0, x1, y1), as fractions, and shapes [N, K] (-1: unused) of label maps' regions."""
    side = maps_NHW.shape[-1]
    regions: list[list[tuple[list[float], int]]] = []
    for map_HW in maps_NHW.numpy():
        found = []
        for label in np.unique(map_HW[map_HW > 0]).tolist():
            numbered, _ = ndimage.label(map_HW == label, structure=np.ones((3, 3)))
            for rows, columns in ndimage.find_objects(numbered):
                box = [columns.start / side, rows.start / side, columns.stop / side, rows.stop / side]
                found.append((box, label - 1))
        regions.append(found)
    slots = max(1, *(len(found) for found in regions))
    boxes = np.zeros((len(regions), slots, 4))
    classes = np.full((len(regions), slots), -1, np.int64)
    for n, found in enumerate(regions):
        for k, (box, shape) in enumerate(found):
            boxes[n, k], classes[n, k] = box, shape
    return boxes, classes


def foreground(images: Tensor) -> Tensor:
    """Pixels that are no background, bool [N, H, W]: more than 60 (L1, of 765) from the border's median colour."""
    x = images.float()
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], dim=-1)
    background = border.median(dim=-1).values[..., None, None]
    return (x - background).abs().sum(1) > FOREGROUND_DISTANCE


def map_overlap(images: Tensor, maps_NHW: Tensor) -> float:
    """Intersection over union of the drawn objects with the map's (mean over images)."""
    drawn, wanted = foreground(images), maps_NHW > 0
    union = (drawn | wanted).sum((1, 2)).clamp(min=1)
    return float(((drawn & wanted).sum((1, 2)) / union).mean())
