"""Arms of a speed comparison: processes of their own that alternate (A B C A B C ...), and what is made of their times.

The one that compares starts a `Process` for each arm and lets them `alternate`; in that process `Turns` waits on stdin
for its turn, makes its steps and answers with one line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.ledger import bench_row, peak_memory
from common.paths import REPOSITORY

Step = Callable[[int], object]  # takes the number of the step


def mixed(device: str, enabled: bool) -> Any:
    return torch.autocast(device, torch.bfloat16) if enabled else nullcontext()


def matmul(device: str, bf16: bool, side: int = 2048) -> Step:
    """The processor's own rate: one large square product a step."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    side = side if device == "cpu" else 4 * side
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    return lambda index: torch.matmul(a, b, out=out)


class Turns:
    """An arm's side: waits for a turn ("12\\n" on stdin: twelve steps), takes it, answers with one line of JSON."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.left = 0
        self.losses: list[Any] = []

    def wait(self) -> bool:
        """Block until the next turn; False when there is none."""
        line = sys.stdin.readline()
        if not line.strip():
            return False
        self.steps = self.left = int(line)
        self.losses = []
        self._synchronise()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return True

    def done(self, loss: Any = None) -> bool:
        """One step was made; True when the turn is over (the answer is then out)."""
        self.left -= 1
        if isinstance(loss, Tensor) and loss.dim() == 0:
            self.losses.append(loss)
        if self.left:
            return False
        self._synchronise()
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.answer(
            wall=wall / self.steps,
            cpu=cpu / self.steps,
            memory=peak_memory(),
            losses=[float(loss) for loss in self.losses],
        )
        return True

    def answer(self, **content: Any) -> None:
        print(json.dumps(content), flush=True)

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def serve(self, step: Step) -> None:
        """Take turns with a plain step function."""
        index = 0
        while self.wait():
            while True:
                result = step(index)
                index += 1
                if self.done(result):
                    break


class Process:
    """The other side of `Turns`: an arm's process as seen from the one that takes turns."""

    def __init__(self, module: str, arm: Any, folder: Path, threads: int, *options: str) -> None:
        """Start `python -m module --arm JSON --folder FOLDER --threads N options`; `arm` is a frozen dataclass."""
        self.arm = arm
        self.log = (folder / f"{abs(hash(arm))}.log").open("w+")
        command = [sys.executable, "-m", module, "--arm", json.dumps(vars(arm)), "--folder", str(folder)]
        command += ["--threads", str(threads), *options]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CI": "1"},
        )

    def turn(self, steps: int) -> dict[str, Any]:
        """Let the arm make `steps` steps."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: `answer` says why
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print other lines before it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        last = "\n".join(self.log.read().splitlines()[-12:])
        raise RuntimeError(f"{self.arm} ended with status {self.process.wait()}:\n{last}")

    def end(self) -> None:
        self.process.communicate()
        self.log.close()


@dataclass
class Timing:
    """Medians over the rounds, in seconds a step; peak memory in bytes; the losses of the first turn."""

    wall: float
    cpu: float
    memory: int
    losses: list[float]
    best: float  # fastest round, seconds a step


def alternate(
    processes: Mapping[str, Process], steps: Mapping[str, int], warm_up: Mapping[str, int], rounds: int
) -> dict[str, Timing]:
    """Give every process its turn, `rounds` times, and summarise each; all of them are ended."""
    try:
        none: dict[str, Any] = {"losses": []}
        first = {n: process.turn(warm_up[n]) if warm_up[n] else none for n, process in processes.items()}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                answers[name].append(process.turn(steps[name]))
    finally:
        for process in processes.values():
            process.end()
    return {
        name: Timing(
            statistics.median(a["wall"] for a in given),
            statistics.median(a["cpu"] for a in given),
            max(a["memory"] for a in given),
            first[name]["losses"],
            min(a["wall"] for a in given),
        )
        for name, given in answers.items()
    }


def noted(row: dict[str, Any], note: str) -> dict[str, Any]:
    return {**row, "note": note}


def faster(name: str, ours: Timing, peer: Timing, images: int, target: float | None, note: str) -> dict[str, Any]:
    """A row of images per second."""
    load = f"; load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    row = bench_row(name, images / ours.wall, images / peer.wall, "images/s", target=target)
    return noted(row, f"{note}; {torch.get_num_threads()} threads, CPU-time ratio {peer.cpu / ours.cpu:.2f}{load}")
