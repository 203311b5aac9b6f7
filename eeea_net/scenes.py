"""Pictures with boxes, label maps and keypoints for the transfer of section 4.3, and their batches.

Two sets: Shapes (drawn, so that everything is exact; keypoints are corners and tips) and PhotoCollage (photographic
cut-outs on photographs; boxes and masks come from the cut-outs' outlines, keypoints are the outermost points of an
outline: left, top, right, bottom).

Every picture that a network sees is an affine window of a stored one: boxes, maps and points go through the same
matrix, and everything drawn is a function of (seed, step).

Shape suffixes: N pictures, B batch, C channels, H W sides, K objects, P keypoints; coordinates are fractions of the
side, y down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.photos import CATEGORIES, PhotoCollage
from common.data.sampling import step_generator
from common.data.shapes import KEYPOINTS, MAX_KEYPOINTS, SHAPES, Shapes
from common.errors import UserError
from common.paths import cache_dir
from common.study import kept_tensors
from eeea_net.transfer_config import AugmentOptions, SceneConfig, Task

EXTREMES = ("left", "top", "right", "bottom")
# Side of a crop for the pose over the longer side of its box; SimpleBaseline's 1.25 would cut off turned corners.
AROUND = 1.5
LEAST_VISIBLE = 0.4  # share of a box that must be inside a window for the object to count
VERSION = 1  # of what `_photos` makes
DRAWS = 7  # uniform numbers for a picture
TEST = 2**40  # the step whose draws turn the test crops


@dataclass(frozen=True)
class Scenes:
    """A part of a set, in memory.

    Attributes:
        boxes_NK4: x0 y0 x1 y1. labels_NK: class, -1 where there is no object.
        maps_NHW: 0 for the background, 1 + class elsewhere.
        points_NKP3: x, y, and 1 where there is such a point.
        mirrored_CP: which point of a class takes a point's place in a mirrored picture.
        turn: largest angle in degrees by which crops for the pose are turned; 0: the set's objects vary by themselves.
    """

    name: str
    classes: tuple[str, ...]
    images_NCHW: Tensor
    boxes_NK4: Tensor
    labels_NK: Tensor
    maps_NHW: Tensor
    points_NKP3: Tensor
    mirrored_CP: Tensor
    turn: float

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def in_channels(self, channels: int) -> Scenes:
        """The same in colour (3) or grey (1)."""
        if self.images_NCHW.shape[1] == channels:
            return self
        weights_C = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        grey_N1HW = (self.images_NCHW * weights_C).sum(1, keepdim=True)
        return replace(self, images_NCHW=grey_N1HW.round().to(torch.uint8))

    @property
    def points(self) -> int:
        return self.points_NKP3.shape[2]

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(mean, deviation) [C] of the pixels in [0, 1]."""
        pixels = self.images_NCHW.double() / 255
        return pixels.mean((0, 2, 3)).float(), pixels.std((0, 2, 3)).float().clamp_min(1e-3)

    @cached_property
    def objects(self) -> Tensor:
        """(picture, object) int64 [M, 2] of all objects with keypoints."""
        return (self.points_NKP3[..., 2].sum(-1) > 0).nonzero()


def _mirrored_shapes() -> Tensor:
    """All shapes are symmetric: the mirrored place of a point is that of the point on the other side."""
    order = torch.arange(MAX_KEYPOINTS).repeat(len(SHAPES), 1)
    for row, shape in zip(order, SHAPES):
        places = KEYPOINTS[shape]
        for point, (u, v) in enumerate(places):
            row[point] = min(
                range(len(places)), key=lambda other: (places[other][0] + u) ** 2 + (places[other][1] - v) ** 2
            )
    return order


