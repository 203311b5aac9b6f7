"""The search: alternating steps of architecture and weights, from which a cell is derived.

Everything random is a function of (seed, step), so that a killed search continues with identical alphas; on N processes
the batch is shared out, batch statistics are those of the whole batch and gradients are averaged, so that the search is
that of one process.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.costs import kept_bytes
from common.data.augmentation import Augmentation, Batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError
from common.loops import Clock
from common.options import RunOptions
from pc_darts.architect import Architect
from pc_darts.config import SearchOptions
from pc_darts.drawing import draw_cell, draw_weights
from pc_darts.genotypes import Cap, Genotype
from pc_darts.search_space import ARCHITECTURE, SearchNetwork
from pc_darts.training import Loop, Machine, Result, peak_bytes, seed_step

WEIGHTS, ALPHAS = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class SearchResult(Result):
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

    steps: int
    seconds: float
    cpu_seconds: float
    images_per_second: float
    memory_bytes: int
    peak_bytes: int | None
    parameters: int
    history: list[dict[str, Any]]
    alphas: dict[str, Any]


class Searcher(Loop[SearchNetwork]):
    """One search; `run` finishes it, from wherever it was interrupted.

    Args:
        halves: pictures for the weights, pictures for the architecture.
        folder: checkpoint, logs and drawings.
        run: see `Loop`.
        draw: write the cells and the weights as pictures at every epoch.
        cap: bound on the size of the retrained network, for the derivation at the end.
        initial_seed: of the weights and alphas at the start, when it is not to follow `seed` (claim PC4).
    """

    kind = "search"

    def __init__(
        self,
        options: SearchOptions,
        data: ImageSet,
        halves: tuple[Pictures, Pictures],
        augment: Augmentation,
        folder: Path,
        seed: int = 0,
        machine: Machine | None = None,
        run: RunOptions | None = None,
        draw: bool = True,
        cap: Cap | None = None,
        initial_seed: int | None = None,
    ) -> None:
        if options.epochs < 1 or not 0 <= options.warmup_epochs <= options.epochs:
            raise UserError(
                f"search.epochs {options.epochs} and warmup_epochs {options.warmup_epochs}: expected at least one "
                "epoch and no more of warm-up"
            )
        machine = machine or Machine()
        device = machine.device
        torch.manual_seed(derive_seed(seed if initial_seed is None else initial_seed, 0))
        network = SearchNetwork(options.network(len(data.classes), data.channels), options.fused).to(device)
        if device.type == "cuda":
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        training, self.validation = (
            Batches(
                data, part, options.batch_size, derive_seed(seed, stream), augment, machine.rank, machine.world, device
            )
            for part, stream in zip(halves, (WEIGHTS, ALPHAS))
        )
        super().__init__(network, network.weights(), options, training, folder, seed, machine, run)
        self.sums = {"loss": 0.0, "right": 0.0, "validation": 0.0, "started": 0.0}
        self.options, self.draw, self.cap = options, draw, cap
        self.architecture = network.architecture()
        self.architect = Architect(
            network,
            self.optimiser,
            options.arch_lr,
            options.arch_betas,
            options.arch_weight_decay,
            options.arch_grad_clip,
            machine,
        )
        self._memory = 0

    def run(self, stop_after: int | None = None) -> SearchResult:
        """Search to the end (or, for tests, to a step) and write `folder/search.json`."""
        done = self.folder / "search.json"
        if done.is_file():
            return SearchResult.load(done)
        self.train(stop_after)
        result = self._result()
        if self.machine.main and self.step == self.total_steps:
            result.genotype.save(self.folder / "genotype.json")
            result.save(done)  # the last of all: with it the search is not begun again
        self.machine.wait()
        return result

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """A batch for the weights and one for the architecture."""
        both = zip(self.training.run(first, last), self.validation.run(first, last))
        return ((*training, *validation) for training, validation in both)

    def _one_step(self, *batch: Tensor) -> None:
        x_BCHW, y_B, x_val_BCHW, y_val_B = batch
        self._begin_step()
        # Channels of random sampling are drawn from torch's generator: alike in every process.
        seed_step(self.seed, self.step)
        with self.machine.whole_batch():
            if self.epoch >= self.options.warmup_epochs:
                loss = self.architect.step(
                    x_BCHW, y_B, x_val_BCHW, y_val_B, lr=self._lr, unrolled=self.options.unrolled
                )
                self.machine.average([loss])
                self.stop_if_not_finite(float(loss), "architecture loss")
                self.sums["validation"] += float(loss)
            self.optimiser.zero_grad(set_to_none=True)
            with self._fixed_architecture():
                logits_BK = self.network(x_BCHW)
                loss = F.cross_entropy(logits_BK, y_B)
                loss.backward()
        self._end_step(loss, logits_BK, y_B)

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

    def _end_epoch(self, row: dict[str, Any]) -> None:
        steps, epoch = self.training.steps_per_epoch, row["epoch"]
        searching = epoch >= self.options.warmup_epochs
        genotype = self.network.genotype()
        row["validation_loss"] = self.sums["validation"] / steps if searching else None
        row["images_per_second"] = (2 if searching else 1) * steps * self.options.batch_size / row["seconds"]
        row["genotype"] = genotype.to_json()
        if self.draw and self.machine.main:
            self._draw(epoch, genotype)

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
        weights = sum(p.numel() * p.element_size() for p in self.weights)
        architecture = sum(p.numel() * p.element_size() for p in self.architecture)
        return kept + 3 * weights + 4 * architecture

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "architect": self.architect.optimiser.state_dict(), "memory": self._memory}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.architect.optimiser.load_state_dict(state["architect"])
        self._memory = state["memory"]

    def _open(self) -> None:
        if not self._place.is_file():
            self._memory = self.measure_memory()
        super()._open()

    def _result(self) -> SearchResult:
        searching = [row for row in self.history if row["epoch"] >= self.options.warmup_epochs]
        speeds = [row["images_per_second"] for row in searching or self.history]
        return SearchResult(
            genotype=self.network.genotype(self.cap),
            steps=self.step,
            seconds=self.clock.seconds,
            cpu_seconds=self.clock.cpu_seconds,
            images_per_second=sum(speeds) / len(speeds) if speeds else 0.0,
            memory_bytes=self._memory,
            peak_bytes=peak_bytes(self.machine.device),
            parameters=sum(p.numel() for p in self.weights),
            history=self.history,
            alphas={name: getattr(self.network, name).tolist() for name in ARCHITECTURE},
        )


def seconds_per_epoch(searcher: Searcher, steps: int = 3) -> float:
    """CPU seconds (GPU: seconds) that an epoch of a fresh search will take, from a few of its steps; it is used up."""
    costs = []
    searcher.options = replace(searcher.options, warmup_epochs=0)
    for step in range(steps + 1):
        clock = Clock()
        searcher._one_step(*searcher.training.batch(step), *searcher.validation.batch(step))
        costs.append(clock.cost(searcher.machine.device))
    # The first step also allocates.
    mean = torch.tensor(sum(costs[1:]) / steps, device=searcher.machine.device)
    searcher.machine.average([mean])
    return float(mean) * searcher.training.steps_per_epoch
