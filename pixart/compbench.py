"""Binding scores on Shapes after T2I-CompBench (table 3): the right attributes on the right objects in the right place.

T2I-CompBench asks a question-answering network about each noun of a prompt ("a red book?") and a detector about places.
On Shapes `common.data.shapes_verifier` reads every object off the pixels, so the same questions have exact answers:

| score   | CompBench's          | share of                                                                        |
|---------|----------------------|---------------------------------------------------------------------------------|
| shape   | shape                | prompted objects for which an object of that shape is there                     |
| color   | color                | prompted objects whose shape is there in the prompted colour                    |
| texture | texture              | prompted objects whose shape is there with the prompted texture                 |
| spatial | spatial              | prompted pairs of objects that stand left/right or above/below as prompted      |
| count   | (numeracy)           | images with exactly the prompted number of objects                              |
| complex | complex              | the mean of color, shape, texture and spatial image by image                    |

An attribute counts only on an object of the right shape (that is the binding), and an object answers for one prompted
object only. `score` of the verifier is the strict companion: whole images that show exactly their prompt, per task.

Shape suffixes: N images, K object slots (unused ones have class -1), H side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from common.data.shapes import COLOURS, SHAPES, TEXTURES
from common.data.shapes_verifier import Found, read
from common.errors import UserError

SCORES = ("shape", "color", "texture", "spatial", "count", "complex")


def binding_scores(images: ArrayLike, columns: Mapping[str, Any]) -> dict[str, float]:
    """Library. The table's scores of images made for the scenes that `columns` describe, and how many were judged.

    Args:
        images: uint8 [N, 3, H, H].
        columns: of the Shapes data set, one row per image: `boxes` float [N, K, 4] (x0, y0, x1, y1), `classes`,
            `colours`, `textures` int [N, K] with -1 in unused slots.

    Returns:
        every name of SCORES in 0..1 (NaN where no image asks for it, for instance `spatial` of single objects), and
        `images`, `objects`, `pairs`: the numbers of cases behind them.

    Raises:
        UserError: a missing column, or columns and images of different length.
    """
    missing = [name for name in ("boxes", "classes", "colours", "textures") if name not in columns]
    if missing:
        raise UserError(
            f"binding scores need the columns boxes, classes, colours and textures: {missing[0]} is missing"
        )
    boxes, classes, colours, textures = (
        np.asarray(columns[name]) for name in ("boxes", "classes", "colours", "textures")
    )
    readings = read(images)
    if not len(readings) == len(boxes) == len(classes) == len(colours) == len(textures):
        raise UserError(f"{len(readings)} images but {len(classes)} rows of columns: give one row for each image")
    judged: dict[str, list[float]] = {name: [] for name in SCORES}
    for i, reading in enumerate(readings):
        slots = np.flatnonzero(classes[i] >= 0)
        wanted = [(SHAPES[classes[i, k]], COLOURS[colours[i, k]], TEXTURES[textures[i, k]]) for k in slots]
        centres = [((boxes[i, k, 0] + boxes[i, k, 2]) / 2, (boxes[i, k, 1] + boxes[i, k, 3]) / 2) for k in slots]
        found = _match(wanted, centres, reading.objects)
        answers = {
            "shape": [object is not None for object in found],
            "color": [object is not None and object.colour == want[1] for object, want in zip(found, wanted)],
            "texture": [object is not None and object.texture == want[2] for object, want in zip(found, wanted)],
            "spatial": _relations(centres, found),
        }
        for name, values in answers.items():
            judged[name].extend(map(float, values))
        judged["count"].append(float(len(reading.objects) == len(wanted)))
        if wanted:
            judged["complex"].append(float(np.mean([np.mean(values) for values in answers.values() if values])))
    scores = {name: float(np.mean(values)) if values else float("nan") for name, values in judged.items()}
    return scores | {"images": len(readings), "objects": len(judged["shape"]), "pairs": len(judged["spatial"])}


def _match(
    wanted: list[tuple[str, str, str]], centres: list[tuple[float, float]], objects: tuple[Found, ...]
) -> list[Found | None]:
    """For each prompted object the one of its shape that answers for it: colour decides first, then texture, place."""
    if not wanted or not objects:
        return [None] * len(wanted)
    fit = np.zeros((len(wanted), len(objects)))
    for row, ((shape, colour, texture), (x, y)) in enumerate(zip(wanted, centres)):
        for column, object in enumerate(objects):
            if object.shape == shape:
                near = 1 - np.hypot(object.cx - x, object.cy - y) / 2
                fit[row, column] = 1000 + 100 * (object.colour == colour) + 10 * (object.texture == texture) + near
    pairs = {int(r): int(c) for r, c in zip(*linear_sum_assignment(fit, maximize=True)) if fit[r, c] > 0}
    return [objects[pairs[row]] if row in pairs else None for row in range(len(wanted))]


def _relations(centres: list[tuple[float, float]], found: list[Found | None]) -> list[bool]:
    """For each pair of prompted objects, whether it is ordered as prompted along the axis on which it lies apart."""
    answers = []
    for a in range(len(centres)):
        for b in range(a + 1, len(centres)):
            dx, dy = centres[b][0] - centres[a][0], centres[b][1] - centres[a][1]
            first, second = found[a], found[b]
            if first is None or second is None:
                answers.append(False)
                continue
            seen_x, seen_y = second.cx - first.cx, second.cy - first.cy
            seen, across, asked = (seen_x, seen_y, dx) if abs(dx) >= abs(dy) else (seen_y, seen_x, dy)
            # As in CompBench the pair must lie along the asked axis, not only in the right order on it.
            answers.append(bool(seen * asked > 0 and abs(seen) >= 0.5 * abs(across)))
    return answers