def _shapes(config: SceneConfig, split: str, count: int, seed: int) -> Scenes:
    data = Shapes(split, count, config.size, caption="canonical", seed=seed)  # type: ignore[arg-type]
    items = [data[i] for i in range(count)]
    boxes_NK4 = torch.stack([item["boxes"] for item in items])
    points_NKP3 = torch.zeros(count, boxes_NK4.shape[1], MAX_KEYPOINTS, 3)
    for number in range(count):
        for place, thing in enumerate(data.scene(number).objects):
            for point, (x, y) in enumerate(thing.keypoints):
                points_NKP3[number, place, point] = torch.tensor([x, y, 1.0])
    return Scenes(
        "shapes",
        SHAPES,
        torch.stack([item["image"] for item in items]),
        boxes_NK4,
        torch.stack([item["classes"] for item in items]),
        torch.stack([item["label_map"] for item in items]),
        points_NKP3,
        _mirrored_shapes(),
        config.turn,
    )


def extreme_points(mask_HW: np.ndarray) -> list[tuple[float, float]]:
    """The outermost points of an outline, (x, y) as fractions: left, top, right, bottom, each the middle of its run."""
    height, width = mask_HW.shape
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))

    def middle(line: np.ndarray) -> float:
        return float(np.flatnonzero(line).mean()) + 0.5

    left, right, top, bottom = columns[0], columns[-1], rows[0], rows[-1]
    places = [
        (left + 0.5, middle(mask_HW[:, left])),
        (middle(mask_HW[top]), top + 0.5),
        (right + 0.5, middle(mask_HW[:, right])),
        (middle(mask_HW[bottom]), bottom + 0.5),
    ]
    return [(float(x) / width, float(y) / height) for x, y in places]


def _photos(config: SceneConfig, split: str, count: int, seed: int) -> Scenes:
    data = PhotoCollage(split, count, config.size, seed, config.path)  # type: ignore[arg-type]

    def made() -> dict[str, Tensor]:
        items = [data[i] for i in range(count)]
        labels_NK = torch.stack([item["categories"] for item in items])
        points_NKP3 = torch.zeros(*labels_NK.shape, len(EXTREMES), 3)
        for number, item in enumerate(items):
            for place, mask_HW in enumerate(item["masks"].numpy()):
                if labels_NK[number, place] >= 0 and mask_HW.any():
                    points_NKP3[number, place, :, :2] = torch.tensor(extreme_points(mask_HW))
                    points_NKP3[number, place, :, 2] = 1
        return {
            "images": torch.stack([item["image"] for item in items]),
            "boxes": torch.stack([item["boxes"] for item in items]),
            "labels": labels_NK,
            "maps": torch.stack([item["label_map"] for item in items]),
            "points": points_NKP3,
        }

    settings = {"set": data.fingerprint, "version": VERSION}
    found = kept_tensors(
        cache_dir("scenes") / f"photos-{split}-{count}-{config.size}-{seed}.safetensors", made, settings
    )
    mirrored = torch.tensor([2, 1, 0, 3]).repeat(len(CATEGORIES), 1)
    boxes, labels, maps, points = (found[name] for name in ("boxes", "labels", "maps", "points"))
    return Scenes("photos", CATEGORIES, found["images"], boxes, labels, maps, points, mirrored, turn=0.0)


def open_scenes(config: SceneConfig, seed: int = 0) -> tuple[Scenes, Scenes]:
    """(training part, test part). Test pictures of the photographs show known objects before scenes that training
    never shows them in.

    Raises:
        UserError: the photographs are not there (`make data-photos`).
    """
    if config.name == "shapes":
        return _shapes(config, "train", config.train, seed), _shapes(config, "test", config.test, seed)
    return _photos(config, "train", config.train, seed), _photos(config, "scene", config.test, seed)


