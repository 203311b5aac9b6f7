"""What the search and the retraining have in common: processes, seeds, checkpoints, logs, accuracy.

A plain loop, not Lightning's: two data streams and two optimisers alternate within a step (and three more passes when
the architecture gradient is of second order), of which Lightning's automation would serve nothing.
"""

from __future__ import annotations

import csv
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common.batch_norm import synchronised_statistics
from common.cpu import tune_allocator
from common.data.augmentation import Batches, evaluation_batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError, stop_if_not_finite
from common.events import Board
from common.files import read_object, reading, write_atomically, write_json
from common.options import RunOptions
from common.processes import start_process_group
from common.stopping import Steps
from common.training import (
    LAST_CHECKPOINT,
    load_checkpoint,
    of_another_network,
    save_checkpoint,
)
from pc_darts.config import SgdOptions
from pc_darts.genotypes import Genotype
from pc_darts.schedules import rate


@dataclass(frozen=True)
class Machine:
    """Where a run computes: this process among `world`, and its device."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the other processes."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def whole_batch(self) -> Iterator[None]:
        """Batch statistics and dropped paths inside are those of all processes' pictures."""
        with synchronised_statistics() if self.world > 1 else nullcontext():
            yield

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in one message."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """`average` of the gradients that are there."""
        self.average([p.grad for p in parameters if p.grad is not None])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def open_machine(device: str = "auto", threads: int = 0) -> Machine:
    """The device, and the group of processes when torchrun started several (gloo on the CPU, NCCL on GPUs).

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if threads:
        torch.set_num_threads(threads)
    tune_allocator()
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    kind = "cuda" if cuda and device in ("auto", "cuda") else "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(local)
        # The same few shapes of convolution come again and again.
        torch.backends.cudnn.benchmark = True
    start_process_group("nccl" if kind == "cuda" else "gloo", seconds=1800)
    return Machine(torch.device(kind, local) if kind == "cuda" else torch.device("cpu"), rank, world)


def seed_step(seed: int, step: int) -> None:
    """Everything drawn from torch's own generator in a step is a function of (seed, step), alike on all processes."""
    torch.manual_seed(derive_seed(seed, step, 0))


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace `folder/last.ckpt` in one step; `state` holds tensors and plain values.

    Raises:
        UserError: a weight is not finite (the earlier checkpoint is kept), or the disk is full.
    """
    save_checkpoint(folder / LAST_CHECKPOINT, state, state["network"], state["step"])


def load_state(folder: Path, kind: str, device: torch.device) -> dict[str, Any] | None:
    """The state in `folder/last.ckpt`, None when no run was interrupted there.

    Raises:
        UserError: truncated, pickled, or the state of something else than a `kind`.
    """
    path = folder / LAST_CHECKPOINT
    if not path.is_file():
        return None
    state = load_checkpoint(path, device)
    if state.get("kind") != kind:
        raise UserError(f"{path} holds no state of a {kind}; choose another --run_dir")
    return state


class Clock:
    """Seconds and CPU seconds since a run began, over all its starts."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._wall, self._cpu = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of this process; does not depend on what else the machine does."""
        return time.process_time() - self._cpu

    def cost(self, device: torch.device) -> float:
        """What budgets are counted in: CPU seconds on the CPU, seconds on a GPU."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return self.seconds
        return self.cpu_seconds


def write_rows(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Log rows as CSV, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


@dataclass(frozen=True)
class Result:
    """What a finished part of a run found, kept as JSON."""

    genotype: Genotype

    def save(self, path: Path) -> None:
        """Atomically."""
        write_json(path, {**self.__dict__, "genotype": json.loads(self.genotype.to_json())})

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote. Raises UserError when the file is damaged."""
        with reading(path, "delete it, and its work is done again"):
            content = read_object(path)
            return cls(**{**content, "genotype": Genotype.parse(json.dumps(content["genotype"]))})


N = TypeVar("N", bound=nn.Module)


