"""One step of a frozen text-to-image model, with low-rank adaptors for that one time.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.adaptors import add_adaptors
from common.teacher import NoiseSchedule, Teacher
from common.unets import RecordedUNet, quicken
from hipa.config import PLACEMENTS, AdaptorConfig
from hipa.frozen import spare_memory


class OneStep(nn.Module):
    """Noise to latents by one evaluation of the U-Net at the last training step T (section 2.1).

    For epsilon models (x - sigma_T eps) / alpha_T, for v models alpha_T x - sigma_T v; no guidance pass.

    Args:
        time: another training step than T, where a picture is drawn from a noisy one (editing).
    """

    def __init__(self, unet: Any, schedule: NoiseSchedule, time: int | None = None) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule
        # 999 of 1000: never what a scheduler's default spacing makes of one step.
        self.time = schedule.steps - 1 if time is None else time

    def forward(self, x_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
        """Latents [B, C, H, W], float32.

        Args:
            x_BCHW: noise; for a U-Net with a picture as its condition that picture's channels stand behind it.
        """
        t_B = torch.full((len(x_BCHW),), self.time, device=x_BCHW.device)
        dtype = next(self.unet.parameters()).dtype
        output_BCHW = self.unet(x_BCHW.to(dtype), t_B, states_BLD.to(dtype), return_dict=False)[0].float()
        alpha, sigma = self.schedule.levels(t_B)
        x1_BCHW, _ = self.schedule.read(output_BCHW, x_BCHW[:, : output_BCHW.shape[1]].float(), alpha, sigma)
        return x1_BCHW

    def recorded(self) -> OneStep:
        """The same step, weights shared, for passes without gradients (`common.recorded`)."""
        return OneStep(RecordedUNet(self.unet), self.schedule, self.time)


def make_student(teacher: Teacher, options: AdaptorConfig, time: int | None = None) -> OneStep:
    """The teacher's U-Net with adaptors whose B is zero: the first loss is that of the raw one-step model."""
    unet = bare_copy(teacher)
    if options.placement == "full":
        unet.requires_grad_(True)
    else:
        add_adaptors(unet, PLACEMENTS[options.placement], options.rank, options.alpha)
    spare_memory(unet)
    return OneStep(unet, teacher.schedule, time)


def bare_copy(teacher: Teacher) -> Any:
    """A float32 copy of the frozen U-Net."""
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in dict(teacher.unet.config).items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(teacher.unet.state_dict())
    return quicken(unet.float().to(teacher.device).eval().requires_grad_(False))


def trained_parameters(student: nn.Module) -> int:
    return sum(p.numel() for p in student.parameters() if p.requires_grad)