@dataclass(frozen=True)
class Window:
    """Affine windows of pictures: what is at `out` (each coordinate -1..1 of the window) is read at `middle` + `turned`
    x `out` of the picture (-1..1 too)."""

    middle_B2: Tensor
    turned_B22: Tensor

    @classmethod
    def of(cls, centre_B2: Tensor, side_B: Tensor, angle_B: Tensor, flip_B: Tensor) -> Window:
        """Squares of a side around a centre (fractions), turned by an angle (radians), mirrored where `flip`."""
        cos, sin = angle_B.cos(), angle_B.sin()
        mirror = torch.where(flip_B, -1.0, 1.0)
        rows = [torch.stack([cos * mirror, -sin], -1), torch.stack([sin * mirror, cos], -1)]
        return cls(2 * centre_B2 - 1, side_B[:, None, None] * torch.stack(rows, -2))

    def read(self, x_BCHW: Tensor, side: int, mode: str = "bilinear", padding: str = "border") -> Tensor:
        """What the windows show, [B, C, side, side]."""
        theta_B23 = torch.cat([self.turned_B22, self.middle_B2[:, :, None]], 2)
        grid = F.affine_grid(theta_B23, [len(x_BCHW), x_BCHW.shape[1], side, side], align_corners=False)
        return F.grid_sample(x_BCHW, grid, mode=mode, padding_mode=padding, align_corners=False)

    def see(self, places_BN2: Tensor) -> Tensor:
        """Where points of the picture are in the window, as fractions of its side (outside: below 0 or above 1)."""
        moved = (2 * places_BN2 - 1 - self.middle_B2[:, None]) @ torch.linalg.inv(self.turned_B22).transpose(1, 2)
        return (moved + 1) / 2


