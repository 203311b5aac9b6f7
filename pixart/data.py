"""Captioned images of a stage, sorted into aspect buckets: procedural scenes, emoji, or the user's own folder.

    pictures = open_pictures(config.data, "train", seed=0, multiple=8)
    pictures.images([0, 1, 2])      # uint8 [3, 3, h, w]; the indices must lie in one bucket
    pictures.captions[0], pictures.labels[0], pictures.originals_N2[0], pictures.ratios_N[0]

Batches for training hold images of one bucket (`BucketDataModule`) and are functions of (seed, step) alone.

Shape suffixes: N = images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from common.data import shapes as scenes
from common.data.cache import fingerprint_path, fingerprint_strings
from common.data.folders import broken_rows, need_words, open_source
from common.data.rows import LEFT_OUT, Source, hold_out
from common.data.sampling import StepDataModule
from common.data.shapes import Scene, Spec
from common.errors import UserError
from common.images import CorruptImage, decoded, picture_size
from pixart.buckets import (
    Bucket,
    BucketBatchSampler,
    assign_buckets,
    bucket_table,
    fit_to_bucket,
    nearest_bucket,
    usable_shapes,
)
from pixart.config import DataConfig

Split = Literal["train", "test"]
Part = Literal["train", "test", "all"]

# Bump whenever the same (seed, part, index) gives another scene or caption: it is part of every cache's name.
CONTENT_VERSION = 1
# Kind of scenes -> its tasks and textures.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one": (("color",), ("solid",)),
    "few": (("color", "attr", "position", "three"), ("solid",)),
    "hq": (("single", "two", "count", "color", "position", "attr", "three"), scenes.TEXTURES),
}
_TRANSPOSED = {"above": "left of", "below": "right of", "left of": "above", "right of": "below"}


@dataclass
class Pictures:
    """Captioned images in aspect buckets.

    Attributes:
        name: for messages.
        captions: one a picture.
        labels_N: class of each, -1 where there is none; `classes` counts them.
        bucket_N: which of `buckets` (image sizes and ratio keys) each picture is framed to.
        originals_N2: height and width of each picture before framing (micro-conditioning).
        draw: indices of one bucket -> uint8 [n, 3, h, w].
        fingerprint: of the pixels (what a cache of latents is keyed by).
        specs: what each picture shows, for scenes.
        trained_on: these are to be held out, but there are too few: training sees them.
    """

    name: str
    captions: list[str]
    labels_N: Tensor
    classes: int
    bucket_N: Tensor
    buckets: list[Bucket]
    originals_N2: Tensor
    draw: Callable[[list[int]], Tensor]
    fingerprint: str
    specs: list[Spec] | None = None
    trained_on: bool = False

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def ratios_N(self) -> Tensor:
        """The bucket key of every picture."""
        return torch.tensor([bucket.ratio for bucket in self.buckets])[self.bucket_N]

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 [n, 3, h, w]; all indices must lie in one bucket."""
        if len(set(self.bucket_N[list(indices)].tolist())) > 1:
            raise ValueError("pictures of several buckets cannot be stacked")
        return self.draw(list(indices))

    def members(self, bucket: int) -> list[int]:
        """Indices of the pictures in a bucket."""
        return torch.nonzero(self.bucket_N == bucket).flatten().tolist()


def open_pictures(
    config: DataConfig, part: Part, seed: int = 0, multiple: int = 8, count: int | None = None
) -> Pictures:
    """The captioned images that a stage's `data` options describe.

    Args:
        part: train, test for held-out pictures, or all of a folder.
        multiple: bucket sides are multiples of this (the codec's factor times the patch size).
        count: at most so many pictures (default: `images` for train, `eval_images` for test).

    Raises:
        UserError: an option or a file of the user's is wrong, named in the message.
    """
    if config.size < multiple or config.size % multiple:
        raise UserError(
            f"data.size {config.size}: expected a multiple of {multiple} (the codec's factor times network.patch_size)"
        )
    if any(not 0.1 <= ratio <= 10 for ratio in config.ratios):
        raise UserError(f"data.ratios {config.ratios}: height / width must lie between 0.1 and 10")
    limit = count or (config.images if part == "train" else config.eval_images)
    if limit is not None and limit < 1:
        raise UserError(f"data.images {limit}: a data set needs at least one image")
    if config.name == "folder":
        opened = _folder(config, part, seed, multiple, limit)
    else:
        split: Split = "train" if part == "train" else "test"
        opened = {"shapes": _shapes, "emoji": _emoji}[config.name](config, split, seed, multiple, limit)
    if config.prompt is not None:
        opened.captions = [config.prompt] * len(opened)
    return opened


