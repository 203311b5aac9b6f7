"""Samplers (sections 3.2 and 4, appendices C and D.4): DDPM, DDIM, PLMS, DPM-Solver++, guidance, large latents.

A sampler walks from z_T to z_0 with a `Denoiser`: denoise(z_t, step) -> (estimate of z_0, estimate of the noise).
`make_denoiser` turns a network into one (with classifier-free guidance); `classifier_guided` and `image_guided` wrap
one in another. Randomness comes from a `Noise` that the caller makes, so a trajectory is a function of its inputs.
Nothing inside the loops waits for the device. Shape suffixes: B batch, C channels, H and W latent height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from ldm.context_memory import ContextMemory
from ldm.diffusion import Conditioning, LatentDiffusion, NoiseSchedule
from ldm.model import CrossAttention

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]


def recorded_noise(noises: Iterable[Tensor]) -> Noise:
    """Noise that replays given tensors in order."""
    stream: Iterator[Tensor] = iter(noises)

    def draw(like: Tensor) -> Tensor:
        try:
            return next(stream).to(like)
        except StopIteration:
            raise UserError("the recorded noise ended before the sampler did: it needs one tensor per draw") from None

    return draw


def seeded_noise(generators: torch.Generator | Sequence[torch.Generator]) -> Noise:
    """Standard normal noise from one generator, or from one per sample (then independent of the batch's make-up)."""
    if isinstance(generators, torch.Generator):
        generators = [generators]

    def draw(like: Tensor) -> Tensor:
        device = generators[0].device
        if len(generators) == 1:
            noise = torch.randn(like.shape, generator=generators[0], device=device)
        elif len(generators) == like.shape[0]:
            noise = torch.stack([torch.randn(like.shape[1:], generator=g, device=device) for g in generators])
        else:
            raise UserError(
                f"{len(generators)} noise generators for {like.shape[0]} samples: give one, or one per sample"
            )
        return noise.to(like)

    return draw


def sample_generators(seed: int, first: int, count: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Generators of samples `first`..`first + count - 1` of a run: sample i is the same whatever the batch size."""
    from common.data.sampling import derive_seed

    return [torch.Generator(device=device).manual_seed(derive_seed(seed, i)) for i in range(first, first + count)]


def concatenate_conditions(first: Any, second: Any) -> Any:
    """Concatenate two conditions of the same structure along the batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second.to(first)])
    if isinstance(first, dict):
        return {key: concatenate_conditions(first[key], second[key]) for key in first}
    return [concatenate_conditions(a, b) for a, b in zip(first, second, strict=True)]


