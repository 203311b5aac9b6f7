"""Scenes to what the network takes: voxels, augmentation, batches; and the scenes that the options describe.

A batch is a dict of tensors over the voxels of all its scenes: coord [N, 3] in metres, grid_coord [N, 3], feat [N, C],
offset [B] (where each scene ends), label [N] and instance [N] (-1 for none), lang_feat [N, F], valid [N].

Shape suffixes: N Gaussians, V voxels, F width of features, B scenes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from common.data.cache import fingerprint_files, fingerprint_strings, fingerprint_tensors
from common.data.sampling import StepBatchSampler, StepDataModule, derive_seed
from common.errors import UserError
from common.files import file_sha256, list_files, sweep
from common.paths import cache_dir, existing_path
from common.weights import read_weights, save_weights
from scenesplat.data_config import DataConfig
from scenesplat.fitted import fitted_room
from scenesplat.furniture import ARCHIVE
from scenesplat.gaussians import Gaussians, axis_turn, inputs
from scenesplat.lifting import Fusion, View, lift
from scenesplat.ply import read_scene
from scenesplat.rooms import CLASSES, SEEN, Part, Room, make_room
from scenesplat.teacher import FolderTeacher, SimulatedTeacher, Teacher
from scenesplat.text import TextSpace
from scenesplat.voxels import Grid

MADE = 1  # of the lifted labels in the cache; a change of rooms, rasteriser, teacher or lifting raises it
TEST_SEEDS = 1_000_000  # rooms of the test part have other seeds than any training room


def centre_shift(coord_N3: Tensor, apply_z: bool = True) -> Tensor:
    """What moves the middle of a scene's box, and with `apply_z` its lowest point, to zero."""
    low_3, high_3 = coord_N3.min(0).values, coord_N3.max(0).values
    shift_3 = -(low_3 + high_3) / 2
    shift_3[2] = -low_3[2] if apply_z else 0
    return shift_3


def chunks(
    scene: Gaussians, side: float = 6.0, stride: float = 3.0, least: int = 10_000, most: int = 6
) -> list[Tensor]:
    """Windows of a large scene in plan: numbers of their Gaussians (preprocessing of the released code).

    A scene that is smaller than a window is one chunk, where the released code drops it.

    Args:
        side, stride: metres. least: Gaussians below which a window is dropped. most: windows; the fullest are kept.
    """
    low_2, high_2 = (getattr(scene.means_N3[:, :2], end)(0).values for end in ("min", "max"))
    starts = [
        [float(low) + stride * i for i in range(max(1, math.ceil((float(high - low) - side) / stride) + 1))]
        for low, high in zip(low_2, high_2)
    ]
    x, y, _ = scene.means_N3.unbind(1)
    found = []
    for left in starts[0]:
        for bottom in starts[1]:
            rows = ((x >= left) & (x <= left + side) & (y >= bottom) & (y <= bottom + side)).nonzero()[:, 0]
            if len(rows) >= least or len(starts[0]) * len(starts[1]) == 1:
                found.append(rows)
    return sorted(found, key=len, reverse=True)[:most]


# Augmentation (section 2.4 of the released configs, in their order) --------------------------------------------------


