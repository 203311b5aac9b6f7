"""How every trained method of the benchmark is optimised: AdamW, warm-up, cosine, averaged weights; any loss.

Shape suffixes: B batch (its rows on this process), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.sampling import StepDataModule
from common.ema import Ema
from common.optimisers import adamw, rise_then, scheduled
from common.options import TrainerOptions
from common.paths import cache_dir
from common.steps import BatchMeans, StepDraws
from common.training import train

WARMUP, WEIGHT_DECAY, GRAD_CLIP, EMA_DECAY = 10, 0.01, 1.0, 0.99

# (network, {"states", and the columns of the data}, draws) -> scalar
Loss = Callable[[nn.Module, dict[str, Tensor], StepDraws], Tensor]


class Minimiser(pl.LightningModule):
    """The step: a loss of `network` on a batch and the states of its prompts.

    Args:
        states: prompt numbers [B] to text states [B, L, D].
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        states: Callable[[Tensor], Tensor],
        steps: int,
        batch: int,
        lr: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.states = network, loss, states
        self.steps, self.batch, self.lr, self.seed = steps, batch, lr, seed
        self.ema, self.means = Ema(network, EMA_DECAY), BatchMeans()

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        return scheduled(adamw(trainable, self.lr, WEIGHT_DECAY), rise_then("cosine", WARMUP, self.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = StepDraws.of(self, batch_idx, batch_size=self.batch, seed=self.seed)
        loss = self.loss(self.network, {**batch, "states": self.states(batch["prompt"])}, draws)
        self.means.log(self, {"loss": loss}, 0, 1)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        self.ema.update(self.network)
        self.zero_grad(set_to_none=True)


def minimise(module: Minimiser, data: Dataset, accelerator: str) -> None:
    """Train the module's network in place; it ends with its averaged weights, in eval mode. Nothing is kept on disk."""
    module.network.train()
    train(
        cache_dir("acceleration"),
        module,
        StepDataModule(data, module.batch, module.steps, module.seed),
        TrainerOptions(precision="32-true", accelerator=accelerator, progress=False),
        steps=module.steps,
        batch_size=module.batch,
        grad_clip=GRAD_CLIP,
        logs=False,
    )
    module.ema.copy_to(module.network)
    module.network.eval()
