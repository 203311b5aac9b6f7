"""What the claims of `reproduce.py` are made of: arms that differ in one thing, on one teacher, one pair set.

Everything is kept: pairs in the cache, trained arms and sampled images in the study's folder, all beside the teacher's
checksum and the sizes, so an interrupted run continues and a new teacher starts afresh.

Budgets are optimiser steps and pairs; every arm books its cost in U-Net forward-equivalent samples (a training step is
3 a sample, guidance doubles a forward, a stacked U-Net doubles everything).
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.pairs import PairDataset, PairSource, StateTable, make_pairs, prompt_list
from common.data.sampling import derive_seed
from common.metrics.distribution import fid
from common.metrics.features import extract
from common.metrics.judge import ShapesJudge
from common.metrics.measures import PromptSet, Yardstick, fixed_noise, shapes_prompts
from common.metrics.perceptual import perceptual_distance
from common.solvers import DiffusionSource
from common.study import CHECKPOINT_EVERY
from common.study import Study as CommonStudy
from common.teacher import Teacher
from instaflow.config import OptimiserConfig, StageConfig, TrainerConfig
from instaflow.flow import FlowSource, TeacherFlow, UNetFlow, conditioned, euler, one_step, straightness
from instaflow.losses import Loss, distillation_loss, perceptual_loss, reflow_loss
from instaflow.student import make_student, stack, unique_state
from instaflow.trainer import optimise

INIT = "negate"
SOLVER = "DPMSolverMultistepScheduler"
PROMPT_POOL = 20_000
LEARNING_RATES = (1e-4, 3e-4, 1e-3)  # tried for every stage alike
TUNING_SEED = 100
TUNING_SHARE = 0.25  # of a stage's steps, for each try
VALIDATION = 128  # held-out pairs on which a learning rate is chosen


@dataclass(frozen=True)
class Sizes:
    """What one seed of all claims may use.

    Args:
        pairs: teacher pairs, and as many of the rectified flow for its distillation.
        solver_steps: of the teacher in the pairs; flow_steps: Euler steps of the 2-RF in its own pairs.
        reflow, distil, more: optimiser steps of reflow, of distillation, and of the continuation of claim I5; direct
            distillation gets reflow + distil.
        many: Euler steps of the 2-RF where it is compared with the teacher at `solver_steps`.
        images: of every Frechet distance. paths: noises of the straightness, path_steps: Euler steps.
        tune: choose learning rates on the grid, else take `lr`.
    """

    solver_steps: int
    flow_steps: int
    many: int
    guidance: float
    batch: int
    images: int
    paths: int
    path_steps: int
    tune: bool
    lr: float
    pairs: int
    reflow: int
    distil: int
    more: int


class Study(CommonStudy[Sizes]):
    """One teacher and the sizes of a tier; arms by (name, seed)."""

    def __init__(self, teacher: Teacher, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes, folder)
        self.teacher = teacher
        self._flows: dict[tuple[str, int], UNetFlow] = {}

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        return {"teacher": self.teacher.checksum(), **super().settings}

    @cached_property
    def prompts(self) -> list[str]:
        return prompt_list("shapes", PROMPT_POOL)

    @cached_property
    def states(self) -> Callable[[Tensor], Tensor]:
        """Numbers of training prompts to their text states."""
        return StateTable(self.teacher).numbered(self.prompts)

    def source(self, steps: int, solver: str = SOLVER) -> DiffusionSource:
        """The teacher's guided ODE."""
        options = {"timestep_spacing": "trailing"} if solver == "DDIMScheduler" else {}
        return DiffusionSource(self.teacher, solver, steps, self.sizes.guidance, options=options)

    @cached_property
    def pairs(self) -> PairDataset:
        """The teacher's pairs: the same for every seed and arm."""
        return self._make(self.source(self.sizes.solver_steps), self.sizes.pairs, 0)

    def _make(self, source: PairSource, count: int, seed: int) -> PairDataset:
        return make_pairs(source, self.prompts, count, seed, 64, 256, progress=False)

    @cached_property
    def evaluation(self) -> PromptSet:
        """Held-out prompts, noises and images."""
        return shapes_prompts(self.sizes.images, self.teacher.latent_shape)

    @cached_property
    def evaluation_states(self) -> Tensor:
        return self.teacher.encode(self.evaluation.prompts).float()

    @cached_property
    def yardstick(self) -> Yardstick:
        teacher = self.teacher.decode(self.teacher_latents(self.sizes.solver_steps))
        return Yardstick(self.evaluation, ShapesJudge(), teacher)

    def teacher_latents(self, steps: int, solver: str = SOLVER) -> Tensor:
        """End points of the teacher's ODE from the evaluation noises."""
        return self._kept(f"teacher-{solver}-{steps}", lambda: self._solve(self.source(steps, solver)))

    def _solve(self, source: PairSource) -> Tensor:
        noise, states = self.evaluation.noise, self.evaluation_states
        return torch.cat([source(z, s).clone() for z, s in zip(noise.split(64), states.split(64))])

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made once."""
        return self.tensors(name, lambda: {"latents": make()}, self.settings)["latents"]

    def flow(self, name: str, seed: int) -> UNetFlow:
        """A trained arm: reflow, instaflow, direct, continued_l2, continued_perceptual, stacked."""
        if (name, seed) not in self._flows:
            flow = self._start(name, seed)

            def trained() -> Mapping[str, Tensor]:
                self._train(name, flow, seed)
                return unique_state(flow)

            flow.load_state_dict(self.tensors(f"{name}-seed{seed}", trained, self.settings), strict=False)
            self.note(name, seed, self.settings, {"training_forwards": self.cost(name)})
            self._forget_work(f"{name}-seed{seed}")
            self._flows[name, seed] = flow.eval().requires_grad_(False)
        return self._flows[name, seed]

    def _start(self, name: str, seed: int) -> UNetFlow:
        """The network an arm starts from."""
        if name in ("reflow", "direct"):
            return make_student(self.teacher, INIT)
        parent = self.flow("instaflow" if name.startswith("continued") else "reflow", seed)
        started = stack(parent) if name == "stacked" else copy.deepcopy(parent)
        return started.requires_grad_(True)

    def _train(self, name: str, flow: UNetFlow, seed: int) -> None:
        sizes = self.sizes
        stage = {"reflow": "reflow", "direct": "direct"}.get(name, "distil")
        steps = {"reflow": sizes.reflow, "direct": sizes.reflow + sizes.distil}.get(name, sizes.distil)
        steps = sizes.more if name.startswith("continued") else steps
        lr = self.learning_rate(stage)
        # Continuing at the full rate would first undo what the averaged weights had reached.
        lr = 0.3 * lr if name.startswith("continued") else lr
        data = self.pairs if name in ("reflow", "direct") else self.flow_pairs(seed)
        loss: Loss = reflow_loss() if name == "reflow" else distillation_loss()
        if name == "continued_perceptual":
            loss = perceptual_loss(self.teacher, perceptual_distance("trained"))
        self._optimise(f"{name}-seed{seed}", flow, loss, data, steps, lr, derive_seed(seed, *name.encode()))

    def forget(self) -> None:
        """Also the flows."""
        super().forget()
        self._flows.clear()

    def _forget_work(self, name: str) -> None:
        """Drop the checkpoints of an arm that is kept by now."""
        shutil.rmtree(self.folder / "arms" / name, ignore_errors=True)

    def _optimise(
        self, name: str, flow: UNetFlow, loss: Loss, data: PairDataset, steps: int, lr: float, seed: int
    ) -> None:
        options = TrainerConfig(
            precision=self.precision,
            accelerator="cpu",
            progress=False,
            sample_every=0,
            checkpoint_every=CHECKPOINT_EVERY,
        )
        optimise(
            flow,
            loss,
            data,
            self.states,
            StageConfig(steps, self.sizes.batch, lr),
            OptimiserConfig(warmup=min(20, steps // 4), schedule="cosine", ema_decay=0.99),
            seed,
            self.workplace(f"arms/{name}", self.settings),
            options,
            logs=False,
        )

    def flow_pairs(self, seed: int) -> PairDataset:
        """Pairs of a seed's 2-RF: other noises than the teacher's pairs, as many, guidance off (it is inside)."""
        source = FlowSource(self.flow("reflow", seed), self.teacher, self.sizes.flow_steps, 1.0)
        return self._make(source, self.sizes.pairs, 1)

    def learning_rate(self, stage: str) -> float:
        """Chosen for each stage on the same grid with equally many short tries, on a seed that is not reported."""
        if not self.sizes.tune:
            return self.sizes.lr

        def tries() -> dict[str, Any]:
            errors = {}
            for lr in LEARNING_RATES:
                parent = self.flow("reflow", TUNING_SEED) if stage == "distil" else None
                flow = copy.deepcopy(parent).requires_grad_(True) if parent else make_student(self.teacher, INIT)
                whole = {"reflow": self.sizes.reflow, "distil": self.sizes.distil}
                steps = int(TUNING_SHARE * whole.get(stage, self.sizes.reflow + self.sizes.distil))
                data = self.flow_pairs(TUNING_SEED) if stage == "distil" else self.pairs
                loss = reflow_loss() if stage == "reflow" else distillation_loss()
                self._optimise(f"try-{stage}-{lr:g}", flow, loss, data, steps, lr, TUNING_SEED)
                errors[f"{lr:g}"] = self._validation_error(flow, stage)
            best = min(LEARNING_RATES, key=lambda lr: errors[f"{lr:g}"])
            return {"lr": best, "errors": errors}

        chosen = float(self.values(f"tuning-{stage}", tries, self.settings)["lr"])
        for lr in LEARNING_RATES:
            self._forget_work(f"try-{stage}-{lr:g}")
        return chosen

    @torch.no_grad()
    def _validation_error(self, flow: UNetFlow, stage: str) -> float:
        """Regression error on held-out pairs: at 8 times for reflow, at t = 0 for distillation."""
        noise, states = self.evaluation.noise[:VALIDATION], self.evaluation_states[:VALIDATION]
        if stage == "distil":
            ends = euler(conditioned(self.flow("reflow", TUNING_SEED), states), noise, self.sizes.flow_steps)
        else:
            ends = self.teacher_latents(self.sizes.solver_steps)[:VALIDATION]
        total = 0.0
        times = [i / 8 for i in range(8)] if stage == "reflow" else [0.0]
        for t in times:
            t_B = torch.full((len(noise),), t)
            v_BCHW = flow(t * ends + (1 - t) * noise, t_B, states)
            total += float((v_BCHW - (ends - noise)).square().mean())
        return total / len(times)

    @torch.no_grad()
    def latents(self, name: str, seed: int, steps: int) -> Tensor:
        """End points of an arm's Euler steps from the evaluation noises."""

        def draw() -> Tensor:
            flow = self.flow(name, seed)
            parts = zip(self.evaluation.noise.split(64), self.evaluation_states.split(64))
            return torch.cat([euler(conditioned(flow, s), z, steps) for z, s in parts])

        return self._kept(f"{name}-seed{seed}-{steps}-steps", draw)

    def images(self, name: str, seed: int, steps: int) -> Tensor:
        """Decoded `latents`, uint8."""
        return self.teacher.decode(self.latents(name, seed, steps))

    def fd(self, name: str, seed: int, steps: int) -> dict[str, float]:
        """All measures of an arm with so many steps."""
        key = f"measures-{name}-seed{seed}-{steps}"
        return self.values(key, lambda: self.yardstick.measure(self.images(name, seed, steps)), self.settings)

    def teacher_fd(self, steps: int, solver: str = SOLVER) -> dict[str, float]:
        """All measures of the teacher."""

        def measured() -> dict[str, float]:
            return self.yardstick.measure(self.teacher.decode(self.teacher_latents(steps, solver)))

        return self.values(f"measures-teacher-{solver}-{steps}", measured, self.settings)

    def distance_between(self, a: Tensor, b: Tensor) -> float:
        """Frechet distance of two sets of images."""
        judge = ShapesJudge()
        return fid(extract(a, judge), extract(b, judge))

    def straightness_of(self, name: str, seed: int) -> float:
        """S of an arm on fixed noises; `teacher` is the guided 1-flow through the epsilon-to-velocity wrapper."""

        def measured() -> dict[str, float]:
            sizes = self.sizes
            noise = fixed_noise(sizes.paths, self.teacher.latent_shape, 77)
            states = self.teacher.encode(shapes_prompts(sizes.paths, self.teacher.latent_shape, seed=77).prompts)
            total = 0.0
            for z, s in zip(noise.split(64), states.split(64)):
                if name == "teacher":
                    null = self.teacher.null(len(z))
                    velocity = conditioned(TeacherFlow(self.teacher), s, null, sizes.guidance)
                else:
                    velocity = conditioned(self.flow(name, seed), s)
                total += float(straightness(velocity, z, sizes.path_steps)) * len(z)
            return {"S": total / len(noise)}

        key = "straightness-teacher" if name == "teacher" else f"straightness-{name}-seed{seed}"
        return float(self.values(key, measured, self.settings)["S"])

    @torch.no_grad()
    def one_step_error(self, name: str, seed: int, ends: Tensor) -> float:
        """Mean squared error of an arm's one step to given end points, on the evaluation noises."""
        flow, total = self.flow(name, seed), 0.0
        parts = zip(self.evaluation.noise.split(64), self.evaluation_states.split(64), ends.split(64))
        for z, s, end in parts:
            total += float((one_step(conditioned(flow, s), z) - end).square().mean((1, 2, 3)).sum())
        return total / len(ends)

    @torch.no_grad()
    def latency(self, name: str, seed: int, repeats: int = 30) -> float:
        """Milliseconds of one U-Net evaluation with one image: the fastest of `repeats` (other load only adds)."""
        flow, z, s = self.flow(name, seed), self.evaluation.noise[:1], self.evaluation_states[:1]
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            one_step(conditioned(flow, s), z)
            times.append(time.perf_counter() - started)
        return 1000 * min(times)

    def cost(self, name: str) -> float:
        """Forward-equivalent samples behind an arm, from the teacher on, pairs included."""
        sizes = self.sizes
        pairs = sizes.pairs * self.source(sizes.solver_steps).evaluations
        reflow = pairs + 3 * sizes.batch * sizes.reflow
        distilled = reflow + sizes.pairs * sizes.flow_steps + 3 * sizes.batch * sizes.distil
        more = distilled + 3 * sizes.batch * sizes.more
        return {
            "reflow": reflow,
            "direct": pairs + 3 * sizes.batch * (sizes.reflow + sizes.distil),
            "instaflow": distilled,
            "continued_l2": more,
            "continued_perceptual": more,
            "stacked": distilled + 3 * sizes.batch * sizes.distil,
        }[name]