def make_denoiser(
    network: Network,
    schedule: NoiseSchedule,
    cond: Conditioning = None,
    *,
    guidance: float = 1.0,
    uncond: Conditioning = None,
) -> Denoiser:
    """Denoiser from a network (z_t, t, cond) -> eps, x0 or v (as `schedule.prediction` says).

    Args:
        guidance: classifier-free scale s: out_uncond + s (out_cond - out_uncond); both halves run as one batch in the
            order [uncond, cond]. 1, or no `uncond`, runs the conditional half only.
    """
    guided = guidance != 1.0 and uncond is not None
    both = concatenate_conditions(uncond, cond) if guided else None

    def denoise(zt_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        batch = zt_BCHW.shape[0]
        if guided:
            t_2B = torch.full((2 * batch,), step, device=zt_BCHW.device, dtype=torch.long)
            out_uncond, out_cond = network(torch.cat([zt_BCHW, zt_BCHW]), t_2B, both).to(zt_BCHW.dtype).chunk(2)
            output_BCHW = out_uncond + guidance * (out_cond - out_uncond)
        else:
            t_B = torch.full((batch,), step, device=zt_BCHW.device, dtype=torch.long)
            output_BCHW = network(zt_BCHW, t_B, cond).to(zt_BCHW.dtype)
        return schedule.x0_and_eps(output_BCHW, zt_BCHW, step)

    return denoise


@contextlib.contextmanager
def reused_context(network: nn.Module) -> Iterator[None]:
    """Inside the block, cross-attention projects a condition to keys and values once and keeps them while the same
    tensor comes back: the same at all sampling steps. Without gradients only."""
    layers = [module for module in network.modules() if isinstance(module, CrossAttention)]
    outer = [layer.memory for layer in layers]
    for layer in layers:
        layer.memory = ContextMemory()
    try:
        yield
    finally:
        for layer, memory in zip(layers, outer, strict=True):
            layer.memory = memory


def _with_eps(schedule: NoiseSchedule, zt_BCHW: Tensor, eps_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
    abar = schedule.abar[step]
    return (zt_BCHW - (1 - abar) ** 0.5 * eps_BCHW) / abar**0.5, eps_BCHW


def classifier_guided(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    classifier: Callable[[Tensor, Tensor], Tensor],
    labels_B: Tensor,
    scale: float,
) -> Denoiser:
    """Classifier guidance (appendix D.4): eps <- eps - s sqrt(1 - abar_t) grad log p(y | z_t).

    Args:
        classifier: (z_t, t) -> logits [B, classes] on noisy latents (`EncoderUNet`).
    """

    def guided(zt_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        _, eps_BCHW = denoise(zt_BCHW, step)
        with torch.enable_grad():
            z_BCHW = zt_BCHW.detach().requires_grad_()
            t_B = torch.full((z_BCHW.shape[0],), step, device=z_BCHW.device, dtype=torch.long)
            log_p_B = classifier(z_BCHW, t_B).float().log_softmax(-1).gather(1, labels_B[:, None])
            (gradient,) = torch.autograd.grad(log_p_B.sum(), z_BCHW)
        eps_BCHW = eps_BCHW - scale * (1 - schedule.abar[step]) ** 0.5 * gradient
        return _with_eps(schedule, zt_BCHW, eps_BCHW, step)

    return guided


def image_guided(
    denoise: Denoiser, schedule: NoiseSchedule, distance: Callable[[Tensor], Tensor], scale: float = 1.0
) -> Denoiser:
    """Post-hoc image guiding (appendix C): eps <- eps + s sqrt(1 - abar_t) grad_{z_t} distance(z0(z_t)).

    The paper's equation adds the gradient of a log-likelihood -1/2 |y - T(D(z0))|^2 to the score, which SUBTRACTS it
    from eps: the distance falls.

    Args:
        distance: estimate of z_0 -> one distance per sample [B]; see `l2_distance`, `perceptual_distance`.
    """

    def guided(zt_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z_BCHW = zt_BCHW.detach().requires_grad_()
            x0_BCHW, eps_BCHW = denoise(z_BCHW, step)
            (gradient,) = torch.autograd.grad(distance(x0_BCHW).sum(), z_BCHW)
        eps_BCHW = eps_BCHW.detach() + scale * (1 - schedule.abar[step]) ** 0.5 * gradient
        return _with_eps(schedule, zt_BCHW, eps_BCHW, step)

    return guided


def l2_distance(
    decode: Callable[[Tensor], Tensor], target_BCHW: Tensor, transform: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """1/2 |y - T(D(z_0))|^2 per sample; T is the identity, or e.g. a down-sampling when y is a smaller image."""

    def distance(z_BCHW: Tensor) -> Tensor:
        image_BCHW = decode(z_BCHW)
        if transform is not None:
            image_BCHW = transform(image_BCHW)
        return 0.5 * (image_BCHW - target_BCHW).square().flatten(1).sum(1)

    return distance


def perceptual_distance(
    decode: Callable[[Tensor], Tensor], target_BCHW: Tensor, lpips: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """LPIPS(y, D(z_0)) per sample, where `lpips` gives one number per sample (any shape [B, ...] of singletons)."""

    def distance(z_BCHW: Tensor) -> Tensor:
        return lpips(decode(z_BCHW), target_BCHW).flatten(1).sum(1)

    return distance


@dataclass
class KnownRegion:
    """Inpainting and outpainting with an unconditional model (section 4.5): the known part is re-noised at each step.

    Args:
        z_BCHW: latent of the known image; mask_B1HW: 1 keeps it, 0 paints.
    """

    z_BCHW: Tensor
    mask_B1HW: Tensor


@dataclass
class Trajectory:
    """Every state of a run, if the caller wants them: z_T first, then z_t and the z_0 estimate after each step."""

    z: list[Tensor] = field(default_factory=list)
    x0: list[Tensor] = field(default_factory=list)

    def add(self, z_BCHW: Tensor, x0_BCHW: Tensor) -> None:
        self.z.append(z_BCHW)
        self.x0.append(x0_BCHW)


def ddim_timesteps(
    steps: int, timesteps: int = 1000, discretisation: Literal["uniform", "quad"] = "uniform"
) -> np.ndarray:
    """The authors' sub-sequence of 0..T-1, ascending and shifted by one: range(0, T, T // S) + 1.

    An S that does not divide T gives more than S steps, as in the authors' code.

    Raises:
        UserError: an S whose shifted sequence leaves 0..T-1 (S > T / 2 always does: use the DDPM sampler instead).
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"sampling steps must lie in 1..{timesteps}, got {steps}")
    if discretisation == "uniform":
        sequence = np.arange(0, timesteps, timesteps // steps)
    elif discretisation == "quad":
        sequence = (np.linspace(0, np.sqrt(timesteps * 0.8), steps) ** 2).astype(int)
    else:
        raise UserError(f"DDIM discretisation {discretisation!r} is unknown: use uniform or quad")
    sequence = sequence + 1
    if sequence[-1] >= timesteps:
        raise UserError(
            f"{steps} sampling steps overflow the {timesteps} training steps (the sequence is shifted by one): "
            f"choose a divisor of {timesteps} that is at most {timesteps // 2}, or the ddpm sampler for all steps"
        )
    return sequence


@dataclass(frozen=True)
class DdimTables:
    """Per sampling step, ascending: training step, abar at it and before it (ends on abar_0, not 1), and sigma."""

    timesteps: list[int]
    alphas: list[float]
    alphas_prev: list[float]
    sigmas: list[float]


def ddim_tables(
    schedule: NoiseSchedule, steps: int, eta: float = 0.0, discretisation: Literal["uniform", "quad"] = "uniform"
) -> DdimTables:
    """sigma = eta sqrt((1 - a_prev) / (1 - a) (1 - a / a_prev)): eta 0 is deterministic, eta 1 has DDPM's variance."""
    sequence = ddim_timesteps(steps, schedule.timesteps, discretisation)
    abar = np.asarray(schedule.abar)
    alphas = abar[sequence]
    alphas_prev = np.concatenate([abar[:1], alphas[:-1]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return DdimTables(sequence.tolist(), alphas.tolist(), alphas_prev.tolist(), sigmas.tolist())


def _paste_known(schedule: NoiseSchedule, z_BCHW: Tensor, known: KnownRegion | None, step: int, noise: Noise) -> Tensor:
    if known is None:
        return z_BCHW
    abar = schedule.abar[step]
    noisy_BCHW = abar**0.5 * known.z_BCHW + (1 - abar) ** 0.5 * noise(known.z_BCHW)
    return torch.lerp(z_BCHW, noisy_BCHW, known.mask_B1HW.to(z_BCHW.dtype).expand_as(z_BCHW))


def _walk(
    z_BCHW: Tensor,
    steps: Sequence[int],
    advance: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    progress: Progress | None,
    trajectory: Trajectory | None,
) -> Tensor:
    """z_0 from z_T: advance(z_t, step) -> (the next z_t, estimate of z_0), for each of `steps`."""
    if trajectory is not None:
        trajectory.add(z_BCHW, z_BCHW)
    for done, step in enumerate(steps, start=1):
        z_BCHW, x0_BCHW = advance(z_BCHW, step)
        if trajectory is not None:
            trajectory.add(z_BCHW, x0_BCHW)
        if progress is not None:
            progress(done, len(steps))
    return z_BCHW


@torch.no_grad()
def ddim_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    zT_BCHW: Tensor,
    noise: Noise,
    *,
    steps: int = 50,
    eta: float = 0.0,
    discretisation: Literal["uniform", "quad"] = "uniform",
    temperature: float = 1.0,
    known: KnownRegion | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021) with the authors' conventions; returns z_0 [B, C, H, W].

    Args:
        noise: drawn at every step even when sigma is 0, so that the random stream does not depend on eta; with
            `known`, the known region's noise is drawn before the step's.
        snap: maps each z_0 estimate to the nearest codebook vectors (VQ models).
        temperature: factor on the step noise.
    """
    tables = ddim_tables(schedule, steps, eta, discretisation)

    def advance(z_BCHW: Tensor, index: int) -> tuple[Tensor, Tensor]:
        step = tables.timesteps[index]
        z_BCHW = _paste_known(schedule, z_BCHW, known, step, noise)
        x0_BCHW, eps_BCHW = denoise(z_BCHW, step)
        if snap is not None:
            x0_BCHW = snap(x0_BCHW)
        return _ddim_step(tables, index, x0_BCHW, eps_BCHW, noise(z_BCHW), temperature), x0_BCHW

    return _walk(zT_BCHW, range(len(tables.timesteps))[::-1], advance, progress, trajectory)


def _ddim_step(
    tables: DdimTables, index: int, x0_BCHW: Tensor, eps_BCHW: Tensor, noise_BCHW: Tensor, temperature: float = 1.0
) -> Tensor:
    """Eq. 12 of DDIM: sqrt(a_prev) z_0 + sqrt(1 - a_prev - sigma^2) eps + sigma noise."""
    before, sigma = tables.alphas_prev[index], tables.sigmas[index]
    z_BCHW = before**0.5 * x0_BCHW + max(1 - before - sigma**2, 0.0) ** 0.5 * eps_BCHW
    return z_BCHW + sigma * temperature * noise_BCHW if sigma else z_BCHW


@torch.no_grad()
def plms_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    zT_BCHW: Tensor,
    noise: Noise,
    *,
    steps: int = 50,
    discretisation: Literal["uniform", "quad"] = "uniform",
    known: KnownRegion | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """PLMS (Liu et al. 2022): Adams-Bashforth up to order 4 on eps after one Heun-like step; deterministic.

    `noise` is drawn for the known region, and (its values unused) as often as the authors' code draws it.
    """
    tables = ddim_tables(schedule, steps, 0.0, discretisation)
    history: list[Tensor] = []

    def towards(z_BCHW: Tensor, eps_BCHW: Tensor, index: int) -> tuple[Tensor, Tensor]:
        x0_BCHW, _ = _with_eps(schedule, z_BCHW, eps_BCHW, tables.timesteps[index])
        if snap is not None:
            x0_BCHW = snap(x0_BCHW)
        return _ddim_step(tables, index, x0_BCHW, eps_BCHW, noise(z_BCHW)), x0_BCHW

    def advance(z_BCHW: Tensor, index: int) -> tuple[Tensor, Tensor]:
        step = tables.timesteps[index]
        z_BCHW = _paste_known(schedule, z_BCHW, known, step, noise)
        _, eps_BCHW = denoise(z_BCHW, step)
        if not history:
            ahead_BCHW, _ = towards(z_BCHW, eps_BCHW, index)
            mean_BCHW = (eps_BCHW + denoise(ahead_BCHW, tables.timesteps[max(index - 1, 0)])[1]) / 2
        elif len(history) == 1:
            mean_BCHW = (3 * eps_BCHW - history[-1]) / 2
        elif len(history) == 2:
            mean_BCHW = (23 * eps_BCHW - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            mean_BCHW = (55 * eps_BCHW - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history[:] = [*history[-2:], eps_BCHW]
        return towards(z_BCHW, mean_BCHW, index)

    return _walk(zT_BCHW, range(len(tables.timesteps))[::-1], advance, progress, trajectory)


def ddpm_step(
    schedule: NoiseSchedule,
    x0_BCHW: Tensor,
    zt_BCHW: Tensor,
    step: int,
    noise_BCHW: Tensor,
    *,
    temperature: float = 1.0,
    clip_denoised: bool = False,
) -> Tensor:
    """One ancestral step: a draw from q(z_{t-1} | z_t, z_0); the mean alone at step 0."""
    if clip_denoised:
        x0_BCHW = x0_BCHW.clamp(-1.0, 1.0)
    mean_BCHW = schedule.posterior_mean_coef1[step] * x0_BCHW + schedule.posterior_mean_coef2[step] * zt_BCHW
    if step == 0:
        return mean_BCHW
    return mean_BCHW + (0.5 * schedule.posterior_log_variance_clipped[step]).exp() * temperature * noise_BCHW


@torch.no_grad()
def ddpm_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    zT_BCHW: Tensor,
    noise: Noise,
    *,
    steps: int | None = None,
    temperature: float = 1.0,
    clip_denoised: bool = False,
    known: KnownRegion | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) over all T steps, or from step `steps` - 1 down; returns z_0 [B, C, H, W].

    `clip_denoised` limits z_0 estimates to [-1, 1]: for pixels only, latents have no such range.
    """
    total = schedule.timesteps if steps is None else steps
    if not 1 <= total <= schedule.timesteps:
        raise UserError(f"ddpm steps must lie in 1..{schedule.timesteps}, got {total}")

    def advance(z_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        x0_BCHW, _ = denoise(z_BCHW, step)
        if snap is not None:
            x0_BCHW = snap(x0_BCHW)
        z_BCHW = ddpm_step(
            schedule, x0_BCHW, z_BCHW, step, noise(z_BCHW), temperature=temperature, clip_denoised=clip_denoised
        )
        # The authors' DDPM loop pastes after the step, at the step's own noise level.
        return _paste_known(schedule, z_BCHW, known, step, noise), x0_BCHW

    return _walk(zT_BCHW, range(total)[::-1], advance, progress, trajectory)


@torch.no_grad()
def dpm_solver_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    zT_BCHW: Tensor,
    *,
    steps: int = 20,
    order: int = 2,
    progress: Progress | None = None,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022), multistep and deterministic, by diffusers' scheduler; returns z_0 [B, C, H, W]."""
    from diffusers import DPMSolverMultistepScheduler

    if not 2 <= steps <= schedule.timesteps:
        raise UserError(f"sampling steps of dpm++ must lie in 2..{schedule.timesteps}, got {steps}")
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.cpu().numpy(),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=order,
        # Steps uniform in log-SNR, the solver's own choice; uniform in t leaves one large last step.
        use_lu_lambdas=True,
    )
    solver.set_timesteps(steps, device="cpu")
    solver.set_begin_index(0)  # found by the timestep's value otherwise, which fails where two steps round to one

    def advance(z_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        x0_BCHW, _ = denoise(z_BCHW, step)
        return solver.step(x0_BCHW, step, z_BCHW).prev_sample, x0_BCHW

    return _walk(zT_BCHW, solver.timesteps.tolist(), advance, progress, trajectory)


@torch.no_grad()
def sample(
    ldm: LatentDiffusion,
    shape: Sequence[int],
    noise: Noise,
    cond: Conditioning = None,
    *,
    sampler: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    guidance: float = 1.0,
    uncond: Conditioning = None,
    zT_BCHW: Tensor | None = None,
    wrap: Callable[[Denoiser], Denoiser] | None = None,
    network: Network | None = None,
    **options: Any,
) -> Tensor:
    """Latents [B, C, H, W] from a model; `ldm.decode` turns them into images.

    Args:
        shape: of the latents; any height and width that the denoiser takes (convolutional sampling, section 4.3.2).
        noise: z_T is its first draw unless given.
        sampler: ddim, ddpm (all T steps), plms or dpm++.
        guidance: classifier-free scale; `uncond` defaults to the model's null condition.
        wrap: adds guidance to the denoiser, e.g. lambda d: image_guided(d, ldm.schedule, distance).
        network: replaces `ldm.apply_recorded`, e.g. by `patchwise(ldm.apply_model, ...)`.
        options: of the sampler's own function (known, snap, temperature, progress, ...).
    """
    if zT_BCHW is None:
        zT_BCHW = noise(torch.empty(tuple(shape), device=ldm.scale_factor.device))
    if guidance != 1.0 and cond is not None and uncond is None:
        uncond = ldm.null_conditioning(cond)
    denoise = make_denoiser(network or ldm.apply_recorded, ldm.schedule, cond, guidance=guidance, uncond=uncond)
    if wrap is not None:
        denoise = wrap(denoise)
    with reused_context(ldm.model):
        if sampler == "ddim":
            return ddim_sample(denoise, ldm.schedule, zT_BCHW, noise, steps=steps, eta=eta, **options)
        if eta and sampler in ("plms", "dpm++"):
            raise UserError(f"sampler {sampler} is deterministic: eta must be 0, got {eta}")
        if sampler == "plms":
            return plms_sample(denoise, ldm.schedule, zT_BCHW, noise, steps=steps, **options)
        if sampler == "dpm++":
            return dpm_solver_sample(denoise, ldm.schedule, zT_BCHW, steps=steps, **options)
        if sampler == "ddpm":
            return ddpm_sample(denoise, ldm.schedule, zT_BCHW, noise, **options)
    raise UserError(f"sampler {sampler!r} is unknown: use ddim, ddpm, plms or dpm++")


def _border_distance(height: int, width: int) -> Tensor:
    """[height, width] distance of each cell to the nearest border, as a fraction of the side."""
    y_H = torch.arange(height) / max(height - 1, 1)
    x_W = torch.arange(width) / max(width - 1, 1)
    return torch.minimum(torch.minimum(y_H, 1 - y_H)[:, None], torch.minimum(x_W, 1 - x_W)[None, :])


@dataclass(frozen=True)
class PatchGrid:
    """Overlapping crops of a large map and the weights with which their results are blended (`split_input_params`).

    Args:
        kernel, stride: height and width of a crop, and the distance between crops, in latent cells.
        clip_min, clip_max: limits of a cell's weight, its distance to the crop's border.
        tie_breaker: also weight whole crops by their distance to the map's border, within the tie limits.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    clip_min: float = 0.01
    clip_max: float = 0.5
    tie_breaker: bool = False
    clip_min_tie: float = 0.01
    clip_max_tie: float = 0.5

    def starts(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top-left cells of the crops, row by row. A last crop is added at the border where the stride misses it."""
        lines = []
        for side, kernel, stride in zip((height, width), self.kernel, self.stride):
            if side < kernel:
                raise UserError(f"patch-wise sampling needs a latent of at least {kernel} cells a side, got {side}")
            if not 1 <= stride <= kernel:
                raise UserError(f"patch stride must lie in 1..{kernel} (the patch side), got {stride}")
            line = list(range(0, side - kernel + 1, stride))
            if line[-1] != side - kernel:
                line.append(side - kernel)
            lines.append(line)
        return [(y, x) for y in lines[0] for x in lines[1]]

    def weights(self, height: int, width: int, up: int = 1) -> Tensor:
        """[crops, kernel_h * up, kernel_w * up]."""
        crops = self.starts(height, width)
        cells = _border_distance(self.kernel[0] * up, self.kernel[1] * up).clamp(self.clip_min, self.clip_max)
        weights = cells.expand(len(crops), *cells.shape)
        if self.tie_breaker:
            columns = len({x for _, x in crops})
            ties = _border_distance(len(crops) // columns, columns).clamp(self.clip_min_tie, self.clip_max_tie)
            weights = weights * ties.flatten()[:, None, None]
        return weights

    def normalisation(self, height: int, width: int, up: int = 1) -> Tensor:
        """[height * up, width * up]: sum of the weights that reach each cell."""
        total = torch.zeros(height * up, width * up)
        for (y, x), weight in zip(self.starts(height, width), self.weights(height, width, up)):
            total[y * up : y * up + weight.shape[0], x * up : x * up + weight.shape[1]] += weight
        return total

    def crop(self, x_BCHW: Tensor) -> Tensor:
        """[crops * B, C, kernel_h, kernel_w], crop by crop."""
        starts = self.starts(*x_BCHW.shape[-2:])
        return torch.cat([x_BCHW[..., y : y + self.kernel[0], x : x + self.kernel[1]] for y, x in starts])

    def blend(self, crops_NCHW: Tensor, height: int, width: int, up: int = 1) -> Tensor:
        """Weighted mean [B, C, height * up, width * up] of results for the crops, in the order of `crop`."""
        starts = self.starts(height, width)
        weights = self.weights(height, width, up).to(crops_NCHW)
        results = crops_NCHW.chunk(len(starts))
        total_BCHW = crops_NCHW.new_zeros(*results[0].shape[:2], height * up, width * up)
        for (y, x), weight, result in zip(starts, weights, results):
            if result.shape[-2:] != weight.shape:
                raise UserError(
                    f"a patch's result is {tuple(result.shape[-2:])}, expected {tuple(weight.shape)}: check f"
                )
            total_BCHW[..., y * up : y * up + weight.shape[0], x * up : x * up + weight.shape[1]] += result * weight
        return total_BCHW / self.normalisation(height, width, up).to(total_BCHW)


def _in_chunks(function: Callable[..., Tensor], chunk: int, count: int, *arguments: Any) -> Tensor:
    return torch.cat([function(*(_rows(a, i, i + chunk) for a in arguments)) for i in range(0, count, chunk)])


def _rows(values: Any, start: int, stop: int) -> Any:
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values[start:stop]
    if isinstance(values, dict):
        return {key: _rows(value, start, stop) for key, value in values.items()}
    return [_rows(value, start, stop) for value in values]


def patchwise(network: Network, grid: PatchGrid, chunk: int = 64) -> Network:
    """Apply a denoiser crop by crop on a latent larger than it was trained for, blending the crops' outputs.

    Conditions with the latent's height and width (concatenation) are cropped along; others go to every crop.

    Args:
        chunk: crops (times batch) that go through the network at once.
    """

    def apply(z_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        height, width = z_BCHW.shape[-2:]
        n_crops = len(grid.starts(height, width))

        def spread(values: Any) -> Any:
            if values is None:
                return None
            if isinstance(values, Tensor):
                if values.dim() == 4 and values.shape[-2:] == z_BCHW.shape[-2:]:
                    return grid.crop(values)
                return values.repeat(n_crops, *(1,) * (values.dim() - 1))
            if isinstance(values, dict):
                return {key: spread(value) for key, value in values.items()}
            return [spread(value) for value in values]

        crops_NCHW = grid.crop(z_BCHW)
        out_NCHW = _in_chunks(network, chunk, crops_NCHW.shape[0], crops_NCHW, t_B.repeat(n_crops), spread(cond))
        return grid.blend(out_NCHW, height, width)

    return apply


def decode_patchwise(
    decode: Callable[[Tensor], Tensor], z_BCHW: Tensor, grid: PatchGrid, up: int, chunk: int = 16
) -> Tensor:
    """Library. Decode a large latent crop by crop; `up` is the first stage's down-sampling factor f."""
    crops_NCHW = grid.crop(z_BCHW)
    images_NCHW = _in_chunks(decode, chunk, crops_NCHW.shape[0], crops_NCHW)
    return grid.blend(images_NCHW, z_BCHW.shape[-2], z_BCHW.shape[-1], up)


def downsampling(scale: int) -> Callable[[Tensor], Tensor]:
    """The T of post-hoc guiding by a smaller image: mean over scale x scale pixels (figure 14's up-sampling)."""
    return lambda x_BCHW: F.avg_pool2d(x_BCHW, scale)
