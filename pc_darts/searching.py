"""The search: alternating steps of architecture and weights (specification section 2.5), from which a cell is derived.

Everything random is a function of (seed, step), so that a killed search continues with identical alphas; on N processes
the batch is shared out, batch statistics are those of the whole batch and gradients are averaged, so that the search is
that of one process.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.costs import kept_bytes
from common.data.augmentation import Augmentation, Batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import write_json
from pc_darts.architect import Architect
from pc_darts.config import SearchOptions
from pc_darts.drawing import draw_cell, draw_weights
from pc_darts.genotypes import Cap, Genotype
from pc_darts.schedules import rate
from pc_darts.search_space import ARCHITECTURE, SearchConfig, SearchNetwork
from pc_darts.training import (
    Clock,
    Machine,
    load_state,
    peak_bytes,
    progress_bar,
    restore,
    save_state,
    seed_step,
    start_peak,
    stop_if_not_finite,
    write_rows,
)

WEIGHTS, ALPHAS = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class SearchResult:
    """What a search found and cost.

    Attributes:
        genotype: of the last epoch (issue 26 of the authors' repository).
        seconds, cpu_seconds: of all steps, drawing and checkpoints included, over all starts.
        images_per_second: of both halves together, in the epochs in which the architecture is trained.
        memory_bytes: kept for the backward pass of one architecture step, plus weights, gradients and optimisers.
        peak_bytes: largest memory allocated on the GPU; None on the CPU.
        history: one row an epoch: epoch, lr, train_loss, train_accuracy, validation_loss, seconds, images_per_second,
            genotype (JSON).
        alphas: the architecture's parameters at the end, as nested lists.
    """

    genotype: Genotype
    steps: int
    seconds: float
    cpu_seconds: float
    images_per_second: float
    memory_bytes: int
    peak_bytes: int | None
    parameters: int
    history: list[dict[str, Any]]
    alphas: dict[str, Any]

    def save(self, path: Path) -> None:
        """As JSON, atomically."""
        write_json(path, {**self.__dict__, "genotype": json.loads(self.genotype.to_json())})

    @classmethod
    def load(cls, path: Path) -> SearchResult:
        """What `save` wrote. Raises UserError when the file is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "genotype": Genotype.parse(json.dumps(content["genotype"]))})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of a search ({error}); delete it to search again") from None


class SharedArchitect(Architect):
    """The architect on N processes: every gradient is averaged before it is used."""

    machine = Machine()

    def apply(self, gradients: Sequence[Tensor]) -> None:
        averaged = [gradient.clone() for gradient in gradients]
        self.machine.average(averaged)
        super().apply(averaged)

    def step(
        self,
        x_train_BCHW: Tensor | None,
        y_train_B: Tensor | None,
        x_val_BCHW: Tensor,
        y_val_B: Tensor,
        lr: float | None = None,
        unrolled: bool = False,
    ) -> Tensor:
        with contextlib.ExitStack() as stack:
            if unrolled and self.machine.world > 1:
                # The unrolled step and the direction of the finite difference are functions of the whole batch's
                # gradient. The architecture's own gradients are averaged once, in `apply`.
                for weight in self.network.weights():
                    stack.callback(weight.register_hook(self._averaged).remove)
            return super().step(x_train_BCHW, y_train_B, x_val_BCHW, y_val_B, lr, unrolled)

    def _averaged(self, gradient: Tensor) -> Tensor:
        mean = gradient.clone()
        self.machine.average([mean])
        return mean


def search_config(options: SearchOptions, data: ImageSet) -> SearchConfig:
    """The network's shape for these options and pictures."""
    return SearchConfig(
        channels=options.channels,
        cells=options.cells,
        nodes=options.nodes,
        classes=len(data.classes),
        partial=options.partial,
        edge_normalisation=options.edge_normalisation,
        sampling=options.sampling,
        stem=options.stem,
        in_channels=data.channels,
    )


