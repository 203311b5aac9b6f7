"""What the search and the retraining have in common: processes, seeds, checkpoints, logs, accuracy.

A plain loop, not Lightning's: two data streams and two optimisers alternate within a step (and three more passes when
the architecture gradient is of second order), of which Lightning's automation would serve nothing.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import loops
from common.batch_norm import synchronised_statistics
from common.cpu import tune_allocator
from common.data.augmentation import Batches, evaluation_batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError, stop_if_not_finite
from common.files import read_object, reading, write_json
from common.options import RunOptions
from common.processes import start_process_group
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


class Loop(loops.Loop, Generic[N]):
    """Steps of SGD on a network's weights that go on exactly; see `common.loops.Loop`.

    Args:
        network: as it starts. weights: of it, trained by SGD.
        batches: of the training pictures.
    """

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
        run = run or RunOptions(checkpoint_every=50, log_every=10, progress=False, logger="none")
        super().__init__(folder, run, machine.device, machine.main)
        self.network, self.weights, self.schedule, self.training = network, list(weights), options, batches
        self.seed, self.machine = seed, machine
        self.optimiser = torch.optim.SGD(
            self.weights, options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.history: list[dict[str, Any]] = []
        self.sums = {"loss": 0.0, "right": 0.0, "started": 0.0}  # of the epoch

    @property
    def total_steps(self) -> int:
        return self.schedule.epochs * self.training.steps_per_epoch

    @property
    def epoch(self) -> int:
        return self.step // self.training.steps_per_epoch

    def batches(self, first: int, last: int) -> Iterable[tuple[Tensor, ...]]:
        return self.training.run(first, last)

    @abstractmethod
    def _one_step(self, *batch: Tensor) -> None:
        """`_begin_step`, gradients of the weights, `_end_step`."""

    @abstractmethod
    def _end_epoch(self, row: dict[str, Any]) -> None:
        """Complete the epoch's row of the history, which has epoch, lr, train_loss, train_accuracy and seconds."""

    def _after_step(self) -> None:
        if self.step % self.training.steps_per_epoch == 0:
            self._close_epoch()

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
        stop_if_not_finite(loss, self.step + 1, self._place, advice="a lower lr", what=what)

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

    def _state(self) -> dict[str, Any]:
        parts = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
        return {**parts, "history": self.history, "sums": self.sums}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.history, sums = state["history"], state["sums"]
        # Trainings from before they had names: loss, right, started.
        self.sums = dict(zip(self.sums, sums)) if isinstance(sums, list) else sums

    def save(self) -> str:
        """Every process holds the same state; they go on together."""
        kept = super().save()
        self.machine.wait()
        return kept

    def _open(self) -> None:
        super()._open()
        start_peak(self.machine.device)


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