class Draws:
    """Random numbers of one scene's augmentation."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < share

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def moved_about(scene: Gaussians, draws: Draws) -> Gaussians:
    """A training scene turned, scaled, mirrored, jittered and bent; every rotation turns the Gaussians too."""
    scene = scene.moved(centre_shift(scene.means_N3))
    if draws.chance(0.2):
        scene = scene.select(torch.rand(len(scene), generator=draws.generator) >= 0.2)
    matrix = torch.eye(3)
    for axis, most in (("z", math.pi), ("x", math.pi / 64), ("y", math.pi / 64)):
        if draws.chance(0.5):
            matrix = axis_turn(axis, draws.uniform(-most, most)) @ matrix
    scene = scene.turned(matrix).scaled(draws.uniform(0.9, 1.1))
    for number in (0, 1):
        if draws.chance(0.5):
            scene = scene.mirrored(number)
    scene = scene.moved((0.005 * draws.normal(len(scene), 3)).clamp(-0.01, 0.01))
    if draws.chance(0.95):
        for granularity, magnitude in ((0.2, 0.4), (0.8, 1.6)):
            scene = scene.moved(elastic(scene.means_N3, granularity, magnitude, draws.generator))
    return scene


def elastic(coord_N3: Tensor, granularity: float, magnitude: float, generator: torch.Generator) -> Tensor:
    """Smooth displacements [N, 3] in metres: noise on a grid of `granularity` metres, blurred twice, interpolated."""
    low_3, high_3 = coord_N3.min(0).values, coord_N3.max(0).values
    sizes = [int(v) + 3 for v in ((high_3 - low_3) / granularity).tolist()]
    noise = torch.randn(1, 3, *sizes, generator=generator)
    for _ in range(2):
        noise = F.avg_pool3d(noise, 3, 1, 1)
    places_N3 = (coord_N3 - low_3 + granularity) / (granularity * (torch.tensor(sizes) - 1)) * 2 - 1
    # grid_sample counts the last axis first
    found = F.grid_sample(noise, places_N3.flip(1)[None, :, None, None], align_corners=True)
    return magnitude * found[0, :, :, 0, 0].t()


def recoloured(colour_N3: Tensor, draws: Draws) -> Tensor:
    """Contrast, cast and noise of colours in 0..255."""
    if draws.chance(0.2):
        low_3, high_3 = colour_N3.min(0).values, colour_N3.max(0).values
        blend = draws.uniform(0, 1)
        stretched_N3 = (colour_N3 - low_3) * (255 / (high_3 - low_3).clamp(min=1))
        colour_N3 = (1 - blend) * colour_N3 + blend * stretched_N3
    if draws.chance(0.95):
        cast_13 = (torch.rand(1, 3, generator=draws.generator) - 0.5) * 255 * 2 * 0.05
        colour_N3 = (colour_N3 + cast_13).clamp(0, 255)
    if draws.chance(0.95):
        colour_N3 = (colour_N3 + 0.05 * 255 * draws.normal(*colour_N3.shape)).clamp(0, 255)
    return colour_N3


# Batches ------------------------------------------------------------------------------------------------------------


def example(
    scene: Gaussians, voxel: float, names: Sequence[str], seed: int, augment: bool, largest: int
) -> dict[str, Tensor]:
    """One scene as the network takes it in training: one Gaussian of each voxel.

    Args:
        names: attributes. seed: of everything random in it. largest: voxels; of larger scenes a sphere is cut out.
    """
    draws = Draws(seed)
    scene = replace(scene, colours_NC=scene.colours_NC[:, :3])  # higher bands are not seen
    scene = moved_about(scene, draws) if augment else scene.moved(centre_shift(scene.means_N3))
    seen = scene.attributes()
    if augment:
        seen["colour"] = recoloured(seen["colour"], draws)
    grid = Grid.of(seen["coord"], voxel)
    rows = grid.one_each(draws.generator)
    if len(rows) > largest:
        middle = int(torch.randint(len(rows), (), generator=draws.generator))
        places = seen["coord"][rows]
        rows = rows[(places - places[middle]).norm(dim=1).argsort(stable=True)[:largest]]
    found = {
        "coord": seen["coord"][rows] + centre_shift(seen["coord"][rows], apply_z=False),
        "grid_coord": grid.cells_N3[rows],
        "feat": inputs(seen, names)[rows],
    }
    for name, value in (("label", scene.labels_N), ("instance", scene.instances_N)):
        found[name] = value[rows] if value is not None else torch.full((len(rows),), -1)
    if scene.features_NF is not None:
        valid_N = scene.valid_N if scene.valid_N is not None else (scene.features_NF != 0).any(1)
        found |= {"lang_feat": scene.features_NF[rows].float(), "valid": valid_N[rows]}
    return found


def collate(examples: Sequence[dict[str, Tensor]], mixed: bool = False) -> dict[str, Tensor]:
    """Scenes behind each other; with `mixed` two by two laid over each other (Mix3D): one cloud, one offset."""
    ends = torch.tensor([len(found["coord"]) for found in examples]).cumsum(0)
    batch = {name: torch.cat([found[name] for found in examples]) for name in examples[0]}
    keep = [i for i in range(len(ends)) if i % 2 == 1 or i == len(ends) - 1] if mixed else list(range(len(ends)))
    return {**batch, "offset": ends[keep]}


class SceneData(Dataset):
    """Scenes in memory, asked for as (scene, seed) pairs; an answer is a whole batch.

    Args:
        scenes: with features and labels. classes: their names. groups: data set of each scene; a batch is of one.
        rooms: what the scenes were made from, where they are rooms.
    """

    def __init__(
        self,
        scenes: Sequence[Gaussians],
        classes: Sequence[str],
        data: DataConfig,
        groups: Sequence[str] = (),
        rooms: Sequence[Room] = (),
    ) -> None:
        self.scenes, self.classes, self.data = list(scenes), list(classes), data
        self.groups, self.rooms = list(groups) or ["scenes"] * len(self.scenes), list(rooms)

    def __len__(self) -> int:
        return len(self.scenes)

    def scene(self, number: int) -> Gaussians:
        """One of them, nothing drawn."""
        return self.scenes[number]

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        options = self.data
        examples = [
            example(self.scenes[row], options.voxel, options.inputs, seed, options.augment, options.largest)
            for row, seed in wanted
        ]
        return collate(examples, Draws(derive_seed(wanted[0][1], 1)).chance(options.mix))

    @property
    def fingerprint(self) -> str:
        """Of the scenes and what is said about them."""
        parts = [
            fingerprint_tensors({k: v for k, v in vars(scene).items() if isinstance(v, Tensor)})
            for scene in self.scenes
        ]
        return fingerprint_strings([*parts, *self.classes, *self.groups])


class SceneBatches(Sampler[list[tuple[int, int]]]):
    """For each step the scenes of one group and a seed for each, as a function of (seed, step).

    Groups take turns by their shares: in every so many steps as the shares add up to, each has its own number, in a
    drawn order. Within a group scenes are drawn as `StepBatchSampler` does.

    Args:
        groups: of each scene. shares: steps of each group; {} gives each as many as it has scenes, roughly.
        options: of StepBatchSampler.
    """

    def __init__(
        self, groups: Sequence[str], shares: dict[str, int], batch_size: int, steps: int, seed: int, **options: Any
    ) -> None:
        self.rows = {name: [i for i, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)}
        unknown = sorted(set(shares) - set(self.rows))
        if unknown:
            raise UserError(f"--data.shares: no scenes of {unknown[0]}; there are {', '.join(self.rows)}")
        shares = shares or {name: 1 for name in self.rows}
        self.cycle = [name for name, share in shares.items() for _ in range(share)]
        self.steps, self.seed, self.batch_size = steps, seed, batch_size
        self.rank, self.world = options.get("rank", 0), options.get("world", 1)
        self.start: Callable[[], int] = options.pop("start", lambda: 0)
        self.samplers = {
            name: StepBatchSampler(len(rows), batch_size, steps, derive_seed(seed, number), **options)
            for number, (name, rows) in enumerate(self.rows.items())
        }

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(scene, seed) of this process's share of a step."""
        round_, place = divmod(step, len(self.cycle))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, -2, round_))
        order = torch.randperm(len(self.cycle), generator=generator)
        name = self.cycle[int(order[place])]
        before = round_ * self.cycle.count(name) + sum(self.cycle[int(i)] == name for i in order[:place])
        found = self.samplers[name].batch(before)
        seeds = [derive_seed(self.seed, step, position) for position in range(self.rank, self.batch_size, self.world)]
        return [(self.rows[name][row], seed) for row, seed in zip(found, seeds)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start(), self.steps):
            yield self.batch(step)

    def __len__(self) -> int:
        return self.steps


