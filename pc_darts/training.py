"""What the search and the retraining have in common: processes, seeds, checkpoints, logs, accuracy.

A plain loop, not Lightning's: two data streams and two optimisers alternate within a step (and three more passes when
the architecture gradient is of second order), of which Lightning's automation would serve nothing.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.cpu import tune_allocator
from common.data.augmentation import evaluation_batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import write_atomically
from common.training import LAST_CHECKPOINT, load_checkpoint
from pc_darts.operations import synchronised_statistics


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

    @contextmanager
    def whole_batch(self) -> Iterator[None]:
        """Batch statistics inside are those of all processes' pictures."""
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
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Machine(torch.device(kind, local) if kind == "cuda" else torch.device("cpu"), rank, world)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Everything drawn from torch's own generator in a step is a function of (seed, step, rank)."""
    torch.manual_seed(derive_seed(seed, step, rank))


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace `folder/last.ckpt` in one step; `state` holds tensors and plain values.

    Raises:
        UserError: a weight is not finite (the earlier checkpoint is kept), or the disk is full.
    """
    for name, value in state["network"].items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"step {state['step']}: {name} is not finite; {LAST_CHECKPOINT} not overwritten")
    write_atomically(folder / LAST_CHECKPOINT, lambda temporary: torch.save(state, temporary))


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


def restore(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict` with the user's mistake as a sentence."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        detail = (str(error).splitlines()[1:2] or [str(error)])[0].strip()[:160]
        raise UserError(
            f"checkpoint {path} belongs to another network ({detail}): give the options of the run that wrote it, or "
            "choose another --run_dir"
        ) from None


def stop_if_not_finite(loss: Tensor, step: int, folder: Path, what: str) -> None:
    """A NaN or infinite loss ends the run before the next checkpoint.

    Raises:
        UserError: naming the step and the last good checkpoint.
    """
    if torch.isfinite(loss).all():
        return
    last = folder / LAST_CHECKPOINT
    kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint had been written yet"
    raise UserError(f"the {what} loss became {float(loss)} at step {step}: stopped; {kept}. Try a lower lr")


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


def progress_bar(show: bool, label: str, start: int, total: int) -> Any:
    """A bar over the steps of a run, None where nobody looks (CI)."""
    if not show or os.environ.get("CI"):
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=start, desc=label, unit="step", mininterval=1.0)
