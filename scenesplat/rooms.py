"""Furnished rooms as Gaussians: real models under rules of what stands where, with labels, boxes and surface points.

    python -m scenesplat.rooms ROOM.ply --seed 3              # a room to look at or to ask, of furniture for tests
    python -m scenesplat.rooms FOLDER --seed 3                # the same with its labels, as a folder of .npy arrays

A room is a function of its seed. `quality` below 1 changes its Gaussians only, never what stands where, so that the
same seed at quality 1 is the reference for a PSNR.

Shape suffixes: N Gaussians, Q points of surfaces, I objects, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Portion, Positive, Seed
from scenesplat.furniture import NAMES, UNSEEN, Furniture, furniture
from scenesplat.gaussians import C0, Gaussians, quaternions
from scenesplat.ply import write_scene
from scenesplat.rasterize import Camera, render

STRUCTURE = ("wall", "floor", "ceiling")
CLASSES = (*STRUCTURE, *NAMES)  # the unseen ones are the last
SEEN = tuple(name for name in CLASSES if name not in UNSEEN)
HEIGHT = 2.6  # metres
GAP = 0.03  # metres that things keep from each other
TRIES = 30
NEIGHBOURS = 8  # that the shape of a Gaussian is taken from
Part = Literal["train", "test"]

# Rooms: the least and the most of each class. What is required comes first, since later things find less space.
RECIPES: dict[str, dict[str, tuple[int, int]]] = {
    "bedroom": {
        **{"bed": (1, 1), "cabinet": (1, 1), "desk": (0, 1), "chair": (1, 1), "bookshelf": (0, 1), "lamp": (1, 2)},
        **{"radiator": (1, 1), "plant": (0, 1), "tv": (0, 1)},
    },
    "living room": {
        **{"sofa": (1, 2), "table": (1, 1), "bookshelf": (1, 1), "cabinet": (1, 1), "tv": (1, 1), "chair": (0, 2)},
        **{"lamp": (1, 2), "plant": (1, 2), "radiator": (0, 1)},
    },
    "office": {
        **{"desk": (1, 2), "chair": (1, 3), "bookshelf": (1, 1), "cabinet": (0, 1), "tv": (1, 1), "lamp": (1, 2)},
        **{"plant": (0, 2), "radiator": (1, 1)},
    },
    "kitchen": {
        **{"stove": (1, 1), "refrigerator": (1, 1), "cabinet": (2, 3), "sink": (1, 1), "table": (1, 1)},
        **{"chair": (2, 4), "plant": (0, 1), "lamp": (0, 1)},
    },
    "bathroom": {
        **{"bathtub": (1, 1), "toilet": (1, 1), "sink": (1, 1), "cabinet": (0, 1), "radiator": (1, 1)},
        **{"plant": (0, 1)},
    },
}
SIZES = {  # metres, both sides from this range
    "bedroom": (3.2, 4.5),
    "living room": (3.8, 5.2),
    "office": (3.2, 4.8),
    "kitchen": (3.2, 4.5),
    "bathroom": (2.6, 3.4),
}
STRANGERS = {  # of UNSEEN, where test rooms have them
    "bedroom": ("wardrobe", "nightstand"),
    "living room": ("armchair", "vase"),
    "office": ("armchair", "stool"),
    "kitchen": ("stool", "vase"),
    "bathroom": ("stool",),
}
AGAINST_WALLS = (
    *("bed", "sofa", "desk", "cabinet", "bookshelf", "radiator", "stove", "refrigerator", "sink", "toilet"),
    *("bathtub", "wardrobe", "nightstand"),
)
SUPPORTS = ("table", "desk", "cabinet", "nightstand")
SMALL = 0.75  # metres: lower lamps, plants, vases and screens stand on something


@dataclass
class Placed:
    """A model in a room: its foot's centre, turned by `yaw` about the vertical."""

    model: Furniture
    place_3: NDArray
    yaw: float

    @property
    def turn_33(self) -> NDArray:
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    @property
    def box(self) -> tuple[NDArray, NDArray]:
        """Lowest and highest corner of the box around it."""
        width, depth, height = self.model.size_3
        c, s = abs(math.cos(self.yaw)), abs(math.sin(self.yaw))
        half = np.array([(c * width + s * depth) / 2, (s * width + c * depth) / 2, 0.0])
        return self.place_3 - half, self.place_3 + half + np.array([0, 0, height])


