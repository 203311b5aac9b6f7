"""Tells what a Shapes image shows, and so whether a generated image satisfies its prompt.

    accepted = verify(images, specs)            # bool [N]
    print(score(images, specs)["mean"])         # GenEval-S: mean of the per-task accuracies
    print(free_attribute_entropy(images))       # 1 = as diverse as the data, 0 = collapsed

The reading is deterministic: background = median of the image border; pixels further than 60 (L1) from it form
8-connected components; colour = the palette entry whose two tones (or their blends) explain the component's strong
pixels best; shape = a tiny MLP on the component's 14x14 normalised coverage; texture = sign of the autocorrelation of
the tone half a period away. An image is accepted if it shows exactly the objects of the specification, with their
colours, number and relation (or grid cells).

The MLP (50 kB) lies beside this file as `shapes_verifier.safetensors`; `python -m common.data.shapes_verifier` trains
it again from renders (about half a minute on one core).

Shape suffixes: N images, H, W side in pixels, M components, P foreground pixels, C palette colours, F features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load_file, save_file
from scipy import ndimage

from common.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    EXTENTS,
    GRID_TASKS,
    PALETTE,
    RADII,
    SHAPES,
    TASKS,
    TEXTURE_PERIOD,
    TEXTURES,
    Shapes,
    Spec,
    Split,
)
from common.errors import UserError, stop_if_not_finite

WEIGHTS = Path(__file__).with_name("shapes_verifier.safetensors")

FOREGROUND_DISTANCE = 60.0  # L1 over RGB
MIN_AREA = 6 / 32**2  # smaller components are specks, in fractions of the image
GRID = 14  # side of the normalised coverage map

_TONES_C23 = np.asarray([PALETTE[c] for c in COLOURS], np.float32)
_BACKGROUNDS_B3 = np.asarray(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Found:
    """A component as the verifier reads it; lengths are fractions of the image side, `area` of the image."""

    shape: str
    colour: str
    texture: str
    cx: float
    cy: float
    radius: float
    area: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Reading:
    """What one image shows: its objects, largest first, and the nearest named background."""

    background: str
    objects: tuple[Found, ...]


@dataclass(frozen=True)
class _Components:
    """Components of a batch, before any of them is named."""

    image_M: NDArray[np.int64]
    box_M4: NDArray[np.int64]  # x0, y0, x1, y1 in pixels, upper ends exclusive
    area_M: NDArray[np.int64]
    features_MF: NDArray[np.float32]
    colour_M: NDArray[np.int64]
    texture_M: NDArray[np.int64]


def _as_batch(images: ArrayLike) -> NDArray[np.uint8]:
    """Images as uint8 [N, 3, H, W]; one image [3, H, W] becomes a batch of one."""
    batch = np.asarray(images)
    if batch.ndim == 3:
        batch = batch[None]
    if batch.ndim != 4 or batch.shape[1] != 3 or batch.shape[2] != batch.shape[3] or batch.dtype != np.uint8:
        raise UserError(
            f"the verifier reads square uint8 images [N, 3, H, W] with values 0-255; got {batch.dtype} "
            f"{list(batch.shape)}: convert with (x * 255).round().clamp(0, 255).to(torch.uint8)"
        )
    return batch


def _border_median(pixels_NHW3: NDArray[np.float32]) -> NDArray[np.float32]:
    """Background colour [N, 3]: median of the outermost pixels, of which objects cover less than half."""
    n = len(pixels_NHW3)
    edges = [pixels_NHW3[:, 0], pixels_NHW3[:, -1], pixels_NHW3[:, 1:-1, 0], pixels_NHW3[:, 1:-1, -1]]
    return np.median(np.concatenate([e.reshape(n, -1, 3) for e in edges], axis=1), axis=1).astype(np.float32)


def _coverage_maps(
    distance_NHW: NDArray[np.float32],
    labels_NHW: NDArray[np.int64],
    image_M: NDArray[np.int64],
    label_M: NDArray[np.int64],
    box_M4: NDArray[np.int64],
    strength_M: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Each component's estimated coverage on a 14x14 grid over a square around its box, aspect kept; [M, 196].

    Coverage is the distance to the background over 0.6 of the component's mean distance, at most 1, so that both tones
    of a textured object count as covered; pixels of other components count as background.
    """
    side = distance_NHW.shape[1]
    x0, y0, x1, y1 = box_M4.T.astype(np.float32)
    span_M = np.maximum(x1 - x0, y1 - y0) + 1.0  # one pixel more, for the soft edge
    steps_G = ((np.arange(GRID) + 0.5) / GRID - 0.5).astype(np.float32)
    x_MG = (x0 + x1)[:, None] / 2 - 0.5 + span_M[:, None] * steps_G
    y_MG = (y0 + y1)[:, None] / 2 - 0.5 + span_M[:, None] * steps_G

    total = np.zeros((len(image_M), GRID, GRID), np.float32)
    n = image_M[:, None, None]
    x_floor, y_floor = np.floor(x_MG).astype(np.int64), np.floor(y_MG).astype(np.int64)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = (x_floor + dx)[:, None, :], (y_floor + dy)[:, :, None]
            weight = (1 - np.abs(x - x_MG[:, None, :])) * (1 - np.abs(y - y_MG[:, :, None]))
            inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
            xc, yc = x.clip(0, side - 1), y.clip(0, side - 1)
            own = labels_NHW[n, yc, xc]
            own = (own == 0) | (own == label_M[:, None, None])
            alpha = np.minimum(distance_NHW[n, yc, xc] / (0.6 * strength_M[:, None, None]), 1)
            total += weight * alpha * (inside & own)
    return total.reshape(len(image_M), GRID * GRID)


