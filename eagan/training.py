"""What searching and training have in common: the two steps of the game, and a loop that goes on exactly.

A plain loop, not Lightning's: in a search the pair of networks changes from step to step and a population lives beside
them, of which Lightning's automation would serve nothing.

Shape suffixes: B batch, Z latent, C channels, S side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common import loops
from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.options import RunOptions
from eagan.augment import augmented
from eagan.config import GameOptions
from eagan.data import RealBatches
from eagan.genotypes import Genes
from eagan.losses import discriminator_loss, generator_loss
from eagan.model import Discriminator, Generator, SimpleDiscriminator

BETAS = (0.0, 0.9)  # of Adam, both networks
STREAMS = {"real": 1, "d_step": 2, "g_step": 3, "individual": 4, "round": 5, "start": 6}

AnyDiscriminator = Discriminator | SimpleDiscriminator


def open_device(device: str, precision: str, threads: int) -> torch.device:
    """The device of a run.

    Raises:
        UserError: there is no such device, it has no bf16, or several processes were started.
    """
    from common.cpu import tune_allocator
    from common.precision import bf16_possible

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a run of eagan trains in one process; to use more cores or machines for the population, see "
            "--evaluation.engine"
        )
    if threads:
        torch.set_num_threads(threads)
    tune_allocator()
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    kind = "cuda" if cuda and device != "cpu" else "cpu"
    if precision == "bf16-mixed" and not bf16_possible(kind):
        raise UserError("--precision bf16-mixed: this machine would emulate it, many times slower; use 32-true")
    torch.backends.cudnn.benchmark = kind == "cuda"
    return torch.device(kind)


def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
    """Of all parameters; those without a gradient (operations that were not part of the step) are left alone."""
    return torch.optim.Adam(network.parameters(), lr, BETAS, fused=True)


N = TypeVar("N", bound=nn.Module)


def placed(network: N, device: torch.device, bf16: bool = False) -> N:
    """On its device, with channels last: steps of these networks are half as long again without, on CPUs too.

    But for dilated convolutions in bf16 on CPUs: oneDNN's gradient of their weights is not finite there (torch 2.13).
    """
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules() if device.type == "cpu" and bf16 else ():
        if isinstance(module, nn.Conv2d) and max(module.dilation) > 1:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.contiguous()
    return network


class Diverged(Exception):
    """A loss or gradient was not finite; the networks are as they were before the step."""


class Game:
    """The steps of both networks. What is drawn in a step is a function of (seed, step).

    Args:
        batches: of real pictures.
    """

    def __init__(
        self, options: GameOptions, batches: RealBatches, latent_dim: int, seed: int, device: torch.device, bf16: bool
    ) -> None:
        self.options, self.batches, self.latent_dim = options, batches, latent_dim
        self.seed, self.device, self.bf16 = seed, device, bf16

    def _mixed(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, self.latent_dim, generator=generator).to(self.device)

    def _changed(self, x_BCSS: Tensor, generator: torch.Generator) -> Tensor:
        return augmented(x_BCSS, self.options.augment, generator)

    def drawn(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(real pictures, z of the discriminator's step, z of the generator's), all of a step."""
        real_BCSS = self.batches.batch(step).to(self.device)
        draws = [step_generator(derive_seed(self.seed, STREAMS[name]), step) for name in ("d_step", "g_step")]
        counts = (len(real_BCSS), self.options.batch_fake)
        z_d, z_g = (self._noise(count, generator) for count, generator in zip(counts, draws))
        return real_BCSS, z_d, z_g

    def discriminator_step(
        self,
        step: int,
        generator: Generator,
        discriminator: AnyDiscriminator,
        optimiser: torch.optim.Optimizer,
        g_genes: Genes | None = None,
        d_genes: Genes | None = None,
    ) -> float:
        """One step of the discriminator; returns its loss.

        Raises:
            Diverged: nothing was changed but running statistics.
        """
        draws = step_generator(derive_seed(self.seed, STREAMS["d_step"]), step)
        real_BCSS = self.batches.batch(step).to(self.device)
        # Pictures to learn from are made in training mode: normalised by the batch's own statistics.
        generator.train()
        discriminator.train()
        with self._mixed():
            with torch.no_grad():
                fake_BCSS = generator(self._noise(len(real_BCSS), draws), g_genes)
            # Two passes, as in the paper's form: each follows the spectral norms by one iteration.
            real_B1 = discriminator(self._changed(real_BCSS, draws), d_genes)
            fake_B1 = discriminator(self._changed(fake_BCSS, draws), d_genes)
        loss = discriminator_loss(real_B1.float(), fake_B1.float())
        self._descend(loss, discriminator, optimiser)
        return float(loss.detach())

    def generator_step(
        self,
        step: int,
        generator: Generator,
        discriminator: AnyDiscriminator,
        optimiser: torch.optim.Optimizer,
        g_genes: Genes | None = None,
        d_genes: Genes | None = None,
    ) -> tuple[float, float]:
        """One step of the generator; returns its loss and the norm of its gradient.

        Raises:
            Diverged: nothing was changed but running statistics.
        """
        draws = step_generator(derive_seed(self.seed, STREAMS["g_step"]), step)
        generator.train()
        discriminator.train()
        # The discriminator only passes gradients on: those of its own weights would be thrown away.
        discriminator.requires_grad_(False)
        try:
            with self._mixed():
                fake_BCSS = generator(self._noise(self.options.batch_fake, draws), g_genes)
                fake_B1 = discriminator(self._changed(fake_BCSS, draws), d_genes)
            loss = generator_loss(fake_B1.float())
            norm = self._descend(loss, generator, optimiser)
        finally:
            discriminator.requires_grad_(True)
        return float(loss.detach()), norm

    def _descend(self, loss: Tensor, network: nn.Module, optimiser: torch.optim.Optimizer) -> float:
        """Backward, clip and step; returns the norm of the gradient before clipping."""
        if not math.isfinite(float(loss.detach())):
            raise Diverged
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        active = [p for p in network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in active if p.grad is not None])
        if not math.isfinite(float(norm)):
            raise Diverged
        if self.options.clip:
            nn.utils.clip_grads_with_norm_(active, self.options.clip, norm)
        optimiser.step()
        return float(norm)


class Loop(loops.Loop):
    """Steps of the game that go on exactly; see `common.loops.Loop`.

    Args:
        total: number of steps.
    """

    def __init__(self, folder: Path, total: int, run: RunOptions, device: torch.device) -> None:
        super().__init__(folder, run, device)
        self.total = total

    @property
    def total_steps(self) -> int:
        return self.total

    def _weights(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return flat_tensors(state["networks"])

    def log(self, **values: Any) -> None:
        """A row of log.csv, every `log_every` steps."""
        if self.step % self.run_options.log_every == 0:
            self.rows.append({"step": self.step, **values, "seconds": self.clock.seconds})


def flat_tensors(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"name.tensor": tensor} of {"name": state dict or list of them}."""
    found: dict[str, Tensor] = {}
    for name, state in states.items():
        parts: Iterable[tuple[str, Any]] = enumerate(state) if isinstance(state, list) else [("", state)]  # type: ignore[assignment]
        for number, part in parts:
            found |= {f"{name}{number}.{key}": tensor for key, tensor in part.items()}
    return found