@dataclass
class Room:
    """A furnished room.

    Args:
        gaussians: with labels, objects and normals. names: of the classes that labels count.
        points_Q3: on its surfaces, other ones than the Gaussians', with their classes and objects.
        boxes_I6: centre and size of each object; the first six are floor, ceiling and walls. labels_I: their classes.
    """

    gaussians: Gaussians
    names: list[str]
    kind: str
    size_3: tuple[float, float, float]
    points_Q3: Tensor
    point_labels_Q: Tensor
    point_instances_Q: Tensor
    boxes_I6: Tensor
    labels_I: Tensor

    def cameras(self, count: int, width: int, seed: int = 0) -> list[Camera]:
        """Views from free places at the height of eyes, in turn onto an object and across the room; 4 : 3."""
        rng = np.random.default_rng([seed, count])
        half = np.array(self.size_3[:2]) / 2 - 0.3
        boxes = self.boxes_I6[6:].numpy()
        found = []
        for number in range(count):
            for _ in range(TRIES):
                place = np.array([*rng.uniform(-half, half), rng.uniform(1.3, 1.9)])
                if not (np.abs(boxes[:, :3] - place) < boxes[:, 3:] / 2 + 0.15).all(1).any():
                    break
            if len(boxes) and number % 2 == 0:
                target = boxes[rng.integers(len(boxes)), :3]
            else:
                target = np.array([*(-place[:2] * rng.uniform(0.3, 1.0)), rng.uniform(0.2, 2.2)])
            target = target + np.array([1e-3, 0, 0])  # never straight down
            at_3, place_3 = torch.tensor(target).float(), torch.tensor(place).float()
            found.append(Camera.looking(place_3, at_3, width, width * 3 // 4))
        return found


@dataclass
class _Layout:
    """What stands where in a room of width x depth."""

    width: float
    depth: float
    rng: Generator
    things: list[Placed] = field(default_factory=list)
    kept_free: list[tuple[NDArray, NDArray]] = field(default_factory=list)

    def fits(self, thing: Placed, beside: Placed | None = None) -> bool:
        """Inside the room, and in nothing but perhaps `beside`."""
        low, high = thing.box
        half = np.array([self.width / 2, self.depth / 2])
        if (low[:2] < -half - 1e-6).any() or (high[:2] > half + 1e-6).any() or high[2] > HEIGHT:
            return False
        others = [other.box for other in self.things if other is not beside] + self.kept_free
        return not any((low + GAP < top).all() and (high - GAP > bottom).all() for bottom, top in others)

    def against_wall(self, model: Furniture, elevation: float | None = None, inset: float = GAP) -> Placed:
        """Its back at a wall."""
        side = int(self.rng.integers(4))
        across, along = (self.depth, self.width) if side % 2 == 0 else (self.width, self.depth)
        room = max(0.0, along / 2 - model.size_3[0] / 2)
        yaw = side * math.pi / 2
        outwards, sideways = _turned((0, 1), yaw), _turned((1, 0), yaw)
        place = outwards * (across / 2 - model.size_3[1] / 2 - inset) + sideways * self.rng.uniform(-room, room)
        return Placed(model, np.array([*place, model.elevation if elevation is None else elevation]), yaw)

    def anywhere(self, model: Furniture) -> Placed:
        """On the floor."""
        half = np.array([self.width, self.depth]) / 2 - max(model.size_3[:2]) / 2
        place = self.rng.uniform(-np.abs(half), np.abs(half))
        return Placed(model, np.array([*place, 0.0]), self.rng.integers(4) * math.pi / 2 + self.rng.normal(0, 0.1))

    def at(self, model: Furniture, table: Placed) -> Placed:
        """Before one side of a table, its front under it; at desks before the front."""
        width, depth, _ = table.model.size_3
        side = 2 if table.model.label == "desk" else int(self.rng.integers(4))
        half = depth / 2 if side % 2 == 0 else width / 2
        outwards = _turned((0, 1), table.yaw + side * math.pi / 2)
        place = table.place_3[:2] + outwards * (half + model.size_3[1] / 2 - 0.15)
        yaw = table.yaw + side * math.pi / 2 + self.rng.normal(0, 0.15)
        return Placed(model, np.array([*place, 0.0]), yaw)

    def upon(self, model: Furniture, support: Placed) -> Placed:
        """On a piece of furniture."""
        width, depth = support.model.size_3[:2]
        room = np.maximum(0, np.array([width, depth]) / 2 - max(model.size_3[:2]) / 2)
        place = _turned(self.rng.uniform(-room, room), support.yaw) + support.place_3[:2]
        height = support.place_3[2] + support.model.top + GAP
        return Placed(model, np.array([*place, height]), support.yaw + self.rng.normal(0, 0.2))

    def propose(self, model: Furniture) -> tuple[Placed, Placed | None]:
        """A place by the rules of its class, and what it may stand in."""
        label = model.label
        supports = [thing for thing in self.things if thing.model.label in SUPPORTS and 0.3 < thing.model.top < 1.3]
        tables = [thing for thing in self.things if thing.model.label in ("table", "desk")]
        if label in ("door", "window"):
            sill = 0.0 if label == "door" else min(max(model.elevation, 0.8), HEIGHT - model.size_3[2] - 0.1)
            return self.against_wall(model, sill, inset=0.0), None
        if label in AGAINST_WALLS:
            return self.against_wall(model), None
        if label == "lamp" and any(word in model.name for word in ("Pendant", "Hanging", "Chandelier", "Ceiling")):
            place = self.rng.uniform(-0.4, 0.4, 2)
            return Placed(model, np.array([*place, HEIGHT - model.size_3[2]]), 0.0), None
        if label == "tv" and "Wall" in model.name:
            return self.against_wall(model, 1.1), None
        if label in ("lamp", "plant", "vase", "tv") and model.size_3[2] < SMALL and supports:
            support = supports[self.rng.integers(len(supports))]
            return self.upon(model, support), support
        if label in ("chair", "stool") and tables and self.rng.random() < 0.8:
            table = tables[self.rng.integers(len(tables))]
            return self.at(model, table), table
        return self.anywhere(model), None

    def add(self, models: list[Furniture]) -> None:
        """One of these models, where it fits; none where none does."""
        for _ in range(TRIES):
            thing, beside = self.propose(models[self.rng.integers(len(models))])
            if self.fits(thing, beside):
                self.things.append(thing)
                if thing.model.label == "door":  # whoever comes in needs a metre
                    low, high = thing.box
                    inwards = _turned((0, -1), thing.yaw)
                    shift = np.array([*(inwards * 0.9), 0.0])
                    self.kept_free.append((np.minimum(low, low + shift), np.maximum(high, high + shift)))
                return


def _turned(vector: NDArray | tuple[float, float], yaw: float) -> NDArray:
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1]])