def seen_boxes(window: Window, boxes_BK4: Tensor, labels_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes in windows that are not turned, clipped; label -1 for those that are mostly outside."""
    corners = window.see(boxes_BK4.reshape(len(boxes_BK4), -1, 2)).view(*boxes_BK4.shape[:2], 2, 2)
    low, high = corners.amin(2), corners.amax(2)
    area_BK = (high - low).prod(-1)
    low, high = low.clamp(0, 1), high.clamp(0, 1)
    there = (labels_BK >= 0) & ((high - low).prod(-1) >= LEAST_VISIBLE * area_BK)
    return torch.cat([low, high], -1), torch.where(there, labels_BK, -1)


@dataclass
class SceneBatches:
    """Batches of a task as a function of (seed, step): epoch e is its own random order, leftovers are dropped.

    A batch is normalised pictures [B, C, H, W] and a dict: `boxes` [B, K, 4] and `labels` [B, K] (detection), `map`
    [B, H, W] (segmentation), `points` [B, P, 3] (pose).
    """

    scenes: Scenes
    task: Task
    batch_size: int
    seed: int
    augment: AugmentOptions
    side: int
    scale: tuple[Tensor, Tensor]
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.count = len(self.scenes.objects) if self.task == "pose" else len(self.scenes)
        if self.count < self.batch_size:
            what = "objects with keypoints" if self.task == "pose" else "pictures"
            raise UserError(
                f"--data.train: {self.count} {what} are fewer than a batch of {self.batch_size}; give more, or a "
                "smaller --fit.batch_size"
            )
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    def run(self, start: int, stop: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Batches of steps start to stop - 1."""
        for step in range(start, stop):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = torch.randperm(self.count, generator=step_generator(self.seed, -1 - epoch))
            index_B = self._order[place * self.batch_size : (place + 1) * self.batch_size]
            draws_B7 = torch.rand(len(index_B), DRAWS, generator=step_generator(self.seed, step))
            yield self.seen(index_B, self.augment, draws_B7)

    def seen(self, index_B: Tensor, augment: AugmentOptions, draws_B7: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch of these pictures (for the pose: objects), changed by uniform numbers."""
        signed, flip_B = 2 * draws_B7 - 1, draws_B7[:, 6] < (0.5 if augment.flip else 0.0)
        zoom_B = augment.zoom ** signed[:, 0]
        shift_B2 = augment.shift * signed[:, 1:3]
        if self.task == "pose":
            target, window, index_B = self._pose(index_B, zoom_B, shift_B2, signed[:, 3], flip_B)
        else:
            window = Window.of(0.5 + shift_B2, zoom_B, torch.zeros_like(zoom_B), flip_B)
            target = self._whole(index_B, window)
        x_BCHW = window.read(self.scenes.images_NCHW[index_B].float() / 255, self.side)
        contrast_B, light_B = 1 + augment.jitter * signed[:, 4], augment.jitter * signed[:, 5]
        x_BCHW = ((x_BCHW - 0.5) * contrast_B[:, None, None, None] + 0.5 + light_B[:, None, None, None]).clamp(0, 1)
        mean_C, std_C = self.scale
        x_BCHW = (x_BCHW - mean_C[:, None, None]) / std_C[:, None, None]
        return x_BCHW.to(self.device), {name: value.to(self.device) for name, value in target.items()}

    def _whole(self, index_B: Tensor, window: Window) -> dict[str, Tensor]:
        scenes = self.scenes
        if self.task == "detection":
            boxes, labels = seen_boxes(window, scenes.boxes_NK4[index_B], scenes.labels_NK[index_B])
            return {"boxes": boxes, "labels": labels}
        maps_B1HW = scenes.maps_NHW[index_B].float()[:, None]
        return {"map": window.read(maps_B1HW, self.side, "nearest", "zeros")[:, 0].long()}

    def _pose(
        self, index_B: Tensor, zoom_B: Tensor, shift_B2: Tensor, turn_B: Tensor, flip_B: Tensor
    ) -> tuple[dict[str, Tensor], Window, Tensor]:
        """Squares around the objects' boxes, turned by up to the set's angle."""
        scenes = self.scenes
        picture_B, object_B = scenes.objects[index_B].unbind(1)
        boxes_B4 = scenes.boxes_NK4[picture_B, object_B]
        size_B2 = boxes_B4[:, 2:] - boxes_B4[:, :2]
        side_B = AROUND * size_B2.amax(1) * zoom_B
        centre_B2 = (boxes_B4[:, 2:] + boxes_B4[:, :2]) / 2 + shift_B2 * side_B[:, None]
        window = Window.of(centre_B2, side_B, turn_B * math.radians(scenes.turn), flip_B)
        points_BP3 = scenes.points_NKP3[picture_B, object_B]
        mirrored_BP = scenes.mirrored_CP[scenes.labels_NK[picture_B, object_B]]
        other_BP3 = points_BP3.gather(1, mirrored_BP[..., None].expand_as(points_BP3))
        points_BP3 = torch.where(flip_B[:, None, None], other_BP3, points_BP3)
        seen_BP2 = window.see(points_BP3[..., :2])
        inside_BP = ((seen_BP2 >= 0) & (seen_BP2 < 1)).all(-1) & (points_BP3[..., 2] > 0)
        extent_B2 = size_B2 / side_B[:, None]
        target = {"points": torch.cat([seen_BP2, inside_BP[..., None].float()], -1), "extent": extent_B2}
        return target, window, picture_B

    def test(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All pictures once, in order, unchanged but for the fixed angles of crops for the pose."""
        plain = replace(self.augment, flip=False, zoom=1.0, shift=0.0, jitter=0.0)
        draws_N7 = torch.rand(self.count, DRAWS, generator=step_generator(self.seed, TEST))
        for index_B in torch.arange(self.count).split(self.batch_size):
            yield self.seen(index_B, plain, draws_N7[index_B])


def batches_of(
    scenes: Scenes, task: Task, config: Any, seed: int, scale: tuple[Tensor, Tensor], device: torch.device | str
) -> SceneBatches:
    """Of a run's options (`TransferConfig`)."""
    return SceneBatches(scenes, task, config.fit.batch_size, seed, config.augment, config.data.size, scale, device)