class Searcher:
    """One search; `run` finishes it, from wherever it was interrupted.

    Args:
        halves: pictures for the weights, pictures for the architecture.
        folder: checkpoint, logs and drawings.
        draw: write the cells and the weights as pictures at every epoch.
        cap: bound on the size of the retrained network, for the derivation at the end.
        initial_seed: of the weights and alphas at the start, when it is not to follow `seed` (claim PC4).
    """

    def __init__(
        self,
        options: SearchOptions,
        data: ImageSet,
        halves: tuple[Pictures, Pictures],
        augment: Augmentation,
        folder: Path,
        seed: int = 0,
        machine: Machine | None = None,
        checkpoint_every: int = 50,
        log_every: int = 10,
        progress: bool = False,
        draw: bool = True,
        cap: Cap | None = None,
        initial_seed: int | None = None,
    ) -> None:
        if options.epochs < 1 or not 0 <= options.warmup_epochs <= options.epochs:
            raise UserError(
                f"search.epochs {options.epochs} and warmup_epochs {options.warmup_epochs}: expected at least one "
                "epoch and no more of warm-up"
            )
        self.options, self.data, self.folder, self.seed = options, data, folder, seed
        self.machine = machine or Machine()
        self.checkpoint_every, self.log_every = checkpoint_every, log_every
        self.progress, self.draw, self.cap = progress, draw, cap
        device = self.machine.device
        torch.manual_seed(derive_seed(seed if initial_seed is None else initial_seed, 0))
        self.network = SearchNetwork(search_config(options, data), fused=options.fused).to(device)
        if device.type == "cuda":
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.architecture = self.network.architecture()
        self.optimiser = torch.optim.SGD(
            self.network.weights(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.architect = SharedArchitect(
            self.network,
            self.optimiser,
            options.arch_lr,
            options.arch_betas,
            options.arch_weight_decay,
            options.arch_grad_clip,
        )
        self.architect.machine = self.machine
        place = (self.machine.rank, self.machine.world, device)
        self.training, self.validation = (
            Batches(data, part, options.batch_size, derive_seed(seed, stream), augment, *place)
            for part, stream in zip(halves, (WEIGHTS, ALPHAS))
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []
        self._sums = {"loss": 0.0, "right": 0.0, "validation": 0.0, "started": 0.0}
        self._memory = 0
        self._clock = Clock()

    @property
    def total_steps(self) -> int:
        return self.options.epochs * self.training.steps_per_epoch

    def run(self, stop_after: int | None = None) -> SearchResult:
        """Search to the end (or, for tests, to a step) and write `folder/search.json`.

        Raises:
            UserError: a loss that is not finite, a damaged checkpoint, a full disk.
        """
        done = self.folder / "search.json"
        if done.is_file():
            return SearchResult.load(done)
        self._restore()
        start_peak(self.machine.device)
        last = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        first = self.step
        bar = progress_bar(self.progress and self.machine.main, self.folder.name, first, last)
        batches = zip(self.training.run(first, last), self.validation.run(first, last))
        for (x_BCHW, y_B), (x_val_BCHW, y_val_B) in batches:
            self._one_step(x_BCHW, y_B, x_val_BCHW, y_val_B)
            self.step += 1
            if self.step % self.training.steps_per_epoch == 0:
                self._end_epoch()
            if self.step % self.checkpoint_every == 0 or self.step == last:
                self._save()
            if bar is not None:
                bar.update()
        if bar is not None:
            bar.close()
        result = self._result()
        if self.machine.main and self.step == self.total_steps:
            result.save(done)
            result.genotype.save(self.folder / "genotype.json")
        self.machine.wait()
        return result

    def _one_step(self, x_BCHW: Tensor, y_B: Tensor, x_val_BCHW: Tensor, y_val_B: Tensor) -> None:
        options, network = self.options, self.network
        epoch = self.step // self.training.steps_per_epoch
        lr = rate(options.lr_schedule, epoch, options.epochs, options.lr, options.minimum_lr, options.lr_warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        network.train()
        # Channels of random sampling are drawn from torch's generator: alike in every process.
        seed_step(self.seed, self.step)
        searching = epoch >= options.warmup_epochs
        with self.machine.whole_batch():
            if searching:
                batches = (x_BCHW, y_B, x_val_BCHW, y_val_B)
                loss = self.architect.step(*batches, lr=lr, unrolled=options.unrolled)
                self._sums["validation"] += self._mean(loss)
            self.optimiser.zero_grad(set_to_none=True)
            with self._fixed_architecture():
                logits_BK = network(x_BCHW)
                loss = F.cross_entropy(logits_BK, y_B)
                loss.backward()
        self.machine.average_gradients(network.weights())
        if options.grad_clip > 0:
            nn.utils.clip_grad_norm_(network.weights(), options.grad_clip)
        self.optimiser.step()
        value = self._mean(loss)
        right = self._mean((logits_BK.argmax(1) == y_B).float().mean())
        stop_if_not_finite(torch.tensor(value), self.step + 1, self.folder, "search")
        self._sums["loss"] += value
        self._sums["right"] += right
        if (self.step + 1) % self.log_every == 0:
            row = {"step": self.step + 1, "epoch": epoch, "lr": lr, "loss": value, "accuracy": right}
            self.rows.append({**row, "seconds": self._clock.seconds})

    def _mean(self, value: Tensor) -> float:
        """Over the processes."""
        mean = value.detach().clone()
        self.machine.average([mean])
        return float(mean)

    @contextmanager
    def _fixed_architecture(self) -> Iterator[None]:
        """No gradient for alphas and betas: the weight step would only throw it away."""
        for parameter in self.architecture:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.architecture:
                parameter.requires_grad_(True)

    def _end_epoch(self) -> None:
        options, steps = self.options, self.training.steps_per_epoch
        epoch = self.step // steps - 1
        seconds = self._clock.seconds - self._sums["started"]
        searching = epoch >= options.warmup_epochs
        genotype = self.network.genotype()
        row = {
            "epoch": epoch,
            "lr": float(self.optimiser.param_groups[0]["lr"]),
            "train_loss": self._sums["loss"] / steps,
            "train_accuracy": self._sums["right"] / steps,
            "validation_loss": self._sums["validation"] / steps if searching else None,
            "seconds": seconds,
            "images_per_second": (2 if searching else 1) * steps * options.batch_size / seconds,
            "genotype": genotype.to_json(),
        }
        self.history.append(row)
        if self.draw and self.machine.main:
            self._draw(epoch, genotype)
        self._sums = {"loss": 0.0, "right": 0.0, "validation": 0.0, "started": self._clock.seconds}

    def _draw(self, epoch: int, genotype: Genotype) -> None:
        folder = self.folder / "epochs"
        for kind in ("normal", "reduce"):
            draw_cell(genotype, kind == "reduce", folder / f"{epoch:03d}_{kind}.svg")
        draw_weights(self.network, folder / f"{epoch:03d}_weights.svg")

    def measure_memory(self) -> int:
        """Bytes kept for the backward pass of one architecture step, plus those of weights, gradients, optimisers."""
        network = self.network
        x_BCHW, y_B = self.validation.batch(0)
        network.train()
        running = {name: value.clone() for name, value in network.named_buffers()}
        kept = kept_bytes(lambda: F.cross_entropy(network(x_BCHW), y_B), network.parameters())
        for name, value in network.named_buffers():
            value.copy_(running[name])
        weights = sum(p.numel() * p.element_size() for p in network.weights())
        architecture = sum(p.numel() * p.element_size() for p in self.architecture)
        return kept + 3 * weights + 4 * architecture

    def _save(self) -> None:
        # Every process holds the same state.
        if self.machine.main:
            state = {
                "kind": "search",
                "step": self.step,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "architect": self.architect.optimiser.state_dict(),
                "history": self.history,
                "rows": self.rows,
                "sums": self._sums,
                "memory": self._memory,
                "seconds": self._clock.seconds,
                "cpu_seconds": self._clock.cpu_seconds,
            }
            save_state(self.folder, state)
            if self.rows:
                write_rows(self.folder / "log.csv", self.rows)
        self.machine.wait()

    def _restore(self) -> None:
        state = load_state(self.folder, "search", self.machine.device)
        if state is None:
            self._memory = self.measure_memory()
            self._clock = Clock()
            return
        restore(self.network, state["network"], self.folder / "last.ckpt")
        self.optimiser.load_state_dict(state["optimiser"])
        self.architect.optimiser.load_state_dict(state["architect"])
        self.step, self.history, self.rows = state["step"], state["history"], state["rows"]
        self._sums, self._memory = state["sums"], state["memory"]
        self._clock = Clock(state["seconds"], state["cpu_seconds"])

    def _result(self) -> SearchResult:
        searching = [row for row in self.history if row["epoch"] >= self.options.warmup_epochs]
        speeds = [row["images_per_second"] for row in searching or self.history]
        return SearchResult(
            genotype=self.network.genotype(self.cap),
            steps=self.step,
            seconds=self._clock.seconds,
            cpu_seconds=self._clock.cpu_seconds,
            images_per_second=sum(speeds) / len(speeds) if speeds else 0.0,
            memory_bytes=self._memory,
            peak_bytes=peak_bytes(self.machine.device),
            parameters=sum(p.numel() for p in self.network.weights()),
            history=self.history,
            alphas={name: getattr(self.network, name).tolist() for name in ARCHITECTURE},
        )


def seconds_per_epoch(searcher: Searcher, steps: int = 3) -> float:
    """CPU seconds (GPU: seconds) that an epoch of a fresh search will take, from a few of its steps; it is used up."""
    costs = []
    searcher.options = dataclasses.replace(searcher.options, warmup_epochs=0)
    for step in range(steps + 1):
        clock = Clock()
        searcher._one_step(*searcher.training.batch(step), *searcher.validation.batch(step))
        costs.append(clock.cost(searcher.machine.device))
    # The first step also allocates.
    mean = torch.tensor(sum(costs[1:]) / steps, device=searcher.machine.device)
    searcher.machine.average([mean])
    return float(mean) * searcher.training.steps_per_epoch
