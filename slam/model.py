"""The student f(x_gamma, gamma, t): a diffusers U-Net that also knows where on its sub-path it is.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width, E sinusoids.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adaptors import add_adaptors
from common.errors import UserError
from common.teacher import Teacher
from common.unets import RecordedUNet, quicken
from slam.config import StudentConfig, SubPathConfig
from slam.subpath import TIMESTEP_SCALING, SubPaths, boundary_scalings, column

PROJECTION = "time_embedding.cond_proj.weight"  # the one weight that a full student has beside its teacher's


def scalar_embedding(value_B: Tensor, width: int, scale: float = 1000.0) -> Tensor:
    """Sinusoids [B, E] of a number (LCM embeds its guidance w so, SLAM 10 - 10 gamma): sines, then cosines."""
    half = width // 2
    frequencies_E = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half, device=value_B.device))
    angles_BE = (scale * value_B.float())[:, None] * frequencies_E[None]
    return nn.functional.pad(torch.cat([angles_BE.sin(), angles_BE.cos()], dim=1), (0, width % 2))


@dataclass(frozen=True)
class Reading:
    """What an LCM scheduler does to x1_hat and its boundary condition; students of ours have the defaults.

    Args:
        timestep_scaling: factor of the training step in c_skip and c_out.
        largest: x1_hat is kept within +- this (`clip_sample`, `clip_sample_range`); 0 does not clip.
        quantile: x1_hat of each sample is kept within this quantile s >= 1 of its magnitudes and divided by s
            (`thresholding`); 0 does not.
        largest_quantile: the most that s may be.
    """

    timestep_scaling: float = TIMESTEP_SCALING
    largest: float = 0.0
    quantile: float = 0.0
    largest_quantile: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Reading:
        """Of an LCM scheduler's options; what they leave out is diffusers' default."""
        return cls(
            float(config.get("timestep_scaling", TIMESTEP_SCALING)),
            float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else 0.0,
            float(config.get("dynamic_thresholding_ratio", 0.995)) if config.get("thresholding") else 0.0,
            float(config.get("sample_max_value", 1.0)),
        )

    def options(self) -> dict[str, Any]:
        """The same as options of the scheduler."""
        found: dict[str, Any] = {"timestep_scaling": self.timestep_scaling, "clip_sample": self.largest > 0}
        if self.largest:
            found["clip_sample_range"] = self.largest
        if self.quantile:
            found |= {"thresholding": True, "dynamic_thresholding_ratio": self.quantile}
            found["sample_max_value"] = self.largest_quantile
        return found

    def limited(self, x1_BCHW: Tensor) -> Tensor:
        """x1_hat as the boundary condition takes it; thresholding goes before clipping."""
        if self.quantile:
            most_B = x1_BCHW.flatten(1).abs().quantile(self.quantile, dim=1).clamp(1, self.largest_quantile)
            return x1_BCHW.clamp(-column(most_B), column(most_B)) / column(most_B)
        return x1_BCHW.clamp(-self.largest, self.largest) if self.largest else x1_BCHW


class Student(nn.Module):
    """f(x_gamma, gamma, t | text) = c_skip(t) x_gamma + c_out(t) x1_hat.

    Args:
        unet: a diffusers U-Net; with `time_cond_proj_dim` it receives the embedding of gamma (or of w).
        paths: noise levels and prediction type are those of their schedule.
        effective_time: normalise the input and tell the network the time that fits its noise (`SubPathConfig.time`).
        embedding_scale: see `SubPathConfig`.
        reading: of a student that others have trained, as its scheduler says.
    """

    def __init__(
        self,
        unet: Any,
        paths: SubPaths,
        effective_time: bool = False,
        embedding_scale: float = 1000.0,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.paths, self.reading = unet, paths, reading or Reading()
        self.effective_time, self.embedding_scale = effective_time, embedding_scale

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        states_BLD: Tensor,
        gamma_B: Tensor | None = None,
        s_B: Tensor | None = None,
        w_B: Tensor | None = None,
    ) -> Tensor:
        """The x1 that the path through x_gamma leads to, float32 [B, C, H, W].

        Args:
            t_B: training step of the sub-path's noisy end, whatever gamma is.
            gamma_B, s_B: place on the sub-path and training step of its cleaner end; None: gamma = 1.
            w_B: LCM's guidance, embedded instead of gamma.
        """
        paths = self.paths
        # At the noisy end itself alpha may be 0 (a schedule that ends without signal).
        alpha_B, sigma_B = paths.schedule.exact_levels(t_B) if gamma_B is None else paths.levels(t_B)
        noise_B = sigma_B if gamma_B is None or s_B is None else paths.sigma_gamma(gamma_B, t_B, s_B)
        input_BCHW, time_B = x_BCHW, t_B
        if self.effective_time:
            norm_B = (alpha_B.square() + noise_B.square()).sqrt()
            time_B = paths.effective_time(t_B, noise_B).float()
            input_BCHW = x_BCHW / column(norm_B).to(x_BCHW)
            alpha_B, noise_B = alpha_B / norm_B, noise_B / norm_B
            sigma_B = noise_B
        condition = self._condition(len(x_BCHW), gamma_B, w_B, x_BCHW)
        output_BCHW = self.unet(input_BCHW, time_B, states_BLD, timestep_cond=condition, return_dict=False)[0].float()
        x1_BCHW = self._read(output_BCHW, input_BCHW.float(), alpha_B, sigma_B, noise_B)
        skip, out = (column(c_B).to(x1_BCHW) for c_B in boundary_scalings(t_B, self.reading.timestep_scaling))
        return skip * x_BCHW.float() + out * self.reading.limited(x1_BCHW)

    def recorded(self) -> Student:
        """The same student, weights shared, for passes without gradients (`common.recorded`)."""
        unet = RecordedUNet(self.unet)
        return Student(unet, self.paths, self.effective_time, self.embedding_scale, self.reading)

    def _condition(self, batch: int, gamma_B: Tensor | None, w_B: Tensor | None, like: Tensor) -> Tensor | None:
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        if w_B is not None:
            return scalar_embedding(w_B, width).to(like.dtype)
        value_B = like.new_zeros(batch) if gamma_B is None else 10 - 10 * gamma_B.float()
        return scalar_embedding(value_B, width, self.embedding_scale).to(like.dtype)

    def _read(self, output: Tensor, x_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor, noise_B: Tensor) -> Tensor:
        """x1_hat = (x - sigma_gamma eps) / alpha_t, where a v network's eps is alpha_t v + sigma_t x.

        Args:
            sigma_B: of the time that the network was told; noise_B: of the input. They differ in the released form
                only, where the network is told t at every gamma.
        """
        kind = self.paths.schedule.prediction_type
        alpha, noise = column(alpha_B).to(x_BCHW), column(noise_B).to(x_BCHW)
        if kind == "sample":
            return output
        if kind == "epsilon":
            return (x_BCHW - noise * output) / alpha
        # Gathered before rounding: at gamma = 1 the factor of x is alpha_t itself.
        factor_B = alpha_B if sigma_B is noise_B else (1 - noise_B * sigma_B) / alpha_B
        return column(factor_B).to(x_BCHW) * x_BCHW - noise * output


def make_student(teacher: Teacher, options: StudentConfig, paths: SubPathConfig) -> Student:
    """A trainable float32 student that starts as the teacher: all its weights, or adaptors on frozen ones.

    Raises:
        UserError: the released form with a schedule that ends without signal, or a name in `targets` that fits nothing.
    """
    grid = SubPaths(teacher.schedule, paths.solver_steps, paths.sigma, paths.drift)
    effective = paths.time == "effective"
    if teacher.schedule.zero_signal and teacher.schedule.prediction_type == "v_prediction" and not effective:
        raise UserError(
            "--subpath.time released: this teacher's schedule ends without signal (rescale_betas_zero_snr), where the "
            "released x0 estimate divides by zero at gamma < 1; expected --subpath.time effective"
        )
    unet = copy_unet(teacher, options.embedding_width if options.kind == "full" else None)
    if options.kind == "full":
        if options.zero_init:
            nn.init.zeros_(unet.time_embedding.cond_proj.weight)
        unet.train().requires_grad_(True)
    else:
        add_adaptors(unet, options.targets, options.rank, options.alpha)
        unet.train()
    return Student(quicken(unet), grid, effective, paths.embedding_scale)


def copy_unet(teacher: Teacher, embedding_width: int | None) -> Any:
    """A float32 copy of the teacher's U-Net, with a new projection for an embedding of that width.

    Raises:
        UserError: the copy lacks a weight, which would be left random.
    """
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in dict(teacher.unet.config).items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": embedding_width})
    missing, surplus = unet.load_state_dict(teacher.unet.state_dict(), strict=False)
    if wrong := [*set(missing) - {PROJECTION}, *surplus]:
        raise UserError(f"the teacher's U-Net cannot be rebuilt from its config: {wrong[0]} does not fit")
    return unet.float()


@torch.no_grad()
def follow(target: nn.Module, student: nn.Module, decay: float) -> None:
    """target <- decay target + (1 - decay) student, over what is trained (step 8)."""
    both = zip(target.parameters(), student.parameters(), strict=True)
    pairs = [(t, s) for t, s in both if t.requires_grad or s.requires_grad]
    torch._foreach_lerp_([t.data for t, _ in pairs], [s.data for _, s in pairs], 1 - decay)


def averaged_copy(student: Student) -> Student:
    """A frozen copy that starts as the student; what the student does not train is shared with it, not copied."""
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    target = copy.deepcopy(student, dict(shared))
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    return target.eval()
