"""The step."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.ema import Ema
from common.steps import BatchMeans, StepDraws
from newpaper.config import NewpaperRun
from newpaper.model import Denoiser


class DenoiserTraining(pl.LightningModule):
    """Equation 6: the targets' noise has mean zero, so the least squares solution is the one of clean targets."""

    def __init__(self, config: NewpaperRun) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.network, self.means = config, Denoiser(config.network), BatchMeans()
        self.ema = Ema(self.network, config.ema_decay)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        config, size, parts = self.config, self.config.trainer.batch_size, self.config.trainer.accumulate
        draws = StepDraws.of(self, batch_idx, batch_size=size, accumulate=parts, seed=config.seed)
        x_BCHW = batch["image"]
        noise_BCHW, other_BCHW = config.sigma * draws.normals(2, *x_BCHW.shape[1:])
        target_BCHW = x_BCHW + other_BCHW if config.targets == "noisy" else x_BCHW
        loss = F.mse_loss(self.network(x_BCHW + noise_BCHW), target_BCHW)
        self.means.log(self, {"loss": loss}, draws.part, parts)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.network)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), self.config.lr)