class SceneModule(StepDataModule):
    """Feeds scenes to the trainer in the order of `SceneBatches`."""

    dataset: SceneData

    def sampler(self, batch_size: int, steps: int, seed: int, **options: Any) -> Sampler[Any]:
        names, given = sorted(set(self.dataset.groups)), self.dataset.data.shares
        if given and len(given) != len(names):
            raise UserError(f"--data.shares: expected {len(names)} numbers, one for each of {', '.join(names)}")
        return SceneBatches(self.dataset.groups, dict(zip(names, given)), batch_size, steps, seed, **options)


# What the options describe ------------------------------------------------------------------------------------------


def lifted(room: Room, data: DataConfig, text: TextSpace, seed: int) -> Gaussians:
    """A room's Gaussians with the features that a teacher's answers to its pictures lift onto them.

    Raises:
        UserError: the teacher's features are of another width than the texts.
    """
    found = lift(room.gaussians, views_of(room, data, text, seed), data.lifting)
    features_NF = F.normalize(found.features(), dim=1)
    if features_NF.shape[1] != text.width:
        raise UserError(
            f"--data.image_encoder {data.image_encoder}: features of {features_NF.shape[1]} values, the texts have "
            f"{text.width}; give the same model as --text.encoder, and no --text.width"
        )
    return replace(room.gaussians, features_NF=features_NF, valid_N=found.seen_N & (features_NF != 0).any(1))


