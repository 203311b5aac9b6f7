"""The diffusion process (section 3.2, appendix B) and `LatentDiffusion`, the module that holds both stages.

Shape suffixes: B batch, C channels, H and W latent height and width, T number of diffusion steps; x is an image in
[-1, 1], z a latent, z_t a noised latent. Parameter and buffer names under `model.`, `first_stage_model.`,
`cond_stage_model.`, `model_ema.` and the schedule tables are those of the authors' checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.ema import Ema
from common.errors import UserError
from common.images import to_unit
from common.recorded import Recorder
from common.steps import StepDraws

Prediction = Literal["eps", "x0", "v"]
# What the denoiser is conditioned on: nothing, one tensor (its place follows from the conditioning key), or the
# official dictionary {"c_concat": [BCHW, ...], "c_crossattn": [BLD, ...]}.
Conditioning = Tensor | dict[str, list[Tensor]] | None


def make_betas(kind: str, timesteps: int, start: float = 1e-4, end: float = 2e-2, cosine_s: float = 8e-3) -> np.ndarray:
    """Variances beta_1..beta_T in float64.

    Args:
        kind: linear (linear in sqrt(beta): diffusers' scaled_linear), cosine, sqrt_linear (linear in beta) or sqrt.
    """
    if kind == "linear":
        return np.linspace(start**0.5, end**0.5, timesteps, dtype=np.float64) ** 2
    if kind == "cosine":
        angle = (np.arange(timesteps + 1, dtype=np.float64) / timesteps + cosine_s) / (1 + cosine_s) * np.pi / 2
        abar = np.cos(angle) ** 2
        return np.clip(1 - abar[1:] / abar[:-1], 0.0, 0.999)
    if kind == "sqrt_linear":
        return np.linspace(start, end, timesteps, dtype=np.float64)
    if kind == "sqrt":
        return np.linspace(start, end, timesteps, dtype=np.float64) ** 0.5
    raise UserError(f"noise schedule {kind!r} is unknown: use linear, cosine, sqrt_linear or sqrt")


class NoiseSchedule(nn.Module):
    """Tables of q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I) and of its posterior; index 0 is the first step.

    The buffers (float32, official names, not saved: the options below define them) follow the module to its device;
    `abar` keeps the cumulative products in float64 on the host, so that samplers never wait for the device.

    Args:
        kind, timesteps, start, end, cosine_s: see `make_betas`.
        betas: the levels themselves, in place of a kind's.
        v_posterior: variance of p(z_{t-1} | z_t) = (1 - v) beta~_t + v beta_t.
        prediction: what the network predicts; decides the weights of the variational bound.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    lvlb_weights: Tensor

    def __init__(
        self,
        kind: str = "linear",
        timesteps: int = 1000,
        start: float = 0.0015,
        end: float = 0.0195,
        *,
        cosine_s: float = 8e-3,
        v_posterior: float = 0.0,
        prediction: Prediction = "eps",
        betas: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if prediction not in ("eps", "x0", "v"):
            raise UserError(f"prediction {prediction!r} is unknown: use eps, x0 or v")
        if timesteps < 2:
            raise UserError(f"timesteps must be at least 2, got {timesteps}")
        levels = np.asarray(betas) if betas else make_betas(kind, timesteps, start, end, cosine_s)
        if not ((levels > 0) & (levels < 1)).all():
            raise UserError(f"schedule {kind} from {start} to {end} leaves (0, 1): every beta must lie strictly inside")
        alphas = 1.0 - levels
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        posterior_variance = (1 - v_posterior) * levels * (1 - abar_prev) / (1 - abar) + v_posterior * levels
        # In float32 as in the authors' code: 1 - abar loses digits at the first steps, and theirs has lost them too.
        betas_f, variance_f, alphas_f, abar_f = (
            table.astype(np.float32) for table in (levels, posterior_variance, alphas, abar)
        )
        if prediction == "eps":
            with np.errstate(divide="ignore"):
                bound = betas_f * betas_f / (2 * variance_f * alphas_f * (1 - abar_f))
        elif prediction == "x0":
            # Their denominator reads `2 * 1 - abar`.
            bound = np.float32(0.5) * np.sqrt(abar_f) / (2 - abar_f)
        else:
            bound = np.ones_like(betas_f)
        bound[0] = bound[1]  # beta~_1 = 0 would make the first weight infinite

        self.timesteps = timesteps
        self.prediction: Prediction = prediction
        self.v_posterior = v_posterior
        self.abar: list[float] = abar.tolist()
        tables = {
            "betas": levels,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
            "log_one_minus_alphas_cumprod": np.log(1 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
            "posterior_mean_coef1": levels * np.sqrt(abar_prev) / (1 - abar),
            "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(alphas) / (1 - abar),
            "lvlb_weights": bound,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=False)

    def official_tables(self) -> dict[str, Tensor]:
        """The tables that the authors' checkpoints store (all but the bound's weights)."""
        return {name: table for name, table in self.named_buffers() if name != "lvlb_weights"}

    def signal_noise(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), broadcastable against `like`."""
        shape = (-1, *(1,) * (like.dim() - 1))
        return self.sqrt_alphas_cumprod[t_B].view(shape), self.sqrt_one_minus_alphas_cumprod[t_B].view(shape)

    def q_sample(self, z_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise."""
        signal, sigma = self.signal_noise(t_B, z_BCHW)
        return signal * z_BCHW + sigma * noise_BCHW

    def target(self, z_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """What the network should predict: the noise, z_0, or v = sqrt(abar) noise - sqrt(1 - abar) z_0."""
        if self.prediction == "eps":
            return noise_BCHW
        if self.prediction == "x0":
            return z_BCHW
        signal, sigma = self.signal_noise(t_B, z_BCHW)
        return signal * noise_BCHW - sigma * z_BCHW

    def x0_and_eps(self, output_BCHW: Tensor, zt_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Turn a network output at `step` (one step for the whole batch) into estimates of z_0 and of the noise."""
        abar = self.abar[step]
        signal, sigma = abar**0.5, (1 - abar) ** 0.5
        if self.prediction == "eps":
            return (zt_BCHW - sigma * output_BCHW) / signal, output_BCHW
        if self.prediction == "x0":
            return output_BCHW, (zt_BCHW - signal * output_BCHW) / sigma
        return signal * zt_BCHW - sigma * output_BCHW, sigma * zt_BCHW + signal * output_BCHW


def diffusion_loss(
    schedule: NoiseSchedule,
    output_BCHW: Tensor,
    target_BCHW: Tensor,
    t_B: Tensor,
    *,
    loss: str = "l2",
    logvar_T: Tensor | None = None,
    learn_logvar: bool = False,
    simple_weight: float = 1.0,
    elbo_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 2 of the paper with the options of the authors' code (`p_losses`).

    Returns the scalar loss and detached scalars: loss_simple (the plain error), loss_vlb (the same weighted by the
    variational bound), loss, and with a learned log-variance also loss_gamma (the reweighted error) and logvar.
    """
    difference = output_BCHW.float() - target_BCHW.float()
    if loss == "l2":
        error = difference.square()
    elif loss == "l1":
        error = difference.abs()
    else:
        raise UserError(f"loss {loss!r} is unknown: use l1 or l2")
    error_B = error.flatten(1).mean(1)
    weighted_B = error_B
    if logvar_T is not None:
        logvar_B = logvar_T[t_B]
        weighted_B = error_B / logvar_B.exp() + logvar_B
    bound = (schedule.lvlb_weights[t_B] * error_B).mean()
    total = simple_weight * weighted_B.mean() + elbo_weight * bound
    logs = {"loss_simple": error_B.detach().mean(), "loss_vlb": bound.detach(), "loss": total.detach()}
    if learn_logvar and logvar_T is not None:
        logs["loss_gamma"] = weighted_B.detach().mean()
        logs["logvar"] = logvar_T.detach().mean()
    return total, logs


def scale_factor_from_std(z_BCHW: Tensor) -> Tensor:
    """Appendix G: 1 / (unbiased standard deviation over ALL elements of the first batch); the mean is not removed."""
    return 1.0 / z_BCHW.detach().float().flatten().std()


def replace_rows(values: Any, other: Any, where_B: Tensor) -> Any:
    """Rows b of `values` with where_B[b] replaced by `other`; tensors, or mappings and sequences of tensors."""
    if isinstance(values, Tensor):
        return torch.where(where_B.view(-1, *(1,) * (values.dim() - 1)), other.to(values), values)
    if isinstance(values, Mapping):
        return {key: replace_rows(values[key], other[key], where_B) for key in values}
    return [replace_rows(value, null, where_B) for value, null in zip(values, other, strict=True)]


def _zeros_like(values: Any) -> Any:
    if isinstance(values, Tensor):
        if not values.is_floating_point():
            raise UserError(
                "a condition of class labels has no zero: give LatentDiffusion the null class as null_input"
            )
        return torch.zeros_like(values)
    if isinstance(values, Mapping):
        return {key: _zeros_like(value) for key, value in values.items()}
    return [_zeros_like(value) for value in values]


def _expand(values: Any, batch: int, device: torch.device) -> Any:
    if isinstance(values, Tensor):
        return values.to(device).expand(batch, *values.shape[1:])
    return {key: _expand(value, batch, device) for key, value in values.items()}


class LatentDiffusion(nn.Module):
    """Both stages of the paper: a frozen autoencoder, the denoiser in its latent space, and tau_theta (section 3.3).

    Args:
        first_stage: autoencoder with `encode_latent(x, noise)`, `decode_latent(z)`; it is frozen here.
        denoiser: `ConditionedUNet` (the authors' DiffusionWrapper), called as (z_t, t, c_concat=[], c_crossattn=[]).
        cond_stage: module that turns `batch[cond_stage_key]` into the condition; "first_stage" encodes it with the
            autoencoder (inpainting); None uses the entry as it is (super-resolution).
        conditioning_key: None (unconditional), concat, crossattn, hybrid or adm. hybrid also needs `batch["c_concat"]`.
        cond_stage_key: entry of a batch that holds the condition's raw form (`class_label`, `caption`,
            `coordinates_bbox`, `segmentation`, `LR_image`, `masked_image` which goes with `mask`, ...).
        train_cond_stage: whether tau_theta is trained jointly.
        schedule, loss, simple_weight, elbo_weight, learn_logvar, logvar_init: see `NoiseSchedule`, `diffusion_loss`.
        scale_factor: latents are multiplied by it after encoding, divided before decoding (appendix G).
        cond_drop: probability of training without the condition, for classifier-free guidance.
        null_input: the raw condition that means "none" (token ids of "", the null class), batch size 1, a tensor or a
            mapping of tensors like the raw condition itself; without it the null condition is all zeros.
    """

    scale_factor: Tensor
    logvar: Tensor

    def __init__(
        self,
        first_stage: nn.Module,
        denoiser: nn.Module,
        cond_stage: nn.Module | Literal["first_stage"] | None = None,
        *,
        conditioning_key: str | None = None,
        first_stage_key: str = "image",
        cond_stage_key: str = "image",
        train_cond_stage: bool = True,
        schedule: NoiseSchedule | None = None,
        loss: str = "l2",
        simple_weight: float = 1.0,
        elbo_weight: float = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        scale_factor: float = 1.0,
        cond_drop: float = 0.1,
        null_input: Tensor | Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if loss not in ("l1", "l2"):
            raise UserError(f"loss {loss!r} is unknown: use l1 or l2")
        if not 0.0 <= cond_drop < 1.0:
            raise UserError(f"cond_drop must lie in [0, 1), got {cond_drop}")
        self.schedule = schedule if schedule is not None else NoiseSchedule()
        self.model = denoiser
        self.first_stage_model = first_stage.requires_grad_(False).eval()
        self.cond_stage_model = first_stage if cond_stage == "first_stage" else cond_stage
        self.train_cond_stage = train_cond_stage and isinstance(cond_stage, nn.Module)
        if isinstance(cond_stage, nn.Module) and not train_cond_stage:
            cond_stage.requires_grad_(False).eval()
        self.conditioning_key = conditioning_key
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.loss_type = loss
        self.simple_weight = simple_weight
        self.elbo_weight = elbo_weight
        self.learn_logvar = learn_logvar
        self.cond_drop = cond_drop
        self.null_input = null_input
        self._recorders: dict[tuple[tuple[str, int], ...], Recorder] = {}
        self.register_buffer("scale_factor", torch.tensor(scale_factor, dtype=torch.float32))
        logvar_T = torch.full((self.schedule.timesteps,), logvar_init)
        if learn_logvar:
            self.logvar = nn.Parameter(logvar_T)
        else:
            self.register_buffer("logvar", logvar_T, persistent=False)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if isinstance(self.cond_stage_model, nn.Module) and not self.train_cond_stage:
            self.cond_stage_model.eval()
        return self

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        """Image -> scaled latent. KL: a posterior sample with the given noise; VQ: the vector before quantisation."""
        return self.scale_factor * self.first_stage_model.encode_latent(x_BCHW, noise_BCHW)  # type: ignore[operator]

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Scaled latent -> image (VQ quantises first). Differentiable, for post-hoc guiding."""
        return self.first_stage_model.decode_latent(z_BCHW / self.scale_factor)  # type: ignore[operator]

    def set_scale_factor(self, z_BCHW: Tensor) -> None:
        """`scale_by_std`: take the factor from the unscaled latents of the first batch."""
        self.scale_factor.copy_(scale_factor_from_std(z_BCHW))

    def _condition(self, raw: Any, batch: Mapping[str, Any]) -> Conditioning:
        if self.cond_stage_model is self.first_stage_model:
            with torch.no_grad():
                # The authors condition on the unscaled latent, for a KL stage on its mode (zero noise).
                moments_BCHW = self.first_stage_model.moments(raw)  # type: ignore[operator]
                c_BCHW = self.first_stage_model.latent_from_moments(  # type: ignore[operator]
                    moments_BCHW, torch.zeros((), device=raw.device)
                )
            if "mask" in batch:
                from ldm.masks import resize_mask

                c_BCHW = torch.cat([c_BCHW, resize_mask(batch["mask"], c_BCHW.shape[-2:])], dim=1)
            return c_BCHW
        c = raw
        if self.cond_stage_model is not None:
            with contextlib.nullcontext() if self.train_cond_stage else torch.no_grad():
                c = self.cond_stage_model(raw)
        if self.conditioning_key == "hybrid":
            return {"c_concat": [batch["c_concat"]], "c_crossattn": [c]}
        return c

    def conditioning(self, batch: Mapping[str, Any], uniform_B: Tensor | None = None) -> Conditioning:
        """The condition of a batch: tau_theta(y).

        Args:
            uniform_B: numbers in [0, 1), one per sample; where below `cond_drop` the null condition is used, so that
                the draw is the caller's. None keeps every condition.
        """
        if self.conditioning_key is None:
            return None
        if self.cond_stage_key not in batch:
            raise UserError(
                f"the batch lacks {self.cond_stage_key!r}, the condition of this model; it has {sorted(batch)}"
            )
        raw = batch[self.cond_stage_key]
        if uniform_B is None or self.cond_drop == 0.0:
            return self._condition(raw, batch)
        drop_B = uniform_B < self.cond_drop
        if self.null_input is not None:
            null = _expand(self.null_input, drop_B.shape[0], drop_B.device)
            return self._condition(replace_rows(raw, null, drop_B), batch)
        cond = self._condition(raw, batch)
        return replace_rows(cond, _zeros_like(cond), drop_B)

    def null_conditioning(self, cond: Conditioning) -> Conditioning:
        """The unconditional counterpart of `cond`, of the same shape (for classifier-free guidance)."""
        if cond is None:
            return None
        if self.null_input is None:
            return _zeros_like(cond)
        first = cond if isinstance(cond, Tensor) else next(iter(cond.values()))[0]
        null = _expand(self.null_input, first.shape[0], first.device)
        batch = {"c_concat": cond["c_concat"][0]} if isinstance(cond, dict) and "c_concat" in cond else {}
        return self._condition(null, batch)

    def apply_model(self, zt_BCHW: Tensor, t_B: Tensor, cond: Conditioning = None) -> Tensor:
        """The denoiser's raw output (eps, x0 or v)."""
        return self.model(zt_BCHW, t_B, **self._lists(cond))

    def apply_recorded(self, zt_BCHW: Tensor, t_B: Tensor, cond: Conditioning = None) -> Tensor:
        """The same for samplers: without gradients, calls that come often are recorded (`common.recorded`)."""
        lists = self._lists(cond)
        form = tuple((name, len(tensors)) for name, tensors in lists.items())
        if form not in self._recorders:

            def call(model: nn.Module, z_BCHW: Tensor, t_B: Tensor, *tensors: Tensor) -> Tensor:
                rest = iter(tensors)
                return model(z_BCHW, t_B, **{name: [next(rest) for _ in range(count)] for name, count in form})

            self._recorders[form] = Recorder(self.model, call)
        return self._recorders[form](zt_BCHW, t_B, *(x for tensors in lists.values() for x in tensors))

    def _lists(self, cond: Conditioning) -> dict[str, list[Tensor]]:
        if isinstance(cond, Tensor):
            return {"c_concat" if self.conditioning_key == "concat" else "c_crossattn": [cond]}
        return cond or {}

    def loss(
        self, z_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor, cond: Conditioning = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training objective at latents z, steps t and noise, a pure function of them. See `diffusion_loss`."""
        output_BCHW = self.apply_model(self.schedule.q_sample(z_BCHW, t_B, noise_BCHW), t_B, cond)
        return diffusion_loss(
            self.schedule,
            output_BCHW,
            self.schedule.target(z_BCHW, t_B, noise_BCHW),
            t_B,
            loss=self.loss_type,
            logvar_T=self.logvar,
            learn_logvar=self.learn_logvar,
            simple_weight=self.simple_weight,
            elbo_weight=self.elbo_weight,
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Denoiser, jointly trained tau_theta and learned log-variance: what the optimiser gets."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def official_state_dict(self, ema: Ema | None = None) -> dict[str, Tensor]:
        """State dict in the authors' layout, with schedule tables and optional `model_ema.`."""
        state = dict(self.state_dict())
        state.update(self.schedule.official_tables())
        if ema is not None:
            # The averages may follow this whole module; the authors' file has those of the denoiser only.
            averages = {name.removeprefix("model."): ema.get_buffer(buffer) for name, buffer in ema.buffer_of.items()}
            for name, _ in self.model.named_parameters():
                state[f"model_ema.{name.replace('.', '')}"] = averages[name]
            state["model_ema.decay"], state["model_ema.num_updates"] = ema.decay, ema.num_updates
        return state

    def load_official_state_dict(self, state: Mapping[str, Tensor], use_ema: bool = True) -> None:
        """Library. Load the authors' checkpoint (its `state_dict`), taking the averaged denoiser where there is one.

        Raises:
            UserError: missing or unknown parameters, or tables of another schedule than this model's.
        """
        tables = self.schedule.official_tables()
        if "betas" in state:
            betas_T = state["betas"].float().cpu()
            own_T = self.schedule.betas.cpu()
            if betas_T.shape != own_T.shape or not torch.allclose(betas_T, own_T, rtol=1e-4, atol=1e-7):
                raise UserError(
                    "the checkpoint was trained with another noise schedule than this configuration: check timesteps, "
                    "linear_start, linear_end and beta_schedule"
                )
        ignored = ("first_stage_model.loss.", "cond_stage_model.loss.", "model_ema.")
        weights = {
            name: value
            for name, value in state.items()
            if name not in tables and name not in ("lvlb_weights", "cond_ids") and not name.startswith(ignored)
        }
        if use_ema:
            for name, _ in self.model.named_parameters():
                averaged = state.get(f"model_ema.{name.replace('.', '')}")
                if averaged is not None:
                    weights[f"model.{name}"] = averaged
        if not self.learn_logvar:
            weights.pop("logvar", None)
        weights.setdefault("scale_factor", self.scale_factor)
        weights["scale_factor"] = torch.as_tensor(weights["scale_factor"]).reshape(())
        result = self.load_state_dict(weights, strict=False)
        problems = [f"missing {name}" for name in result.missing_keys] + [
            f"unknown {name}" for name in result.unexpected_keys
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise UserError(f"the checkpoint does not fit this configuration: {', '.join(problems[:4])}{more}")


def draw_latents(
    ldm: LatentDiffusion, batch: Mapping[str, Tensor], draws: StepDraws
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled posterior samples z [B, C, H, W] of a batch's images (or cached moments), steps t [B], noise like z, and
    two more uniform numbers a sample [2, B]."""
    first_stage: Any = ldm.first_stage_model
    uniform_3B = draws.uniform(3)
    with torch.no_grad():
        moments_BCHW = batch["moments"] if "moments" in batch else first_stage.moments(to_unit(batch["image"]))
    posterior_noise, noise_BCHW = draws.normals(2, first_stage.embed_dim, *moments_BCHW.shape[2:])
    z_BCHW = ldm.scale_factor * first_stage.latent_from_moments(moments_BCHW, posterior_noise)
    return z_BCHW, (uniform_3B[0] * ldm.schedule.timesteps).long(), noise_BCHW, uniform_3B[1:]