def make_room(
    seed: int,
    part: Part = "train",
    density: float = 120.0,
    bare: float = 0.4,
    quality: float = 1.0,
    which: str = "archive",
    unseen: bool = False,
) -> Room:
    """The room of a seed.

    Args:
        part: train or test: test rooms have other models of the same classes.
        density: Gaussians per square metre of furniture; bare: share of that on floor, ceiling and walls.
        quality: 1 for Gaussians on their surfaces; lower ones are jittered, blurred, discoloured, and have floaters.
        which: `furniture(which)`. unseen: also classes that no training room has.
    """
    rng = np.random.default_rng([seed, part == "test", 0])
    kind = sorted(RECIPES)[int(rng.integers(len(RECIPES)))]
    low, high = SIZES[kind]
    width, depth = rng.uniform(low, high, 2)
    layout = _Layout(float(width), float(depth), rng)
    models: dict[str, list[Furniture]] = {}
    for model in furniture(which):
        if model.held_out == (part == "test") and model.size_3[2] < HEIGHT - 0.1:
            models.setdefault(model.label, []).append(model)
    if unseen and part == "train":
        raise UserError("unseen classes are for test rooms only")
    wanted = ["door", "window"] + ["window"] * int(rng.integers(2))
    for label, (least, most) in RECIPES[kind].items():
        wanted += [label] * int(rng.integers(least, most + 1))
    wanted += STRANGERS[kind] if unseen else ()
    for label in wanted:
        layout.add(models[label])
    return _filled(layout, kind, seed, density, bare, quality)


