"""What the claims are measured on: one small world, models that differ in one thing, one judge."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.data.cache import fingerprint_module, fingerprint_strings
from common.data.sampling import StepDataModule, Table, step_generator
from common.data.shapes import Scene, Spec, Split, heldout_pairs, prompts, render, sample_scene
from common.options import TrainerOptions
from common.steps import StepDraws
from common.study import Arm, Watch, fit_arm
from common.study import Study as CommonStudy
from lightgen.config import NetworkConfig, OptimiserConfig, PreferenceConfig, SamplingConfig, StagesConfig, TextConfig
from lightgen.data import WORLDS, Autoencoder, Captioned, latents, scenes
from lightgen.evaluate import scores
from lightgen.model import Fluid
from lightgen.painter import Painter
from lightgen.plan import model_of, step_flop
from lightgen.preferences import Pairs, build_pairs, held_out_accuracy
from lightgen.text import TextStates
from lightgen.trainer import MaskedTraining, PreferenceTraining

SIZE, WORLD = 32, "small"
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)  # of Muon
PREFERENCE_RATES = (3e-6, 1e-5, 3e-5)
TUNING_SEED = 100  # none of the seeds that are reported
TUNING_SHARE = 0.25  # of the steps, for each try
VALIDATION_SEED, GIVEN_SEED = 17, 7919  # of the prompts that rates are chosen on, of the given pictures
VOLUME_CAPTIONS, DIVERSE = 24, 800
NETWORK = NetworkConfig(
    width=128,
    encoder_depth=2,
    decoder_depth=2,
    cross_depth=2,
    text_depth=1,
    encoder_heads=4,
    decoder_heads=4,
    cross_heads=4,
    dropout=0.0,
    grid=4,
    head_width=160,
    head_depth=3,
)
STAGES = StagesConfig(mask_min=0.3)  # as in configs/small.yaml
SAMPLING = SamplingConfig(iterations=12, head_steps=20, guidance=3.0, clip=4.0)
# Every pre-trained arm differs from the recipe in what stands here: options of the network, of the set, of the stages.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flip": {"flip": True},
    "volume": {"set": "volume"},
    "diverse": {"set": "diverse"},
    "raster": {"network": {"order": "raster"}},
    "regression": {"network": {"head": "regression"}},
    "staged": {"staged": True},
}


@dataclass
class Sizes:
    """Sizes of a tier.

    Args:
        steps: optimiser steps of a pre-trained arm; preference_steps: of DPO and of its baseline; batch: of a step.
        images: of the training set; per_task: prompts of each of the six tasks; pairs: of preferences.
        set_sizes: claim B; iterations: claim F.
        tune: choose learning rates on grids with equal tries; else `lr` and `preference_lr` are taken.
        beta: of DPO.
    """

    batch: int
    images: int
    per_task: int
    pairs: int
    set_sizes: list[int]
    iterations: list[int]
    tune: bool
    lr: float
    preference_lr: float
    beta: float
    steps: int
    preference_steps: int


def volume_scenes(count: int, seed: int = 0) -> Captioned:
    """Many pictures of few captions: each caption's objects are drawn again and again, the rest is free."""
    specs = prompts(VOLUME_CAPTIONS // 6, "train", seed=seed, **WORLDS[WORLD])
    pixels = np.stack([render(_scene_of(specs[i % len(specs)], seed, i), SIZE) for i in range(count)])
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    captions = [specs[i % len(specs)].caption for i in range(count)]
    name = fingerprint_strings([f"volume-{count}-{seed}", *captions])
    return Captioned(captions, lambda rows: images[rows], name)


def _scene_of(spec: Spec, seed: int, index: int) -> Scene:
    """A scene that the caption describes: another one's places and sizes, with the caption's shapes and colours."""
    rng = np.random.default_rng([seed, 3, index])
    while True:
        drawn = sample_scene(rng, spec.task, "train", **WORLDS[WORLD])
        if len(drawn.objects) != len(spec.objects) or drawn.relation != spec.relation:
            continue
        named = zip(drawn.objects, spec.objects)
        objects = tuple(replace(o, shape=shape, colour=colour or o.colour) for o, (colour, shape) in named)
        if not any(o.pair in heldout_pairs() for o in objects):
            return replace(drawn, objects=objects)


class Study(CommonStudy[Sizes]):
    """One autoencoder and one world; arms by (name, seed)."""

    paper = "lightgen"

    def __init__(self, autoencoder: str, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes, folder)
        self.autoencoder, self.text = Autoencoder(autoencoder), TextStates(TextConfig())

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        return {"autoencoder": self.autoencoder.fingerprint, "text": self.text.fingerprint, **super().settings}

    def specs(self, split: Split = "test", seed: int = 0) -> list[Spec]:
        """Prompts of the six tasks."""
        return prompts(self.sizes.per_task, split, seed=seed, **WORLDS[WORLD])

    def pictures(self, name: str) -> Captioned:
        """The set of an arm: `volume`, `diverse`, or a number of scenes."""
        if name == "volume":
            return volume_scenes(10 * DIVERSE)
        return scenes("train", DIVERSE if name == "diverse" else int(name), SIZE, WORLD)

    def painter(self, model: Fluid) -> Painter:
        return Painter(model, self.text, self.autoencoder, SAMPLING, SIZE)

    def new_model(self, name: str, seed: int) -> Fluid:
        torch.manual_seed(seed)
        network = replace(NETWORK, **ARMS[name].get("network", {}))
        return Fluid(network, self.autoencoder.channels, self.text.width)

    def _fit(
        self,
        module: Any,
        table: Table,
        steps: int,
        seed: int,
        folder: Path | None,
        watch: Watch,
    ) -> None:
        options = TrainerOptions(precision=self.precision, accelerator="cpu", progress=False)
        every = max(20, steps // 10) if folder else 0
        fit_arm(
            module,
            StepDataModule(table, self.sizes.batch, steps, seed),
            watch,
            options,
            batch_size=self.sizes.batch,
            grad_clip=3.0,
            steps=steps,
            folder=folder,
            checkpoint_every=every,
        )

    def _masked(
        self,
        start: tuple[Fluid, Fluid | None],
        table: Table,
        captions: Sequence[str],
        lr: float,
        steps: int,
        seed: int,
        folder: Path | None = None,
        watch: Watch | None = None,
    ) -> tuple[Fluid, Fluid]:
        """(trained, averaged) after so many steps of Equation 6."""
        optimiser = OptimiserConfig("muon", warmup=min(50, steps // 4), schedule="cosine", ema_decay=0.99)
        states = self.text.cached(captions, progress=False)
        module = MaskedTraining(
            *start, states, STAGES, optimiser, seed=seed, lr=lr, steps=steps, batch_size=self.sizes.batch
        )
        self._fit(module, table, steps, seed, folder, watch or Watch())
        return module.model, module.averaged()

    def _pretrain(
        self, name: str, images: str, lr: float, steps: int, seed: int, folder: Path | None = None, watch: Any = None
    ) -> Fluid:
        change, pictures = ARMS[name], self.pictures(images)
        start: tuple[Fluid, Fluid | None] = (self.new_model(name, seed), None)
        flip = change.get("flip", False)
        if change.get("staged"):
            table = latents(pictures, SIZE // 2, self.autoencoder, flip, progress=False)
            early, steps = self.staged_steps(steps)
            first = folder / "first" if folder else None
            start = self._masked(start, table, pictures.captions, lr, early, seed, first, watch)
        table = latents(pictures, SIZE, self.autoencoder, flip, progress=False)
        return self._masked(start, table, pictures.captions, lr, steps, seed, folder, watch)[1]

    def staged_steps(self, steps: int) -> tuple[int, int]:
        """Steps at half size and at full size that together cost as many FLOP as `steps` at full size: half each."""
        model = model_of(NETWORK, self.autoencoder.channels, self.text.width)
        small, large = (step_flop(model, self.text.config.length, grid) for grid in ((2, 2), (4, 4)))
        return round(0.5 * steps * large / small), round(0.5 * steps)

    def _tuned(self, name: str, rates: Sequence[float], badness: Callable[[float], float]) -> float:
        """The rate with the least badness."""

        def tries() -> dict[str, Any]:
            found = {f"{lr:g}": badness(lr) for lr in rates}
            return {"lr": min(rates, key=lambda lr: found[f"{lr:g}"]), "badness": found}

        return float(self.values(f"tuning-{name}", tries, self.settings)["lr"])

    @torch.no_grad()
    def held_out_loss(self, model: Fluid) -> float:
        """Equation 6 on pictures that were not trained on: always the same masks, times and noises."""
        pictures = scenes("test", 8 * self.sizes.batch, SIZE, WORLD, VALIDATION_SEED)
        table = latents(pictures, SIZE, self.autoencoder, False, progress=False)
        states, batch = self.text.cached(pictures.captions, progress=False), self.sizes.batch
        module = MaskedTraining(
            model, None, states, STAGES, OptimiserConfig(), seed=0, lr=0.0, steps=1, batch_size=batch
        ).eval()
        total = 0.0
        for number, first in enumerate(range(0, len(pictures), batch)):
            draws = StepDraws(step_generator(VALIDATION_SEED, number), batch, slice(None))
            total += float(module.loss(table.__getitems__(range(first, first + batch)), draws)) * batch / len(pictures)
        return total

    def learning_rate(self, name: str) -> float:
        """Of a pre-trained arm; sets of other pictures and sizes take that of `plain`."""
        if not self.sizes.tune:
            return self.sizes.lr
        kind = name if "network" in ARMS[name] else "plain"
        steps, images = max(1, int(TUNING_SHARE * self.sizes.steps)), str(self.sizes.images)

        def badness(lr: float) -> float:  # after so few steps most pictures are wrong, whatever the rate is
            return self.held_out_loss(self._pretrain(kind, images, lr, steps, TUNING_SEED))

        return self._tuned(kind, LEARNING_RATES, badness)

    def pretrained(self, name: str, seed: int, images: str | None = None) -> Arm[Fluid]:
        """A pre-trained arm."""
        images = images or ARMS[name].get("set") or str(self.sizes.images)
        lr = self.learning_rate(name)

        def train(network: Fluid, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            watch = Watch()
            made = self._pretrain(name, images, lr, self.sizes.steps, seed, folder, watch)
            return made, {**watch.record(), "lr": lr}

        settings = {**self.settings, "lr": lr, "set": images}
        return self.arm(f"{name}-{images}", seed, lambda: self.new_model(name, seed), train, settings)

    def pairs(self, start: str, seed: int, part: int = 0) -> Pairs:
        """(given picture, own sample of a pre-trained arm); part 1 holds others."""
        count = self.sizes.pairs if part == 0 else max(32, self.sizes.pairs // 4)
        given = scenes("train", count, SIZE, WORLD, GIVEN_SEED + part)
        painter = self.painter(self.pretrained(start, seed).network)
        name = f"{start}-{seed}-{part}-{fingerprint_module(painter.model)[:8]}"  # trained anew it has other samples
        return build_pairs(painter, given, self.folder / "pairs" / name, progress=False)

    def _prefer(
        self, start: str, kind: str, lr: float, steps: int, seed: int, folder: Path | None = None, watch: Any = None
    ) -> Fluid:
        pairs, model = self.pairs(start, seed), self.pretrained(start, seed).network
        policy = copy.deepcopy(model).requires_grad_(True)
        if kind == "sft":
            return self._masked((policy, model), pairs.winners, pairs.captions, lr, steps, seed, folder, watch)[1]
        options = PreferenceConfig(steps=steps, lr=lr, batch_size=self.sizes.batch, beta=self.sizes.beta)
        states = self.text.cached(pairs.captions, progress=False)
        module = PreferenceTraining(
            policy,
            copy.deepcopy(model),
            states,
            len(pairs.captions),
            options,
            OptimiserConfig(warmup=10),
            STAGES.mask_min,
            seed=seed,
        )
        self._fit(module, pairs.table, steps, seed, folder, watch or Watch())
        return module.policy

    def preference_rate(self, start: str, kind: str) -> float:
        """Of DPO, or of its baseline, which takes the grid of pre-training."""
        if not self.sizes.tune:
            return self.sizes.preference_lr
        steps = max(1, int(TUNING_SHARE * self.sizes.preference_steps))
        rates = PREFERENCE_RATES if kind == "dpo" else tuple(0.1 * lr for lr in LEARNING_RATES)

        def badness(lr: float) -> float:
            painter = self.painter(self._prefer(start, kind, lr, steps, TUNING_SEED))
            return 1 - scores(painter, self.specs(seed=VALIDATION_SEED))["overall"]

        return self._tuned(f"{start}-{kind}", rates, badness)

    def preferred(self, start: str, kind: str, seed: int, times: float = 1.0) -> Arm[Fluid]:
        """An arm after DPO (`dpo`) or after as many steps on the winners (`sft`); `times` its own rate."""
        lr = times * self.preference_rate(start, kind)

        def train(network: Fluid, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            watch = Watch()
            made = self._prefer(start, kind, lr, self.sizes.preference_steps, seed, folder, watch)
            return made, {**watch.record(), "lr": lr}

        name = f"{start}-{kind}" + (f"-x{times:g}" if times != 1 else "")
        settings = {**self.settings, "lr": lr}
        return self.arm(name, seed, lambda: self.new_model(start, seed), train, settings)

    def scored(self, name: str, model: Callable[[], Fluid], seed: int, **changes: Any) -> dict[str, float]:
        """All numbers of an arm on the test prompts, with the seconds that drawing took."""

        def made() -> dict[str, float]:
            painter = self.painter(model())
            painter.sampling = replace(painter.sampling, **changes.get("sampling", {}))
            started = time.process_time()
            found = scores(painter, self.specs(changes.get("split", "test")), seed)
            return {**found, "seconds": time.process_time() - started}

        label = "-".join(f"{value}" for value in changes.get("sampling", {}).values())
        file = f"scores-{name}-seed{seed}-{changes.get('split', 'test')}{label and f'-{label}'}"
        return self.values(file, made, {**self.settings, "changes": f"{changes}"})

    def held_out_preference(self, start: str, seed: int) -> dict[str, float]:
        """How a policy judges pairs that it was not trained on."""
        pairs, reference = self.pairs(start, seed, 1), self.pretrained(start, seed).network
        policy = self.preferred(start, "dpo", seed).network
        return held_out_accuracy(policy, reference, pairs, self.text.cached(pairs.captions, progress=False), seed)
