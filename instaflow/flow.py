"""The rectified flow of the paper: time, losses, solvers, straightness, and how a diffusion network is read as a flow.

Time follows the paper: t = 0 is noise, t = 1 is data. The network's own time input runs the other way,
`network_time(t) = 1000 (1 - t)`, so that weights of Stable Diffusion see the noise level that they know.

Shape suffixes: B batch, C channels, H height, W width (of the latents), L text tokens, D text width, T training steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.teacher import NoiseSchedule, Teacher, module_checksum
from common.unets import RecordedUNet

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z_BCHW, t_B) -> v_BCHW
TIME_SCALE = 1000.0  # the published weights: network time 1000 at the noise end


def network_time(t: Tensor, scale: float = TIME_SCALE) -> Tensor:
    """What the network receives for the paper's time t: `scale` at the noise end, 0 at the data end."""
    return scale * (1 - t)


def interpolate(x0_BCHW: Tensor, x1_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """X_t = t X1 + (1 - t) X0 (eq. 1)."""
    t_B111 = t_B.to(x0_BCHW.dtype).view(-1, 1, 1, 1)
    return t_B111 * x1_BCHW + (1 - t_B111) * x0_BCHW


class TimeMatching:
    """Between the flow's time t and a diffusion's time tau: those of equal signal-to-noise ratio."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        alpha2_T = schedule.alphas_cumprod_T
        # log(alpha / sigma), ascending: from the noise end to the data end.
        log_snr_T = (0.5 * (alpha2_T.log() - (1 - alpha2_T).log())).flip(0).contiguous()
        self._log_snr: dict[torch.device, Tensor] = {torch.device("cpu"): log_snr_T}

    @property
    def t_min(self) -> float:
        """Earliest flow time whose noise level exists in the schedule: alpha/sigma = t/(1-t) at the last step."""
        return float(torch.sigmoid(self._log_snr[torch.device("cpu")][0]))

    def tau(self, t_B: Tensor) -> Tensor:
        """Diffusion time tau [B] in [0, T-1] with log(alpha/sigma) = log(t/(1-t)), linear between training steps.

        Times outside the schedule are clamped to its ends.
        """
        if t_B.device not in self._log_snr:
            self._log_snr[t_B.device] = self._log_snr[torch.device("cpu")].to(t_B.device)
        grid_T = self._log_snr[t_B.device]
        wanted_B = torch.logit(t_B.double()).clamp(grid_T[0], grid_T[-1])
        right_B = torch.searchsorted(grid_T, wanted_B).clamp(1, len(grid_T) - 1)
        left_value_B, right_value_B = grid_T[right_B - 1], grid_T[right_B]
        # Schedules that end without signal have equal neighbours there.
        position_B = right_B - 1 + (wanted_B - left_value_B) / (right_value_B - left_value_B).clamp(min=1e-12)
        return (len(grid_T) - 1 - position_B).float()


@dataclass(frozen=True)
class FlowEstimate:
    """What a diffusion network says about the flow at x_t: velocity v = x1_hat - eps_hat and where it was asked."""

    velocity: Tensor
    x1_hat: Tensor
    eps_hat: Tensor
    tau_B: Tensor


class UNetFlow(nn.Module):
    """A velocity field v(x_t, t | text) made of a diffusers U-Net.

    Without `schedule` the U-Net's output is the velocity, at network time `time_scale (1 - t)` (the published models).
    With `schedule` the U-Net is a diffusion network (epsilon, v or x0) read as the 1-rectified flow: it is asked at
    the diffusion time of equal signal-to-noise ratio, with its input scaled to unit variance, and v = x1_hat - eps_hat.

    Below `TimeMatching.t_min` no training step is noisy enough: the network is asked at its last step and v is the line
    from x_t to x1_hat, (x1_hat - x_t) / (1 - t), which equals x1_hat - eps_hat where a matching step exists. One step
    from t = 0 then lands on x1_hat, as one DDIM step does.
    """

    def __init__(self, unet: nn.Module, schedule: NoiseSchedule | None = None, time_scale: float = TIME_SCALE) -> None:
        super().__init__()
        self.unet, self.schedule, self.time_scale = unet, schedule, time_scale
        self.matching = None if schedule is None else TimeMatching(schedule)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, states_BLD: Tensor) -> Tensor:
        """Velocity [B, C, H, W] in the dtype of x. `t_B` holds the paper's times in [0, 1]."""
        if self.schedule is not None:
            return self.estimate(x_BCHW, t_B, states_BLD).velocity
        return self._network(x_BCHW, network_time(t_B, self.time_scale), states_BLD)

    def _network(self, x_BCHW: Tensor, time_B: Tensor, states_BLD: Tensor) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        output = self.unet(x_BCHW.to(dtype), time_B, states_BLD.to(dtype), return_dict=False)[0]
        return output.to(x_BCHW.dtype)

    def recorded(self) -> UNetFlow:
        """The same flow, weights shared, for passes without gradients (`common.recorded`)."""
        return UNetFlow(RecordedUNet(self.unet), self.schedule, self.time_scale)

    def estimate(self, x_BCHW: Tensor, t_B: Tensor, states_BLD: Tensor) -> FlowEstimate:
        """The diffusion network's view of the flow at x_t = t x1 + (1 - t) eps.

        Raises:
            UserError: the network has no noise schedule (it predicts velocities already).
        """
        if self.schedule is None or self.matching is None:
            raise UserError("this flow predicts velocities directly; only diffusion networks have an x1 estimate")
        tau_B = self.matching.tau(t_B)
        t_B111 = t_B.to(x_BCHW.dtype).view(-1, 1, 1, 1)
        matched_B111 = t_B111.clamp(min=self.matching.t_min)
        norm_B111 = (matched_B111.square() + (1 - matched_B111).square()).sqrt()
        alpha_B111, sigma_B111 = matched_B111 / norm_B111, (1 - matched_B111) / norm_B111
        # x_t has variance t^2 + (1 - t)^2 (for unit-variance data); the network expects 1.
        vp_BCHW = x_BCHW / (t_B111.square() + (1 - t_B111).square()).sqrt()
        output_BCHW = self._network(vp_BCHW, tau_B, states_BLD)
        x1_BCHW, eps_BCHW = self.schedule.read(output_BCHW, vp_BCHW, alpha_B111, sigma_B111)
        if self.schedule.prediction_type == "sample":  # sigma = 0 at t = 1, where the line has no length left
            eps_BCHW = torch.where(t_B111 >= 1, vp_BCHW, eps_BCHW)
        line_BCHW = (x_BCHW - t_B111 * x1_BCHW) / (1 - t_B111).clamp(min=1e-6)
        eps_BCHW = torch.where(t_B111 < self.matching.t_min, line_BCHW, eps_BCHW)
        return FlowEstimate(x1_BCHW - eps_BCHW, x1_BCHW, eps_BCHW, tau_B)


class TeacherFlow(UNetFlow):
    """A teacher (`common.teacher.Teacher`) read as the 1-rectified flow."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.unet, teacher.schedule, float(teacher.schedule.steps))


def guided_velocity(
    flow: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_BCHW: Tensor,
    t_B: Tensor,
    states_BLD: Tensor,
    null_BLD: Tensor,
    alpha: float,
) -> Tensor:
    """v^alpha = alpha v(x, t | text) + (1 - alpha) v(x, t | null) (eq. 5); both branches in one batch."""
    if alpha == 1:
        return flow(x_BCHW, t_B, states_BLD)
    # Null first and u + alpha (c - u): the order and rounding of the published pipeline.
    both = flow(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), torch.cat([null_BLD, states_BLD]))
    null_BCHW, text_BCHW = both.chunk(2)
    return null_BCHW + alpha * (text_BCHW - null_BCHW)


def conditioned(
    flow: Callable[[Tensor, Tensor, Tensor], Tensor],
    states_BLD: Tensor,
    null_BLD: Tensor | None = None,
    alpha: float = 1.0,
) -> Velocity:
    """The field v(z, t) of fixed prompts, with guidance `alpha` if `null_BLD` is given: what the solvers take."""

    def velocity(z_BCHW: Tensor, t_B: Tensor) -> Tensor:
        if null_BLD is None:
            return flow(z_BCHW, t_B, states_BLD)
        return guided_velocity(flow, z_BCHW, t_B, states_BLD, null_BLD, alpha)

    return velocity


def one_step(velocity: Velocity, z0_BCHW: Tensor) -> Tensor:
    """Z1 = Z0 + v(Z0, 0): the distilled model (section 2, item 4)."""
    return z0_BCHW + velocity(z0_BCHW, z0_BCHW.new_zeros(len(z0_BCHW), dtype=torch.float32))


def euler_path(velocity: Velocity, z0_BCHW: Tensor, steps: int, eps: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (z, v) after each of N Euler steps: t_i = i/N (1 - eps) + eps, Z <- Z + v/N (item 6)."""
    if steps < 1:
        raise UserError(f"{steps} Euler steps: expected at least 1")
    z_BCHW = z0_BCHW
    for i in range(steps):
        t_B = torch.full((len(z_BCHW),), i / steps * (1 - eps) + eps, device=z_BCHW.device)
        v_BCHW = velocity(z_BCHW, t_B)
        z_BCHW = z_BCHW + v_BCHW / steps
        yield z_BCHW, v_BCHW


def euler(velocity: Velocity, z0_BCHW: Tensor, steps: int, eps: float = 0.0) -> Tensor:
    """End point Z1 of N Euler steps from the noise z0."""
    *_, (z1_BCHW, _) = euler_path(velocity, z0_BCHW, steps, eps)
    return z1_BCHW


@torch.no_grad()
def rk45(
    velocity: Velocity,
    z_BCHW: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    eps: float = 1e-3,
    reverse: bool = False,
) -> tuple[Tensor, int]:
    """Library. Adaptive Runge-Kutta from eps to 1, or back with `reverse` (image to noise); also evaluations used."""
    from scipy.integrate import solve_ivp

    def slope(t: float, flat: Any) -> Any:
        z = torch.from_numpy(flat).to(z_BCHW.device, torch.float32).view(z_BCHW.shape)
        t_B = torch.full((len(z),), float(t), device=z.device)
        return velocity(z, t_B).double().cpu().numpy().reshape(-1)

    span = (1.0, eps) if reverse else (eps, 1.0)
    start = z_BCHW.detach().double().cpu().numpy().reshape(-1)
    solution = solve_ivp(slope, span, start, method="RK45", rtol=rtol, atol=atol)
    return torch.from_numpy(solution.y[:, -1]).to(z_BCHW).view(z_BCHW.shape), int(solution.nfev)


@torch.no_grad()
def straightness(velocity: Velocity, z0_BCHW: Tensor, steps: int = 50) -> Tensor:
    """S = int_0^1 E || (Z1 - Z0) - v(Z_t, t) ||^2 dt on the N-step Euler path (section 2, item 3); 0 if straight.

    Squared norms are summed over the latent's dimensions, averaged over the nodes t_i = i/N and the batch.
    """
    # On that path Z1 - Z0 is the mean of the velocities, so S is their variance: one pass, nothing stored (Welford).
    mean_BCHW = torch.zeros_like(z0_BCHW, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=z0_BCHW.device)
    for i, (_, v_BCHW) in enumerate(euler_path(velocity, z0_BCHW, steps)):
        before_BCHW = v_BCHW.double() - mean_BCHW
        mean_BCHW += before_BCHW / (i + 1)
        total += (before_BCHW * (v_BCHW.double() - mean_BCHW)).sum()
    return (total / (steps * len(z0_BCHW))).float()


def transport_cost(x0_BCHW: Tensor, x1_BCHW: Tensor, power: float = 2.0) -> Tensor:
    """E |X1 - X0|^power of a coupling, averaged over pairs and dimensions; convex for power >= 1."""
    if power < 1:
        raise UserError(f"transport cost with power {power}: convex only from 1 on")
    return (x1_BCHW.float() - x0_BCHW.float()).abs().pow(power).mean()


class FlowSource:
    """A flow's ODE by N Euler steps with guided velocity (the paper's 2-RF as distillation teacher: 25 steps, 1.5)."""

    def __init__(self, flow: UNetFlow, teacher: Teacher, steps: int = 25, guidance: float = 1.5) -> None:
        self.flow, self.teacher, self.steps, self.guidance = flow, teacher, steps, guidance
        self._recorded = flow.recorded()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "flow",
            "solver": "euler",
            "steps": self.steps,
            "guidance": self.guidance,
            "flow": module_checksum(self.flow),
            "wrapped": self.flow.schedule is not None,
            "teacher": self.teacher.checksum(),
            "precision": str(next(self.flow.parameters()).dtype).removeprefix("torch."),
        }

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.guidance > 1 else 1)

    @torch.no_grad()
    def __call__(self, x0_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
        null = self.teacher.null(len(x0_BCHW)) if self.guidance > 1 else None
        return euler(conditioned(self._recorded, states_BLD, null, self.guidance), x0_BCHW, self.steps)
