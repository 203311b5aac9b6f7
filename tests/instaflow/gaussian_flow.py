"""Teachers whose flow is known: the best diffusion network for normally distributed data."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from common.teacher import NoiseSchedule, read_schedule
from instaflow.flow import UNetFlow
from tests.common.tiny_teacher import SCHEDULER


class GaussianNetwork(nn.Module):
    """The best possible diffusion network for data N(0, spread^2): its flow sends the noise z to spread * z."""

    def __init__(self, schedule: NoiseSchedule, spread: float) -> None:
        super().__init__()
        self.schedule, self.spread = schedule, spread
        self.unused = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=4, sample_size=2)

    def forward(self, x: Tensor, tau: Tensor, states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        # Between training steps log(alpha/sigma) is linear, as TimeMatching assumes.
        alpha2 = self.schedule.alphas_cumprod_T
        log_snr = 0.5 * (alpha2.log() - (1 - alpha2).log())
        low = tau.double().floor().long().clamp(max=len(alpha2) - 2)
        between = torch.lerp(log_snr[low], log_snr[low + 1], tau.double() - low)
        alpha = torch.sigmoid(2 * between).sqrt().float().view(-1, 1, 1, 1)
        sigma = torch.sigmoid(-2 * between).sqrt().float().view(-1, 1, 1, 1)
        # The input has unit variance only for unit-variance data: undo the flow's scaling to reach the true x_tau.
        x1 = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2) * x
        eps = sigma / (alpha**2 * self.spread**2 + sigma**2) * x
        kind = self.schedule.prediction_type
        return ({"epsilon": eps, "v_prediction": alpha * eps - sigma * x1, "sample": x1}[kind],)


def gaussian_flow(prediction_type: str, spread: float = 0.5) -> UNetFlow:
    schedule = read_schedule({**SCHEDULER, "prediction_type": prediction_type})
    return UNetFlow(GaussianNetwork(schedule, spread), schedule)
