"""What draws a token from its condition: an MLP that is a diffusion model (Equation 6), or, as an ablation, a mean.

Shape suffixes: R rows (tokens), C numbers of a token, D width of the condition, W width of the head, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.products import Linear
from lightgen.diffusion import Diffusion, training_chain

FREQUENCIES = 256


def time_sinusoids(t_R: Tensor, width: int = FREQUENCIES) -> Tensor:
    """[R, width] cosines, then sines, of t."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t_R.device) / half)
    angle = t_R.float()[:, None] * frequency[None]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, width % 2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class ResidualBlock(nn.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), all three from SiLU(y)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.modulation = Linear(width, 3 * width)

    def forward(self, x_RW: Tensor, active_RW: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(active_RW).chunk(3, dim=-1)
        return torch.addcmul(x_RW, gate, self.mlp(modulated(self.norm(x_RW), shift, scale)))


class DiffusionHead(nn.Module):
    """(x_t, t, z) -> noise and share of the variance.

    Args:
        token: numbers C of a token.
        condition: width of z.
    """

    def __init__(self, token: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.token, self.width = token, width
        self.time = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))
        self.condition = Linear(condition, width)
        self.input = Linear(token, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = Linear(width, 2 * width)
        self.output = Linear(width, 2 * token)
        self.reset()

    def reset(self) -> None:
        """Starting weights: modulations and output at zero, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("output"):
                nn.init.zeros_(parameter)

    def forward(self, x_RC: Tensor, t_R: Tensor, z_RD: Tensor) -> Tensor:
        """Output [R, 2 C]; t counts training steps."""
        return self._network(x_RC, self.time(time_sinusoids(t_R)), self.condition(z_RD))

    def _network(self, x_RC: Tensor, time_RW: Tensor, condition_RW: Tensor) -> Tensor:
        active_RW = F.silu(time_RW + condition_RW)
        x_RW = self.input(x_RC)
        for block in self.blocks:
            x_RW = block(x_RW, active_RW)
        shift, scale = self.final_modulation(active_RW).chunk(2, dim=-1)
        return self.output(modulated(self.final_norm(x_RW), shift, scale))

    def _times(self, t_R: Tensor, count: int) -> Tensor:
        """Features of times below `count`: of every one of these once, where there are more rows than times."""
        if len(t_R) <= count:
            return self.time(time_sinusoids(t_R))
        every = self.time(time_sinusoids(torch.arange(count, device=t_R.device)))
        return every.index_select(0, t_R.long())

    def terms(self, x0_RC: Tensor, z_RD: Tensor, t_R: Tensor, noise_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(squared error [R], bound [R], noise as predicted [R, C]) of tokens at times t.

        z may have fewer rows, which are then repeated: its projection is made once for all of a token's times.
        """
        chain = training_chain()
        x_RC = chain.noised(x0_RC, t_R, noise_RC)
        condition_RW = self.condition(z_RD)
        condition_RW = condition_RW.repeat(len(x_RC) // len(z_RD), 1)
        output = self._network(x_RC, self._times(t_R, len(chain)), condition_RW).float()
        eps_RC = output[:, : self.token]
        return (eps_RC - noise_RC).square().mean(1), chain.bound(output, x0_RC, x_RC, t_R), eps_RC

    def loss(self, x0_RC: Tensor, z_RD: Tensor, t_R: Tensor, noise_RC: Tensor) -> Tensor:
        """[R] of Equation 6."""
        error_R, bound_R, _ = self.terms(x0_RC, z_RD, t_R, noise_RC)
        return error_R + bound_R

    def guided(self, x_RC: Tensor, t: int, condition_RW: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """(noise [R, C], share of the variance [R, C]) at training step t.

        Args:
            condition_RW: projected; with guidance other than 1 twice as many rows, those of the null text last. Both
                halves see the same x, the variance is that of the first.
        """
        time_1W = self.time(time_sinusoids(torch.full((1,), t, device=x_RC.device)))
        both = x_RC if guidance == 1 else torch.cat([x_RC, x_RC])
        eps, share = self._network(both, time_1W, condition_RW).float().chunk(2, dim=1)
        if guidance == 1:
            return eps, share
        given, null = eps.chunk(2)
        return null + guidance * (given - null), share.chunk(2)[0]

    def sample(
        self,
        z_RD: Tensor,
        chain: Diffusion,
        x_RC: Tensor,
        noise_SRC: Tensor | None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        clip: float = 0.0,
        watch: Callable[[Tensor], object] = lambda _: None,
    ) -> Tensor:
        """Tokens [R, C], drawn from unit noise x along a chain.

        Args:
            z_RD: with guidance other than 1 [2 R, D], the rows of the null text last.
            noise_SRC: unit noise of each step, the noisiest first; None takes DDIM steps, in which the temperature
                scales the start.
            watch: called with x after each step.
        """
        condition_RW = self.condition(z_RD)  # once for all steps
        if noise_SRC is None:
            x_RC = x_RC * temperature
        for number, step in enumerate(range(len(chain) - 1, -1, -1)):
            eps, share = self.guided(x_RC, int(chain.times[step]), condition_RW, guidance)
            if noise_SRC is None:
                x_RC = chain.ddim(x_RC, step, eps, clip)
            else:
                x_RC = chain.ancestral(x_RC, step, eps, share, temperature * noise_SRC[number], clip)
            watch(x_RC)
        return x_RC


class RegressionHead(nn.Module):
    """The ablation without diffusion: an MLP of the same size says the mean of a token."""

    def __init__(self, token: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.token = token
        layers: list[nn.Module] = [Linear(condition, width)]
        for _ in range(depth):
            layers += [nn.SiLU(), Linear(width, width)]
        self.network = nn.Sequential(*layers, nn.SiLU(), Linear(width, token))

    def loss(self, x0_RC: Tensor, z_RD: Tensor, t_R: Tensor, noise_RC: Tensor) -> Tensor:
        """[R] squared error; t and noise are not used."""
        mean_RC = self.network(z_RD).float()
        return (mean_RC.repeat(len(x0_RC) // len(z_RD), 1) - x0_RC).square().mean(1)

    def sample(self, z_RD: Tensor, guidance: float = 1.0) -> Tensor:
        """The means [R, C], guided."""
        mean_RC = self.network(z_RD).float()
        if guidance == 1:
            return mean_RC
        given, null = mean_RC.chunk(2)
        return null + guidance * (given - null)