def _filled(layout: _Layout, kind: str, seed: int, density: float, bare: float, quality: float) -> Room:
    """Points on everything in a room, half of them to become Gaussians."""
    rng = np.random.default_rng([seed, 1])
    size_3 = np.array([layout.width, layout.depth, HEIGHT])
    parts: list[tuple[Any, ...]] = []  # points, normals, colours, clearness, whether they become Gaussians, object
    boxes: list[list[float]] = []
    labels: list[int] = []
    openings = [thing.box for thing in layout.things if thing.model.label in ("door", "window")]
    for name, axis, sign in (("floor", 2, -1), ("ceiling", 2, 1), *(("wall", a, s) for a in (0, 1) for s in (-1, 1))):
        parts.append((*_plane(name, axis, sign, size_3, density * bare, openings, rng, layout), len(boxes)))
        centre, extent = np.array([0, 0, HEIGHT / 2]), size_3.copy()
        centre[axis] += sign * size_3[axis] / 2
        extent[axis] = 0.02
        boxes.append([*centre, *extent])
        labels.append(CLASSES.index(name))
    for thing in layout.things:
        model = thing.model
        width, depth, height = model.size_3
        hull = 2 * (width * depth + width * height + depth * height)
        count = max(40, int(2 * density * min(model.area, 1.2 * hull)))
        rows = rng.permutation(len(model.points_P3))
        rows = rows[:count] if count <= len(rows) else rng.integers(len(rows), size=count)
        points = model.points_P3[rows] @ thing.turn_33.T + thing.place_3
        tint = rng.uniform(0.85, 1.15, 3)
        normals = model.normals_P3[rows] @ thing.turn_33.T
        colours = (model.colours_P3[rows] * tint).clip(0, 1)
        parts.append((points, normals, colours, model.clear_P[rows], np.arange(count) % 2 == 0, len(boxes)))
        low, high = thing.box
        boxes.append([*(low + high) / 2, *(high - low)])
        labels.append(CLASSES.index(model.label))
    points_M3, normals_M3, colours_M3, clear_M, drawn_M = (
        np.concatenate([part[i] for part in parts]) for i in range(5)
    )
    instance_M = np.concatenate([np.full(len(part[0]), part[5]) for part in parts])
    labels_I = torch.tensor(labels)
    gaussians = _as_gaussians(points_M3[drawn_M], normals_M3[drawn_M], colours_M3[drawn_M], clear_M[drawn_M], seed)
    instance_N = torch.from_numpy(instance_M[drawn_M])
    gaussians = replace(gaussians, instances_N=instance_N, labels_N=labels_I[instance_N])
    instance_Q = torch.from_numpy(instance_M[~drawn_M])
    return Room(
        degraded(gaussians, quality, tuple(size_3), seed),
        list(CLASSES),
        kind,
        (layout.width, layout.depth, HEIGHT),
        torch.from_numpy(points_M3[~drawn_M]).float(),
        labels_I[instance_Q],
        instance_Q,
        torch.tensor(np.array(boxes)).float(),
        labels_I,
    )


