"""The step: sub-path distillation of a student, with an averaged target.

Shape suffixes: b rows of a micro-batch on this process, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor

from common.optimisers import adamw, rise_then, scheduled
from common.steps import StepOptions, StepTraining
from common.teacher import Teacher
from slam.config import LossConfig, OptimiserConfig, SubPathConfig
from slam.losses import draw_gamma, solve_subpath, subpath_loss
from slam.model import Student, averaged_copy, follow


class SlamTraining(StepTraining):
    """Trains `student`; `target` follows it and is what is kept in the end.

    Args:
        teacher: frozen, on the device of the training, no part of the checkpoint.
        states: prompt numbers [b] to text states [b, L, D] (of the frozen encoder).
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        states: Callable[[Tensor], Tensor],
        subpath: SubPathConfig,
        loss: LossConfig,
        optimiser: OptimiserConfig,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.student, self.target = student, averaged_copy(student)
        self.teacher, self.states, self.subpath, self.loss, self.options = teacher, states, subpath, loss, optimiser

    def configure_optimizers(self) -> Any:
        options = self.options
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimiser = adamw(trained, options.lr, options.weight_decay)
        return scheduled(optimiser, rise_then(options.schedule, options.warmup, self.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        x1_bCHW, states_bLD = batch["x1"].float(), self.states(batch["prompt"])
        paths = self.student.paths
        # The same draws whatever the options are, so that arms differ in nothing else.
        index_b, gamma_b, share_b = draws.integers(paths.steps), draws.uniform(), draws.uniform()
        noise_bCHW = draws.normal(*x1_bCHW.shape[1:])
        gamma_b = draw_gamma(self.subpath.gamma, gamma_b)
        low, high = self.loss.w_range or (self.loss.guidance, self.loss.guidance)
        w_b = low + (high - low) * share_b
        path = solve_subpath(self.teacher, paths, x1_bCHW, noise_bCHW, index_b, states_bLD, w_b)
        target = self.target if self.options.ema_decay > 0 else self.student
        embedded = w_b if self.loss.w_range else None
        loss = subpath_loss(self.student, target, path, gamma_b, states_bLD, self.loss, embedded)
        self.means.log(self, {"loss": loss}, draws.part, self.accumulate)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        follow(self.target, self.student, self.options.ema_decay)
        self.zero_grad(set_to_none=True)

    def final(self) -> Student:
        """The student with its averaged weights."""
        if self.options.ema_decay > 0:
            follow(self.student, self.target, 0.0)
        return self.student.eval()

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Without the weights that are not trained, which the teacher has."""
        frozen = {f"student.{name}" for name, p in self.student.named_parameters() if not p.requires_grad}
        frozen |= {name.replace("student.", "target.", 1) for name in frozen}
        return {k: v for k, v in super().state_dict(*args, **options).items() if k not in frozen}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict=strict, assign=assign)