def stage_buckets(config: DataConfig, multiple: int) -> list[Bucket]:
    """The image sizes of a stage, ascending in ratio: those nearest to `ratios`, or the whole table."""
    table = bucket_table(config.size, multiple)
    if not config.ratios:
        return list(table)
    return [table[i] for i in sorted({nearest_bucket(table, ratio, 1.0) for ratio in config.ratios})]


class BucketDataModule(StepDataModule):
    """`StepDataModule` whose batches hold pictures of one bucket; the data set has `bucket_N` and `__getitems__`."""

    def sampler(self, batch_size: int, steps: int, seed: int, **options: Any) -> Sampler[list[int]]:
        return BucketBatchSampler(self.dataset.bucket_N, batch_size, steps, seed, **options)  # type: ignore[attr-defined]


def draw_scene(
    rng: np.random.Generator,
    task: str,
    shapes: Sequence[str],
    colours: Sequence[str],
    textures: Sequence[str],
    ratio: float = 1.0,
) -> Scene:
    """A scene of `common.data.shapes`, or one with three different objects (task `three`, of kind `attr`).

    Args:
        ratio: height / width of the picture. Relations are drawn along the longer side, where a relation that is clear
            in fractions of the sides is clear in pixels too; the held-out combinations stay unseen.
    """
    world = (tuple(shapes), tuple(colours), tuple(textures))
    while True:
        if task == "three":
            scene = _three_objects(rng, *world)
        else:
            scene = scenes.sample_scene(rng, task, "train", *world)
        across = ("above", "below") if ratio < 1 else ("left of", "right of") if ratio > 1 else ()
        if scene.relation is not None and scene.relation in across:
            turned = tuple(dataclasses.replace(o, cx=o.cy, cy=o.cx) for o in scene.objects)
            scene = dataclasses.replace(scene, objects=turned, relation=_TRANSPOSED[scene.relation])
        if not _shows_heldout(on_square(scene, ratio)):
            return scene


def _three_objects(rng: np.random.Generator, *world: tuple[str, ...]) -> Scene:
    while True:
        crowd = scenes.sample_scene(rng, "count", "train", *world)
        if len(crowd.objects) >= 3:
            break
    objects: list[scenes.Object] = []
    while len(objects) < 3:
        new = scenes.sample_scene(rng, "color", "train", *world).objects[0]
        if new.pair not in [o.pair for o in objects]:
            place = crowd.objects[len(objects)]
            objects.append(dataclasses.replace(new, cx=place.cx, cy=place.cy, radius=place.radius))
    return dataclasses.replace(crowd, task="attr", objects=tuple(objects))


def _shows_heldout(scene: Scene) -> bool:
    pairs = [(a, b) for i, a in enumerate(scene.objects) for b in scene.objects[i + 1 :]]
    for first, second in pairs:
        relation = scenes.relation_between(first, second)
        if relation is not None and scenes.is_heldout_relation(first.pair, relation, second.pair):
            return True
    return False


def on_square(scene: Scene, ratio: float) -> Scene:
    """The scene of a picture with sides in this ratio, moved to the top left part of the square around it."""
    high, wide = min(1.0, ratio), min(1.0, 1 / ratio)
    short = min(high, wide)
    moved = (dataclasses.replace(o, cx=o.cx * wide, cy=o.cy * high, radius=o.radius * short) for o in scene.objects)
    return dataclasses.replace(scene, objects=tuple(moved))


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """Image uint8 [height, width, 3]: radii are fractions of the shorter side, centres of each side."""
    side = max(height, width)
    return scenes.render(on_square(scene, height / width), side)[:height, :width]


