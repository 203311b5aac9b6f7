"""What the claims are measured on: a teacher of the repository, adaptors that differ in one option, one judge."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.costs import parameter_count
from common.data.captioned import latents, open_captioned
from common.data.pairs import StateTable
from common.data.sampling import StepDataModule, derive_seed
from common.metrics.judge import judge_of
from common.metrics.measures import EVALUATION_SEED, PromptSet, Yardstick, shapes_prompts
from common.metrics.perceptual import perceptual_distance
from common.optimisers import adamw, rise_then, scheduled
from common.options import TrainerOptions
from common.progressive import progressive_grid, progressive_loss, progressive_sample, progressive_target
from common.solvers import DiffusionSource, guided_network
from common.steps import StepTraining
from common.study import Arm, Watch, fit_arm
from common.study import Study as CommonStudy
from common.teacher import Teacher
from hipa.analyse import compare
from hipa.config import (
    AdaptorConfig,
    EvaluationConfig,
    HipaConfig,
    LossConfig,
    OptimiserConfig,
    PairsConfig,
    TaskConfig,
)
from hipa.data import base_table, evaluation_set, pair_table, teacher_source, training_prompts, with_pictures
from hipa.evaluate import TRAIN_STEP
from hipa.losses import AdaptationLoss
from hipa.model import OneStep, make_student
from hipa.run import loss_of
from hipa.tasks import extra_channels, many_steps_source, start_time, widened
from hipa.trainer import BaseTraining, HipaTraining

LEARNING_RATES = {"adaptor": (1e-3, 2e-3, 5e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
TUNING_SEED = 100  # none of the seeds that are reported
TUNING_SHARE = 0.25  # of the steps, for each try
ROUNDS = (16, 8, 4, 2, 1)  # of progressive distillation; the first distils guidance at the teacher's own steps
PROGRESSIVE_COST = {True: 7, False: 5}  # U-Net forwards a sample: 3 to train, 2 steps of the teacher, guided or not
# Every arm differs from the recipe in what stands here; `pairs` and `arm` also name what is trained against.
ARMS: dict[str, dict[str, Any]] = {
    "hipa": {},
    "spatial": {"arm": "spatial"},
    "pixel": {"arm": "pixel"},
    **{f"rank_{rank}": {"adaptor": {"rank": rank}} for rank in (1, 2, 8, 16)},
    **{place: {"adaptor": {"placement": place}} for place in ("qv", "attention", "attention_ff", "everywhere", "full")},
    "fourier_only": {"loss": {"edge": "none"}},
    "edge_only": {"loss": {"fourier": "none"}},
    "lambda_0.1": {"loss": {"weight": 0.1}},
    "lambda_10": {"loss": {"weight": 10.0}},
    "radius_16th": {"loss": {"radius": 1 / 16}},
    "radius_4th": {"loss": {"radius": 0.25}},
    "gaussian": {"loss": {"mask": "gaussian"}},
    "l1_complex": {"loss": {"fourier": "l1_complex"}},
    "l1_amplitude": {"loss": {"fourier": "l1_amplitude"}},
    "edge_dists": {"loss": {"edge": "dists"}},
    "lpips": {"loss": {"spatial": "lpips"}},
    "lpips_only": {"arm": "spatial", "loss": {"spatial": "lpips"}},
    "mse": {"loss": {"spatial": "mse", "weight": 0.03}},
    "latents": {"loss": {"space": "latents", "spatial": "mse", "weight": 0.03}},
    "data": {"pairs": {"target": "data"}},
}
ABLATIONS = [name for name in ARMS if name not in ("hipa", "spatial", "pixel")]
TASKS = {"editing": TaskConfig("editing"), "inpainting": TaskConfig("inpainting"), "superres": TaskConfig("superres")}


@dataclass
class Sizes:
    """Sizes of a tier.

    Args:
        steps: optimiser steps of an arm; batch: of a step.
        pairs: of the teacher, made by `solver_steps`; guidance: of the teacher in them.
        rank: of the adaptors, on attention and convolutions.
        images: that FD is taken over.
        base_steps: in which the teacher learns to take a picture beside the noise.
        tune: choose each arm's learning rate on LEARNING_RATES with equal tries; else `lr` is taken.
    """

    batch: int
    guidance: float
    pairs: int
    solver_steps: int
    rank: int
    images: int
    base_steps: int
    tune: bool
    lr: float
    steps: int


class Study(CommonStudy[Sizes]):
    """One teacher on one set of prompts; arms by (name, seed).

    Args:
        data: shapes or emoji.
        task: another than drawing from text, on a base of its own.
    """

    def __init__(
        self, teacher: Teacher, sizes: Sizes, folder: Path, data: str = "shapes", task: TaskConfig | None = None
    ) -> None:
        super().__init__(sizes, folder)
        self.teacher, self.data, self.task = teacher, data, task or TaskConfig()
        self._tables: dict[str, Dataset] = {}

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        task = vars(self.task) if self.task.name != "text" else {}
        return {"teacher": self.teacher.checksum(), "data": self.data, **task, **super().settings}

    def config(self, name: str) -> HipaConfig:
        """The options of an arm; pairs are the same for all seeds, as they are for all arms."""
        change, sizes = ARMS[name], self.sizes
        pairs = PairsConfig(self.data, count=sizes.pairs, steps=sizes.solver_steps, guidance=sizes.guidance)
        return HipaConfig(
            task=self.task,
            pairs=replace(pairs, **change.get("pairs", {})),
            adaptor=replace(AdaptorConfig(sizes.rank, placement="attention_conv"), **change.get("adaptor", {})),
            loss=loss_of(change.get("arm", "hipa"), replace(LossConfig(), **change.get("loss", {}))),
            evaluation=EvaluationConfig(images=sizes.images),
        )

    # The task's base and what is measured on it ----------------------------------------------------------------------

    @cached_property
    def base(self) -> Teacher:
        """The frozen model: the teacher, or what it became for the task (one for all seeds)."""
        extra = extra_channels(self.task, self.teacher)
        if not extra:
            return self.teacher
        teacher, steps = self.teacher, self.sizes.base_steps
        unet = widened(teacher, extra)

        def trained() -> Mapping[str, Tensor]:
            table, captions = base_table(self.config("hipa"), teacher, progress=False)
            states = self._states_of(captions)
            module = BaseTraining(
                unet.train(),
                teacher.schedule,
                states,
                teacher.null().float(),
                lr=self.task.base_lr,
                seed=0,
                steps=steps,
                batch_size=self.sizes.batch,
            )
            self._fit(module, table, Watch(), 0, steps)
            return unet.state_dict()

        unet.load_state_dict(self.tensors("base", trained, self.settings))
        parts = (unet.eval(), teacher.vae, teacher.text_encoder, teacher.tokenizer, teacher.scheduler_config)
        return Teacher(*parts, pictures=True)

    @cached_property
    def evaluation(self) -> PromptSet:
        return evaluation_set(self.config("hipa"), self.base)

    @cached_property
    def validation(self) -> PromptSet:
        """Other noises than those of the claims, and of Shapes other scenes, on which learning rates are chosen."""
        count, shape, size = max(32, self.sizes.images // 4), self.teacher.latent_shape, self.teacher.image_size[0]
        if self.data == "shapes" and self.task.name == "text":
            return shapes_prompts(count, shape, size, EVALUATION_SEED + 1)
        config = replace(self.config("hipa"), evaluation=EvaluationConfig(images=count))
        return evaluation_set(config, self.base, EVALUATION_SEED + 1)

    @cached_property
    def judge(self) -> Any:
        return judge_of(None, self.data)

    @cached_property
    def many(self) -> Tensor:
        """The base's many-step pictures of the evaluation set, uint8."""
        return self.drawn(self.many_steps(self.sizes.solver_steps), self.evaluation)

    def many_steps(self, steps: int) -> Any:
        """The guided base with so many steps."""
        if self.task.name == "text":
            return teacher_source(self.base, replace(self.config("hipa").pairs, steps=steps))
        return many_steps_source(self.base, steps, self.sizes.guidance, self.time)

    def drawn(self, source: Any, prompts: PromptSet) -> Tensor:
        return self.base.draw(source, prompts.prompts, prompts.noise)

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.evaluation, self.judge, self.many, perceptual_distance("trained"))

    @property
    def time(self) -> int:
        return start_time(self.task, self.teacher.schedule)

    def frozen(self) -> OneStep:
        """The base itself in one step."""
        return OneStep(self.base.unet, self.base.schedule, self.time)

    # Adaptors --------------------------------------------------------------------------------------------------------

    def _states_of(self, prompts: list[str] | Any) -> Any:
        return StateTable(self.teacher).numbered(prompts)

    def _table(self, config: HipaConfig) -> Dataset:
        """The pairs of an arm, with their pictures; the same for most arms."""
        if config.pairs.target not in self._tables:
            table = pair_table(config, self.base, progress=False)
            self._tables[config.pairs.target] = with_pictures(table, self.base, 2.0)
        return self._tables[config.pairs.target]

    def training(self, name: str, seed: int, lr: float, steps: int) -> HipaTraining:
        """The module of an arm; equal seeds give equal pairs in equal order."""
        config = self.config(name)
        torch.manual_seed(seed)
        return HipaTraining(
            make_student(self.base, config.adaptor, self.time),
            AdaptationLoss(config.loss, self.base.decode_differentiable, self.base.device),
            self._states_of(training_prompts(config, self.base.image_size[0])),
            OptimiserConfig(lr=lr, warmup=min(10, steps // 4), schedule="cosine"),
            seed=seed,
            steps=steps,
            batch_size=self.sizes.batch,
            fresh_noise=config.pairs.target == "data",
        )

    def _fit(
        self,
        module: pl.LightningModule,
        table: Dataset,
        watch: Watch,
        seed: int,
        steps: int,
        folder: Path | None = None,
    ) -> None:
        fit_arm(
            module,
            StepDataModule(table, self.sizes.batch, steps, seed),
            watch,
            TrainerOptions(precision="32-true", accelerator="cpu", progress=False),
            batch_size=self.sizes.batch,
            grad_clip=1.0,
            steps=steps,
            folder=folder,
            checkpoint_every=max(20, steps // 10) if folder else 0,
        )

    def learning_rate(self, name: str) -> float:
        """Of an arm: on one grid, with equally many short tries, by FD to data of the validation set."""
        if not self.sizes.tune:
            return self.sizes.lr
        steps = max(1, int(TUNING_SHARE * self.sizes.steps))
        grid = LEARNING_RATES["full" if name == "full" else "adaptor"]

        def tries() -> dict[str, Any]:
            yardstick, badness = Yardstick(self.validation, self.judge), {}
            for lr in grid:
                module = self.training(name, TUNING_SEED, lr, steps)
                self._fit(module, self._table(self.config(name)), Watch(), TUNING_SEED, steps)
                badness[f"{lr:g}"] = self._fd(module.final(), yardstick)
            return {"lr": min(grid, key=lambda lr: badness[f"{lr:g}"]), "fd": badness}

        return float(self.values(f"tuning-{name}", tries, self.settings)["lr"])

    def _fd(self, source: Any, yardstick: Yardstick) -> float:
        found = yardstick.measure(self.drawn(source, yardstick.prompts))["fd_data"]
        return found if math.isfinite(found) else math.inf

    def student(self, name: str, seed: int) -> Arm[OneStep]:
        """A trained arm."""
        sizes, lr = self.sizes, self.learning_rate(name)

        def train(network: OneStep, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            module, watch = self.training(name, seed, lr, sizes.steps), Watch()
            self._fit(module, self._table(self.config(name)), watch, seed, sizes.steps, folder)
            return module.final(), {**watch.record(), "lr": lr}

        def build() -> OneStep:
            torch.manual_seed(seed)
            return make_student(self.base, self.config(name).adaptor, self.time)

        return self.arm(name, seed, build, train, {**self.settings, "lr": lr})

    def forwards(self, name: str) -> dict[str, float]:
        """U-Net evaluations of an arm's pairs and training, and its share of trained parameters."""
        config, sizes = self.config(name), self.sizes
        solver = sizes.solver_steps * (2 if sizes.guidance > 1 else 1)
        pairs = sizes.pairs * solver if config.pairs.target == "teacher" else 0
        student = make_student(self.base, config.adaptor, self.time)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        whole = parameter_count(self.base.unet)
        total = pairs + TRAIN_STEP * sizes.steps * sizes.batch
        return {"forwards": float(total), "trained": float(trained), "trained_share": trained / whole}

    # Measures --------------------------------------------------------------------------------------------------------

    def measures(self, name: str, seed: int) -> dict[str, float]:
        """All measures of an arm's pictures, with the agreement with the teacher's by band."""

        def made() -> dict[str, float]:
            return self._measured(self.drawn(self.student(name, seed).network, self.evaluation))

        return self.values(f"measures-{name}-seed{seed}", made, self.settings)

    def frozen_measures(self, which: str) -> dict[str, float]:
        """Of the frozen model: one step, one guided step, two guided steps of DDIM, or many."""

        def made() -> dict[str, float]:
            trailing = {"timestep_spacing": "trailing"}
            guided = {
                "guided": lambda: DiffusionSource(self.base, "DDIMScheduler", 1, 5.0, options=trailing),
                "two": lambda: DiffusionSource(self.base, "DDIMScheduler", 2, self.sizes.guidance, options=trailing),
            }
            if which == "many":
                return self._measured(self.many)
            return self._measured(self.drawn(guided[which]() if which in guided else self.frozen(), self.evaluation))

        return self.values(f"measures-frozen-{which}", made, self.settings)

    def _measured(self, images: Tensor) -> dict[str, float]:
        radius = self.base.image_size[0] / 8
        found = compare(images, self.many, self.evaluation.reference, self.judge, radius)
        bands = {f"coherence_{i}": value for i, value in enumerate(found["coherence"])}
        bands |= {f"error_{i}": value for i, value in enumerate(found["error"])}
        keys = ("error_below", "error_above", "fd_low_one_high_many", "fd_low_many_high_one")
        return {**self.yardstick.measure(images), **bands, **{key: found[key] for key in keys}}

    # Progressive distillation, the paper's own yardstick -------------------------------------------------------------

    @cached_property
    def latents(self) -> Dataset:
        """Latents of real pictures, which progressive distillation noises."""
        pictures = open_captioned(self.data, "train", self.teacher.image_size[0], self.sizes.pairs)
        return latents(pictures, self.teacher, progress=False)

    def progressive_steps(self) -> int:
        """Optimiser steps of each round, so that all rounds take ten times HiPA's U-Net evaluations."""
        costs = sum(PROGRESSIVE_COST[number == 0] for number in range(len(ROUNDS)))
        return max(1, math.ceil(10 * self.forwards("hipa")["forwards"] / (costs * self.sizes.batch)))

    def progressive(self, seed: int) -> dict[str, float]:
        """Measures of the one-step student after all rounds, and their U-Net evaluations."""
        steps, sizes = self.progressive_steps(), self.sizes
        pictures = open_captioned(self.data, "train", self.teacher.image_size[0], sizes.pairs)
        states = self._states_of(pictures.captions)

        def round_of(number: int, teacher: Any, lr: float, seed: int, steps: int, folder: Path | None) -> Any:
            student = copy.deepcopy(teacher).float().train().requires_grad_(True)
            guidance = sizes.guidance if number == 0 else 1.0
            module = Round(
                student, teacher, self.teacher, states, ROUNDS[number], guidance, lr, seed, steps, sizes.batch
            )
            self._fit(module, self.latents, Watch(), seed, steps, folder)
            return student.eval().requires_grad_(False)

        def tries() -> dict[str, Any]:
            yardstick, badness = Yardstick(self.validation, self.judge), {}
            for lr in LEARNING_RATES["full"]:
                short = max(1, int(TUNING_SHARE * sizes.steps))
                unet = round_of(len(ROUNDS) - 1, self.teacher.unet, lr, TUNING_SEED, short, None)
                badness[f"{lr:g}"] = self._fd(lambda x, s, unet=unet: self._progressive_draw(unet, x, s), yardstick)
            return {"lr": min(LEARNING_RATES["full"], key=lambda lr: badness[f"{lr:g}"]), "fd": badness}

        def made() -> dict[str, float]:
            lr = self.values("tuning-progressive", tries, self.settings)["lr"] if sizes.tune else 3e-4
            unet = self.teacher.unet
            for number, count in enumerate(ROUNDS):
                name, before = f"progressive-{count}-seed{seed}", unet

                def trained(number: int = number, before: Any = before, name: str = name) -> Mapping[str, Tensor]:
                    folder = self.workplace(f"arms/{name}", self.settings)
                    state = round_of(number, before, lr, derive_seed(seed, number), steps, folder).state_dict()
                    return {key: tensor.contiguous() for key, tensor in state.items()}

                unet = copy.deepcopy(unet).float().eval().requires_grad_(False)
                unet.load_state_dict(self.tensors(name, trained, {**self.settings, "lr": lr}))
            images = self.drawn(lambda x, states: self._progressive_draw(unet, x, states), self.evaluation)
            total = sum(PROGRESSIVE_COST[number == 0] for number in range(len(ROUNDS))) * steps * sizes.batch
            return {**self.yardstick.measure(images), "forwards": float(total), "lr": lr}

        return self.values(f"measures-progressive-seed{seed}", made, self.settings)

    def _progressive_draw(self, unet: Any, x_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
        return progressive_sample(guided_network(unet, states_BLD), self.teacher.schedule, x_BCHW, 1)


class Round(StepTraining):
    """One halving: the student's step against two of its teacher (Salimans & Ho, algorithm 2)."""

    def __init__(
        self,
        student: Any,
        before: Any,
        teacher: Teacher,
        states: Any,
        count: int,
        guidance: float,
        lr: float,
        seed: int,
        steps: int,
        batch_size: int,
    ) -> None:
        super().__init__(seed=seed, steps=steps, batch_size=batch_size)
        self.student, self.states, self.count, self.guidance = student, states, count, guidance
        self.before, self.teacher = [before], [teacher]  # no part of the checkpoint
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return scheduled(adamw(self.student.parameters(), self.lr), rise_then("cosine", 10, self.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        (before,), (teacher,) = self.before, self.teacher
        schedule, x1_BCHW, states = teacher.schedule, batch["x1"].float(), self.states(batch["prompt"])
        index_B = 1 + draws.integers(self.count)
        alpha, sigma = schedule.levels(progressive_grid(schedule, self.count, index_B))
        z_BCHW = alpha * x1_BCHW + sigma * draws.normal(*x1_BCHW.shape[1:])
        network = guided_network(before, states, teacher.null(1).float(), self.guidance)
        target = progressive_target(network, schedule, z_BCHW, index_B, self.count)
        loss = progressive_loss(guided_network(self.student, states), target, schedule, z_BCHW)
        self.means.log(self, {"loss": loss}, 0, 1)
        return loss
