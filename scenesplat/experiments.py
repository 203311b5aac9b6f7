"""What the claims are measured on: rooms with lifted labels, networks that differ in one option, unseen rooms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from common.options import TrainerOptions
from common.study import Arm, Watch, fit_arm
from common.study import Study as CommonStudy
from scenesplat.config import LossConfig, NetworkConfig, OptimiserConfig
from scenesplat.data import SceneData, SceneModule, lifted, open_scenes
from scenesplat.data_config import DataConfig
from scenesplat.evaluate import Asked, counts_of, labels_score, summed
from scenesplat.export import SceneModel
from scenesplat.gaussians import ATTRIBUTES
from scenesplat.inference import scene_classes, scene_features
from scenesplat.model import PointTransformer
from scenesplat.protocol import VOTERS, excluded_classes
from scenesplat.rooms import CLASSES, SEEN, STRUCTURE, Room, degraded, make_room, psnr
from scenesplat.self_experiments import SelfSizes, SelfSupervised
from scenesplat.text import TextSpace
from scenesplat.trainer import LanguagePretraining

WIDTH = 64  # of the projected text space
NETWORK = NetworkConfig(
    strides=[2, 2],
    enc_depths=[1, 1, 2],
    enc_channels=[32, 48, 96],
    enc_heads=[2, 3, 6],
    enc_patch=[64, 64, 64],
    dec_depths=[1, 1],
    dec_channels=[WIDTH, 64],
    dec_heads=[4, 4],
    dec_patch=[64, 64],
    drop_path=0.1,
    norm_momentum=0.1,
)
LOSS = LossConfig(contrastive=0.02, schedule="last_75", least=20)
# Every arm differs from the recipe in what stands here.
ARMS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "never": {"loss": {"schedule": "skip"}},
    "always": {"loss": {"schedule": "all"}},
    "colour": {"data": {"inputs": ["colour"]}},
    "colour_normal": {"data": {"inputs": ["colour", "normal"]}},
    "few_rooms": {},
    "fitted": {"data": {"gaussians": "fitted"}},
    # Of the table of ablations alone.
    "with_normal": {"data": {"inputs": ["colour", "opacity", "quaternion", "scale", "normal"]}},
    "pseudo": {"loss": {"classes": "pseudo"}},
    "contrastive_20": {"loss": {"contrastive": 0.2}},
    "cosine_alone": {"loss": {"cosine": 3.0, "l2": 0.0}},  # of unit vectors the same loss at the same scale
    "crop_alone": {"data": {"fusion": "local"}},
    "masked_alone": {"data": {"fusion": "masked"}},
    "global_alone": {"data": {"fusion": "global"}},
    "all_pixels": {"data": {"lifting": "pixels"}},
    "median_view": {"data": {"lifting": "median"}},
    "nearest_view": {"data": {"lifting": "nearest"}},
    "no_confusion": {"data": {"confusion": 0.0}},
    "confusion_40": {"data": {"confusion": 0.4}},
}
QUALITIES = (0.2, 1.0)  # least and most of the rooms of claim G
SYNONYMS = {  # names in the label sets or in common use; none of them is a class
    **{"sofa": "couch", "tv": "television", "refrigerator": "fridge", "lamp": "light", "plant": "potted plant"},
    **{"bookshelf": "bookcase", "cabinet": "cupboard", "bathtub": "bath", "stove": "cooker", "sink": "washbasin"},
    **{"radiator": "heater", "desk": "writing table", "door": "doorway", "bed": "mattress", "toilet": "lavatory"},
}


@dataclass
class Sizes:
    """Sizes of a tier.

    Args:
        rooms: for training; few_rooms: of the arm with few; eval_rooms: that are never trained on.
        batch: rooms of a step; lr, block_lr: highest rates.
        steps: optimiser steps of an arm.
        self_supervision: of the claims on self-supervision.
    """

    rooms: int
    few_rooms: int
    eval_rooms: int
    batch: int
    lr: float
    block_lr: float
    steps: int
    self_supervision: SelfSizes


class Study(CommonStudy[Sizes]):
    """Rooms, one text space; arms by (name, seed)."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes, folder)
        self._data: dict[str, SceneData] = {}

    @cached_property
    def text(self) -> TextSpace:
        return TextSpace(width=WIDTH)

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        own = {key: value for key, value in super().settings.items() if key != "self_supervision"}
        return {"text": self.text.fingerprint, **own}

    @cached_property
    def self_supervised(self) -> SelfSupervised:
        """What the claims on self-supervision are measured on."""
        return SelfSupervised(self, self.sizes.self_supervision, NETWORK, self.settings)

    def data_options(self, name: str) -> DataConfig:
        """Of an arm; the rooms are the same in all."""
        rooms = self.sizes.few_rooms if name == "few_rooms" else self.sizes.rooms
        options = DataConfig(rooms=rooms, eval_rooms=self.sizes.eval_rooms)
        return replace(options, **ARMS[name].get("data", {}))

    def data(self, name: str) -> SceneData:
        """An arm's training rooms."""
        options = self.data_options(name)
        key = repr(options)
        if key not in self._data:
            self._data[key] = open_scenes(options, "train", self.text, 0)
        return self._data[key]

    @cached_property
    def unseen(self) -> SceneData:
        """The unseen rooms, with the labels that teacher and lifting would collect there."""
        return open_scenes(self.data_options("recipe"), "test", self.text, 0)

    @property
    def rooms(self) -> list[Room]:
        return self.unseen.rooms

    @property
    def names(self) -> list[str]:
        """Classes that are trained and measured."""
        return list(SEEN)

    def model(self, name: str, network: PointTransformer) -> SceneModel:
        options = self.data_options(name)
        return SceneModel(network.eval(), self.text, options.voxel, list(options.inputs), self.names)

    def network(self, name: str, seed: int) -> PointTransformer:
        """An arm's network as it starts; equal seeds start alike where the inputs are equal."""
        torch.manual_seed(seed)
        inputs = sum(ATTRIBUTES[attribute] for attribute in self.data_options(name).inputs)
        return PointTransformer(replace(NETWORK, in_channels=inputs))

    def trained(self, name: str, seed: int) -> Arm[PointTransformer]:
        """A trained arm."""
        sizes = self.sizes

        def train(network: PointTransformer, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            module = LanguagePretraining(
                network,
                self.text.embed(self.names),
                replace(LOSS, **ARMS[name].get("loss", {})),
                OptimiserConfig(lr=sizes.lr, block_lr=sizes.block_lr),
                seed=seed,
                steps=sizes.steps,
                batch_size=sizes.batch,
            )
            options = TrainerOptions(precision="32-true", accelerator="cpu", progress=False)
            data = SceneModule(self.data(name), sizes.batch, sizes.steps, seed)
            watch = Watch()
            fit_arm(
                module,
                data,
                watch,
                options,
                batch_size=sizes.batch,
                grad_clip=1.0,
                steps=sizes.steps,
                folder=folder,
                checkpoint_every=max(20, sizes.steps // 10),
            )
            return network.eval(), watch.record()

        options = asdict(self.data_options(name))
        return self.arm(name, seed, lambda: self.network(name, seed), train, {**self.settings, "data": options})

    def score(self, name: str, seed: int, trained: bool = True) -> dict[str, float]:
        """f-mIoU and the others of an arm on the unseen rooms, in shares of 1."""

        def made() -> dict[str, float]:
            network = self.trained(name, seed).network if trained else self.network(name, seed)
            found = self.found(self.model(name, network), self.text.embed(self.names))
            return self.metrics(found)

        kind = name if trained else f"{name}-untrained"
        return self.values(f"score-{kind}-seed{seed}", made, self.settings)

    def found(self, model: SceneModel, texts_KD: Tensor) -> list[Tensor]:
        """Nearest texts of the Gaussians of every unseen room."""
        return [scene_classes(model, room.gaussians, texts_KD, limit=4) for room in self.rooms]

    def metrics(self, found: Sequence[Tensor], voters: int = VOTERS) -> dict[str, float]:
        counts = (
            counts_of(labels, room.gaussians, Asked.of(room), len(self.names), voters)
            for labels, room in zip(found, self.rooms)
        )
        return summed(counts).metrics(excluded_classes(self.names, STRUCTURE))

    def baselines(self, seed: int) -> dict[str, float]:
        """f-mIoU of the most frequent class, of the nearest mean colour, and of the untrained network."""

        def made() -> dict[str, float]:
            scenes = self.data("recipe").scenes
            labels = torch.cat([scene.labels_N for scene in scenes if scene.labels_N is not None])
            colours = torch.cat([scene.colours_NC[:, :3] for scene in scenes])
            inside = labels >= len(STRUCTURE)
            counts = torch.bincount(labels[inside], minlength=len(self.names))
            means = torch.stack([colours[labels == k].mean(0) for k in range(len(self.names))]).nan_to_num(1e6)
            most = [torch.full((len(room.gaussians),), int(counts.argmax())) for room in self.rooms]
            near = [torch.cdist(room.gaussians.colours_NC[:, :3], means).argmin(1) for room in self.rooms]
            found = {"most_frequent": most, "nearest_colour": near}
            return {f"f_miou_{name}": self.metrics(labels)["f_miou"] for name, labels in found.items()}

        values = self.values(f"baselines-seed{seed}", made, self.settings)
        return {**values, "f_miou_untrained": self.score("recipe", seed, trained=False)["f_miou"]}

    def labels_score(self) -> dict[str, float]:
        """Of the labels that teacher and lifting would collect in the unseen rooms."""

        def made() -> dict[str, float]:
            scenes = [(scene, Asked.of(room)) for scene, room in zip(self.unseen.scenes, self.rooms)]
            return labels_score(scenes, self.text.embed(self.names), self.names, VOTERS)

        return self.values("score-labels", made, self.settings)

    def unknown(self, seed: int) -> dict[str, float]:
        """Ranks of the true names of things of classes that no training room has, among all names.

        0 is what guessing comes to, 1 is always first; each Gaussian of such a thing counts once.
        """

        def made() -> dict[str, float]:
            model = self.model("recipe", self.trained("recipe", seed).network)
            strange = open_scenes(self.data_options("recipe"), "test", self.text, 0, unseen=True)
            names = [name for name in CLASSES if name not in STRUCTURE]
            texts = self.text.embed(names)
            gains, rights = [], []
            for room in strange.rooms:
                labels = room.gaussians.labels_N
                assert labels is not None
                rows = (labels >= len(SEEN)).nonzero().squeeze(1)
                score = scene_features(model, room.gaussians, limit=4)[rows] @ texts.t()
                own = score.gather(1, (labels[rows] - len(STRUCTURE))[:, None])
                rank = 1 + (score > own).sum(1)
                gains.append(1 - 2 * (rank - 1) / (len(names) - 1))
                rights.append(rank == 1)
            return {"rank_gain": float(torch.cat(gains).mean()), "accuracy": float(torch.cat(rights).float().mean())}

        return self.values(f"unknown-seed{seed}", made, self.settings)

    def by_quality(self, seed: int) -> dict[str, float]:
        """Spearman's correlation of PSNR and f-mIoU over the unseen rooms, each of a quality of its own."""

        def made() -> dict[str, float]:
            model = self.model("recipe", self.trained("recipe", seed).network)
            texts = self.text.embed(self.names)
            without = excluded_classes(self.names, STRUCTURE)
            psnrs, scores = [], []
            for number, room in enumerate(self.rooms):
                low, high = QUALITIES
                quality = low + (high - low) * number / max(1, len(self.rooms) - 1)
                scene = degraded(room.gaussians, quality, room.size_3, number)
                found = scene_classes(model, scene, texts, limit=4)
                counts = counts_of(found, scene, Asked.of(room), len(self.names), VOTERS)
                psnrs.append(psnr(scene, room.gaussians, room.cameras(4, 96)))
                scores.append(counts.metrics(without, present_only=True)["f_miou"])
            half = len(scores) // 2
            return {
                "spearman": float(spearmanr(psnrs, scores).statistic),
                "f_miou_low_quality": statistics.fmean(scores[:half]),
                "f_miou_high_quality": statistics.fmean(scores[half:]),
            }

        return self.values(f"quality-seed{seed}", made, self.settings)


def lifting_against_passing(rounds: int = 3, seed: int = 0) -> dict[str, float]:
    """Seconds a room by lifting (views, simulated teacher, fusion, Occam) and by one pass of an equal network."""
    options, text = DataConfig(), TextSpace(width=WIDTH)
    torch.manual_seed(seed)
    model = SceneModel(PointTransformer(NETWORK).eval(), text, options.voxel, list(options.inputs), [])
    room = make_room(seed, "test", options.density, options.bare)
    texts = text.embed(list(SEEN))
    taken: dict[str, list[float]] = {"lifting": [], "pass": []}
    for _ in range(rounds + 1):
        for name in taken:
            started = time.perf_counter()
            if name == "lifting":
                lifted(room, options, text, seed)
            else:
                scene_classes(model, room.gaussians, texts, limit=1)
            taken[name].append(time.perf_counter() - started)
    medians = {f"seconds_{name}": statistics.median(values[1:]) for name, values in taken.items()}
    count = float(len(room.gaussians))
    return {"speedup": medians["seconds_lifting"] / medians["seconds_pass"], **medians, "gaussians": count}
