"""What claims on self-supervision are measured on: encoders that differ in one option, fine-tuned on a few rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.options import TrainerOptions
from common.study import Arm, Watch, fit_arm
from scenesplat.config import NetworkConfig, OptimiserConfig
from scenesplat.crops import CropData
from scenesplat.data import SceneData, SceneModule, picture_features
from scenesplat.data_config import DataConfig
from scenesplat.evaluate import Asked, classified
from scenesplat.export import LabelModel
from scenesplat.language_codes import with_codes
from scenesplat.model import PointTransformer
from scenesplat.pretrain_config import CropConfig, LabelConfig, SelfOptimiserConfig, TermsConfig
from scenesplat.protocol import VOTERS
from scenesplat.rooms import STRUCTURE, Room
from scenesplat.self_supervision import hidden_error, ranks
from scenesplat.text import TextSpace
from scenesplat.trainer import LabelTraining, SelfSupervision

SCRATCH = "scratch"  # an arm without pre-training
ROOMS = 4  # labelled rooms that arms are fine-tuned on
_ALONE: dict[str, Any] = {"distillation": 0.0, "patches": 0.0, "language": 0.0}
# Every arm differs from the whole of GaussianSSL in what stands here.
SELF_ARMS: dict[str, dict[str, Any]] = {
    "ssl": {},
    "ssl_masked": {"terms": _ALONE},
    "ssl_masked_dino": {"terms": {"patches": 0.0, "language": 0.0}},
    "ssl_masked_ibot": {"terms": {"distillation": 0.0, "language": 0.0}},
    "ssl_no_language": {"terms": {"language": 0.0}},
    "ssl_no_masked": {"terms": {"masked": 0.0, "language": 0.0}},
    "ssl_ratio_30": {"crops": {"ratio_least": 0.3, "ratio_most": 0.3}},
    "ssl_ratio_80": {"crops": {"ratio_least": 0.8, "ratio_most": 0.8}},
    "ssl_voxels": {"crops": {"patch": 0.05}},
    "ssl_after": {"terms": {"hide": "after"}},
    "ssl_frozen_heads": {"terms": {"train_heads": False}},
    "ssl_no_activations": {"terms": {"activations": False}},
    "ssl_pictures": {"terms": {"codes_from": "pictures"}},
    "ssl_each": {"terms": {"autoencoder": "each"}},
    "ssl_64": {"terms": {"codes": [64]}},
    "ssl_64_16": {"terms": {"codes": [64, 16]}},
}


@dataclass
class SelfSizes:
    """Sizes of a tier.

    Args:
        batch: rooms of a step; lr, block_lr: highest rates. hidden, bottleneck: of the heads.
        tune_lr, tune_block_lr: highest rates of fine-tuning, of two rooms a step.
        steps: of an encoder; tune_steps: of a fine-tuning.
    """

    batch: int
    lr: float
    block_lr: float
    hidden: int
    bottleneck: int
    tune_lr: float
    tune_block_lr: float
    steps: int
    tune_steps: int


class Rooms(Protocol):
    """Of a study: what is kept, rooms with lifted features, rooms that are never trained on, the space of texts."""

    def arm(self, name: str, seed: int, build: Any, train: Any, settings: Mapping[str, Any] | None = None) -> Arm: ...

    def values(self, name: str, make: Any, settings: Mapping[str, Any] | None = None) -> dict[str, Any]: ...

    def tensors(self, name: str, make: Any, settings: Mapping[str, Any] | None = None) -> dict[str, Tensor]: ...

    def data(self, name: str) -> SceneData: ...

    def data_options(self, name: str) -> DataConfig: ...

    @property
    def rooms(self) -> list[Room]: ...

    @property
    def text(self) -> TextSpace: ...


class SelfSupervised:
    """Encoders by (arm, seed), and what fine-tuning makes of them.

    Args:
        network: of the language arms; these pool by the greatest and have a mask token.
    """

    def __init__(self, study: Rooms, sizes: SelfSizes, network: NetworkConfig, settings: Mapping[str, Any]) -> None:
        self.study, self.sizes = study, sizes
        self.network = replace(network, pooling="max", mask_token=True)
        self.settings = {**settings, "self_supervision": asdict(sizes)}

    def options(self, name: str) -> tuple[TermsConfig, CropConfig]:
        """Of an arm."""
        terms = TermsConfig(hidden=self.sizes.hidden, bottleneck=self.sizes.bottleneck)
        changes = SELF_ARMS[name]
        return replace(terms, **changes.get("terms", {})), replace(CropConfig(), **changes.get("crops", {}))

    @cached_property
    def pictures(self) -> Tensor:
        """Features of the masks in all pictures of the training rooms, in 16 bits on disk."""
        data = self.study.data("recipe")

        def made() -> dict[str, Tensor]:
            return {"features": picture_features(data.rooms, data.data, self.study.text).half()}

        return self.study.tensors("picture-features", made, self.settings)["features"].float()

    def crops(self, name: str) -> CropData:
        """An arm's training rooms with codes for features."""
        terms, crops = self.options(name)
        data = self.study.data("recipe")
        if not terms.language:
            plain = [replace(scene, features_NF=None, valid_N=None) for scene in data.scenes]
            return CropData(data, plain, crops)
        learnt = self.pictures if terms.codes_from == "pictures" else None
        coded, _ = with_codes(data.scenes, terms.codes, 0, terms.autoencoder == "each", learnt)
        return CropData(data, coded, crops)

    def module(self, name: str, seed: int) -> SelfSupervision:
        """An arm as it starts; equal seeds start alike."""
        sizes, (terms, _) = self.sizes, self.options(name)
        torch.manual_seed(seed)
        return SelfSupervision(
            PointTransformer(self.network),
            terms,
            SelfOptimiserConfig(lr=sizes.lr, block_lr=sizes.block_lr),
            self.study.data_options("recipe").inputs,
            terms.codes[-1],
            seed=seed,
            steps=sizes.steps,
            batch_size=sizes.batch,
        )

    def pretrained(self, name: str, seed: int) -> Arm[nn.ModuleDict]:
        """A trained arm: its `network` and its `heads`."""

        def build() -> nn.ModuleDict:
            module = self.module(name, seed)
            return nn.ModuleDict({"network": module.network, "heads": module.heads})

        def train(_: nn.ModuleDict, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            module, sizes, watch = self.module(name, seed), self.sizes, Watch()
            data = SceneModule(self.crops(name), sizes.batch, sizes.steps, seed)
            _fit(module, data, watch, sizes.batch, sizes.steps, folder)
            return nn.ModuleDict({"network": module.network, "heads": module.heads}), watch.record()

        terms, crops = self.options(name)
        given = {**self.settings, "terms": asdict(terms), "crops": asdict(crops)}
        return self.study.arm(name, seed, build, train, given)

    def tuned(self, name: str, seed: int, rooms: int = ROOMS) -> dict[str, float]:
        """mIoU and the others on unseen rooms after fine-tuning on so many labelled ones, in shares of 1."""

        def made() -> dict[str, float]:
            data = self.study.data("recipe")
            plain = [replace(scene, features_NF=None, valid_N=None) for scene in data.scenes[:rooms]]
            scenes = SceneData(plain, data.classes, data.data, rooms=data.rooms[:rooms])
            torch.manual_seed(seed)
            network = PointTransformer(replace(self.network, mask_token=False))
            head = nn.Linear(self.network.dec_channels[0], len(scenes.classes))
            if name != SCRATCH:
                given: Any = self.pretrained(name, seed).network["network"]
                state = {key: value for key, value in given.state_dict().items() if key != "mask_token"}
                network.load_state_dict(state)
            sizes = self.sizes
            module = LabelTraining(
                network,
                head,
                LabelConfig(),
                OptimiserConfig(lr=sizes.tune_lr, block_lr=sizes.tune_block_lr),
                seed=seed,
                steps=sizes.tune_steps,
                batch_size=2,
            )
            _fit(module, SceneModule(scenes, 2, sizes.tune_steps, seed), Watch(), 2, sizes.tune_steps, None)
            options = data.data
            model = LabelModel(network.eval(), head, options.voxel, list(options.inputs), list(scenes.classes))
            model.head.requires_grad_(False)
            unseen = [(room.gaussians, Asked.of(room)) for room in self.study.rooms]
            return classified(model, unseen, STRUCTURE, VOTERS, 4)["tester"]

        return self.study.values(f"tuned-{name}-rooms{rooms}-seed{seed}", made, self.settings)

    def seen(self, name: str, seed: int) -> dict[str, float]:
        """Effective ranks of an arm's features of unseen rooms, and the error at what is hidden there."""

        def made() -> dict[str, float]:
            arm: Any = self.pretrained(name, seed).network
            scenes = [replace(room.gaussians, features_NF=None, valid_N=None) for room in self.study.rooms]
            options, (terms, crops) = self.study.data_options("recipe"), self.options(name)
            found = ranks(arm["network"], scenes, options.voxel, options.inputs)
            if terms.masked:
                data = self.study.data("recipe")
                given = CropData(SceneData(scenes, data.classes, replace(options, augment=False)), scenes, crops)
                batches = [given.__getitems__([(row, row)]) for row in range(len(scenes))]
                found |= hidden_error(arm["network"], arm["heads"]["mae"], batches, terms, options.inputs)
            return found

        return self.study.values(f"seen-{name}-seed{seed}", made, self.settings)


def _fit(module: Any, data: SceneModule, watch: Watch, batch: int, steps: int, folder: Path | None) -> None:
    """Train an arm, from its last checkpoint on where it has a folder."""
    fit_arm(
        module,
        data,
        watch,
        TrainerOptions(precision="32-true", accelerator="cpu", progress=False),
        batch_size=batch,
        grad_clip=1.0,
        steps=steps,
        folder=folder,
        checkpoint_every=max(20, steps // 10) if folder else 0,
    )


def gains(found: Mapping[str, float], name: str, others: Sequence[str], points: float = 100.0) -> float:
    """What one arm has over the best of others, in points."""
    return points * (found[name] - max(found[other] for other in others))
