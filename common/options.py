"""The options that every trainer has, declared once, and the ranges of numbers; imports nothing heavy.

A number's range stands in its type. It is part of `--help` and is checked before any work begins:

    steps: Count = 50                                    # a whole number of at least 1
    drop: Share = 0.1                                    # from 0 to 1
    bits: Annotated[int, Range(2, 8)] = 4

A paper subclasses `TrainerOptions` for its defaults and for what it alone has:

    @dataclass
    class TrainerConfig(TrainerOptions):
        max_steps: Count = 3000
        batch_size: Count = 64
        sample_every: Whole = 1000
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from common.errors import UserError

LARGEST = 10**9  # of counts: what does not fit 32 bits is a slip of the finger
FURTHEST = 10**6  # of weights, rates, scales: beyond it float32 has no digits left for a step
REPEATS = 4  # of a sample in one batch


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, beside its type: `Annotated[float, Range(0, 1)]`.

    Args:
        least: the smallest.
        most: the largest; None where no sensible run comes near a limit (`LARGEST`, `FURTHEST`).
        above: `least` itself is left out.
    """

    least: float
    most: float | None = None
    above: bool = False

    def __str__(self) -> str:
        """As `--help` says it: "at least 1", "above 0 and at most 1", "from 0 to 1"."""
        if self.most is None:
            return f"above {self.least}" if self.above else f"at least {self.least}"
        return f"above {self.least} and at most {self.most}" if self.above else f"from {self.least} to {self.most}"

    def check(self, name: str, value: Any, kind: type) -> None:
        """Refuse a value that is no number of this range.

        Args:
            name: of the option, without the dashes.
            kind: int or float.

        Raises:
            UserError: naming the option and what was expected.
        """
        limit = (LARGEST if kind is int else FURTHEST) if self.most is None else self.most
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = number and self.least <= value <= limit and not (self.above and value == self.least)
        if fits and (kind is float or value == int(value)):
            return
        shown = str(replace(self, most=limit) if number and value > limit else self)
        of = "of " if shown.startswith("at") else ""
        raise UserError(f"--{name} {value}: expected a {'whole ' if kind is int else ''}number {of}{shown}")


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Portion = Annotated[float, Range(0, 1, above=True)]  # a share that is not nothing
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Threads = Annotated[int, Range(0, 4096)]
Decay = Annotated[float, Range(0, 0.999999)]  # of a moving average that must not stand still

Events = Literal["tensorboard", "wandb", "none"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
Compile = bool | Literal["auto"]
Attention = Literal["auto", "fused", "fused_float32", "written_out", "parts"]


@dataclass
class RunOptions:
    """How any loop runs, Lightning's or a paper's own.

    Args:
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the logs.
        threads: CPU threads of a process; 0 leaves torch's default.
        progress: show how far it is.
        logger: event files with numbers and pictures: tensorboard; wandb, which also keeps a W&B run on disk (an
            extra; sent only where WANDB_MODE=online is set); or none.
    """

    checkpoint_every: Count = 500
    log_every: Count = 20
    threads: Threads = 0
    progress: bool = True
    logger: Events = "tensorboard"


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
        compile: compile the networks with torch.compile while they are trained; auto: on a CPU with a C++ compiler, in
            a run of one process whose precision is auto as well, where training takes so long that it pays.
        attention: the form that attention is computed in (common/kernels/attention.py); auto: on CPUs the one that is
            measured to be the fastest, shape by shape.
    """

    accumulate: Count = 1
    precision: Precision = "auto"
    accelerator: str = "auto"
    devices: Count = 1
    num_nodes: Count = 1
    strategy: str = "auto"
    compile: Compile = "auto"
    attention: Attention = "auto"


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures are classified.

    Args:
        name: emoji (EmojiGroups, embedded, 9 classes), digits (scikit-learn, 8 px grey), textures (procedural shape x
            texture), fashion-mnist (`make data-fashion-mnist`), cifar10 or cifar100 (binary version, --data.path), or
            folder (your own: one subfolder per class, optionally below train/ and test/, or a table with labels).
        path: folder of cifar10, cifar100 or folder.
        image_column: the column of the pictures in a table; None takes `image`, or the one that may be it.
        label_column: the column of the classes, likewise `label` by default.
        size: side of the square pictures in pixels.
        images: at most so many training pictures; None takes all.
    """

    name: Literal["emoji", "digits", "textures", "fashion-mnist", "cifar10", "cifar100", "folder"] = "emoji"
    path: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    size: Annotated[int, Range(8, 4096)] = 32
    images: Count | None = None


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
    "logger",
)


