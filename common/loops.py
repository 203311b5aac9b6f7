"""Loops of a paper's own, where Lightning's would serve nothing: steps that go on exactly from the last checkpoint."""

from __future__ import annotations

import csv
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.events import Board
from common.files import write_atomically
from common.options import RunOptions
from common.stopping import Steps
from common.training import LAST_CHECKPOINT, load_checkpoint, of_another_network, save_checkpoint


class Clock:
    """Seconds and CPU seconds since a stage began, over all its starts."""

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
        folder: gets last.ckpt and log.csv.
        run: checkpoint_every, log_every and progress are read.
        main: False writes and shows nothing (another process of the run does).
    """

    kind = "training"
    board: Board | None = None

    def __init__(self, folder: Path, run: RunOptions, device: torch.device, main: bool = True) -> None:
        self.folder, self.run_options, self.device, self._main = folder, run, device, main
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.clock = Clock()

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Number of steps."""

    def batches(self, first: int, last: int) -> Iterable[tuple[Any, ...]]:
        """What `_one_step` takes, for steps `first` to `last` - 1."""
        return repeat((), last - first)

    @abstractmethod
    def _one_step(self, *batch: Any) -> None:
        """Step number `self.step`."""

    def _after_step(self) -> None:  # noqa: B027 (nothing, by default)
        """What comes after some steps; `self.step` is the number of those made."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors and plain values from which everything goes on."""

    def _weights(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Those of `_state` that must be finite."""
        return state["network"]

    @abstractmethod
    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over `_state`."""

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of something else."""
        if state.get("kind") != self.kind:
            raise UserError(f"{self._place} holds no state of a {self.kind}; choose another --run_dir")

    @property
    def _place(self) -> Path:
        return self.folder / LAST_CHECKPOINT

    def train(self, stop_after: int | None = None) -> None:
        """To the end, or to a step; from wherever it was interrupted.

        Raises:
            UserError: a loss that is not finite, a damaged or foreign checkpoint, a full disk.
            Stopped: between two steps.
        """
        self._open()
        self.board = Board(self.folder, self.run_options.logger, self.step, self._main)
        last = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        show = self.run_options.progress and self._main and not os.environ.get("CI")
        bar = tqdm(total=last, initial=self.step, desc=self.folder.name, unit="step", mininterval=1.0, disable=not show)
        with bar, self.board, Steps() as steps:
            for batch in self.batches(self.step, last):
                self._one_step(*batch)
                self.step += 1
                self._after_step()
                if self.step % self.run_options.checkpoint_every == 0 or self.step == last:
                    self.save()
                bar.update()
                steps.ended(self.save)

    def save(self) -> str:
        """Replace the checkpoint; returns what is kept, for messages."""
        if self._main:
            state = self._state()
            content = {
                "kind": self.kind,
                "step": self.step,
                "rows": self.rows,
                "seconds": self.clock.seconds,
                "cpu_seconds": self.clock.cpu_seconds,
            }
            save_checkpoint(self._place, content | state, self._weights(state), self.step)
            if self.rows:
                write_rows(self.folder / "log.csv", self.rows)
            if self.board is not None:
                self.board.keep(self.rows, self.step)
        return f"step {self.step} is saved in {self._place}"

    def _open(self) -> None:
        if not self._place.is_file():
            self.clock = Clock()  # what came between the loop's making and its start is not counted
            return
        state = load_checkpoint(self._place, self.device)
        self._refuse_other(state)
        try:
            self._restore(state)
        except RuntimeError as error:
            raise of_another_network(self._place, error) from None
        self.step, self.rows = state["step"], state["rows"]
        self.clock = Clock(state["seconds"], state["cpu_seconds"])
