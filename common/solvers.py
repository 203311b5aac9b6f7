"""Solving a frozen teacher's probability-flow ODE: any deterministic scheduler of diffusers, and plain DDIM steps.

Shape suffixes: B batch, C channels, H height, W width (of the latents), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.pretrained import quiet_libraries
from common.teacher import NoiseSchedule, Teacher, check_steps

Network = Callable[[Tensor, Tensor], Tensor]  # (z_BCHW, tau_B) -> output of the schedule's prediction type


class DiffusionSource:
    """The teacher's probability-flow ODE by any deterministic diffusers scheduler (paper: DPM-Solver, 25, 5.0).

    Args:
        solver: a diffusers scheduler class; the teacher's noise schedule is given to it.
        guidance: w of u + w (c - u); 1 or less means the conditional network alone.
        options: further scheduler options, for example {"use_karras_sigmas": True}.

    Raises:
        UserError: no such scheduler, or one that draws noise.
    """

    def __init__(
        self,
        teacher: Teacher,
        solver: str = "DPMSolverMultistepScheduler",
        steps: int = 25,
        guidance: float = 5.0,
        negative_prompt: str = "",
        options: dict[str, Any] | None = None,
    ) -> None:
        self.teacher, self.solver, self.steps, self.guidance = teacher, solver, steps, guidance
        self.negative_prompt, self.options = negative_prompt, dict(options or {})
        self.scheduler = make_scheduler(solver, teacher.scheduler_config, self.options)
        if steps < 1:
            raise UserError(f"{steps} solver steps: expected at least 1")
        check_steps(self.scheduler, steps, f"solver {solver}, steps")
        self._calls = len(self.scheduler.timesteps)
        refuse_stochastic(self.scheduler, steps)
        self._null: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "diffusion",
            "solver": self.solver,
            "options": self.options,
            "steps": self.steps,
            "guidance": self.guidance,
            "negative_prompt": self.negative_prompt,
            "teacher": self.teacher.checksum(),
            "precision": str(next(self.teacher.unet.parameters()).dtype).removeprefix("torch."),
        }

    @property
    def evaluations(self) -> int:
        return self._calls * (2 if self.guidance > 1 else 1)

    @torch.no_grad()
    def __call__(self, x0_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
        if self._null is None:
            self._null = self.teacher.encode([self.negative_prompt])
        network, scheduler = self.teacher.network, self.scheduler
        *_, x1_BCHW = solve(network, scheduler, self.steps, x0_BCHW, states_BLD, self._null, self.guidance)
        return x1_BCHW


# What stock pipelines set in any scheduler, whatever its config says or leaves out.
STOCK_OPTIONS = {"clip_sample": False, "steps_offset": 1}


@quiet_libraries()
def make_scheduler(name: str, config: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
    """The diffusers scheduler `name` with the noise schedule and prediction type of `config`, as stock pipelines have
    it."""
    import diffusers

    known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler"))
    if name not in known:
        close = [n for n in known if name.lower().replace("_", "") in n.lower()]
        raise UserError(
            f"solver {name!r} is not a scheduler of diffusers; {'did you mean ' if close else 'for example '}"
            f"{', '.join(close[:3] or ['DPMSolverMultistepScheduler', 'DDIMScheduler'])}"
        )
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    given = options or {}
    try:
        scheduler = getattr(diffusers, name).from_config(plain, **given)
        if other := {k: v for k, v in STOCK_OPTIONS.items() if k not in given and scheduler.config.get(k, v) != v}:
            scheduler = getattr(diffusers, name).from_config(plain | other, **given)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"solver {name} does not take this teacher's schedule: {error}") from None
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"solver {name} has noise levels of its own, not this teacher's; expected one for diffusion models"
        )
    return scheduler


@quiet_libraries()
def stock_pipeline(teacher: Teacher, solver: str) -> Any:
    """Stock diffusers around the teacher's own networks, with a scheduler of diffusers by name."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=teacher.unet,
        scheduler=make_scheduler(solver, teacher.scheduler_config),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@quiet_libraries()
def refuse_stochastic(scheduler: Any, steps: int) -> None:
    """A coupling needs an ODE: one noise, one image.

    Raises:
        UserError: two runs on the same inputs differ.
    """
    ends = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            sample = torch.ones(1, 1, 2, 2)
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                sample = scheduler.step(torch.full_like(sample, 0.5), t, sample, return_dict=False)[0]
            ends.append(sample)
    if not torch.equal(*ends):
        raise UserError(
            f"solver {type(scheduler).__name__} draws noise, so one seed has many images; reflow needs an ODE solver "
            "such as DPMSolverMultistepScheduler or DDIMScheduler"
        )


def solve(
    unet: Any,
    scheduler: Any,
    steps: int,
    x0_BCHW: Tensor,
    states_BLD: Tensor,
    null_BLD: Tensor,
    guidance: float,
) -> Iterator[Tensor]:
    """Yields the latent after each step of a diffusers scheduler from the noise x0, as stock pipelines step it.

    Guidance is active above 1; its two branches go through the network in one batch. The latents stay float32.
    """
    scheduler.set_timesteps(steps)
    dtype = next(unet.parameters()).dtype
    guided = guidance > 1
    # Everything that is the same in all steps is made once: the loop holds the network and the scheduler's arithmetic.
    states = states_BLD.to(dtype)
    if guided:
        states = torch.cat([null_BLD.to(states).expand_as(states), states])
    times = scheduler.timesteps.tolist()
    network_times = scheduler.timesteps.to(x0_BCHW.device)
    x_BCHW = x0_BCHW.float() * scheduler.init_noise_sigma
    for i, t in enumerate(times):
        input_BCHW = scheduler.scale_model_input(x_BCHW, t).to(dtype)
        if guided:
            input_BCHW = torch.cat([input_BCHW, input_BCHW])
        output_BCHW = unet(input_BCHW, network_times[i], states, return_dict=False)[0].float()
        if guided:
            null_BCHW, text_BCHW = output_BCHW.chunk(2)
            output_BCHW = null_BCHW + guidance * (text_BCHW - null_BCHW)
        x_BCHW = scheduler.step(output_BCHW, t, x_BCHW, return_dict=False)[0]
        yield x_BCHW


def ddim_step(
    network: Network, schedule: NoiseSchedule, z_BCHW: Tensor, tau_B: Tensor, to_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Deterministic DDIM from training steps tau to earlier ones; also the x1 estimate it used."""
    alpha, sigma = schedule.levels(tau_B)
    x1_BCHW, eps_BCHW = schedule.read(network(z_BCHW, tau_B), z_BCHW, alpha, sigma)
    alpha_to, sigma_to = schedule.levels(to_B)
    return alpha_to * x1_BCHW + sigma_to * eps_BCHW, x1_BCHW


def guided_network(unet: Any, states_BLD: Tensor, null_BLD: Tensor | None = None, guidance: float = 1.0) -> Network:
    """The U-Net for fixed prompts, with classifier-free guidance above 1 (both branches in one batch)."""

    def network(z_BCHW: Tensor, tau_B: Tensor) -> Tensor:
        if guidance <= 1 or null_BLD is None:
            return unet(z_BCHW, tau_B, states_BLD, return_dict=False)[0]
        states = torch.cat([null_BLD.expand_as(states_BLD), states_BLD])
        both = unet(torch.cat([z_BCHW, z_BCHW]), torch.cat([tau_B, tau_B]), states, return_dict=False)[0]
        null_BCHW, text_BCHW = both.chunk(2)
        return null_BCHW + guidance * (text_BCHW - null_BCHW)

    return network
