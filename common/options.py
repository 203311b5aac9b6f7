"""The options that every trainer has, declared once; imports nothing heavy, so that `--help` is quick.

A paper subclasses `TrainerOptions` for its defaults and for what it alone has:

    @dataclass
    class TrainerConfig(TrainerOptions):
        max_steps: int = 3000
        batch_size: int = 64
        sample_every: int = 1000
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
Attention = Literal["auto", "fused", "fused_float32", "written_out", "parts"]


@dataclass
class RunOptions:
    """How any loop runs, Lightning's or a paper's own.

    Args:
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the logs.
        threads: CPU threads of a process; 0 leaves torch's default.
        progress: show how far it is.
    """

    checkpoint_every: int = 500
    log_every: int = 20
    threads: int = 0
    progress: bool = True


@dataclass
class TrainerOptions(RunOptions):
    """How to run: passed to Lightning's Trainer.

    Args:
        accumulate: micro-batches that a step's global batch is divided into; changes no loss.
        precision: 32-true, bf16-mixed, 16-mixed (GPUs only), or auto: bf16-mixed where this machine has it and a few
            measured steps of the run's own network are at least 10 % faster with it, else 32-true.
        accelerator: auto, cpu, gpu, ... (Lightning's names).
        devices: devices of each machine.
        num_nodes: machines (through torchrun).
        strategy: auto, ddp, fsdp, deepspeed_stage_2, ... (Lightning's names).
        compile: compile the network with torch.compile.
        attention: the form that attention is computed in (common/kernels/attention.py); auto: on CPUs the one that is
            measured to be the fastest, shape by shape.
        checkpoint_every, log_every, threads, progress: see `RunOptions`.
    """

    accumulate: int = 1
    precision: Precision = "auto"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    compile: bool = False
    attention: Attention = "auto"


FREE_TRAINER_OPTIONS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "checkpoint_every",
    "sample_every",
    "log_every",
    "threads",
    "progress",
)


def free_options(*own: str, section: str = "trainer.") -> tuple[str, ...]:
    """What two starts of one run may disagree on, since it changes no weight: the trainer's free options and a paper's
    own, dotted (`data.workers`) or whole sections (`sampling`).

    Args:
        section: where the trainer's options stand; "" for a run whose `RunOptions` are its own.
    """
    return ("run_dir", "resume", *own, *(f"{section}{name}" for name in FREE_TRAINER_OPTIONS))


def check_run(options: RunOptions, section: str = "") -> None:
    """Refuse numbers that no loop can use; `section` stands before the options' names."""
    at_least(f"{section}checkpoint_every", options.checkpoint_every, 1)
    at_least(f"{section}log_every", options.log_every, 1)
    at_least(f"{section}threads", options.threads, 0)


def check_trainer(
    options: TrainerOptions,
    batches: Mapping[str, int],
    *,
    resume: str = "auto",
    ema_decay: float = 0.0,
    grad_clip: float = 0.0,
) -> None:
    """Refuse, before anything is written, what would fail after work has begun.

    Args:
        batches: global batch size of each stage by the option that says it ("trainer.batch_size").
        ema_decay, grad_clip: of the optimiser, which sharding strategies cannot do.

    Raises:
        UserError: naming the option and what was expected.
    """
    for name in ("accumulate", "devices", "num_nodes"):
        at_least(f"trainer.{name}", getattr(options, name), 1)
    check_run(options, "trainer.")
    at_least("trainer.sample_every", getattr(options, "sample_every", 0), 0)
    within("optimiser.ema_decay", ema_decay, 0, 1)
    at_least("optimiser.grad_clip", grad_clip, 0)
    for name, batch in batches.items():
        if batch < 1 or batch % options.accumulate:
            raise UserError(
                f"--{name} {batch} cannot be divided into --trainer.accumulate {options.accumulate} micro-batches"
            )
    sharded = [name for name in ("fsdp", "deepspeed_stage_3") if name in options.strategy]
    if sharded and (ema_decay > 0 or grad_clip > 0):
        raise UserError(
            f"--trainer.strategy {options.strategy} shards the weights that the moving average follows and cannot clip "
            "by norm: set --optimiser.ema_decay 0 --optimiser.grad_clip 0"
        )
    if resume not in ("auto", "never") and not Path(resume).is_file():
        raise UserError(f"--resume {resume}: no such file; expected auto, never or a checkpoint of a run")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below `least`, or one that is not finite.

    Args:
        name: of the option, without the dashes.
    """
    if not math.isfinite(value) or value < least:
        raise UserError(f"--{name} {value}: expected a number of at least {least}")


def within(name: str, value: float, least: float, most: float) -> None:
    """Refuse a number outside [least, most]."""
    if not least <= value <= most:
        raise UserError(f"--{name} {value}: expected a number from {least} to {most}")
