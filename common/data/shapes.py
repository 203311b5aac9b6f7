"""Shapes: the procedural, captioned, exactly checkable scene set that every paper of this repository shares.

A scene is one to five flat shapes (8 shapes x 10 colours x 3 textures) on a light background. Six tasks follow the
categories of GenEval (single, two, count, color, position, attr); `grid2` and `grid3` put the objects into the cells of
a 2x2 or 3x3 grid for layout conditioning. Whatever the caption does not name (texture, size, place, background, in
`single` and `two` also the colour) is a free attribute, so the image is not a function of the caption alone. Boxes,
masks and label maps come with each image; `common.data.shapes_verifier` tells whether a generated image shows what its
prompt asked for.

    data = Shapes("train", n=40_000, size=32, caption="sparse", seed=0)
    prompts = data.prompts(n_per_task=100, split="heldout")   # fixed, with the specification the verifier checks

Splits: `train` and `test` draw from the same scenes; both never show one of the 16 held-out (colour, shape) pairs, and
none of their two-object scenes shows a held-out (pair, relation, pair) tuple. Every scene of `heldout` shows one: the
first object's pair, or for `position` the tuple, made of pairs that are themselves seen in training.

Shape suffixes: H, W image side in pixels; K = MAX_OBJECTS slots for objects; S side of the 4x supersampled window.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import write_atomically
from common.paths import cache_dir

# Bump whenever the same (seed, split, index) gives other pixels, boxes or captions: it is part of every cache key.
CONTENT_VERSION = 2

Split = Literal["train", "test", "heldout"]
CaptionStyle = Literal["sparse", "dense", "mixed", "canonical", "web"]

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
TEXTURES = ("solid", "stripes", "checks")
TASKS = ("single", "two", "count", "color", "position", "attr")
GRID_TASKS = ("grid2", "grid3")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 5

# Tone of the object and second tone of its stripes and checks. All twenty tones are far from each other and from
# every background, so that a textured object stays one connected component with one readable colour.
PALETTE: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((222, 40, 40), (135, 12, 22)),
    "green": ((40, 165, 60), (12, 95, 35)),
    "blue": ((45, 85, 225), (18, 35, 135)),
    "yellow": ((242, 212, 40), (185, 150, 0)),
    "purple": ((140, 50, 180), (80, 15, 110)),
    "orange": ((245, 130, 25), (255, 190, 125)),
    "pink": ((245, 130, 190), (195, 65, 135)),
    "cyan": ((45, 200, 215), (10, 130, 150)),
    "brown": ((125, 75, 35), (185, 135, 90)),
    "black": ((25, 25, 28), (115, 115, 120)),
}
COLOURS = tuple(PALETTE)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (214, 214, 214),
    "cream": (250, 243, 218),
    "mint": (212, 242, 220),
    "sky": (210, 230, 248),
    "lilac": (230, 218, 247),
}
COLOUR_JITTER = 12  # per channel, uniform, both tones alike
BACKGROUND_JITTER = 4

# Radii as fractions of the image side.
RADII = {
    "single": (0.20, 0.34),
    "color": (0.20, 0.34),
    "two": (0.15, 0.21),
    "position": (0.15, 0.21),
    "attr": (0.15, 0.21),
    "count": (0.11, 0.15),
    "grid2": (0.14, 0.19),
    "grid3": (0.10, 0.13),
}
MIN_GAP = 1.3  # distance of centres over r1 + r2; at 1.15 neighbours merge at 32 px
MIN_RELATION_DISTANCE = 0.3
RELATION_DOMINANCE = 1.5  # |d along the relation's axis| over |d across it|
TEXTURE_PERIOD = 0.125  # of the side, but at least 4 pixels
SUPERSAMPLING = 4

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZE_WORDS = ("small", "medium", "large")
SIZE_LIMITS = (0.17, 0.26)
TEXTURE_WORDS = {"solid": "solid", "stripes": "striped", "checks": "checked"}
PLACE_WORDS = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
_RELATION_PARAPHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_OPENINGS = ("there is", "a picture of", "an image of")

# Extent (left, top, right, bottom) of each shape in units of its radius.
EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.84, -0.84, 0.84, 0.84),
    "triangle": (-1.0, -1.0, 1.0, 0.8),
    "star": (-0.9511, -1.0, 0.9511, 0.8090),
    "heart": (-0.9990, -0.9470, 0.9990, 0.9167),
    "cross": (-0.95, -0.95, 0.95, 0.95),
    "diamond": (-0.82, -1.0, 0.82, 1.0),
    "ring": (-1.0, -1.0, 1.0, 1.0),
}

# Corners and tips of each shape in units of its radius, clockwise from the top; circle and ring have none.
KEYPOINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)),
    "triangle": ((0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)),
    "star": ((0.0, -1.0), (0.9511, -0.3090), (0.5878, 0.8090), (-0.5878, 0.8090), (-0.9511, -0.3090)),
    "heart": ((0.0, -0.75), (0.0, 0.9167)),  # the notch and the tip
    "cross": ((0.0, -0.95), (0.95, 0.0), (0.0, 0.95), (-0.95, 0.0)),  # the middles of the arms' ends
    "diamond": ((0.0, -1.0), (0.82, 0.0), (0.0, 1.0), (-0.82, 0.0)),
    "ring": (),
}
MAX_KEYPOINTS = max(map(len, KEYPOINTS.values()))


@dataclass(frozen=True)
class Object:
    """One shape. Centre and radius are fractions of the image side (y down); `jitter` is added to both RGB tones."""

    shape: str
    colour: str
    texture: str
    cx: float
    cy: float
    radius: float
    jitter: tuple[int, int, int] = (0, 0, 0)

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)"""
        return self.colour, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) as fractions of the side."""
        x0, y0, x1, y1 = EXTENTS[self.shape]
        return (
            self.cx + x0 * self.radius,
            self.cy + y0 * self.radius,
            self.cx + x1 * self.radius,
            self.cy + y1 * self.radius,
        )

    @property
    def keypoints(self) -> tuple[tuple[float, float], ...]:
        """(x, y) of its `KEYPOINTS` as fractions of the side."""
        return tuple((self.cx + u * self.radius, self.cy + v * self.radius) for u, v in KEYPOINTS[self.shape])

    @property
    def size_word(self) -> str:
        """small, medium or large"""
        return SIZE_WORDS[sum(self.radius >= limit for limit in SIZE_LIMITS)]

    @property
    def place_words(self) -> str:
        """Which ninth of the image the centre lies in, in words."""
        return PLACE_WORDS[_third(self.cy)][_third(self.cx)]


@dataclass(frozen=True)
class Scene:
    """What is in the image and which task it was drawn for; in `position`, objects[0] is `relation` objects[1]."""

    task: str
    background: str
    objects: tuple[Object, ...]
    relation: str | None = None
    background_jitter: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Spec:
    """A prompt and what an image must show to satisfy it.

    `objects` are (colour, shape) with None for a free colour, exactly as many as must be there. In the grid tasks
    `cells` holds the (row, column) of each object.
    """

    task: str
    caption: str
    objects: tuple[tuple[str | None, str], ...]
    relation: str | None = None
    cells: tuple[tuple[int, int], ...] | None = None


def _third(x: float) -> int:
    return min(int(3 * x), 2)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big")


@cache
def heldout_pairs() -> frozenset[tuple[str, str]]:
    """16 of the 80 (colour, shape) pairs: in the order of their hashes, two of each shape, at most two of a colour."""
    pairs = itertools.product(COLOURS, SHAPES)
    ranked = sorted(pairs, key=lambda pair: _digest(f"shapes pair {pair[0]} {pair[1]}"))
    chosen: list[tuple[str, str]] = []
    for pair in ranked:
        if all(sum(pair[side] == other[side] for other in chosen) < 2 for side in (0, 1)):
            chosen.append(pair)
    return frozenset(chosen)


@cache
def is_heldout_relation(first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Whether "first relation second" is one of the 20 % held-out tuples; "b right of a" is the tuple "a left of b"."""
    if relation in ("right of", "below"):
        first, relation, second = second, _OPPOSITE[relation], first
    return _digest(f"shapes tuple {first[0]} {first[1]} {relation} {second[0]} {second[1]}") % 5 == 0