def pad_to_square(images_N3HW: Tensor) -> Tensor:
    """Extend pictures to squares by the median of their border, as the verifier reads squares: uint8 [N, 3, S, S]."""
    height, width = images_N3HW.shape[2:]
    side = max(height, width)
    border = torch.cat(
        [images_N3HW[:, :, 0], images_N3HW[:, :, -1], images_N3HW[:, :, :, 0], images_N3HW[:, :, :, -1]], dim=2
    )
    square = border.median(dim=2).values[:, :, None, None].repeat(1, 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top : top + height, left : left + width] = images_N3HW
    return square


def world_of(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """Shapes, colours and textures that the scenes of a stage are made of."""
    world = {"shapes": tuple(config.shapes or scenes.SHAPES), "colours": tuple(config.colours or scenes.COLOURS)}
    for known, given in ((scenes.SHAPES, world["shapes"]), (scenes.COLOURS, world["colours"])):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"data.shapes and data.colours: unknown {unknown[0]!r}; choose from {', '.join(known)}")
    return {**world, "textures": KINDS["hq" if config.scenes == "all" else config.scenes][1]}


def _shapes(config: DataConfig, part: Split, seed: int, multiple: int, limit: int | None) -> Pictures:
    if limit is None:
        raise UserError("data.images is missing: say how many scenes to draw, for example --data.images 10000")
    world = world_of(config)
    kinds = tuple(KINDS) if config.scenes == "all" else (config.scenes,)
    buckets = stage_buckets(config, multiple)
    stream = 0 if part == "train" else 1

    def generator(i: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed, stream, purpose, i])

    def scene_of(i: int) -> tuple[Scene, int]:
        rng = generator(i, 0)
        tasks, textures = KINDS[kinds[i % len(kinds)]]
        bucket = int(rng.random() * len(buckets))
        ratio = buckets[bucket].height / buckets[bucket].width
        task = tasks[i // len(kinds) % len(tasks)]
        return draw_scene(rng, task, world["shapes"], world["colours"], textures, ratio), bucket

    drawn = [scene_of(i) for i in range(limit)]
    captions = []
    for i, (scene, _) in enumerate(drawn):
        rng = generator(i, 1)
        if config.captions == "web" and rng.random() < 0.2:  # the caption of another image
            scene = drawn[int(rng.random() * limit)][0]
        captions.append(scenes.caption(scene, config.captions, rng))

    def draw(indices: list[int]) -> Tensor:
        bucket = buckets[drawn[indices[0]][1]]
        pictures = [render(drawn[i][0], bucket.height, bucket.width) for i in indices]
        return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())

    first = [scene.objects[0] for scene, _ in drawn]
    labels = [world["colours"].index(o.colour) * len(world["shapes"]) + world["shapes"].index(o.shape) for o in first]
    bucket_N = torch.tensor([bucket for _, bucket in drawn])
    key = [CONTENT_VERSION, scenes.CONTENT_VERSION, seed, part, limit, kinds, world, [vars(b) for b in buckets]]
    return Pictures(
        name=f"shapes ({config.scenes})",
        captions=captions,
        labels_N=torch.tensor(labels),
        classes=len(world["shapes"]) * len(world["colours"]),
        bucket_N=bucket_N,
        buckets=buckets,
        originals_N2=torch.tensor([[bucket.height, bucket.width] for bucket in buckets])[bucket_N],
        draw=draw,
        fingerprint=fingerprint_strings([json.dumps(key)]),
        specs=[scenes.spec_of(scene) for scene, _ in drawn],
    )