def free_options(*own: str, section: str = "trainer.") -> tuple[str, ...]:
    """What two starts of one run may disagree on, since it changes no weight: the trainer's free options and a paper's
    own, dotted (`data.workers`) or whole sections (`sampling`).

    Args:
        section: where the trainer's options stand; "" for a run whose `RunOptions` are its own.
    """
    return ("run_dir", "resume", *own, *(f"{section}{name}" for name in FREE_TRAINER_OPTIONS))


def ranges_of(hint: Any) -> Iterator[tuple[type, Range]]:
    """The ranges that a type names, with int or float: of `Count | None`, of `list[Share]`."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        yield from ((kind, note) for note in notes if isinstance(note, Range))
    for part in get_args(hint):
        if not isinstance(part, Range):
            yield from ranges_of(part)


@functools.cache
def types_of(options: type) -> dict[str, Any]:
    """The fields of a dataclass of options and their types, ranges included."""
    hints = get_type_hints(options, include_extras=True)
    return {field.name: hints[field.name] for field in fields(options) if field.init}


def sections_of(hint: Any) -> Iterator[type]:
    """The dataclasses of options that a type names: of `StageConfig | None`."""
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    elif get_origin(hint) is not Annotated:
        for part in get_args(hint):
            yield from sections_of(part)


def check_ranges(options: Any, section: str = "", declared: type | None = None) -> None:
    """Refuse numbers outside of their ranges, and words that are empty where the default is not.

    Args:
        options: a dataclass of options, or a namespace with the values for one.
        section: stands before the options' names: "trainer.".
        declared: the dataclass of a namespace.

    Raises:
        UserError: naming the option and what was expected.
    """
    defaults = {field.name: field.default for field in fields(declared or options)}
    for name, hint in types_of(declared or type(options)).items():
        value, kinds = getattr(options, name), get_args(hint)
        if value is None and type(None) in kinds:
            continue
        if value is None:
            raise UserError(f"--{section}{name} null: expected a value; for the default leave it out")
        entries = value if isinstance(value, (list, tuple)) else [value]
        also = {word for part in kinds if get_origin(part) is Literal for word in get_args(part)}
        for kind, allowed in ranges_of(hint):
            for number in entries:
                if number not in also:
                    allowed.check(f"{section}{name}", number, kind)
        for word in entries:
            if isinstance(word, str) and ((not word.strip() and defaults[name] != word) or not is_text(word)):
                raise UserError(f"--{section}{name} {word!r}: expected text that is not empty; for none leave it out")
        for kind in sections_of(hint):
            if not hasattr(value, "__dict__"):
                raise UserError(f"--{section}{name} {value}: expected a section with the options of its own")
            check_ranges(value, f"{section}{name}.", kind)


def refuse_large_batch(name: str, batch: int, samples: int, what: str = "training samples") -> None:
    """Refuse a batch that takes every sample many times: a small set may be smaller than a batch, but a slip of the
    finger would never end.

    Args:
        name: of the option, without the dashes.
        samples: that there are.

    Raises:
        UserError: naming both.
    """
    if batch > REPEATS * samples:
        raise UserError(f"--{name} {batch}: expected at most {REPEATS} times the {samples} {what}")


def device(word: str) -> str:
    """A device of torch's, as the type of an option.

    Raises:
        UserError: it is none, or this machine has no GPU.
    """
    kind, _, number = word.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind, bool(number)) == ("cpu", True):
        raise UserError(f"--device {word}: expected cpu, cuda or cuda:N, the number of a GPU")
    if kind == "cuda":
        import torch

        if int(number or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {word}: this machine has {torch.cuda.device_count()} usable GPUs; use cpu")
    return word


def device_or_auto(word: str) -> str:
    """The same, or auto."""
    return word if word == "auto" else device(word)


def chosen_device(word: str = "auto") -> str:
    """cpu or cuda, by name or by what this machine has.

    Raises:
        UserError: it is none, or this machine has no GPU.
    """
    if word == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return device(word)


def is_text(word: str) -> bool:
    """Whether it can be written as UTF-8 and be part of a path."""
    return "\0" not in word and not any("\ud800" <= letter <= "\udfff" for letter in word)