def relation_between(first: Object, second: Object) -> str | None:
    """The relation of `first` to `second` where it is clear: one axis dominates by 1.5 and differs by 0.3 (2.3)."""
    dx, dy = second.cx - first.cx, second.cy - first.cy
    if abs(dx) > MIN_RELATION_DISTANCE and abs(dx) >= RELATION_DOMINANCE * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) > MIN_RELATION_DISTANCE and abs(dy) >= RELATION_DOMINANCE * abs(dx):
        return "above" if dy > 0 else "below"
    return None


# Only rng.random() is used: its stream is the raw bit generator's, which numpy keeps stable between versions.


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.random() * len(options))]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _jitter(rng: np.random.Generator, amount: int) -> tuple[int, int, int]:
    r, g, b = (int(x * (2 * amount + 1)) - amount for x in rng.random(3).tolist())
    return r, g, b


def _check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(given, str) or not given:
        raise UserError(f"{what} must be a non-empty list of names out of {', '.join(known)}; got {given!r}")
    for name in given:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}; choose from {', '.join(known)}")


@cache
def _pairs(shapes: tuple[str, ...], colours: tuple[str, ...], heldout: bool) -> tuple[tuple[str, str], ...]:
    pairs = tuple(p for p in itertools.product(colours, shapes) if (p in heldout_pairs()) == heldout)
    if not pairs:
        kind = "held-out" if heldout else "training"
        raise UserError(
            f"shapes {', '.join(shapes)} in {', '.join(colours)} have no {kind} pair; add shapes or colours"
        )
    return pairs


