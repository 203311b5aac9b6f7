"""What searching and training have in common: the two steps of the game, and a loop that goes on exactly.

A plain loop, not Lightning's: in a search the pair of networks changes from step to step and a population lives beside
them, of which Lightning's automation would serve nothing.

Shape suffixes: B batch, Z latent, C channels, S side.
"""

from __future__ import annotations

import csv
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.events import Board
from common.files import write_atomically
from common.options import RunOptions
from common.stopping import Steps
from common.training import LAST_CHECKPOINT, load_checkpoint, of_another_network, save_checkpoint
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


class Clock:
    """Seconds and CPU seconds since a stage began, over all its starts."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._wall, self._cpu = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows as CSV, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


class Loop(ABC):
    """Steps that go on exactly from `folder/last.ckpt`.

    Args:
        total: number of steps.
        run: checkpoint_every, log_every and progress are read.
    """

    kind: str
    board: Board

    def __init__(self, folder: Path, total: int, run: RunOptions, device: torch.device) -> None:
        self.folder, self.total, self.run_options, self.device = folder, total, run, device
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.clock = Clock()

    @abstractmethod
    def _one_step(self) -> None:
        """Step number `self.step`."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors and plain values from which everything goes on."""

    @abstractmethod
    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over `_state`."""

    def _after_step(self) -> None:  # noqa: B027 (nothing, by default)
        """What comes after some steps; `self.step` is the number of those made."""

    def train(self, stop_after: int | None = None) -> None:
        """To the end, or to a step; from wherever it was interrupted.

        Raises:
            UserError: a loss that is not finite, a damaged or foreign checkpoint, a full disk.
        """
        self._open()
        self.board = Board(self.folder, self.run_options.logger, self.step)
        last = self.total if stop_after is None else min(stop_after, self.total)
        show = self.run_options.progress and not os.environ.get("CI")
        bar = tqdm(total=last, initial=self.step, desc=self.folder.name, unit="step", mininterval=1.0, disable=not show)
        with bar, self.board, Steps() as steps:
            while self.step < last:
                self._one_step()
                self.step += 1
                self._after_step()
                if self.step % self.run_options.checkpoint_every == 0 or self.step == last:
                    self.save()
                bar.update()
                steps.ended(self.save)

    def log(self, **values: Any) -> None:
        """A row of log.csv, every `log_every` steps."""
        if self.step % self.run_options.log_every == 0:
            self.rows.append({"step": self.step, **values, "seconds": self.clock.seconds})

    def save(self) -> str:
        """Replace the checkpoint; returns what is kept, for messages."""
        state = self._state()
        path = self.folder / LAST_CHECKPOINT
        content = {
            "kind": self.kind,
            "step": self.step,
            "rows": self.rows,
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
        }
        save_checkpoint(path, content | state, flat_tensors(state.get("networks", {})), self.step)
        if self.rows:
            write_rows(self.folder / "log.csv", self.rows)
        self.board.keep(self.rows, self.step)
        return f"step {self.step} is saved in {path}"

    def _open(self) -> None:
        path = self.folder / LAST_CHECKPOINT
        if not path.is_file():
            return
        state = load_checkpoint(path, self.device)
        if state.get("kind") != self.kind:
            raise UserError(f"{path} holds no state of a {self.kind}; choose another --run_dir")
        try:
            self._restore(state)
        except RuntimeError as error:
            raise of_another_network(path, error) from None
        self.step, self.rows = state["step"], state["rows"]
        self.clock = Clock(state["seconds"], state["cpu_seconds"])


def flat_tensors(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"name.tensor": tensor} of {"name": state dict or list of them}."""
    found: dict[str, Tensor] = {}
    for name, state in states.items():
        parts: Iterable[tuple[str, Any]] = enumerate(state) if isinstance(state, list) else [("", state)]  # type: ignore[assignment]
        for number, part in parts:
            found |= {f"{name}{number}.{key}": tensor for key, tensor in part.items()}
    return found