def views_of(room: Room, data: DataConfig, text: TextSpace, seed: int) -> list[View]:
    """A teacher's answers to the pictures of a room."""
    answers: Teacher
    if data.segmenter is None or data.image_encoder is None:
        names = text.embed(room.names)
        answers = SimulatedTeacher(names, room.labels_I, data.confusion, data.mask_errors, data.fusion, seed)
    else:
        answers = real_teacher(data.segmenter, data.image_encoder, data.fusion)
    cameras = room.cameras(data.views, data.view_size, seed)
    return [answers(room.gaussians, camera, number) for number, camera in enumerate(cameras)]


def picture_features(rooms: Sequence[Room], data: DataConfig, text: TextSpace, seed: int = 0) -> Tensor:
    """The features [M, F] of all masks in the pictures of training rooms, before any is lifted."""
    first = seed * 10_000
    views = [view for i, room in enumerate(rooms) for view in views_of(room, data, text, first + i)]
    return torch.cat([view.features_MF for view in views])


@functools.cache
def real_teacher(segmenter: str, encoder: str, fusion: Fusion) -> FolderTeacher:
    """The models of two folders, read once."""
    return FolderTeacher(existing_path(segmenter), existing_path(encoder), fusion)


def open_scenes(data: DataConfig, part: Part, text: TextSpace | None, seed: int = 0, unseen: bool = False) -> SceneData:
    """The scenes of a part; train and test share no room, and no model of furniture.

    Args:
        text: the space of the features that are lifted onto rooms; None lifts none and asks no scene for them.
        unseen: test rooms also hold classes that no training room has.

    Raises:
        UserError: an option or a file of the user's is wrong.
    """
    if (data.segmenter is None) != (data.image_encoder is None):
        raise UserError("--data.segmenter and --data.image_encoder: expected both, or neither (the simulated teacher)")
    if data.name == "scenes":
        return _open_folder(data, part, text)
    count = data.rooms if part == "train" else data.eval_rooms
    first = seed * 10_000 + (TEST_SEEDS if part == "test" else 0)
    made = [
        make_room(first + i, part, data.density, data.bare, data.quality, data.furniture, unseen) for i in range(count)
    ]
    if data.gaussians == "fitted":
        if data.quality != 1:
            raise UserError(f"--data.quality {data.quality}: fitted Gaussians are as good as their fit; expected 1")
        made = [fitted_room(room, first + number, part, data, unseen) for number, room in enumerate(made)]
    if text is None:
        return SceneData([room.gaussians for room in made], CLASSES if unseen else SEEN, data, rooms=made)
    folder = cache_dir("scenesplat", _cache_key(data, text))
    sweep(folder)
    scenes = []
    for number, room in enumerate(made):
        path = folder / f"{part}{'-unseen' if unseen else ''}-{first + number}.safetensors"
        if not path.is_file():
            made_anew = lifted(room, data, text, first + number)
            assert made_anew.features_NF is not None and made_anew.valid_N is not None
            save_weights(path, {"features": made_anew.features_NF.half(), "valid": made_anew.valid_N})
        kept, _ = read_weights(path)
        if len(kept["features"]) != len(room.gaussians):
            raise UserError(f"{path}: of another room than {part} {first + number}; remove it, it is made again")
        features_NF = F.normalize(kept["features"].float(), dim=1)
        scenes.append(replace(room.gaussians, features_NF=features_NF, valid_N=kept["valid"].bool()))
    return SceneData(scenes, CLASSES if unseen else SEEN, data, rooms=made)


