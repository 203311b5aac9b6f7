"""`--trainer.precision auto`: bf16 where the machine at hand has it and is faster with it, float32 elsewhere;
`--trainer.compile auto`: compiled networks where the run is long enough to earn the compiler's minutes back.

CPUs without bf16 instructions (AVX2 only) are many times slower in bf16 than in float32; small networks are no faster
in it on CPUs that have them. So the run's own network is timed for a few steps in both. Compiled steps round otherwise
than eager ones, so a run that names its precision, to be repeated to the digit, is never compiled unasked.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import LightningEnvironment

from common.choices import FILE, Choices
from common.options import Precision, TrainerOptions
from common.processes import is_main_process

FLOAT32: Precision = "32-true"
BF16: Precision = "bf16-mixed"
MARGIN = 0.1  # bf16 must win by so much, so that equal machines choose alike
PAYS_AFTER = 40.0  # minutes of training: compiling takes one to three; steps in bf16 were 1.04 to 1.47 times as fast
FEWEST_STEPS = 500  # of a run that is worth timing for it
ROUNDS, STEPS = 2, 3  # measured turns of each precision, and steps of a turn, of which the first is not counted


def bf16_possible(accelerator: str = "auto") -> bool:
    """Whether this machine computes in bf16 without emulating it.

    On a CPU oneDNN says so: it knows the instructions (AVX-512 BF16, AMX, ...) and honours ONEDNN_MAX_CPU_ISA.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(
    folder: Path | None,
    options: TrainerOptions,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    choices: Choices | None = None,
) -> str:
    """Lightning's name of the precision that a run takes: the one asked for, or for `auto` the one kept in `folder`,
    or else measured now on copies of `module`, whose own state and torch's random state stay as they are.

    Args:
        folder: of the run or its stage, which keeps the choice; None measures for this process only.
    """
    if options.precision != "auto":
        return options.precision
    choices = choices or Choices(folder)
    if choices.kept("precision") is None and not bf16_possible(options.accelerator):
        return choices.choose("precision", lambda: {FLOAT32: 0.0}, default=FLOAT32)
    return choices.choose(
        "precision", lambda: measure_precisions(options, module, data), default=FLOAT32, margin=MARGIN
    )


def choose_compile(
    folder: Path | None,
    options: TrainerOptions,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    steps: int,
    precision: str,
    begun: bool = False,
) -> bool:
    """Whether a run compiles its networks: as it was asked, or for `auto` the choice kept in `folder`, or made now.

    Args:
        folder: of the run or its stage, as for `choose_precision`.
        steps: of the whole training.
        precision: the one that the run takes.
        begun: it goes on from a checkpoint; one that has kept no choice was eager.
    """
    if options.compile != "auto":
        return options.compile
    choices = Choices(folder)
    if choices.kept("compile") is None and (begun or steps < FEWEST_STEPS or not _may_compile(options)):
        return False

    def measure() -> dict[str, float]:
        known = (choices.kept("precision") or {}).get("seconds", {}).get(precision)
        each = known or measure_precisions(options, module, data, (precision,))[precision]
        return {"eager": each * steps}

    def long_enough(seconds: Mapping[str, float]) -> str:
        return "compiled" if seconds["eager"] > 60 * PAYS_AFTER else "eager"

    if choices.choose("compile", measure, default="eager", pick=long_enough) == "eager":
        return False
    print("compile auto: a long training, so the networks are compiled first (minutes)", file=sys.stderr)
    return True


def _may_compile(options: TrainerOptions) -> bool:
    """Where auto compiles at all: a single process on a CPU, with the compiler that TorchInductor needs."""
    alone = options.devices == options.num_nodes == 1 and "WORLD_SIZE" not in os.environ
    on_cpu = options.accelerator == "cpu" or not torch.cuda.is_available()
    if options.precision != "auto" or not alone or not on_cpu:
        return False
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def precisions_taken(run_dir: Path, asked: str) -> str:
    """In words, which precision a run's stages took, for cards and records: what was asked for, or what auto came to.

    Args:
        asked: `trainer.precision` of the run.
    """
    if asked != "auto":
        return asked
    records = {file.parent: Choices(file.parent).kept("precision") for file in sorted(run_dir.rglob(FILE))}
    taken = {folder.name: record["chosen"] for folder, record in records.items() if record is not None}
    if len(set(taken.values())) == 1:
        return str(next(iter(taken.values())))
    return ", ".join(f"{folder} {chosen}" for folder, chosen in taken.items()) or asked


def affordable_steps(
    folder: Path,
    options: TrainerOptions,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    steps: int,
    minutes: float,
) -> int:
    """How many of a stage's steps this machine does in so many minutes: all of them, or as many eighths as fit.

    A recipe that ends in time on one machine then also does on a slower one, with a shorter training. Eighths, so that
    equal machines train alike; at least one. The choice is kept in `folder` like the precision.

    Args:
        minutes: 0 for no limit.
    """
    if minutes <= 0:
        return steps
    choices = Choices(folder)
    precision = choose_precision(folder, options, module, data, choices)

    def measure() -> dict[str, float]:
        known = (choices.kept("precision") or {}).get("seconds", {}).get(precision)
        each = known or measure_precisions(options, module, data, (precision,))[precision]
        return {f"{eighths}/8": each * steps * eighths / 8 for eighths in range(8, 0, -1)}

    def most(seconds: Mapping[str, float]) -> str:
        return next((share for share, taken in seconds.items() if taken <= 60 * minutes), "1/8")

    eighths = int(choices.choose("steps", measure, default="8/8", pick=most).partition("/")[0])
    taken = max(1, steps * eighths // 8)
    if taken < steps and is_main_process():
        print(
            f"{folder.name}: {taken} of {steps} steps, so that this machine ends within {minutes:g} minutes; "
            "--trainer.max_minutes 0 does all of them",
            file=sys.stderr,
        )
    return taken


def measure_precisions(
    options: TrainerOptions,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    precisions: Sequence[str] = (FLOAT32, BF16),
) -> dict[str, float]:
    """Seconds of a training step by precision: the fastest of each step over `ROUNDS` turns, averaged over steps."""
    devices = list(range(torch.cuda.device_count()))
    turns: dict[str, list[list[float]]] = {precision: [] for precision in precisions}
    with torch.random.fork_rng(devices):
        for _ in range(ROUNDS):
            for precision, kept in turns.items():
                kept.append(_timed_steps(precision, options, copy.deepcopy(module), data))
    means = {}
    for precision, kept in turns.items():
        best = [min(step) for step in zip(*kept)]
        means[precision] = sum(best) / max(1, len(best))
    if len(means) > 1:
        shown = ", ".join(f"{precision} {seconds:.3g} s a step" for precision, seconds in means.items())
        print(f"precision auto: {shown}", file=sys.stderr)
    return means


class _Stopwatch(Callback):
    """Times steps after the first and ends the trial."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._begun += 1
        if self._begun > 1:
            self.seconds.append(time.perf_counter() - self._since)
        if self._begun >= STEPS:
            trainer.should_stop = True


def _timed_steps(
    precision: str, options: TrainerOptions, module: pl.LightningModule, data: pl.LightningDataModule
) -> list[float]:
    watch = _Stopwatch()
    settings: dict[str, Any] = dict(
        max_steps=-1,
        max_epochs=1,  # which ends where a run has fewer steps than are timed; more epochs of none would never end
        accelerator=options.accelerator,
        devices=1,
        plugins=[LightningEnvironment()],  # one process, whatever launcher started this one
        precision=precision,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    pl.Trainer(**settings).fit(module, data)
    return watch.seconds