def _plane(
    name: str,
    axis: int,
    sign: int,
    size_3: NDArray,
    density: float,
    openings: list[tuple[NDArray, NDArray]],
    rng: Generator,
    layout: _Layout,
) -> tuple[NDArray, ...]:
    """Points of floor, ceiling or a wall, one in each cell of a grid, twice: painted, in planks or in tiles."""
    others = [a for a in range(3) if a != axis]
    counts = np.maximum(4, (size_3[others] * math.sqrt(density)).round().astype(int))
    cells = np.stack(np.meshgrid(*(np.arange(count) for count in counts), indexing="ij"), -1).reshape(-1, 2)
    cells = np.concatenate([cells, cells])
    points = np.zeros((len(cells), 3))
    points[:, others] = (cells + rng.random(cells.shape)) / counts * size_3[others] - size_3[others] / 2
    points[:, axis] = sign * size_3[axis] / 2
    points[:, 2] += HEIGHT / 2
    drawn = np.arange(len(points)) < len(points) // 2
    for low, high in openings:
        outside = ~((points > low - 0.02) & (points < high + 0.02)).all(1)
        points, drawn = points[outside], drawn[outside]
    normals = np.zeros_like(points)
    normals[:, axis] = -sign
    base = {"floor": np.array([0.55, 0.42, 0.3]), "ceiling": np.array([0.93, 0.93, 0.92])}.get(name)
    if base is None:  # all four walls of a room are painted alike
        base = 0.72 + 0.22 * np.random.default_rng(int(1e6 * layout.width)).random(3)
    if name == "floor":
        base = base * rng.uniform(0.6, 1.4)
        side = rng.choice([0.12, 0.4])  # planks, or tiles
        number = np.floor(points[:, 0] / side) * 7 + np.floor(points[:, 1] / (1.2 if side < 0.2 else side)) * 3
        shade = 0.85 + 0.3 * ((number * 0.618034) % 1)
        colours = base * shade[:, None]
    else:
        colours = np.tile(base * rng.uniform(0.94, 1.0), (len(points), 1))
    colours = colours + rng.normal(0, 0.015, points.shape)
    return points, normals, colours.clip(0, 1), np.zeros(len(points)), drawn


def _as_gaussians(
    points_N3: NDArray, normals_N3: NDArray, colours_N3: NDArray, clear_N: NDArray, seed: int
) -> Gaussians:
    """A flat Gaussian for each point: as wide as its neighbours lie, along the directions in which they lie."""
    rng = np.random.default_rng([seed, 2])
    _, nearest_NV = cKDTree(points_N3).query(points_N3, min(NEIGHBOURS + 1, len(points_N3)))
    helper_N3 = np.where(np.abs(normals_N3[:, 2:]) < 0.9, [[0.0, 0, 1]], [[1.0, 0, 0]])
    first_N3 = np.cross(normals_N3, helper_N3)
    first_N3 /= np.maximum(np.linalg.norm(first_N3, axis=1, keepdims=True), 1e-9)
    second_N3 = np.cross(normals_N3, first_N3)
    apart_NV3 = points_N3[nearest_NV[:, 1:]] - points_N3[:, None]
    flat_NV2 = np.stack([(apart_NV3 * first_N3[:, None]).sum(-1), (apart_NV3 * second_N3[:, None]).sum(-1)], -1)
    spread_N22 = flat_NV2.transpose(0, 2, 1) @ flat_NV2 / max(1, flat_NV2.shape[1])
    values_N2, axes_N22 = np.linalg.eigh(spread_N22)
    # Neighbours within a disc of radius r have a second moment of r^2 / 4 along each axis.
    wide_N2 = 0.8 * np.sqrt(np.maximum(values_N2, 1e-8)) * np.exp(rng.normal(0, 0.15, values_N2.shape))
    wide_N2 = wide_N2.clip(0.004, 0.15)
    along_N3 = axes_N22[:, 0, 1:] * first_N3 + axes_N22[:, 1, 1:] * second_N3
    frame_N33 = np.stack([along_N3, np.cross(normals_N3, along_N3), normals_N3], -1)
    thin_N = wide_N2.min(1) / rng.uniform(5, 10, len(points_N3))
    scales_N3 = np.stack([wide_N2[:, 1], wide_N2[:, 0], thin_N], 1)
    light = np.array([0.3, 0.2, 0.93])
    shade_N1 = 0.8 + 0.2 * np.abs(normals_N3 @ light)[:, None]
    opacity_N = (0.9 + 0.09 * rng.uniform(-1, 1, len(points_N3))) * (1 - 0.7 * clear_N)
    colour_N3 = ((colours_N3 * shade_N1).clip(0, 1) - 0.5) / C0
    rest_N9 = rng.normal(0, 0.02, (len(points_N3), 9))

    def tensor(values: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).float()

    return Gaussians(
        tensor(points_N3),
        tensor(np.log(scales_N3)),
        quaternions(tensor(frame_N33)),
        torch.logit(tensor(opacity_N)),
        tensor(np.concatenate([colour_N3, rest_N9], 1)),
        normals_N3=tensor(normals_N3),
    )


