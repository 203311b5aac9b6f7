"""The diffusion process of PixArt-alpha: linear betas, eps prediction, variance learned as a range (iDDPM).

Shape suffixes: B batch, C channels of the latent, H and W its height and width, T diffusion steps. The network
returns 2C channels: the noise estimate and the variance logits v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

Network = Callable[[Tensor, Tensor], Tensor]


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> np.ndarray:
    """beta_1..beta_T in float64; for T other than 1000 both ends are scaled by 1000/T (iDDPM)."""
    scale = 1000 / steps
    return np.linspace(scale * start, scale * end, steps, dtype=np.float64)


def respaced_steps(total: int, spacing: int | str | Sequence[int]) -> list[int]:
    """The steps of a chain of length `total` that a shorter chain keeps, ascending (iDDPM's respacing).

    Args:
        spacing: a count (`100`), counts of equal sections ("10,15,20"), or "ddimN": N steps at one integer stride.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        wanted = _positive(spacing[len("ddim") :], spacing)
        for stride in range(1, total):
            if len(range(0, total, stride)) == wanted:
                return list(range(0, total, stride))
        raise UserError(f"respacing {spacing!r}: no integer stride gives {wanted} of {total} steps")
    if isinstance(spacing, str):
        counts = [_positive(part, spacing) for part in spacing.split(",")]
    else:
        counts = [spacing] if isinstance(spacing, int) else list(spacing)
    if not counts or min(counts) < 1:
        raise UserError(f"respacing {spacing!r}: every section needs at least one step")
    base, longer = divmod(total, len(counts))
    kept: list[int] = []
    first = 0
    for section, count in enumerate(counts):
        length = base + (section < longer)
        if count > length:
            raise UserError(f"respacing {spacing!r}: section {section} has {length} steps, {count} were asked for")
        distance = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # summed, not multiplied, so that ties round as in the original
            kept.append(first + round(position))
            position += distance
        first += length
    return kept


def _positive(text: str, spacing: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f'respacing {spacing!r}: use a number of steps, sections such as "10,15,20", or "ddim50"'
        ) from None


class Diffusion:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) with its posterior; step 0 is the least noisy one.

    Args:
        betas: variances beta_1..beta_T (float64); default the paper's linear 1e-4..0.02 with T = 1000.
        timestep_map: the step of the ORIGINAL chain each step stands for; this is what the network is told.

    Attributes are float64 arrays of length T: `betas`, `alphas_cumprod`, `posterior_variance` (beta~),
    `posterior_log_variance_clipped`, `posterior_mean_coef1`, `posterior_mean_coef2`.
    """

    def __init__(self, betas: np.ndarray | None = None, timestep_map: Sequence[int] | None = None) -> None:
        self.betas = linear_betas() if betas is None else np.asarray(betas, dtype=np.float64)
        if self.betas.ndim != 1 or len(self.betas) < 2 or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError("betas must be a vector of at least two numbers in (0, 1]")
        self.steps = len(self.betas)
        self.timestep_map = list(range(self.steps)) if timestep_map is None else list(timestep_map)
        if len(self.timestep_map) != self.steps:
            raise ValueError(f"timestep_map has {len(self.timestep_map)} entries for {self.steps} steps")
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        rest = 1 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - previous) / rest
        # beta~ is 0 at the first step: its logarithm takes the value of the second.
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_mean_coef1 = self.betas * np.sqrt(previous) / rest
        self.posterior_mean_coef2 = (1 - previous) * np.sqrt(1 - self.betas) / rest
        self._tables: dict[torch.device, dict[str, Tensor]] = {}

    def respaced(self, spacing: int | str | Sequence[int]) -> Diffusion:
        """The shorter chain over the kept steps (`respaced_steps`), with betas so that abar agrees at those steps."""
        kept = respaced_steps(self.steps, spacing)
        abar = self.alphas_cumprod[kept]
        betas = 1 - abar / np.append(1.0, abar[:-1])
        return Diffusion(betas, [self.timestep_map[step] for step in kept])

    def table(self, name: str, t_B: Tensor) -> Tensor:
        """Row t of a coefficient table, float32, shaped [B, 1, 1, 1] on the device of `t_B`."""
        tables = self._tables.setdefault(t_B.device, {})
        if name not in tables:
            values = {
                "sqrt_abar": lambda: np.sqrt(self.alphas_cumprod),
                "sqrt_one_minus_abar": lambda: np.sqrt(1 - self.alphas_cumprod),
                "sqrt_recip_abar": lambda: np.sqrt(1 / self.alphas_cumprod),
                "sqrt_recip_abar_minus_one": lambda: np.sqrt(1 / self.alphas_cumprod - 1),
                "log_betas": lambda: np.log(self.betas),
                "log_large_variance": lambda: np.log(np.append(self.posterior_variance[1], self.betas[1:])),
                "timestep_map": lambda: np.array(self.timestep_map),
            }
            array = values[name]() if name in values else getattr(self, name)
            dtype = torch.long if name == "timestep_map" else torch.float32
            tables[name] = torch.as_tensor(array).to(t_B.device, dtype)
        return tables[name][t_B].view(-1, 1, 1, 1)

    def q_sample(self, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, in the type of x_0."""
        xt_BCHW = self.table("sqrt_abar", t_B) * x0_BCHW + self.table("sqrt_one_minus_abar", t_B) * noise_BCHW
        return xt_BCHW.to(x0_BCHW.dtype)

    def x0_from_eps(self, xt_BCHW: Tensor, t_B: Tensor, eps_BCHW: Tensor) -> Tensor:
        """The estimate of x_0 that a noise estimate implies; not clipped (latents have no fixed range)."""
        return self.table("sqrt_recip_abar", t_B) * xt_BCHW - self.table("sqrt_recip_abar_minus_one", t_B) * eps_BCHW

    def posterior_mean(self, x0_BCHW: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return self.table("posterior_mean_coef1", t_B) * x0_BCHW + self.table("posterior_mean_coef2", t_B) * xt_BCHW

    def log_variance(self, logits_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Learned range: log var = f log(beta_t) + (1 - f) log(beta~_t) with f = (v + 1) / 2."""
        fraction_BCHW = (logits_BCHW + 1) / 2
        low = self.table("posterior_log_variance_clipped", t_B)
        return fraction_BCHW * self.table("log_betas", t_B) + (1 - fraction_BCHW) * low

    def fixed_log_variance(self, t_B: Tensor, small: bool = False) -> Tensor:
        """Where the network learns none: log beta, or with `small` log beta~; at the first step log beta~_2 in both."""
        return self.table("posterior_log_variance_clipped" if small else "log_large_variance", t_B)

    def training_losses(
        self,
        model: Network,
        x0_BCHW: Tensor,
        t_B: Tensor,
        noise_BCHW: Tensor,
        snr_loss: bool = False,
    ) -> dict[str, Tensor]:
        """Per-sample training losses [B]: `loss` = `mse` + `vb` (paper section 2.4 of the spec; iDDPM's hybrid loss).

        Args:
            model: (x_t BCHW, t_B of the original chain) -> [B, 2C, H, W] (or [B, C, H, W]: fixed variance, no vb).
            snr_loss: compare x_0 instead of the noise at t <= 249 (the authors' optional variant).

        Returns:
            mse: mean over C, H, W of the squared error; vb: the variational bound's term in bits per dimension, which
            trains the variance alone (its noise estimate is detached).
        """
        x0_BCHW, noise_BCHW = x0_BCHW.float(), noise_BCHW.float()
        channels = x0_BCHW.shape[1]
        xt_BCHW = self.q_sample(x0_BCHW, t_B, noise_BCHW)
        out = model(xt_BCHW, self.table("timestep_map", t_B).view(-1)).float()
        eps_BCHW = out[:, :channels]
        if snr_loss:
            early = (t_B <= 249).view(-1, 1, 1, 1)
            target = torch.where(early, x0_BCHW, noise_BCHW)
            estimate = torch.where(early, self.x0_from_eps(xt_BCHW, t_B, eps_BCHW), eps_BCHW)
        else:
            target, estimate = noise_BCHW, eps_BCHW
        mse_B = (target - estimate).square().flatten(1).mean(1)
        if out.shape[1] == channels:
            return {"loss": mse_B, "mse": mse_B, "vb": torch.zeros_like(mse_B)}
        vb_B = self.variational_bound(out, x0_BCHW, xt_BCHW, t_B)
        return {"loss": mse_B + vb_B, "mse": mse_B, "vb": vb_B}

    def variational_bound(self, out_B2CHW: Tensor, x0_BCHW: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Bits per dimension [B]: KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)); at t = 0 the discretised decoder NLL."""
        eps_BCHW, logits_BCHW = out_B2CHW.chunk(2, dim=1)
        true_mean = self.posterior_mean(x0_BCHW, xt_BCHW, t_B)
        true_log_variance = self.table("posterior_log_variance_clipped", t_B)
        mean = self.posterior_mean(self.x0_from_eps(xt_BCHW, t_B, eps_BCHW.detach()), xt_BCHW, t_B)
        log_variance = self.log_variance(logits_BCHW, t_B)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = discretised_gaussian_nll(x0_BCHW, mean, log_variance)
        nats = torch.where((t_B == 0).view(-1, 1, 1, 1), nll, kl)
        return nats.flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, element by element."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_gaussian_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass in the bin of width 2/255 around x_0, in nats.

    The outer bins (|x_0| > 0.999) reach to infinity. The normal distribution function is the tanh approximation of the
    authors' loss.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _normal_cdf((x0 - mean + 1 / 255) * inverse_std)
    lower = _normal_cdf((x0 - mean - 1 / 255) * inverse_std)
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