def _cache_key(data: DataConfig, text: TextSpace) -> str:
    """Of everything that lifted features hang on."""
    kept = {"density", "bare", "quality", "views", "view_size", "confusion", "mask_errors", "fusion", "lifting"}
    if data.gaussians == "fitted":
        kept |= {"gaussians", *(name for name in asdict(data) if name.startswith("fit_"))}
    options = {name: value for name, value in asdict(data).items() if name in {*kept, "furniture"}}
    source = file_sha256(ARCHIVE) if data.furniture == "archive" else "all"
    folders = [existing_path(name) for name in (data.segmenter, data.image_encoder) if name is not None]
    models = [fingerprint_files(list_files(folder), folder) for folder in folders]
    return fingerprint_strings([str(MADE), str(sorted(options.items())), source, text.fingerprint, *models])[:16]


def _open_folder(data: DataConfig, part: Part, text: TextSpace | None) -> SceneData:
    """The user's scenes: PATH/train and PATH/test with scenes, or with a folder of scenes for each data set."""
    if data.path is None:
        raise UserError("--data.name scenes needs --data.path: a folder with train/ and test/, which hold scenes")
    root = existing_path(data.path) / part
    names_file = existing_path(data.path) / "classes.txt"
    if text is not None and not names_file.is_file():
        raise UserError(
            f"{names_file} is missing: the classes' names, one a line, in the order of segment.npy's numbers"
        )
    lines = names_file.read_text(encoding="utf-8").splitlines() if names_file.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    found = scene_places(root)
    scenes = [read_scene(place) for place in found]
    if text is None:
        scenes = [replace(scene, features_NF=None, valid_N=None) for scene in scenes]
    for place, scene in zip(found, scenes):
        if text is not None and part == "train" and scene.features_NF is None:
            raise UserError(
                f"{place}: no lang_feat.npy; a training scene is a folder of .npy arrays with lifted features"
            )
        if text is not None and scene.features_NF is not None and scene.features_NF.shape[1] != text.width:
            raise UserError(
                f"{place}: lang_feat.npy has {scene.features_NF.shape[1]} values a Gaussian, the text space "
                f"{text.width}; give the --text.encoder and --text.width that it was made with"
            )
    groups = [place.parent.relative_to(root).as_posix() for place in found]
    if part == "train":  # what is larger than a window is trained on window by window
        windows = [[scene.select(rows) for rows in chunks(scene)] for scene in scenes]
        groups = [group for group, parts in zip(groups, windows) for _ in parts]
        scenes = [scene for parts in windows for scene in parts]
    return SceneData(scenes, names, data, groups)


def scene_places(root: Path) -> list[Path]:
    """The scenes in a folder: .ply files and folders with coord.npy, sorted.

    Raises:
        UserError: there is none.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected one with scenes")
    files = list_files(root)
    found = [path.parent if path.name == "coord.npy" else path for path in files]
    found = [place for place, path in zip(found, files) if place != path or path.suffix.lower() == ".ply"]
    if not found:
        raise UserError(f"{root}: no scene in it; expected .npy folders (coord.npy, ...) or .ply files")
    return found


def read_scenes(root: Path) -> list[Gaussians]:
    """Every scene in a folder.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    return [read_scene(place) for place in scene_places(root)]
