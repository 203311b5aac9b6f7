"""What the tokenizer's claims are measured on: networks that differ in one option, the same pictures, one yardstick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.sampling import StepDataModule
from common.images import resize_uint8, to_uint8, to_unit
from common.study import Arm, Watch, fit_arm
from common.study import Study as CommonStudy
from instella_t2i.aiming import new_tokenizer
from instella_t2i.config import DataConfig, DecoderConfig, NetworkConfig, TokenizerConfig, TrainerConfig
from instella_t2i.data import Pictures, open_pictures
from instella_t2i.evaluate import Yardstick, reconstruct
from instella_t2i.generator_experiments import ROTATION, Generators, GeneratorSizes
from instella_t2i.losses import code_usage
from instella_t2i.quantizers import index_of
from instella_t2i.tokenizer import Tokenizer
from instella_t2i.trainer import TokenizerTraining

HEAD_DIM = 32
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 100  # none of the seeds that are reported
TUNING_SHARE = 0.25  # of the steps, for each try
# Weight of a quantizer's own loss: our recipe's for bits, the authors' for the baselines.
CODE = {"binary": 0.1, "vq": 1.0, "lfq": 0.1, "bsq": 0.1}
# Every arm differs from the recipe in what stands here.
ARMS: dict[str, dict[str, Any]] = {
    "binary": {"network": {"tokens": 8, "bits": 32}},
    "vq": {"network": {"tokens": 8, "bits": 10, "quantizer": "vq"}},
    "binary_10": {"network": {"tokens": 8, "bits": 10}},
    "lfq_10": {"network": {"tokens": 8, "bits": 10, "quantizer": "lfq"}},
    "bsq_10": {"network": {"tokens": 8, "bits": 10, "quantizer": "bsq"}},
    "bsq": {"network": {"tokens": 8, "bits": 32, "quantizer": "bsq"}},
    "tokens_4": {"network": {"tokens": 4, "bits": 32}},
    "line": {"network": {"tokens": 16, "bits": 32}},
    "grid": {"network": {"tokens": 16, "bits": 32, "layout": "grid"}},
    "tokens_32": {"network": {"tokens": 32, "bits": 32}},
    "grid_36": {"network": {"tokens": 36, "bits": 32, "layout": "grid"}},
    "threshold": {"network": {"tokens": 8, "bits": 32}, "tokenizer": {"noise": False}},
    "no_code_loss": {"network": {"tokens": 8, "bits": 32}, "tokenizer": {"code": 0.0}},
    "no_logit_loss": {"network": {"tokens": 8, "bits": 32}, "tokenizer": {"logit": 0.0}},
    "free": {"network": {"tokens": 8, "bits": 32}, "tokenizer": {"aimed": False}},
    "released": {
        "network": {"tokens": 8, "bits": 32, "rotary": "released", "theta": 10_000.0},
        "tokenizer": {"aimed": False},
    },
    "gan": {"network": {"tokens": 8, "bits": 32}, "tokenizer": {"gan": 0.1}},
}
ABLATIONS = (
    *("binary_10", "lfq_10", "bsq_10", "bsq", "tokens_4", "tokens_32"),
    *("threshold", "no_code_loss", "no_logit_loss", "free", "released", "gan"),
)
PAGE = ("binary", "line", "tokens_32", "grid", "grid_36")  # of the rate-distortion page


@dataclass
class Sizes:
    """Sizes of a tier.

    Args:
        size: side of the pictures; patch: of the tokens' patches.
        layers, heads: of encoder and of decoder, heads of 32.
        batch: pictures of a step; steps: of an arm.
        images: held out; training_images: at most, 0 for all.
        tune: choose each arm's learning rate on LEARNING_RATES with equal tries; else `lr` is taken.
        generators: of the other claims.
    """

    size: int
    patch: int
    layers: int
    heads: int
    batch: int
    images: int
    training_images: int
    tune: bool
    lr: float
    steps: int
    generators: GeneratorSizes


class Study(CommonStudy[Sizes]):
    """Arms by (name, seed)."""

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        return {key: value for key, value in super().settings.items() if key != "generators"}

    @cached_property
    def generators(self) -> Generators:
        """What the claims C, D, F, G, H are measured on."""
        return Generators(self, self.sizes.generators)

    @cached_property
    def data(self) -> DataConfig:
        sizes = self.sizes
        return DataConfig(size=sizes.size, images=sizes.training_images, eval_images=sizes.images)

    @cached_property
    def pictures(self) -> Pictures:
        """What all arms learn from."""
        return open_pictures(self.data, "train")

    @cached_property
    def yardstick(self) -> Yardstick:
        """Held-out pictures."""
        return Yardstick(open_pictures(self.data, "test").all())

    @cached_property
    def _validation(self) -> Yardstick:
        """Training pictures that learning rates are chosen on."""
        return Yardstick(self.pictures.images(range(0, len(self.pictures), max(1, len(self.pictures) // 256))), None)

    def network(self, name: str) -> NetworkConfig:
        """Of an arm."""
        sizes = self.sizes
        base = NetworkConfig(
            patch=sizes.patch,
            encoder_layers=sizes.layers,
            encoder_heads=sizes.heads,
            encoder_head_dim=HEAD_DIM,
            decoder_layers=sizes.layers,
            decoder_heads=sizes.heads,
            decoder_head_dim=HEAD_DIM,
            down_after=[0],
            up_after=[max(0, sizes.layers - 2)],
            scale=2.0 * sizes.size,
            **ROTATION,
        )
        return replace(base, **ARMS[name]["network"])

    def recipe(self, name: str, lr: float, steps: int) -> TokenizerConfig:
        """Of an arm's training."""
        network = self.network(name)
        base = TokenizerConfig(
            steps=steps,
            batch_size=self.sizes.batch,
            optimiser="muon",
            lr=lr,
            warmup=max(1, steps // 20),
            perceptual=0.1,
            gan=0.0,
            gan_warmup=max(1, steps // 20),
            code=CODE[network.quantizer],
            aimed=network.layout == "line",
        )
        return replace(base, **ARMS[name].get("tokenizer", {}))

    def _fit(
        self,
        tokenizer: Tokenizer,
        losses: TokenizerConfig,
        stage: TokenizerConfig | DecoderConfig,
        pictures: Pictures,
        seed: int,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Train a tokenizer in place; returns its record."""
        options = TrainerConfig(precision="32-true", accelerator="cpu", progress=False)
        module = TokenizerTraining(tokenizer, losses, stage, self.data, options, seed)
        watch = Watch()
        fit_arm(
            module,
            StepDataModule(pictures.table(), stage.batch_size, stage.steps, seed),
            watch,
            options,
            batch_size=stage.batch_size,
            grad_clip=0.0,  # the module clips by itself
            steps=3 * stage.steps,  # of all optimisers, at most
            folder=folder,
            checkpoint_every=max(20, stage.steps // 10) if folder else 0,
        )
        tokenizer.eval()
        return watch.record()

    def learning_rate(self, name: str) -> float:
        """Of an arm: on one grid, with equally many short tries, by PSNR."""
        if not self.sizes.tune:
            return self.sizes.lr
        steps = max(1, int(TUNING_SHARE * self.sizes.steps))

        def tries() -> dict[str, Any]:
            found = {}
            for lr in LEARNING_RATES:
                tokenizer, recipe = self._new(name, TUNING_SEED), self.recipe(name, lr, steps)
                self._fit(tokenizer, recipe, recipe, self.pictures, TUNING_SEED)
                images = self._validation.originals
                found[f"{lr:g}"] = self._validation.measure(reconstruct(tokenizer, images)[0])["psnr"]
            return {"lr": max(LEARNING_RATES, key=lambda lr: found[f"{lr:g}"]), "psnr": found}

        return float(self.values(f"tuning-{name}", tries, self.settings)["lr"])

    def _new(self, name: str, seed: int) -> Tokenizer:
        return new_tokenizer(self.network(name), self.sizes.size, seed, self.recipe(name, 0.0, 1).aimed)

    def tokenizer(self, name: str, seed: int) -> Arm[Tokenizer]:
        """A trained arm."""
        lr = self.learning_rate(name)
        recipe = self.recipe(name, lr, self.sizes.steps)

        def train(tokenizer: Tokenizer, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            return tokenizer, {**self._fit(tokenizer, recipe, recipe, self.pictures, seed, folder), "lr": lr}

        return self.arm(name, seed, lambda: self._new(name, seed), train, {**self.settings, "lr": lr})

    @property
    def decoder_sizes(self) -> list[int]:
        """Sides of stage 2: half, three quarters and the whole."""
        multiple = 2 * self.sizes.patch
        return sorted({max(2 * multiple, round(self.sizes.size * s / multiple) * multiple) for s in (0.5, 0.75, 1.0)})

    def second_stage(self, name: str, seed: int) -> Arm[Tokenizer]:
        """A trained arm whose decoder has learned several sizes since, in half as many steps."""
        first = self.tokenizer(name, seed)
        steps = max(1, self.sizes.steps // 2)
        stage = DecoderConfig(steps, self.sizes.batch, 3e-4, max(1, steps // 20), self.decoder_sizes)
        losses = self.recipe(name, first.record["lr"], self.sizes.steps)

        def build() -> Tokenizer:
            tokenizer = self._new(name, seed)
            tokenizer.load_state_dict(first.network.state_dict())
            return tokenizer

        def train(tokenizer: Tokenizer, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            return tokenizer, self._fit(tokenizer, losses, stage, self.pictures, seed, folder)

        settings = {**self.settings, "lr": first.record["lr"], "stage": "decoder"}
        return self.arm(f"{name}-decoder", seed, build, train, settings)

    def measures(self, name: str, seed: int) -> dict[str, float]:
        """Distortions of a trained arm on held-out pictures, and how its codes are used."""

        def made() -> dict[str, float]:
            tokenizer = self.tokenizer(name, seed).network
            found, codes = reconstruct(tokenizer, self.yardstick.originals)
            used = index_of(codes).unique().numel() / 2 ** codes.shape[2] if codes.shape[2] <= 16 else float("nan")
            return {**self.yardstick.measure(found), **code_usage(codes), "used": used}

        return self.values(f"measures-{name}-seed{seed}", made, self.settings)

    def sizes_of_one_code(self, name: str, seed: int) -> dict[str, float]:
        """PSNR at the whole size, decoded there and decoded at half of it and scaled up; and what each takes."""

        def made() -> dict[str, float]:
            tokenizer = self.second_stage(name, seed).network
            originals, small = self.yardstick.originals, self.decoder_sizes[0]
            codes = tokenizer.encode(to_unit(originals))

            def decoded(side: int) -> Tensor:
                return torch.cat([tokenizer.decode(part, side) for part in codes.split(64)])

            psnr = {
                "whole": to_uint8(decoded(self.sizes.size)),
                "scaled_up": to_uint8(F.interpolate(decoded(small), self.sizes.size, mode="bilinear")),
            }
            found = {f"psnr_{key}": self.yardstick.measure(value)["psnr"] for key, value in psnr.items()}
            at_half = Yardstick(resize_uint8(originals, small), None).measure(to_uint8(decoded(small)))["psnr"]
            return {**found, "psnr_half": at_half}

        return self.values(f"sizes-{name}-seed{seed}", made, self.settings)