def _different_pair(
    rng: np.random.Generator, other: tuple[str, str], pairs: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    """A pair whose colour and shape both differ from `other`'s."""
    for _ in range(1000):
        colour, shape = _pick(rng, pairs)
        if colour != other[0] and shape != other[1]:
            return colour, shape
    raise UserError("two-object tasks need at least two shapes and two colours; add shapes or colours")


def _place(rng: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Centres inside the image with a gap of at least 1.3 (r1 + r2), by dart throwing with restarts."""
    while True:
        centres: list[tuple[float, float]] = []
        for k, radius in enumerate(radii):
            darts = radius + (1 - 2 * radius) * rng.random((16, 2))
            for x, y in darts.tolist():
                if all(
                    (x - u) ** 2 + (y - v) ** 2 >= (MIN_GAP * (radius + radii[j])) ** 2
                    for j, (u, v) in enumerate(centres)
                ):
                    centres.append((x, y))
                    break
            if len(centres) == k:
                break
        if len(centres) == len(radii):
            return centres


def _place_related(rng: np.random.Generator, radii: Sequence[float], relation: str) -> list[tuple[float, float]]:
    """Two centres of which the first is clearly `relation` the second."""
    horizontal = relation in ("left of", "right of")
    while True:
        (ax, ay), (bx, by) = _place(rng, radii)
        along, across = (bx - ax, by - ay) if horizontal else (by - ay, bx - ax)
        if abs(along) > MIN_RELATION_DISTANCE and abs(along) >= RELATION_DOMINANCE * abs(across):
            if (along > 0) == (relation in ("left of", "above")):
                return [(ax, ay), (bx, by)]
            # The mirror image has the right order and keeps gap and margins.
            return [(1 - ax, ay), (1 - bx, by)] if horizontal else [(ax, 1 - ay), (bx, 1 - by)]


def _place_in_cells(rng: np.random.Generator, radii: Sequence[float], cells: int) -> list[tuple[float, float]]:
    """Centres near the middles of distinct cells of a `cells` x `cells` grid, inside their cells."""
    free = list(range(cells * cells))
    centres = []
    for radius in radii:
        cell = free.pop(int(rng.random() * len(free)))
        slack = max(0.5 / cells - 1.1 * radius, 0.0)
        row, column = divmod(cell, cells)
        x, y = (2 * rng.random(2) - 1) * slack
        centres.append(((column + 0.5) / cells + float(x), (row + 0.5) / cells + float(y)))
    return centres


def sample_scene(
    rng: np.random.Generator,
    task: str,
    split: Split = "train",
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = COLOURS,
    textures: Sequence[str] = TEXTURES,
) -> Scene:
    """Draw one scene of a task.

    Args:
        task: one of TASKS or GRID_TASKS.
        split: `heldout` draws the held-out combinations, `train` and `test` never do.
        shapes, colours, textures: restrict the world (small models learn 3 shapes x 6 colours sooner).

    Raises:
        UserError: unknown names, or a world too small for the task.
    """
    _check_names("task", [task], TASKS + GRID_TASKS)
    _check_names("split", [split], get_args(Split))
    heldout = split == "heldout"
    shapes, colours = tuple(shapes), tuple(colours)
    seen = _pairs(shapes, colours, False)
    first_from = _pairs(shapes, colours, True) if heldout and task != "position" else seen
    low, high = RADII[task]

    while True:
        relation = _pick(rng, RELATIONS) if task == "position" else None
        pairs = [_pick(rng, first_from)]
        if task in ("two", "position", "attr"):
            pairs.append(_different_pair(rng, pairs[0], seen))
            if heldout and relation is None and rng.random() < 0.5:
                pairs.reverse()
        elif task == "count":
            n = 2 + int(rng.random() * 4)
            pairs *= n
            high = 0.13 if n == 5 else 0.15
        elif task in GRID_TASKS:
            extra = int(rng.random() * (4 if task == "grid2" else MAX_OBJECTS))
            pairs += [_pick(rng, seen) for _ in range(extra)]
        if relation is not None and is_heldout_relation(pairs[0], relation, pairs[1]) != heldout:
            continue

        radii = [_uniform(rng, low, high) for _ in pairs]
        if relation is not None:
            centres = _place_related(rng, radii, relation)
        elif task in GRID_TASKS:
            centres = _place_in_cells(rng, radii, int(task[-1]))
        else:
            centres = _place(rng, radii)
        texture = _pick(rng, textures)
        objects = tuple(
            Object(
                shape=shape,
                colour=colour,
                texture=texture if task == "count" else _pick(rng, textures),
                cx=x,
                cy=y,
                radius=radius,
                jitter=_jitter(rng, COLOUR_JITTER),
            )
            for (colour, shape), radius, (x, y) in zip(pairs, radii, centres)
        )
        if task in ("two", "attr") and not heldout:
            # Two objects of a training scene must not show a held-out tuple by accident either.
            shown = relation_between(*objects)
            if shown is not None and is_heldout_relation(pairs[0], shown, pairs[1]):
                continue
        background = _pick(rng, tuple(BACKGROUNDS))
        return Scene(task, background, objects, relation, _jitter(rng, BACKGROUND_JITTER))


# Only products, sums and comparisons below: no libm call, so that every machine renders the same pixels.
_STAR_INNER = 0.45
_COS36, _SIN36 = np.float32(np.cos(np.pi / 5)), np.float32(np.sin(np.pi / 5))


def _inside_star(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Five-pointed star, one point up: fold the plane into one of its ten sectors, then test against that edge."""
    x: NDArray[Any] = np.abs(u)
    y: NDArray[Any] = -v
    for normal_x in (_COS36, -_COS36):  # mirror whatever lies beyond a sector's border
        beyond = 2 * np.maximum(normal_x * x - _SIN36 * y, 0)
        x, y = x - beyond * normal_x, y + beyond * _SIN36
    inner_x, inner_y = _STAR_INNER * _SIN36, _STAR_INNER * _COS36
    return (y - 1) * inner_x <= np.abs(x) * (inner_y - 1)


def _inside_heart(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The sextic heart (x^2 + y^2 - 1)^3 = x^2 y^3, centred and scaled to about unit radius."""
    x, y = u * 1.14, 0.10 - v * 1.20
    x2, y2 = x * x, y * y
    a = x2 + y2 - 1
    return a * a * a <= x2 * y2 * y


def _inside_cross(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    a, b = np.abs(u), np.abs(v)
    return (np.minimum(a, b) <= 0.33) & (np.maximum(a, b) <= 0.95)


def _inside_ring(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    r2 = u * u + v * v
    return (r2 <= 1) & (r2 >= 0.52**2)


# u to the right, v down, both in units of the radius.
_INSIDE: dict[str, Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.bool_]]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.84,
    "triangle": lambda u, v: (v <= 0.8) & (v >= 1.8 * np.abs(u) - 1),
    "star": _inside_star,
    "heart": _inside_heart,
    "cross": _inside_cross,
    "diamond": lambda u, v: np.abs(u) / 0.82 + np.abs(v) <= 1,
    "ring": _inside_ring,
}


def _window(obj: Object, size: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that the object can touch."""
    x0, y0 = (max(int((c - obj.radius) * size), 0) for c in (obj.cx, obj.cy))
    x1, y1 = (min(int((c + obj.radius) * size) + 1, size) for c in (obj.cx, obj.cy))
    return slice(y0, y1), slice(x0, x1)


def _box_downsample(fine_SS: NDArray[np.bool_]) -> NDArray[np.float32]:
    h, w = (side // SUPERSAMPLING for side in fine_SS.shape)
    blocks = fine_SS.reshape(h, SUPERSAMPLING, w, SUPERSAMPLING)
    return blocks.sum(axis=(1, 3), dtype=np.float32) * np.float32(SUPERSAMPLING**-2)


def _coverage(obj: Object, size: int) -> tuple[tuple[slice, slice], NDArray[np.float32], NDArray[np.float32] | None]:
    """The object's pixel window, its coverage there in [0, 1], and that of the second tone (None for solid)."""
    rows, columns = _window(obj, size)
    fine = size * SUPERSAMPLING
    y = (np.arange(rows.start * SUPERSAMPLING, rows.stop * SUPERSAMPLING, dtype=np.float32) + 0.5) / fine - obj.cy
    x = (np.arange(columns.start * SUPERSAMPLING, columns.stop * SUPERSAMPLING, dtype=np.float32) + 0.5) / fine - obj.cx
    u, v = x.astype(np.float32) / np.float32(obj.radius), y.astype(np.float32) / np.float32(obj.radius)
    inside_SS = _INSIDE[obj.shape](u[None, :], v[:, None])
    coverage = _box_downsample(inside_SS)
    if obj.texture == "solid":
        return (rows, columns), coverage, None
    # A stripe of the first tone is centred on the object; stripes lie horizontally, checks alternate in both axes.
    half_period = max(TEXTURE_PERIOD, 4 / size) / 2
    odd_rows = (np.floor(y / half_period + 0.5).astype(np.int64) & 1).astype(bool)
    if obj.texture == "stripes":
        second_SS = inside_SS & odd_rows[:, None]
    else:
        odd_columns = (np.floor(x / half_period + 0.5).astype(np.int64) & 1).astype(bool)
        second_SS = inside_SS & (odd_rows[:, None] ^ odd_columns[None, :])
    return (rows, columns), coverage, _box_downsample(second_SS)


def _draw(scene: Scene, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image uint8 [H, W, 3] and instance map uint8 [H, W]: 0 background, k + 1 where object k covers half a pixel."""
    background = np.asarray(BACKGROUNDS[scene.background], np.float32) + np.asarray(scene.background_jitter, np.float32)
    image_HW3 = np.empty((size, size, 3), np.float32)
    image_HW3[:] = background.clip(0, 255)
    instances_HW = np.zeros((size, size), np.uint8)
    for k, obj in enumerate(scene.objects):
        tones = (np.asarray(PALETTE[obj.colour], np.float32) + np.asarray(obj.jitter, np.float32)).clip(0, 255)
        window, coverage, second = _coverage(obj, size)
        patch = image_HW3[window]
        patch += coverage[..., None] * (tones[0] - patch)
        if second is not None:
            patch += second[..., None] * (tones[1] - tones[0])
        instances_HW[window][coverage >= 0.5] = k + 1
    return (image_HW3 + 0.5).astype(np.uint8), instances_HW


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Anti-aliased image uint8 [size, size, 3]: inside tests on a 4x finer grid, averaged over each pixel."""
    return _draw(scene, size)[0]


def label_map(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Class of each pixel, uint8 [size, size]: 0 background, 1 + index into SHAPES."""
    classes = [0] + [1 + SHAPES.index(o.shape) for o in scene.objects]
    return np.asarray(classes, np.uint8)[_draw(scene, size)[1]]


def layout(scene: Scene) -> list[dict[str, Any]]:
    """Objects as {"box": (x0, y0, x1, y1) fractions of the side, "shape", "colour", "texture"}, in scene order."""
    return [{"box": o.box, "shape": o.shape, "colour": o.colour, "texture": o.texture} for o in scene.objects]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _words(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _names_colour(task: str) -> bool:
    return task not in ("single", "two")


def _cell(obj: Object, cells: int) -> tuple[int, int]:
    return min(int(obj.cy * cells), cells - 1), min(int(obj.cx * cells), cells - 1)


def _cell_words(obj: Object, cells: int) -> str:
    row, column = _cell(obj, cells)
    step = 2 if cells == 2 else 1
    return PLACE_WORDS[row * step][column * step]


def _sparse(scene: Scene, rng: np.random.Generator | None) -> str:
    """GenEval-like caption: the canonical wording, with `rng` paraphrased and now and then with a free attribute."""

    def chance(p: float) -> bool:
        return rng is not None and rng.random() < p

    objects = scene.objects
    named = []
    for obj in objects[:1] if scene.task == "count" else objects:
        named.append(
            _words(
                obj.size_word if scene.task != "count" and chance(0.1) else None,
                TEXTURE_WORDS[obj.texture] if chance(0.1) else None,
                obj.colour if _names_colour(scene.task) else None,
                obj.shape,
            )
        )

    if scene.task == "count":
        text = f"{NUMBERS[len(objects)]} {_plural(named[0])}"
    elif scene.task == "position":
        assert scene.relation is not None
        relation, (first, second) = scene.relation, named
        if chance(0.3):
            relation, first, second = _OPPOSITE[relation], second, first
        if chance(0.3):
            relation = _RELATION_PARAPHRASES[relation][1]
        text = f"{_with_article(first)} {relation} {_with_article(second)}"
    elif scene.task in GRID_TASKS:
        cells = int(scene.task[-1])
        places = [_words(_with_article(n), _cell_words(o, cells)) for n, o in zip(named, objects)]
        text = ", ".join(places)
    else:
        if len(named) == 2 and chance(0.5):
            named.reverse()
        if len(named) == 1 and chance(0.15):
            text = f"one {named[0]}"
        else:
            text = " and ".join(_with_article(n) for n in named)

    if rng is not None and rng.random() < 0.2:
        opening = _pick(rng, _OPENINGS)
        text = f"{'there are' if opening == 'there is' and scene.task == 'count' else opening} {text}"
    if chance(0.1):
        text = f"{text} on a {scene.background} background"
    return text


def _dense(scene: Scene) -> str:
    """Names the size, texture, colour, shape and place of every object, the relation or number, and the background."""
    described = [
        _words(_with_article(_words(o.size_word, TEXTURE_WORDS[o.texture], o.colour, o.shape)), o.place_words)
        for o in scene.objects
    ]
    if scene.task == "count":
        first = scene.objects[0]
        head = f"{NUMBERS[len(scene.objects)]} {TEXTURE_WORDS[first.texture]} {first.colour} {_plural(first.shape)}"
        text = f"{head}: " + ", ".join(f"one {o.place_words}" for o in scene.objects)
    elif scene.relation is not None:
        text = f"{described[0]}, {scene.relation} {described[1]}"
    else:
        text = ", ".join(described)
    return f"{text}, on a {scene.background} background"


def _web(scene: Scene, rng: np.random.Generator) -> str:
    """Poor caption in the manner of web alt text: each attribute of each object is kept with probability 0.35."""

    def keep(word: str) -> str | None:
        return word if rng.random() < 0.35 else None

    phrases = [
        _words(
            _with_article(_words(keep(TEXTURE_WORDS[o.texture]), keep(o.colour), keep(o.shape) or "thing")),
            keep(o.place_words),
        )
        for o in scene.objects
    ]
    return " and ".join(phrases[: 1 + int(rng.random() * len(phrases))])


def caption(scene: Scene, style: CaptionStyle, rng: np.random.Generator) -> str:
    """Caption of a scene.

    Styles: `canonical` (the evaluation wording, e.g. "a red star left of a blue ring"), `sparse` (canonical with
    paraphrases, order swaps and occasionally a free attribute), `dense` (every attribute of everything), `mixed` (half
    sparse, half dense), `web` (most attributes dropped; in a `Shapes` data set one such caption in five belongs to
    another scene: the LAION-like grade of PixArt-alpha's data comparison).
    """
    _check_names("caption style", [style], get_args(CaptionStyle))
    if style == "mixed":
        style = "sparse" if rng.random() < 0.5 else "dense"
    if style == "canonical":
        return _sparse(scene, None)
    if style == "sparse":
        return _sparse(scene, rng)
    if style == "dense":
        return _dense(scene)
    return _web(scene, rng)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word and mark that a caption can contain, sorted: enough for a word-level tokenizer without unknowns."""
    phrases: list[str] = [*SHAPES, *map(_plural, SHAPES), *COLOURS, *BACKGROUNDS, *NUMBERS[1:], *SIZE_WORDS]
    phrases += [
        *TEXTURE_WORDS.values(),
        *itertools.chain(*PLACE_WORDS),
        *itertools.chain(*_RELATION_PARAPHRASES.values()),
    ]
    phrases += [*_OPENINGS, "there are", "a an and one thing on background , :"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def spec_of(scene: Scene) -> Spec:
    """What an image must show to satisfy the scene's canonical caption."""
    objects = tuple((o.colour if _names_colour(scene.task) else None, o.shape) for o in scene.objects)
    cells = None
    if scene.task in GRID_TASKS:
        cells = tuple(_cell(o, int(scene.task[-1])) for o in scene.objects)
    return Spec(scene.task, _sparse(scene, None), objects, scene.relation, cells)


# Streams of random numbers, kept apart so that no two purposes share a draw.
_SCENE, _CAPTION, _PROMPT = range(3)


def _rng(seed: int, stream: int, split: str, *rest: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, get_args(Split).index(split), *rest])


class Shapes(Dataset[dict[str, Any]]):
    """Map-style data set of rendered scenes; item i is a pure function of (seed, split, i) and the world's arguments.

    Images are rendered once (about 0.3 ms each at 32 px) and kept in the cache; tasks alternate with i, so any prefix
    is balanced.

    Args:
        split: train, test (same scenes, other draws) or heldout (combinations never shown in train or test).
        n: number of items.
        size: side in pixels.
        tasks: names out of TASKS and GRID_TASKS.
        caption: sparse, dense, mixed, canonical or web; see `caption`.
        seed: non-negative.
        shapes, colours, textures: restrict the world.

    Items (default collate works; K = MAX_OBJECTS slots, unused ones have box 0 and index -1):
        image uint8 [3, H, W]; caption str; task str;
        label, colour, background int: shape and colour of the main (first named) object, background;
        boxes float32 [K, 4] (x0, y0, x1, y1 as fractions of the side);
        classes, colours, textures int64 [K]: indices into SHAPES, COLOURS, TEXTURES;
        label_map uint8 [H, W]: 0 background, 1 + shape; instances uint8 [H, W]: 0 background, 1 + slot.

    Raises:
        UserError: unknown split, task, caption style, shape, colour or texture; n < 1; size < 8.
    """

    def __init__(
        self,
        split: Split,
        n: int,
        size: int = 32,
        tasks: Sequence[str] = TASKS,
        caption: CaptionStyle = "sparse",
        seed: int = 0,
        shapes: Sequence[str] = SHAPES,
        colours: Sequence[str] = COLOURS,
        textures: Sequence[str] = TEXTURES,
    ) -> None:
        _check_names("split", [split], get_args(Split))
        _check_names("task", tasks, TASKS + GRID_TASKS)
        _check_names("caption style", [caption], get_args(CaptionStyle))
        _check_names("shape", shapes, SHAPES)
        _check_names("colour", colours, COLOURS)
        _check_names("texture", textures, TEXTURES)
        if n < 1:
            raise UserError(f"n={n}: a data set needs at least one item")
        if size < 8:
            raise UserError(f"size={size}: shapes need at least 8 pixels")
        if seed < 0:
            raise UserError(f"seed={seed}: the seed must not be negative")
        self.split: Split = split
        self.n, self.size, self.seed = n, size, seed
        self.tasks, self.caption_style = tuple(tasks), caption
        self.world: dict[str, tuple[str, ...]] = {
            "shapes": tuple(shapes),
            "colours": tuple(colours),
            "textures": tuple(textures),
        }
        self._arrays = self._load_arrays()
        self._captions = self._load_captions()

    def scene(self, i: int) -> Scene:
        """The scene of item i, drawn again (about 0.1 ms)."""
        task = self.tasks[i % len(self.tasks)]
        return sample_scene(_rng(self.seed, _SCENE, self.split, i), task, self.split, **self.world)

    def spec(self, i: int) -> Spec:
        """What an image must show to match item i."""
        return spec_of(self.scene(i))

    def prompts(self, n_per_task: int, split: Split | None = None, seed: int = 0) -> list[Spec]:
        """Fixed evaluation prompts, task after task: those of this data set's tasks and world (see `prompts`)."""
        return prompts(n_per_task, split or self.split, self.tasks, seed, **self.world)

    @property
    def captions(self) -> list[str]:
        """All captions, in order."""
        return list(self._captions)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images as uint8 [n, 3, H, W] (a view, not a copy)."""
        return self._arrays["images"].transpose(0, 3, 1, 2)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        arrays = self._arrays
        classes_K = arrays["objects"][i, :, 0].astype(np.int64)
        instances_HW = arrays["instances"][i]
        class_of_instance = np.concatenate([[0], classes_K + 1]).astype(np.uint8)
        return {
            "image": torch.from_numpy(arrays["images"][i].transpose(2, 0, 1).copy()),
            "caption": self._captions[i],
            "task": self.tasks[i % len(self.tasks)],
            "label": int(classes_K[0]),
            "colour": int(arrays["objects"][i, 0, 1]),
            "background": int(arrays["background"][i]),
            "boxes": torch.from_numpy(arrays["boxes"][i].copy()),
            "classes": torch.from_numpy(classes_K),
            "colours": torch.from_numpy(arrays["objects"][i, :, 1].astype(np.int64)),
            "textures": torch.from_numpy(arrays["objects"][i, :, 2].astype(np.int64)),
            "label_map": torch.from_numpy(class_of_instance[instances_HW]),
            "instances": torch.from_numpy(instances_HW.copy()),
        }

    def _caption(self, i: int) -> str:
        rng = _rng(self.seed, _CAPTION, self.split, i)
        scene = self.scene(i)
        if self.caption_style == "web" and rng.random() < 0.2:
            scene = sample_scene(rng, scene.task, self.split, **self.world)
        return caption(scene, self.caption_style, rng)

    def _cache_file(self, kind: str, suffix: str, **arguments: Any) -> Path:
        key = {
            "version": CONTENT_VERSION,
            "split": self.split,
            "n": self.n,
            "tasks": self.tasks,
            "seed": self.seed,
            **self.world,
            **arguments,
        }
        digest = hashlib.sha1(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir("shapes") / f"{kind}-{self.split}-{self.n}-{digest}{suffix}"

    def _load_arrays(self) -> dict[str, NDArray[Any]]:
        path = self._cache_file("images", ".npz", size=self.size)
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as stored:
                    return {name: stored[name] for name in stored.files}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
                pass  # damaged from outside: it is derived data, so make it again
        arrays = self._render_all()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)

        write_atomically(path, write)
        return arrays

    def _render_all(self) -> dict[str, NDArray[Any]]:
        n, size, K = self.n, self.size, MAX_OBJECTS
        images = np.empty((n, size, size, 3), np.uint8)
        instances = np.empty((n, size, size), np.uint8)
        boxes = np.zeros((n, K, 4), np.float32)
        objects = np.full((n, K, 3), -1, np.int8)
        background = np.empty(n, np.int8)
        names = list(BACKGROUNDS)
        for i in range(n):
            scene = self.scene(i)
            images[i], instances[i] = _draw(scene, size)
            background[i] = names.index(scene.background)
            for k, o in enumerate(scene.objects):
                boxes[i, k] = o.box
                objects[i, k] = SHAPES.index(o.shape), COLOURS.index(o.colour), TEXTURES.index(o.texture)
        return {"images": images, "instances": instances, "boxes": boxes, "objects": objects, "background": background}

    def _load_captions(self) -> list[str]:
        path = self._cache_file("captions", ".json", style=self.caption_style)
        if path.exists():
            try:
                captions = json.loads(path.read_text(encoding="utf-8"))
                if len(captions) == self.n:
                    return captions
            except (OSError, ValueError, TypeError, RecursionError):
                pass
        captions = [self._caption(i) for i in range(self.n)]
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(captions), encoding="utf-8"))
        return captions


def prompts(
    n_per_task: int,
    split: Split = "test",
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = COLOURS,
    textures: Sequence[str] = TEXTURES,
) -> list[Spec]:
    """Fixed evaluation prompts in canonical wording, n_per_task for each task; fewer are a prefix of more, per task.

    `single` has only as many different captions as there are shapes; repeats stand for other noise seeds.
    """
    _check_names("split", [split], get_args(Split))
    _check_names("task", tasks, TASKS + GRID_TASKS)
    known = TASKS + GRID_TASKS
    return [
        spec_of(sample_scene(_rng(seed, _PROMPT, split, known.index(task), j), task, split, shapes, colours, textures))
        for task in tasks
        for j in range(n_per_task)
    ]
