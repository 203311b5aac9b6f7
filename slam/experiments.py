"""What the claims are measured on: a teacher of the repository, students that differ in one option, one judge."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.captioned import latents
from common.data.pairs import StateTable
from common.data.sampling import StepDataModule, TensorTable
from common.metrics.judge import ShapesJudge
from common.metrics.measures import EVALUATION_SEED, PromptSet, Yardstick, shapes_prompts
from common.options import TrainerOptions
from common.solvers import DiffusionSource
from common.study import Arm, Watch, fit_arm
from common.study import Study as CommonStudy
from common.teacher import Teacher
from slam.config import DataConfig, LossConfig, OptimiserConfig, StudentConfig, SubPathConfig
from slam.data import open_pictures
from slam.evaluate import few_step_source
from slam.model import Student, make_student
from slam.trainer import SlamTraining

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNING_SEED = 100  # none of the seeds that are reported
TUNING_SHARE = 0.25  # of the steps, for each try
FEW = (2, 4)
RECIPE = SubPathConfig(solver_steps=25, sigma="linear", time="effective", embedding_scale=0.1)
RELEASED = SubPathConfig(solver_steps=50)
# Every arm differs from the recipe in what stands here.
ARMS: dict[str, dict[str, Any]] = {
    "slam": {},
    "lcm": {"subpath": {"gamma": "one"}},
    "released": {"subpath": vars(RELEASED)},
    "ends": {"subpath": {"gamma": "ends"}},
    "no_drift": {"subpath": {"drift": False}},
    "quadrature": {"subpath": {"sigma": "quadrature"}},
    "k10": {"subpath": {"solver_steps": 100}},
    "k20": {"subpath": {"solver_steps": 50}},
    "k50": {"subpath": {"solver_steps": 20}},
    "k100": {"subpath": {"solver_steps": 10}},
    "ema_0": {"optimiser": {"ema_decay": 0.0}},
    "ema_0.99": {"optimiser": {"ema_decay": 0.99}},
    "l2": {"loss": {"kind": "l2"}},
    "w_half": {"loss": {"guidance": 0.5}},
    "w_double": {"loss": {"guidance": 2.0}},
    "lora_8": {"student": {"kind": "lora", "rank": 8}},
    "lora_32": {"student": {"kind": "lora", "rank": 32}},
}
ABLATIONS = [name for name in ARMS if name not in ("slam", "lcm", "released")]


@dataclass
class Sizes:
    """Sizes of a tier.

    Args:
        steps: optimiser steps of an arm; batch: of a step.
        guidance: w, the teacher's best guidance scale less 1.
        images: that FD is taken over; training_images: whose latents are learned from.
        looks: how often FD with 4 steps is measured on the way, over a quarter of the images.
        tune: choose each arm's learning rate on LEARNING_RATES with equal tries; else `lr` is taken.
    """

    batch: int
    guidance: float
    images: int
    training_images: int
    looks: int
    tune: bool
    lr: float
    steps: int


class Study(CommonStudy[Sizes]):
    """One teacher; arms by (name, seed)."""

    def __init__(self, teacher: Teacher, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes, folder)
        self.teacher = teacher

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        return {"teacher": self.teacher.checksum(), **super().settings}

    @cached_property
    def _pictures(self) -> Any:
        return open_pictures(DataConfig(images=self.sizes.training_images), "train", self.teacher.image_size[0])

    @cached_property
    def data(self) -> TensorTable:
        """Latents of the training pictures."""
        table = latents(self._pictures, self.teacher, progress=False)
        assert isinstance(table, TensorTable)
        return table

    @cached_property
    def states(self) -> Callable[[Tensor], Tensor]:
        """Numbers of training captions to their text states."""
        return StateTable(self.teacher).numbered(self._pictures.captions)

    @cached_property
    def evaluation(self) -> PromptSet:
        return shapes_prompts(self.sizes.images, self.teacher.latent_shape, self.teacher.image_size[0])

    @cached_property
    def validation(self) -> PromptSet:
        """Other scenes and noises, on which learning rates are chosen."""
        count = max(32, self.sizes.images // 4)
        return shapes_prompts(count, self.teacher.latent_shape, self.teacher.image_size[0], EVALUATION_SEED + 1)

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.evaluation, ShapesJudge())

    @cached_property
    def _validation_yardstick(self) -> Yardstick:
        return Yardstick(self.validation, ShapesJudge())

    def training(self, name: str, seed: int, lr: float, steps: int) -> SlamTraining:
        """The module of an arm; equal seeds give equal data, sub-paths, gammas and noises."""
        change, sizes = ARMS[name], self.sizes
        subpath = replace(RECIPE, **change.get("subpath", {}))
        student = replace(StudentConfig(rank=16), **change.get("student", {}))
        loss = LossConfig(guidance=sizes.guidance)
        if "guidance" in change.get("loss", {}):
            loss = replace(loss, guidance=sizes.guidance * change["loss"]["guidance"])
        elif "loss" in change:
            loss = replace(loss, **change["loss"])
        optimiser = OptimiserConfig(lr=lr, warmup=min(10, steps // 4), schedule="cosine")
        optimiser = replace(optimiser, **change.get("optimiser", {}))
        torch.manual_seed(seed)
        return SlamTraining(
            make_student(self.teacher, student, subpath),
            self.teacher,
            self.states,
            subpath,
            loss,
            optimiser,
            seed=seed,
            steps=steps,
            batch_size=sizes.batch,
        )

    def _fit(self, module: SlamTraining, watch: Watch, seed: int, steps: int, folder: Path | None = None) -> Student:
        options = TrainerOptions(precision="32-true", accelerator="cpu", progress=False)
        data = StepDataModule(self.data, self.sizes.batch, steps, seed)
        every = max(20, steps // 10) if folder else 0
        fit_arm(
            module,
            data,
            watch,
            options,
            batch_size=self.sizes.batch,
            grad_clip=1.0,
            steps=steps,
            folder=folder,
            checkpoint_every=every,
        )
        return module.final()

    def learning_rate(self, name: str) -> float:
        """Of an arm: on one grid, with equally many short tries, by the mean of log FD over 2 and 4 steps."""
        if not self.sizes.tune:
            return self.sizes.lr
        steps = max(1, int(TUNING_SHARE * self.sizes.steps))

        def tries() -> dict[str, Any]:
            badness = {}
            for lr in LEARNING_RATES:
                student = self._fit(self.training(name, TUNING_SEED, lr, steps), Watch(), TUNING_SEED, steps)
                found = [self._fd(student, n, self._validation_yardstick) for n in FEW]
                finite = all(math.isfinite(value) for value in found)
                badness[f"{lr:g}"] = statistics.fmean(map(math.log, found)) if finite else math.inf
            return {"lr": min(LEARNING_RATES, key=lambda lr: badness[f"{lr:g}"]), "log_fd": badness}

        return float(self.values(f"tuning-{name}", tries, self.settings)["lr"])

    def _fd(self, student: Student, steps: int, yardstick: Yardstick, count: int | None = None) -> float:
        prompts = yardstick.prompts.head(count or len(yardstick.prompts))
        images = self.teacher.draw(few_step_source(student, steps), prompts.prompts, prompts.noise)
        return yardstick.measure(images)["fd_data"]

    def student(self, name: str, seed: int) -> Arm[Student]:
        """A trained arm, with FD at 4 steps on the way."""
        sizes, lr = self.sizes, self.learning_rate(name)
        looks = {round(sizes.steps * (i + 1) / sizes.looks) for i in range(sizes.looks)} if sizes.looks else set()

        def train(network: Student, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            module = self.training(name, seed, lr, sizes.steps)

            def look(step: int) -> dict[str, float]:
                return {"fd_4": self._fd(module.target, 4, self.yardstick, max(32, sizes.images // 4))}

            watch = Watch(looks, look if looks else None)
            finished = self._fit(module, watch, seed, sizes.steps, folder)
            return finished, {**watch.record(), "lr": lr}

        build = self.training(name, seed, lr, sizes.steps).student
        return self.arm(name, seed, lambda: build, train, {**self.settings, "lr": lr})

    def measures(self, name: str, seed: int, steps: int) -> dict[str, float]:
        """All measures of an arm with so many steps."""

        def made() -> dict[str, float]:
            source = few_step_source(self.student(name, seed).network, steps)
            prompts = self.evaluation
            return self.yardstick.measure(self.teacher.draw(source, prompts.prompts, prompts.noise))

        return self.values(f"measures-{name}-seed{seed}-{steps}", made, self.settings)

    def teacher_measures(self, solver: str, steps: int) -> dict[str, float]:
        """All measures of the guided teacher by a solver."""

        def made() -> dict[str, float]:
            options = {"timestep_spacing": "trailing"} if solver == "DDIMScheduler" else {}
            source = DiffusionSource(self.teacher, solver, steps, self.sizes.guidance + 1, options=options)
            return self.yardstick.measure(self.teacher.draw(source, self.evaluation.prompts, self.evaluation.noise))

        return self.values(f"measures-teacher-{solver}-{steps}", made, self.settings)

    def log_fd(self, name: str, seed: int) -> float:
        """Mean of log FD to data over 2 and 4 steps."""
        return statistics.fmean(math.log(self.measures(name, seed, steps)["fd_data"]) for steps in FEW)

    def steps_to(self, name: str, seed: int, fd: float) -> float:
        """Steps after which an arm's 4-step FD is at most `fd` for the first time; infinite if never."""
        curve = self.student(name, seed).curve
        return min((point["step"] for point in curve if point["fd_4"] <= fd), default=math.inf)
