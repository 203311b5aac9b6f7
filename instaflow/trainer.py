"""One step of training a flow, and one stage of such steps.

Shape suffixes: b rows of a micro-batch on this process, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.sampling import StepDataModule
from common.ema import Ema
from common.optimisers import adamw, rise_then, scheduled
from common.steps import StepTraining
from common.training import EveryNSteps, train
from instaflow.config import OptimiserConfig, StageConfig, TrainerConfig
from instaflow.flow import UNetFlow
from instaflow.losses import Loss


class StudentTrainer(StepTraining):
    """Minimises a loss of a flow with AdamW, warm-up and averaged weights.

    Args:
        states: prompt numbers [b] to text states [b, L, D] (of the frozen encoder, which is no part of the checkpoint).
        accumulate: micro-batches per step.
    """

    def __init__(
        self,
        flow: nn.Module,
        loss: Loss,
        stage: StageConfig,
        optimiser: OptimiserConfig,
        seed: int,
        states: Callable[[Tensor], Tensor],
        accumulate: int = 1,
    ) -> None:
        super().__init__(seed=seed, steps=stage.steps, batch_size=stage.batch_size, accumulate=accumulate)
        self.flow, self.loss, self.stage, self.options, self.states = flow, loss, stage, optimiser, states
        self.ema = Ema(flow, optimiser.ema_decay)

    def configure_optimizers(self) -> Any:
        options = self.options
        trainable = [p for p in self.flow.parameters() if p.requires_grad]
        optimiser = adamw(trainable, self.stage.lr, options.weight_decay)
        return scheduled(optimiser, rise_then(options.schedule, options.warmup, self.stage.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        loss = self.loss(self.flow, {**batch, "states": self.states(batch["prompt"])}, draws)
        self.means.log(self, {"loss": loss}, draws.part, self.accumulate)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        self.ema.update(self.flow)
        self.zero_grad(set_to_none=True)


def optimise(
    flow: UNetFlow,
    loss: Loss,
    data: Dataset,
    states: Callable[[Tensor], Tensor],
    stage: StageConfig,
    optimiser: OptimiserConfig,
    seed: int,
    folder: Path,
    options: TrainerConfig,
    *,
    keep: bool = True,
    logs: bool = True,
    show: Callable[[int], None] | None = None,
) -> None:
    """Train `flow` in place for one stage; afterwards it holds the averaged weights and is in eval mode.

    Args:
        data: map-style, one row a pair (`x0`, `x1`, `prompt`).
        keep: write checkpoints and (unless `logs` is False) logs below `folder`, and continue from the last checkpoint.
        show: called every `options.sample_every` steps while the flow holds its averaged weights.
    """
    module = StudentTrainer(flow.train(), loss, stage, optimiser, seed, states, options.accumulate)

    def shown(step: int) -> None:
        assert show is not None
        with module.ema.swapped_into(flow):
            flow.eval()
            show(step)
            flow.train()

    grids = [EveryNSteps(options.sample_every, shown)] if show and options.sample_every else []
    train(
        folder,
        module,
        StepDataModule(data, stage.batch_size, stage.steps, seed, accumulate=options.accumulate),
        options,
        steps=stage.steps,
        batch_size=stage.batch_size,
        grad_clip=optimiser.grad_clip,
        callbacks=grids,
        logs=keep and logs,
        checkpoints=keep,
        networks=[flow.unet],
    )
    module.ema.copy_to(flow)
    flow.eval()