def degraded(scene: Gaussians, quality: float, size_3: tuple[float, ...], seed: int) -> Gaussians:
    """Gaussians as a worse reconstruction has them; 1 % are floaters at quality 1 too.

    Jitter along the normal to 5 cm, scales blurred up to 2.5 times, colours off by up to 0.2, up to 30 % missing, and
    up to 10 % floaters (shares of 1 - quality).
    """
    worse = 1 - quality
    generator = torch.Generator().manual_seed(seed * 2 + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = len(scene)
    assert scene.normals_N3 is not None and scene.labels_N is not None and scene.instances_N is not None
    colours_NC = scene.colours_NC.clone()
    colours_NC[:, :3] += worse * 0.2 / C0 * normal(count, 3)
    blur_N1 = worse * (math.log(2.5) * uniform(count, 1) + 0.3 * normal(count, 1))
    scene = replace(
        scene,
        means_N3=scene.means_N3 + worse * 0.05 * normal(count, 1) * scene.normals_N3,
        scales_N3=scene.scales_N3 + blur_N1,
        opacities_N=scene.opacities_N - worse * 2 * uniform(count),
        colours_NC=colours_NC,
    )
    scene = scene.select(uniform(count) >= 0.3 * worse)
    floating = uniform(len(scene)) < 0.01 + 0.1 * worse
    number = int(floating.sum())
    extent_3 = torch.tensor(size_3, dtype=torch.float32)
    places = (uniform(number, 3) - 0.5) * extent_3 * 0.95
    places[:, 2] += HEIGHT / 2
    fields = {
        "means_N3": places,
        "labels_N": torch.full((number,), -1),
        "instances_N": torch.full((number,), -1),
        "opacities_N": -1 + normal(number),
    }
    changed = {}
    for name, value in fields.items():
        together = getattr(scene, name).clone()
        together[floating] = value.to(together)
        changed[name] = together
    return replace(scene, **changed)


def psnr(scene: Gaussians, reference: Gaussians, cameras: list[Camera]) -> float:
    """Decibels of a scene's pictures against those of a reference, over all pixels of all cameras."""
    with torch.no_grad():
        errors = [
            (render(scene, camera).rgb_HW3.clamp(0, 1) - render(reference, camera).rgb_HW3.clamp(0, 1)).square().mean()
            for camera in cameras
        ]
    return float(-10 * torch.stack(errors).mean().clamp(min=1e-12).log10())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="a .ply to write, or a folder for .npy arrays")
    parser.add_argument("--seed", type=Seed, default=0, help="of the room")
    parser.add_argument("--part", choices=("train", "test"), default="test", help="whose furniture it gets")
    parser.add_argument("--density", type=Positive, default=400.0, help="Gaussians per square metre of furniture")
    parser.add_argument("--quality", type=Portion, default=1.0, help="of the reconstruction; 1 is the best")
    options = parser.parse_args(argv)
    room = make_room(options.seed, options.part, options.density, quality=options.quality)
    write_scene(options.out, room.gaussians)
    things = ", ".join(CLASSES[label] for label in room.labels_I[6:].tolist())
    print(f"{options.out}: a {room.kind} of {len(room.gaussians):,} Gaussians with {things}")


if __name__ == "__main__":
    run_main(main)
