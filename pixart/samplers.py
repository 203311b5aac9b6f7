"""Samplers of PixArt-alpha: iDDPM, DPM-Solver++ 2M and SA-Solver (appendix A.5), and classifier-free guidance.

A sampler calls `model(x_BCHW, t_B)`, whose output is the (already guided) noise estimate [B, C, H, W], optionally
followed by C channels of variance logits; `guided` makes such a model out of a PixArt network and its captions. t is
the time of the 1000-step training chain, 0..999, and may be fractional. Randomness comes from a `Noise` that the
caller makes, so that a trajectory is a function of its inputs.

The authors' DPM-Solver++ and SA-Solver run here as own code: they are uniform in continuous time, ask the network at
fractional times and stop at t = 1/1000, none of which diffusers' schedulers of the same names do. What diffusers'
converted pipelines sample (integer times, last sigma 0) is `diffusers_sampler`, with diffusers' own scheduler.

Shape suffixes: B batch, C channels, H and W latent height and width, L caption tokens, D caption channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.sampling import derive_seed
from common.errors import UserError
from pixart.diffusion import Diffusion, Network

Noise = Callable[[Tensor], Tensor]


def guide(network: Network, scale: float) -> Network:
    """Classifier-free guidance over a network whose conditions are stacked [null; prompt].

    Args:
        network: (x [2B, C, H, W], t [2B]) -> [2B, C or 2C, H, W], its first B samples unconditional.
        scale: s in eps_null + s (eps_prompt - eps_null), on ALL channels of the noise estimate.

    Returns:
        (x_BCHW, t_B) -> the guided noise estimate, followed by the prompt branch's variance logits if there are any.
    """

    def model(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        null, prompt = network(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B])).to(x_BCHW.dtype).chunk(2)
        channels = x_BCHW.shape[1]
        eps_BCHW = null[:, :channels] + scale * (prompt[:, :channels] - null[:, :channels])
        return torch.cat([eps_BCHW, prompt[:, channels:]], dim=1)

    return model


def guided(
    network: Any,
    caption_BLD: Tensor,
    mask_BL: Tensor | None,
    scale: float,
    *,
    null: tuple[Tensor, Tensor] | None = None,
    **conditions: Tensor | None,
) -> Network:
    """A PixArt network with its captions as a sampler's model: both branches in one batch, captions encoded once.

    The null branch sees the untrained null caption under the PROMPT's mask, as the authors' sampler does. At scale 1
    only the prompt's branch runs.

    Args:
        network: `pixart.model.PixArt` (encode_caption and forward).
        caption_BLD, mask_BL: features and mask of the prompts (`pixart.text.TextEncoder`); mask None = all tokens.
        null: features [1, L, D] and mask [1, L] to take the null caption's place: those of the empty caption, which
            weights without a null caption (diffusers') were meant for.
        conditions: of both branches: `size_B2` and `ratio_B1`, the micro-conditioning of the multi-scale network
            (target height and width in pixels, ratio); `control_BCHW` of a control network.
    """
    if scale == 1:
        context = network.encode_caption(caption_BLD, mask_BL)
        return lambda x_BCHW, t_B: network(x_BCHW, t_B, context, **conditions)
    batch = caption_BLD.shape[0]
    if null is None:
        drop_2B = torch.arange(2 * batch, device=caption_BLD.device) < batch
        context = network.encode_caption(_twice(caption_BLD), _twice(mask_BL), drop_2B)
    else:
        assert mask_BL is not None  # the empty caption has a length of its own
        features, mask = (x.to(caption_BLD.device).expand(batch, *x.shape[1:]) for x in null)
        context = network.encode_caption(torch.cat([features, caption_BLD]), torch.cat([mask, mask_BL]))
    both = {name: _twice(value) for name, value in conditions.items()}
    return guide(lambda x, t: network(x, t, context, **both), scale)


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.cat([tensor, tensor])


def seeded_noise(seed: int, samples: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Standard normal noise with one stream per sample number: sample i is the same in every batch that holds it."""
    generators = [torch.Generator(device=device).manual_seed(derive_seed(seed, i)) for i in samples]

    def draw(like: Tensor) -> Tensor:
        if like.shape[0] != len(generators):
            raise ValueError(f"{len(generators)} noise streams for {like.shape[0]} samples")
        return torch.stack([torch.randn(like.shape[1:], generator=g, device=device) for g in generators]).to(like)

    return draw


class _ContinuousTime:
    """The chain's marginals at times in (0, 1]: t = (i + 1)/T is step i; log alpha is linear between the steps."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.steps = diffusion.steps
        self._times = np.arange(1, self.steps + 1) / self.steps
        self._log_alphas = 0.5 * np.log(diffusion.alphas_cumprod)

    def at(self, time: float) -> tuple[float, float, float]:
        """alpha, sigma and lambda = log(alpha / sigma)."""
        log_alpha = float(np.interp(time, self._times, self._log_alphas))
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        return math.exp(log_alpha), sigma, log_alpha - math.log(sigma)

    def x0(self, model: Network, x_BCHW: Tensor, time: float) -> Tensor:
        """The network's estimate of x_0; it is asked at (t - 1/T) T, which is the step's index, possibly fractional."""
        t_B = torch.full((x_BCHW.shape[0],), (time - 1 / self.steps) * self.steps, device=x_BCHW.device)
        eps_BCHW = model(x_BCHW, t_B)[:, : x_BCHW.shape[1]].to(x_BCHW.dtype)
        alpha, sigma, _ = self.at(time)
        return (x_BCHW - sigma * eps_BCHW) / alpha


def uniform_times(steps: int, start: float = 1.0, end: float = 1e-3) -> list[float]:
    """`steps` + 1 times from `start` down to `end`, equally spaced."""
    if steps < 1:
        raise UserError(f"a sampler needs at least 1 step, not {steps}")
    return [float(time) for time in np.linspace(start, end, steps + 1)]


@torch.no_grad()
def dpm_solver(
    model: Network,
    x_BCHW: Tensor,
    steps: int = 20,
    *,
    order: int = 2,
) -> Tensor:
    """DPM-Solver++ (data prediction, multistep), uniform in time: the paper's sampler, one network call per step.

    Args:
        x_BCHW: standard normal noise.
        order: 2 (2M) or 1 (DDIM). With fewer than 10 steps the last one is of order 1 (lower_order_final).

    Returns:
        x at t = 1/1000, which is taken for x_0.
    """
    if order not in (1, 2):
        raise UserError(f"dpm_solver has order 1 or 2, not {order}")
    chain = _ContinuousTime(Diffusion())
    times = uniform_times(steps)
    previous: tuple[float, Tensor] | None = None  # lambda and x_0 estimate of the step before
    for step in range(1, steps + 1):
        _, sigma_s, lambda_s = chain.at(times[step - 1])
        alpha_t, sigma_t, lambda_t = chain.at(times[step])
        h = lambda_t - lambda_s
        x0_BCHW = chain.x0(model, x_BCHW, times[step - 1])
        estimate = x0_BCHW
        last_of_few = step == steps and steps < 10
        if order == 2 and previous is not None and not last_of_few:
            # Equation of DPM-Solver++ 2M: extrapolate x_0 to the middle of the step, D = x0 + h/(2 h_last) (x0 - last).
            estimate = x0_BCHW + h / (2 * (lambda_s - previous[0])) * (x0_BCHW - previous[1])
        previous = lambda_s, x0_BCHW
        x_BCHW = sigma_t / sigma_s * x_BCHW - alpha_t * math.expm1(-h) * estimate
    return x_BCHW


@torch.no_grad()
def iddpm(
    model: Network,
    x_BCHW: Tensor,
    steps: int | str = 100,
    *,
    small_variance: bool = False,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """Ancestral sampling on the respaced chain; x_0 is not clipped.

    Args:
        model: returns 2C channels, noise estimate and variance logits; with C channels the variance is fixed.
        steps: a respacing (`pixart.diffusion.respaced_steps`).
        small_variance: what a fixed variance is: beta~ instead of beta (the authors' `sigma_small`).
        noise: called once per step, the last (where it is not used) included.
    """
    chain = Diffusion().respaced(steps)
    channels = x_BCHW.shape[1]
    for index in reversed(range(chain.steps)):
        t_B = torch.full((x_BCHW.shape[0],), index, device=x_BCHW.device, dtype=torch.long)
        out = model(x_BCHW, chain.table("timestep_map", t_B).view(-1)).to(x_BCHW.dtype)
        if out.shape[1] not in (channels, 2 * channels):
            raise UserError(f"iddpm needs {channels} or {2 * channels} channels, not {out.shape[1]}")
        mean_BCHW = chain.posterior_mean(chain.x0_from_eps(x_BCHW, t_B, out[:, :channels]), x_BCHW, t_B)
        if out.shape[1] == channels:
            log_variance = chain.fixed_log_variance(t_B, small_variance)
        else:
            log_variance = chain.log_variance(out[:, channels:], t_B)
        std_BCHW = torch.exp(0.5 * log_variance)
        fresh_BCHW = noise(x_BCHW)
        x_BCHW = mean_BCHW + std_BCHW * fresh_BCHW if index else mean_BCHW
    return x_BCHW


@torch.no_grad()
def sa_solver(
    model: Network,
    x_BCHW: Tensor,
    steps: int = 25,
    *,
    eta: float = 1.0,
    predictor_order: int = 2,
    corrector_order: int = 2,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """SA-Solver, the stochastic Adams method for data prediction, in PEC mode (one network call per step).

    With tau(t) = eta for 0.2 <= t <= 0.8 and 0 elsewhere, c = 1 + tau^2 and h = lambda_t - lambda_s, a step is
    x_t = sigma_t/sigma_s e^(-tau^2 h) x_s + alpha_t [(1 - e^(-c h)) D + c h^2/2 D']
          + sigma_t sqrt(1 - e^(-2 tau^2 h)) z
    where D and D' are value and slope (in lambda) of the line through two x_0 estimates; the exact weight of the slope
    is replaced by its limit c h^2/2, which is the authors' "few steps" form.

    Args:
        predictor_order: 2 takes the estimates at s and before; 1 that at s alone.
        corrector_order: 2 takes those at s and at the predicted point; 1 the latter alone; 0 leaves it out.
        noise: called once before the first step (the authors' loop does so; its draw is not used) and once per step.
    """
    if predictor_order not in (1, 2) or corrector_order not in (0, 1, 2):
        raise UserError(
            f"sa_solver has predictor_order 1 or 2 and corrector_order 0, 1 or 2, not {predictor_order} and "
            f"{corrector_order}"
        )
    chain = _ContinuousTime(Diffusion())
    times = uniform_times(steps)
    noise(x_BCHW)
    lambdas = [chain.at(times[0])[2]]
    estimates = [chain.x0(model, x_BCHW, times[0])]
    for step in range(1, steps + 1):
        tau = eta if 0.2 <= times[step] <= 0.8 else 0.0
        _, sigma_s, lambda_s = chain.at(times[step - 1])
        alpha_t, sigma_t, lambda_t = chain.at(times[step])
        h = lambda_t - lambda_s
        c = 1 + tau**2
        base_BCHW = sigma_t / sigma_s * math.exp(-(tau**2) * h) * x_BCHW
        base_BCHW = base_BCHW + sigma_t * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise(x_BCHW)
        value_weight, slope_weight = -alpha_t * math.expm1(-c * h), alpha_t * c * h**2 / 2

        last = step == steps
        x_BCHW = base_BCHW + value_weight * estimates[-1]
        if predictor_order == 2 and step > 1 and not last:
            x_BCHW = x_BCHW + slope_weight / (lambdas[-1] - lambdas[-2]) * (estimates[-1] - estimates[-2])
        if not last:  # the last step neither asks the network nor corrects
            predicted_BCHW = chain.x0(model, x_BCHW, times[step])
            if corrector_order == 2:
                x_BCHW = base_BCHW + value_weight * estimates[-1] + slope_weight / h * (predicted_BCHW - estimates[-1])
            elif corrector_order > 0:
                x_BCHW = base_BCHW + value_weight * predicted_BCHW
            lambdas, estimates = [lambda_s, lambda_t], [estimates[-1], predicted_BCHW]
    return x_BCHW


def diffusers_scheduler() -> Any:
    """diffusers' DPMSolverMultistepScheduler with the settings of the converted PixArt pipelines."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, solver_order=2
    )


@torch.no_grad()
def diffusers_sampler(
    model: Network,
    x_BCHW: Tensor,
    steps: int = 20,
    *,
    scheduler: Any = None,
) -> Tensor:
    """Sample with a diffusers scheduler (default `diffusers_scheduler`): the trajectory of a diffusers pipeline."""
    scheduler = scheduler or diffusers_scheduler()
    scheduler.set_timesteps(steps, device=x_BCHW.device)
    x_BCHW = x_BCHW * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled_BCHW = scheduler.scale_model_input(x_BCHW, t)
        eps_BCHW = model(scaled_BCHW, t.expand(x_BCHW.shape[0]))[:, : x_BCHW.shape[1]]
        x_BCHW = scheduler.step(eps_BCHW, t, x_BCHW).prev_sample
    return x_BCHW