def _emoji(config: DataConfig, part: Split, seed: int, multiple: int, limit: int | None) -> Pictures:
    from common.data.emoji import GROUPS, STYLE_WORDS, EmojiCap

    if config.ratios != [1.0]:
        raise UserError("data.ratios: emoji are square; leave it at [1.0]")
    data = EmojiCap(part, size=config.size, styles=config.styles, seed=seed)
    count = min(limit or len(data), len(data))
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()

    def words(i: int) -> str:
        record = data.records[i]
        tags = {"dense": record.tags, "mixed": record.tags[:1]}.get(config.captions, ())
        return ", ".join([record.concept, f"{STYLE_WORDS[record.style]} style", *tags])

    return Pictures(
        name="emoji",
        captions=[words(i) for i in chosen],
        labels_N=torch.tensor([data.records[i].group for i in chosen]),
        classes=len(GROUPS),
        bucket_N=torch.zeros(count, dtype=torch.long),
        buckets=stage_buckets(config, multiple),
        originals_N2=torch.full((count, 2), config.size),
        draw=lambda indices: torch.from_numpy(data.images[[chosen[i] for i in indices]].transpose(0, 3, 1, 2).copy()),
        fingerprint=fingerprint_strings([hashlib.sha256(data.images[chosen].tobytes()).hexdigest()]),
    )


def folder_source(config: DataConfig, need: Sequence[str] = ()) -> Source:
    """The user's pictures, undecoded; `need` as for `open_source`."""
    if config.path is None:
        raise UserError("data.path is missing: give a folder with metadata.jsonl, or with one subfolder per class")
    root = Path(config.path)
    if not root.exists():
        raise UserError(f"data.path {root}: no such folder")
    text = config.text_column if config.prompt is None else LEFT_OUT  # one caption for all needs no other
    return open_source(root, config.image_column, text, config.label_column, need)


def content_version(config: DataConfig) -> str:
    """What the pictures of our own sets depend on beside their options."""
    if config.name == "emoji":
        from common.data.emoji import ARCHIVE

        return fingerprint_path(ARCHIVE)
    return f"{config.name} {CONTENT_VERSION} {scenes.CONTENT_VERSION}"


def _folder(config: DataConfig, part: Part, seed: int, multiple: int, limit: int | None) -> Pictures:
    source = folder_source(config)
    root = source.name
    broken = broken_rows(source)
    readable = [i for i in range(len(source)) if i not in broken]
    if config.prompt is None:
        try:
            need_words(source, readable)
        except UserError:
            folder_source(config, need=("caption",))  # names several columns that may be
            raise
    sizes_of = {i: picture_size(source.raw(i)) for i in readable}
    usable = {readable[i] for i in usable_shapes(torch.tensor([sizes_of[i] for i in readable]))}
    if not usable:
        raise UserError(f"{root}: every picture is longer than four times its width")
    train, held_out = hold_out(source)
    trained_on = part == "test" and not held_out
    if trained_on:
        warnings.warn(f"{root}: too few pictures to hold some out; samples show those of the training", stacklevel=3)
    rows = {"train": train, "test": held_out or train, "all": range(len(source))}[part]
    kept = [i for i in rows if i in usable][:limit]
    if not kept:
        raise UserError(f"{root}: no usable picture is left for the part {part}")
    buckets = stage_buckets(config, multiple)
    originals_N2 = torch.tensor([sizes_of[i] for i in kept])
    bucket_N = torch.from_numpy(assign_buckets(buckets, originals_N2))

    def draw(indices: list[int]) -> Tensor:
        framed = []
        for i in indices:
            try:
                bucket = buckets[int(bucket_N[i])]
                with decoded(source.raw(kept[i]), side=max(bucket.height, bucket.width)) as picture:
                    framed.append(fit_to_bucket(picture, bucket))
            except CorruptImage as error:
                raise UserError(f"{source.where(kept[i])}: {error}; remove it from the folder") from None
        return torch.stack(framed)

    labels = [source.label(i)[1] for i in kept]
    sizes = json.dumps([vars(bucket) for bucket in buckets])
    return Pictures(
        name=root,
        captions=[source.label(i)[0] for i in kept],
        labels_N=torch.tensor(labels),
        classes=len(source.classes) or max(source.label(i)[1] for i in readable) + 1,
        bucket_N=bucket_N,
        buckets=buckets,
        originals_N2=originals_N2,
        draw=draw,
        fingerprint=fingerprint_strings([sizes, source.fingerprint, repr(kept)]),
        trained_on=trained_on,
    )