def _palette_distances(pixels_P3: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean distance [C, P] of each pixel to the segment between the two tones of each palette entry."""
    distance_CP = np.empty((len(_TONES_C23), len(pixels_P3)), np.float32)
    for c, (first, second) in enumerate(_TONES_C23):
        axis = second - first
        t_P = ((pixels_P3 - first) @ axis / (axis @ axis)).clip(0, 1)
        distance_CP[c] = np.sqrt(((pixels_P3 - first - t_P[:, None] * axis) ** 2).sum(1))
    return distance_CP


def _colours(
    pixels_P3: NDArray[np.float32], weight_P: NDArray[np.float32], component_P: NDArray[np.int64], m: int
) -> NDArray[np.int64]:
    """Palette index [M] with the least weighted mean distance from the component's pixels to its two tones' segment."""
    cost_CM = [
        np.bincount(component_P, weight_P * distance_P, minlength=m) for distance_P in _palette_distances(pixels_P3)
    ]
    return np.stack(cost_CM).argmin(0)


def _textures(
    pixels_NHW3: NDArray[np.float32],
    weight_NHW: NDArray[np.float32],
    component_NHW: NDArray[np.int64],
    colour_M: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Texture index [M] from the tone's correlation half a period away.

    The tone t runs from 0 (first) to 1 (second). Stripes: t turns over vertically and stays horizontally; checks: it
    turns over in both directions; solid: it does not turn over at all.
    """
    m, side = len(colour_M), component_NHW.shape[1]
    member = component_NHW >= 0
    colour_NHW = colour_M[np.where(member, component_NHW, 0)]
    first, second = _TONES_C23[:, 0][colour_NHW], _TONES_C23[:, 1][colour_NHW]
    axis = second - first
    t_NHW = (((pixels_NHW3 - first) * axis).sum(-1) / (axis * axis).sum(-1)).clip(-0.25, 1.25)

    def mean(values: NDArray[Any], weights: NDArray[Any], where: NDArray[Any]) -> NDArray[np.float64]:
        total = np.bincount(where, weights * values, minlength=m)
        return total / np.maximum(np.bincount(where, weights, minlength=m), 1e-9)

    centre_M = mean(t_NHW[member], weight_NHW[member], component_NHW[member])
    t_NHW = np.where(member, t_NHW - centre_M[np.where(member, component_NHW, 0)], 0)
    shift = round(max(TEXTURE_PERIOD * side, 4) / 2)

    def correlation(axis: int) -> NDArray[np.float64]:
        low = (slice(None),) * axis + (slice(None, -shift),)
        high = (slice(None),) * axis + (slice(shift, None),)
        same = (component_NHW[low] == component_NHW[high]) & member[low]
        return mean(
            (t_NHW[low] * t_NHW[high])[same], (weight_NHW[low] * weight_NHW[high])[same], component_NHW[low][same]
        )

    vertical_M, horizontal_M = correlation(1), correlation(2)
    return np.where(vertical_M < -0.015, np.where(horizontal_M > 0, 1, 2), 0)


def _components(batch_N3HW: NDArray[np.uint8]) -> tuple[_Components, NDArray[np.int64]]:
    """Components of a batch with colour, texture and shape features, and the background index of each image."""
    pixels_NHW3 = batch_N3HW.transpose(0, 2, 3, 1).astype(np.float32)
    side = pixels_NHW3.shape[1]
    background_N3 = _border_median(pixels_NHW3)
    background_N = ((background_N3[:, None] - _BACKGROUNDS_B3) ** 2).sum(-1).argmin(1)
    distance_NHW = np.abs(pixels_NHW3 - background_N3[:, None, None]).sum(-1)

    neighbours = np.zeros((3, 3, 3), bool)
    neighbours[1] = True  # 8-connected within an image, never across images
    labels_NHW, count = ndimage.label(distance_NHW > FOREGROUND_DISTANCE, structure=neighbours)
    labels_NHW = np.asarray(labels_NHW, np.int64)
    area = np.bincount(labels_NHW.ravel(), minlength=count + 1)
    kept = np.flatnonzero(area[1:] >= MIN_AREA * side * side) + 1
    slices = ndimage.find_objects(labels_NHW)
    image_M = np.asarray([slices[k - 1][0].start for k in kept], np.int64)
    box_M4 = np.asarray(
        [(s[2].start, s[1].start, s[2].stop, s[1].stop) for s in (slices[k - 1] for k in kept)], np.int64
    ).reshape(-1, 4)

    m = len(kept)
    component_of_label = np.full(count + 1, -1, np.int64)
    component_of_label[kept] = np.arange(m)
    component_NHW = component_of_label[labels_NHW]
    member = component_NHW >= 0
    component_P, distance_P = component_NHW[member], distance_NHW[member]
    strength_M = (np.bincount(component_P, distance_P, minlength=m) / area[kept]).astype(np.float32)
    # Pixels at the soft edge are blends with the background: they hardly count.
    weight_NHW = np.zeros_like(distance_NHW)
    weight_NHW[member] = np.minimum(distance_P / strength_M[component_P], 1) ** 4
    colour_M = _colours(pixels_NHW3[member], weight_NHW[member], component_P, m)
    if m == 0:
        texture_M = np.zeros(0, np.int64)
    else:
        texture_M = _textures(pixels_NHW3, weight_NHW, component_NHW, colour_M)
    features_MF = _coverage_maps(distance_NHW, labels_NHW, image_M, kept, box_M4, strength_M)
    return _Components(image_M, box_M4, area[kept], features_MF, colour_M, texture_M), background_N


@cache
def _weights() -> dict[str, NDArray[np.float32]]:
    return load_file(WEIGHTS)


def _classify(features_MF: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index into SHAPES [M]: one hidden layer of 48 ReLU units."""
    w = _weights()
    hidden = np.maximum(features_MF @ w["hidden.weight"].T + w["hidden.bias"], 0)
    return (hidden @ w["out.weight"].T + w["out.bias"]).argmax(1)


def _shape_scale(shape: str) -> float:
    """Half the longer side of the shape's box in units of its radius."""
    x0, y0, x1, y1 = EXTENTS[shape]
    return max(x1 - x0, y1 - y0) / 2


def read(images: ArrayLike) -> list[Reading]:
    """What each image shows.

    Args:
        images: uint8 [N, 3, H, H] or one image [3, H, H].
    """
    batch = _as_batch(images)
    side = batch.shape[2]
    found: list[list[Found]] = [[] for _ in batch]
    components, background_N = _components(batch)
    shapes_M = _classify(components.features_MF)
    for k, image in enumerate(components.image_M):
        x0, y0, x1, y1 = (components.box_M4[k] / side).tolist()
        shape = SHAPES[shapes_M[k]]
        # The box holds every touched pixel, on average half a pixel more than the object on both sides together.
        half = (max(x1 - x0, y1 - y0) - 0.5 / side) / 2
        found[image].append(
            Found(
                shape=shape,
                colour=COLOURS[components.colour_M[k]],
                texture=TEXTURES[components.texture_M[k]],
                cx=(x0 + x1) / 2,
                cy=(y0 + y1) / 2,
                radius=half / _shape_scale(shape),
                area=float(components.area_M[k]) / side**2,
                box=(x0, y0, x1, y1),
            )
        )
    names = tuple(BACKGROUNDS)
    return [
        Reading(names[b], tuple(sorted(objects, key=lambda o: -o.area)))
        for b, objects in zip(background_N.tolist(), found)
    ]


def _stands(first: Found, relation: str, second: Found) -> bool:
    """Whether `first` is more `relation` of `second` than it is in any other direction."""
    dx, dy = second.cx - first.cx, second.cy - first.cy
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return (along if relation in ("left of", "above") else -along) > abs(across)


def satisfies(reading: Reading, spec: Spec) -> bool:
    """Whether a reading shows exactly what the specification asks for."""

    def wanted_and_seen() -> tuple[list[Any], list[Any]]:
        if spec.cells is not None:
            n = int(spec.task[-1])
            cells = [(min(int(o.cy * n), n - 1), min(int(o.cx * n), n - 1)) for o in reading.objects]
            return (
                [(*o, cell) for o, cell in zip(spec.objects, spec.cells)],
                [(o.colour, o.shape, cell) for o, cell in zip(reading.objects, cells)],
            )
        if any(colour is None for colour, _ in spec.objects):
            return [shape for _, shape in spec.objects], [o.shape for o in reading.objects]
        return list(spec.objects), [(o.colour, o.shape) for o in reading.objects]

    wanted, seen = wanted_and_seen()
    if sorted(wanted) != sorted(seen):
        return False
    if spec.relation is None:
        return True
    first, second = reading.objects
    if (first.colour, first.shape) != spec.objects[0]:
        first, second = second, first
    return _stands(first, spec.relation, second)


def verify(images: ArrayLike, specs: Spec | Sequence[Spec]) -> NDArray[np.bool_]:
    """Which images satisfy their specifications.

    Args:
        images: uint8 [N, 3, H, H], or one image [3, H, H].
        specs: one for each image, or a single one for all.

    Returns:
        bool [N].
    """
    batch = _as_batch(images)
    if isinstance(specs, Spec):
        specs = [specs] * len(batch)
    if len(specs) != len(batch):
        raise UserError(f"{len(batch)} images but {len(specs)} specifications: give one for each image")
    return np.asarray([satisfies(reading, spec) for reading, spec in zip(read(batch), specs)], bool)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's binomial interval (95 % by default) for `successes` of n >= 1 trials."""
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def score(images: ArrayLike, specs: Sequence[Spec]) -> dict[str, float]:
    """Accuracy per task and their mean, with 95 % intervals.

    Returns:
        For every task present `task`, `task_low`, `task_high` (Wilson); `mean` is the GenEval-S score, the plain mean
        of the tasks, with `mean_low` and `mean_high` from the normal approximation over the tasks' variances.
    """
    accepted = verify(images, specs)
    result: dict[str, float] = {}
    means, variance = [], 0.0
    for task in TASKS + GRID_TASKS:
        of_task = accepted[[spec.task == task for spec in specs]]
        if not len(of_task):
            continue
        p = float(of_task.mean())
        low, high = wilson_interval(int(of_task.sum()), len(of_task))
        result |= {task: p, f"{task}_low": low, f"{task}_high": high}
        means.append(p)
        variance += p * (1 - p) / len(of_task)
    if not means:
        raise UserError("no images to score")
    mean = sum(means) / len(means)
    half = 1.96 * math.sqrt(variance) / len(means)
    return result | {"mean": mean, "mean_low": max(mean - half, 0.0), "mean_high": min(mean + half, 1.0)}


def colour_in_boxes(images: ArrayLike, boxes: ArrayLike, colours: ArrayLike) -> NDArray[np.float64]:
    """Layout check without components: does the box hold its colour?

    In each box the 40 % of pixels furthest from the background vote: the palette entry nearest to them on average is
    the box's colour, unless they lie within 60 (L1) of the background, when the box is empty.

    Args:
        images: uint8 [N, 3, H, H].
        boxes: [N, K, 4] (x0, y0, x1, y1) as fractions of the side.
        colours: int [N, K], indices into COLOURS, negative for unused slots.

    Returns:
        [N, K]: 1 where the box shows its colour, 0 where not, NaN for unused slots; `nanmean` is the accuracy.
    """
    batch = _as_batch(images)
    pixels_NHW3 = batch.transpose(0, 2, 3, 1).astype(np.float32)
    background_N3 = _border_median(pixels_NHW3)
    side = batch.shape[2]
    boxes_NK4, colours_NK = np.asarray(boxes, np.float64), np.asarray(colours, np.int64)
    hits = np.full(colours_NK.shape, np.nan)
    for n, k in np.argwhere(colours_NK >= 0):
        x0, y0 = np.floor(boxes_NK4[n, k, :2] * side + 0.5).astype(int).clip(0, side - 1)
        x1, y1 = np.floor(boxes_NK4[n, k, 2:] * side + 0.5).astype(int).clip(1, side)
        crop = pixels_NHW3[n, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].reshape(-1, 3)
        strength = np.abs(crop - background_N3[n]).sum(1)
        strong = np.argsort(strength)[-max(1, int(0.4 * len(crop))) :]
        empty = np.median(strength[strong]) <= FOREGROUND_DISTANCE
        hits[n, k] = not empty and _palette_distances(crop[strong]).mean(1).argmin() == colours_NK[n, k]
    return hits


def objects_in_boxes(
    images: ArrayLike, boxes: ArrayLike, classes: ArrayLike, colours: ArrayLike | None = None, overlap: float = 0.5
) -> NDArray[np.float64]:
    """Layout check by reading: does an object of the box's class, and colour, fill the box?

    Args:
        images: uint8 [N, 3, H, H].
        boxes: [N, K, 4] (x0, y0, x1, y1) as fractions of the side.
        classes: int [N, K], indices into SHAPES, negative for unused slots.
        colours: int [N, K], indices into COLOURS; None takes any.
        overlap: least intersection over union of the object's box with the slot's.

    Returns:
        [N, K]: 1 where the object is found, 0 where not, NaN for unused slots; `nanmean` is the accuracy.
    """
    boxes_NK4, classes_NK = np.asarray(boxes, np.float64), np.asarray(classes, np.int64)
    colours_NK = None if colours is None else np.asarray(colours, np.int64)
    readings = read(images)
    hits = np.full(classes_NK.shape, np.nan)
    for n, k in np.argwhere(classes_NK >= 0):
        shape = SHAPES[classes_NK[n, k]]
        colour = None if colours_NK is None else COLOURS[colours_NK[n, k]]
        hits[n, k] = any(
            found.shape == shape
            and colour in (None, found.colour)
            and _box_overlap(found.box, boxes_NK4[n, k]) >= overlap
            for found in readings[n].objects
        )
    return hits


def _box_overlap(first: Sequence[float], second: NDArray[np.float64]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = float(np.prod((high - low).clip(0)))
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (first, second)]
    return shared / max(sum(areas) - shared, 1e-9)


def read_attributes(images: ArrayLike) -> list[dict[str, Any] | None]:
    """Free attributes of the main (largest) object of each image: shape, colour, texture, background, cx, cy, radius.

    None for an image without any object.
    """
    names = ("shape", "colour", "texture", "cx", "cy", "radius")
    return [
        {**{name: getattr(reading.objects[0], name) for name in names}, "background": reading.background}
        if reading.objects
        else None
        for reading in read(images)
    ]


def free_attribute_entropy(images: ArrayLike) -> dict[str, float]:
    """Normalised entropy (0 = always the same, 1 = uniform) of each free attribute over a set of images.

    Measure it on images of one prompt, or of one task, from many noise seeds, beside the value of real data: `texture`
    (3 bins), `background` (6), `colour` (10), `position` (thirds of x by thirds of y), `size` (thirds of the radii of
    `single`). Images without any object are left out; `empty` is their share.
    """
    everything = read_attributes(images)
    seen = [a for a in everything if a is not None]
    low, high = RADII["single"]
    binned = {
        "texture": ([TEXTURES.index(a["texture"]) for a in seen], len(TEXTURES)),
        "background": ([list(BACKGROUNDS).index(a["background"]) for a in seen], len(BACKGROUNDS)),
        "colour": ([COLOURS.index(a["colour"]) for a in seen], len(COLOURS)),
        "position": ([3 * min(int(3 * a["cy"]), 2) + min(int(3 * a["cx"]), 2) for a in seen], 9),
        "size": ([min(max(int(3 * (a["radius"] - low) / (high - low)), 0), 2) for a in seen], 3),
    }
    result = {}
    for name, (values, bins) in binned.items():
        share = np.bincount(np.asarray(values, np.int64), minlength=bins) / max(len(seen), 1)
        share = share[share > 0]
        result[name] = float(-(share * np.log(share)).sum() / math.log(bins)) + 0.0
    return result | {"empty": 1 - len(seen) / max(len(everything), 1)}


def _training_set(n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Coverage maps of components of blurred and noisy renders at 32 and 64 px, and their shapes."""
    features, labels = [], []
    rng = np.random.default_rng(0)
    large = ("single", "two", "color", "position", "attr", "grid2")  # the rest is a few pixels wide at 16 px
    sizes: tuple[tuple[int, float, tuple[str, ...]], ...] = (
        (32, 0.75, TASKS + GRID_TASKS),
        (64, 0.15, TASKS + GRID_TASKS),
        (16, 0.1, large),
    )
    splits: tuple[Split, ...] = ("train", "heldout")
    for (size, share, tasks), split in itertools.product(sizes, splits):
        data = Shapes(split, n=int(n * share / 2), size=size, tasks=tasks, seed=77)
        images = data.images.astype(np.float32)
        some = rng.random(len(images)) < 0.6
        sigma = rng.uniform(0, 0.8, len(images)) * size / 32 * some
        for i in np.flatnonzero(sigma > 0.2):
            images[i] = ndimage.gaussian_filter(images[i], (0, sigma[i], sigma[i]))
        noise = rng.uniform(0, 16, len(images)) * (rng.random(len(images)) < 0.6)
        images += noise[:, None, None, None] * rng.standard_normal(images.shape).astype(np.float32)
        components, _ = _components(images.clip(0, 255).round().astype(np.uint8))
        for k, i in enumerate(components.image_M):
            item = data[int(i)]
            x0, y0, x1, y1 = components.box_M4[k]
            slots = np.unique(item["instances"][y0:y1, x0:x1])
            slots = slots[slots > 0]
            if len(slots) == 1:  # a component that two objects share has no shape
                features.append(components.features_MF[k])
                labels.append(int(item["classes"][slots[0] - 1]))
    return np.asarray(features), np.asarray(labels)


def train(n: int = 20_000, epochs: int = 40) -> float:
    """Fit the shape classifier on n renders, write WEIGHTS, return the accuracy on a tenth kept aside."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    features, labels = (torch.from_numpy(a) for a in _training_set(n))
    order = torch.randperm(len(labels))
    held, used = order[: len(order) // 10], order[len(order) // 10 :]
    hidden, out = nn.Linear(GRID * GRID, 48), nn.Linear(48, len(SHAPES))
    net = nn.Sequential(hidden, nn.ReLU(), out)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(used) // 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = used[torch.randint(len(used), (256,), generator=torch.Generator().manual_seed(step))]
        loss = nn.functional.cross_entropy(net(features[batch]), labels[batch], label_smoothing=0.02)
        stop_if_not_finite(float(loss.detach()), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file(
        {
            f"{name}.{kind}": getattr(layer, kind).detach().numpy()
            for name, layer in (("hidden", hidden), ("out", out))
            for kind in ("weight", "bias")
        },
        WEIGHTS,
    )
    _weights.cache_clear()
    return float((net(features[held]).argmax(1) == labels[held]).float().mean())


if __name__ == "__main__":
    print(f"shape accuracy on held-out components: {train():.4f}")