class Loop(ABC, Generic[N]):
    """Steps of SGD on a network's weights that go on exactly from `folder/last.ckpt`.

    Args:
        network: as it starts. weights: of it, trained by SGD.
        batches: of the training pictures. folder: gets last.ckpt and log.csv.
        run: checkpoint_every, log_every and progress are read.
    """

    kind: str
    board: Board

    def __init__(
        self,
        network: N,
        weights: Sequence[nn.Parameter],
        options: SgdOptions,
        batches: Batches,
        folder: Path,
        seed: int,
        machine: Machine,
        run: RunOptions | None,
    ) -> None:
        self.network, self.weights, self.schedule, self.training = network, list(weights), options, batches
        self.folder, self.seed, self.machine = folder, seed, machine
        self.run_options = run or RunOptions(checkpoint_every=50, log_every=10, progress=False, logger="none")
        self.optimiser = torch.optim.SGD(
            self.weights, options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []
        self.sums = {"loss": 0.0, "right": 0.0, "started": 0.0}  # of the epoch
        self.clock = Clock()

    @property
    def total_steps(self) -> int:
        return self.schedule.epochs * self.training.steps_per_epoch

    @property
    def epoch(self) -> int:
        return self.step // self.training.steps_per_epoch

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """What `_one_step` takes, for steps `first` to `last` - 1."""
        return self.training.run(first, last)

    @abstractmethod
    def _one_step(self, *batch: Tensor) -> None:
        """`_begin_step`, gradients of the weights, `_end_step`."""

    @abstractmethod
    def _end_epoch(self, row: dict[str, Any]) -> None:
        """Complete the epoch's row of the history, which has epoch, lr, train_loss, train_accuracy and seconds."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights, SGD, logs and times."""

    @abstractmethod
    def _restore(self, state: dict[str, Any] | None) -> None:
        """Take over `_state`; None at the start."""

    def train(self, stop_after: int | None = None) -> None:
        """To the end, or to a step; from wherever it was interrupted.

        Raises:
            UserError: a loss that is not finite, a damaged or foreign checkpoint, a full disk.
        """
        self._open()
        self.board = Board(self.folder, self.run_options.logger, self.step, self.machine.main)
        start_peak(self.machine.device)
        last = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        show = self.run_options.progress and self.machine.main and not os.environ.get("CI")
        bar = tqdm(total=last, initial=self.step, desc=self.folder.name, unit="step", mininterval=1.0, disable=not show)
        with bar, self.board, Steps() as steps:
            for batch in self.batches(self.step, last):
                self._one_step(*batch)
                self.step += 1
                if self.step % self.training.steps_per_epoch == 0:
                    self._close_epoch()
                if self.step % self.run_options.checkpoint_every == 0 or self.step == last:
                    self._save()
                bar.update()
                steps.ended(self._save)

    def _begin_step(self) -> None:
        options = self.schedule
        lr = rate(options.lr_schedule, self.epoch, options.epochs, options.lr, options.minimum_lr, options.lr_warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()

    def _end_step(self, loss: Tensor, logits_BK: Tensor, y_B: Tensor) -> None:
        """Average and clip the weights' gradients, step, and write down how it went."""
        self.machine.average_gradients(self.weights)
        if self.schedule.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.weights, self.schedule.grad_clip)
        self.optimiser.step()
        measured = torch.stack([loss.detach(), (logits_BK.argmax(1) == y_B).float().mean()])
        self.machine.average([measured])
        value, right = measured.tolist()
        step = self.step + 1
        self.stop_if_not_finite(value, f"{self.kind} loss")
        self.sums["loss"] += value
        self.sums["right"] += right
        if step % self.run_options.log_every == 0:
            row = {"step": step, "epoch": self.epoch, "lr": self._lr, "loss": value, "accuracy": right}
            self.rows.append({**row, "seconds": self.clock.seconds})

    def stop_if_not_finite(self, loss: float, what: str) -> None:
        """End the run before its next checkpoint."""
        stop_if_not_finite(loss, self.step + 1, self.folder / LAST_CHECKPOINT, advice="a lower lr", what=what)

    @property
    def _lr(self) -> float:
        return float(self.optimiser.param_groups[0]["lr"])

    def _close_epoch(self) -> None:
        steps = self.training.steps_per_epoch
        row = {
            "epoch": self.epoch - 1,
            "lr": self._lr,
            "train_loss": self.sums["loss"] / steps,
            "train_accuracy": self.sums["right"] / steps,
            "seconds": self.clock.seconds - self.sums["started"],
        }
        self.history.append(row)
        self._end_epoch(row)
        self.sums = {**dict.fromkeys(self.sums, 0.0), "started": self.clock.seconds}

    def _save(self) -> str:
        # Every process holds the same state.
        if self.machine.main:
            state = {
                "kind": self.kind,
                "step": self.step,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "history": self.history,
                "rows": self.rows,
                "sums": self.sums,
                "seconds": self.clock.seconds,
                "cpu_seconds": self.clock.cpu_seconds,
            }
            save_state(self.folder, state | self._state())
            if self.rows:
                write_rows(self.folder / "log.csv", self.rows)
            self.board.keep(self.rows, self.step)
        self.machine.wait()
        return f"step {self.step} is saved in {self.folder / LAST_CHECKPOINT}"

    def _open(self) -> None:
        state = load_state(self.folder, self.kind, self.machine.device)
        self._restore(state)
        if state is None:
            self.clock = Clock()
            return
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise of_another_network(self.folder / LAST_CHECKPOINT, error) from None
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.history, self.rows = state["step"], state["history"], state["rows"]
        sums = state["sums"]  # trainings from before they had names: loss, right, started
        self.sums = dict(zip(self.sums, sums)) if isinstance(sums, list) else sums
        self.clock = Clock(state["seconds"], state["cpu_seconds"])


@torch.no_grad()
def accuracy(
    network: nn.Module, data: ImageSet, pictures: Pictures, machine: Machine | None = None, batch_size: int = 250
) -> float:
    """Share of right answers of a network in eval mode, 0..1."""
    device = machine.device if machine is not None else torch.device("cpu")
    was_training = network.training
    network.eval()
    right = 0
    for x_BCHW, y_B in evaluation_batches(data, pictures, batch_size, device):
        logits = network(x_BCHW)
        logits_BK = logits[0] if isinstance(logits, tuple) else logits
        right += int((logits_BK.argmax(1) == y_B).sum())
    network.train(was_training)
    return right / len(pictures)


def start_peak(device: torch.device) -> None:
    """Begin measuring `peak_bytes` anew (GPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory allocated on the GPU since `start_peak`; None on the CPU, whose peak cannot be reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
