"""Training conventions every paper shares: run folder, exact resume, atomic checkpoints, NaN stop, EMA-safe sampling,
throughput in the progress bar, logs. The loop itself is Lightning's."""

from __future__ import annotations

import csv
import logging
import os
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from common import run_clock
from common.choices import Choices
from common.cpu import tune_allocator
from common.data.sampling import generator_step
from common.errors import UserError, first_line, stop_if_not_finite
from common.events import loggers, show_picture
from common.files import read_object, read_yaml, reading, sweep, write_atomically, write_json
from common.kernels import products
from common.kernels.attention import fix_form, use_choices
from common.ledger import note_start
from common.options import TrainerOptions, check_ranges
from common.precision import choose_compile, choose_precision
from common.processes import (
    Guard,
    end_all,
    first_failure,
    is_main_process,
    lost_the_others,
    start_process_group,
)
from common.stopping import Steps, Stopped, command
from common.weights import refuse_other_files

LAST_CHECKPOINT = "last.ckpt"
INPUTS = "inputs.json"


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """`torch.load` with `weights_only=True` and a clear sentence for a missing, truncated, damaged or pickled file."""
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    refuse_other_files(path, f"checkpoint {path}")
    refuse_damaged(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"checkpoint {path} holds pickled Python objects, which could run code: refused; "
                "only tensors and plain values are read (convert it to .safetensors with a tool you trust)"
            ) from None
        raise UserError(
            f"checkpoint {path} is truncated or not a torch checkpoint: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}; expected a dictionary of tensors")
    return content


def refuse_damaged(path: Path) -> None:
    """Raise UserError where a part of a checkpoint is not what its checksum says: torch writes one (CRC-32) for every
    tensor and reads without looking at them. Checkpoints of before zip files (torch 1.5) have none.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error) as error:
        damaged = first_line(error)
    if damaged is not None:
        part = damaged.partition("/")[2] or damaged  # behind the name that the file had while it was written
        raise UserError(
            f"checkpoint {path} is damaged ({part}: its checksum does not fit): restore it from a copy, or delete it "
            "and start again, which trains this stage anew"
        )


def save_checkpoint(path: Path, checkpoint: dict[str, Any], weights: Mapping[str, Any], step: int | None) -> None:
    """Replace a checkpoint of tensors and plain values in one step.

    Args:
        weights: those in it; one that is not finite leaves the earlier checkpoint as it is.

    Raises:
        UserError: a weight is not finite, or the disk is full.
    """
    bad = [k for k, v in weights.items() if _is_float(v) and not torch.isfinite(v).all()]
    if bad:
        raise UserError(f"step {step}: {bad[0]} is not finite; {path.name} not overwritten")
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    run_clock.keep_with(path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints replaced in one step and read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save_checkpoint(Path(path), checkpoint, checkpoint.get("state_dict", {}), checkpoint.get("global_step"))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content = load_checkpoint(Path(path), map_location or "cpu")
        missing = [key for key in ("state_dict", "optimizer_states", "loops") if key not in content]
        if missing:
            raise UserError(
                f"checkpoint {path} has no {missing[0]!r}, so training cannot go on from it; expected one that this "
                "program wrote (foreign weights go through convert.py)"
            )
        return content


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class StopOnNonFinite(Callback):
    """A NaN or infinite loss ends the run before it can reach the weights' next checkpoint."""

    def __init__(self, checkpoints: Path, every: int = 1) -> None:
        self.checkpoints, self.every = checkpoints, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not torch.isfinite(loss.detach()).all():
            last = self.checkpoints / LAST_CHECKPOINT
            advice = "a lower optimiser.lr or precision 32-true"
            stop_if_not_finite(float(loss.detach()), generator_step(trainer), last, advice=advice)


class SaveEvery(Callback):
    """Replaces `folder/last.ckpt` every `every` steps, after the last one, and before a signal ends the run.

    Steps are those of the main network: Lightning's own callback looks at global_step, which moves by two where a
    discriminator is trained as well and may then miss every multiple.

    Args:
        every: 0 keeps nothing.
    """

    def __init__(self, folder: Path, every: int, last: int) -> None:
        self.path, self.every, self.last = folder / LAST_CHECKPOINT, every, last
        self._saved = self._step = -1
        self._steps = Steps()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = self._step = generator_step(trainer)
        self._steps.__enter__()  # here, since Lightning has just taken the signals

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = generator_step(trainer)
        if step == self._step:  # a micro-batch
            return
        self._step = step
        if self.every and (step % self.every == 0 or step == self.last):
            self._save(trainer)
        self._steps.ended(lambda: self._save(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.__exit__(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._step >= 0:
            self._steps.__exit__(type(exception))

    def _save(self, trainer: pl.Trainer) -> str:
        if not self.every:
            return ""
        if self._saved != self._step:
            self._saved = self._step
            trainer.save_checkpoint(self.path)
        return f"step {self._step} is saved in {self.path}"


class ThroughputBar(TQDMProgressBar):
    """Lightning's bar over the whole run (not per epoch), with the throughput; sparse where it is written to a file.

    Args:
        per_step: what one step gets through, counted in `unit`.
        label: what is being trained, shown in front.
        steps: of the whole run.
    """

    def __init__(self, per_step: float, label: str, steps: int, unit: str = "img") -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else max(1, steps // 20))
        self.per_step, self.label, self.steps, self.unit = per_step, label, steps, unit
        self._last = (time.perf_counter(), 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last = (time.perf_counter(), generator_step(trainer))
        if done := trainer.fit_loop.epoch_loop.batch_progress.current.processed:
            # Lightning begins no epoch where a run goes on within one: the bar would know neither label, end nor rate.
            bar = self.train_progress_bar
            bar.reset(total=self.steps * trainer.accumulate_grad_batches)
            bar.initial = bar.n = done
            bar.set_description(self.label)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.label)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        now, step = time.perf_counter(), generator_step(trainer)
        then, before = self._last
        if step > before and now > then:
            metrics[f"{self.unit}/s"] = f"{(step - before) * self.per_step / (now - then):.0f}"
            if now - then > 30:
                self._last = (now, step)
        return metrics


class ExpectedTime(Callback):
    """Says after some steps how long the whole stage will take, in which precision."""

    AFTER = 5

    def __init__(self, label: str, steps: int, precision: str) -> None:
        self.label, self.steps, self.precision = label, steps, precision

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = generator_step(trainer)
        self._since: float | None = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = generator_step(trainer) - self._first
        if done == 1 and batch_idx < trainer.accumulate_grad_batches:  # the first step warms up
            self._since = time.perf_counter()
        if done == self.AFTER + 1 and trainer.is_global_zero and self._since is not None:
            each = (time.perf_counter() - self._since) / self.AFTER
            minutes = each * (self.steps - self._first - done) / 60
            print(
                f"{self.label}: {self.steps} steps in {self.precision}, {each:.3g} s each: about {minutes:.1f} minutes "
                "to go",
                file=sys.stderr,
                flush=True,
            )
            self._since = None


class EveryNSteps(Callback):
    """Calls `action(step)` on the main process every `every` steps; the sample grids that it draws into the stage's
    `samples/`, named by the step, also go to the event files.

    Attributes:
        networks: compiled ones, which the action calls as they are: its inputs have other sizes, to which the compiler
            would give minutes, and code of its own for the training that follows.
    """

    networks: Sequence[nn.Module] = ()

    def __init__(self, every: int, action: Callable[[int], None]) -> None:
        self.every, self.action = every, action
        self._done = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = generator_step(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = generator_step(trainer)
        if step != self._done and step % self.every == 0:
            self._done = step
            if trainer.is_global_zero:
                with uncompiled(self.networks):
                    self.action(step)
                for path in sorted((Path(trainer.default_root_dir) / "samples").glob(f"*{step:06d}.png")):
                    show_picture(trainer.loggers, path, step)


Inputs = Mapping[str, Callable[[], str] | str]  # fingerprints by the names that messages use: data, tokenizer, ...


@dataclass(frozen=True)
class RunFolder:
    """A run's folder that `open_run_folder` has looked into; nothing is written before `begin`.

    moved: options that say another place than before, by the input that lies there.
    """

    path: Path
    resume: str
    config_yaml: str
    moved: Mapping[str, str] = field(default_factory=dict)

    def begin(self, inputs: Inputs) -> None:
        """Refuse a run that was begun with other inputs (`record_inputs`), then write the config and the record, and
        note on what machine, with which code, it begins or goes on (`common.ledger.note_start`).

        Args:
            inputs: fingerprints of what the run learns from.
        """
        if not is_main_process():
            return
        _refuse_changes(self.path, [sentence for name, sentence in self.moved.items() if name not in inputs])
        saved, resumed = self.path / "config.yaml", self.path
        if self.resume not in ("auto", "never"):
            above = Path(self.resume).absolute().parents
            resumed = next((folder for folder in above if (folder / "config.yaml").is_file()), self.path)
        record = _checked_inputs(self.path, resumed, inputs, self.moved)
        if self.path.is_dir():
            sweep(self.path)
        write_atomically(saved, lambda temporary: temporary.write_text(self.config_yaml, encoding="utf-8"))
        if record != _recorded_inputs(self.path):
            write_json(self.path / INPUTS, record)
        note_start(self.path)
        run_clock.begin(self.path)


def open_run_folder(
    run_dir: Path,
    resume: str,
    config_yaml: str,
    free: Sequence[str] = (),
    places: Mapping[str, Sequence[str]] | None = None,
) -> RunFolder:
    """Refuse to mix two different runs in one folder; what it returns begins the run when its inputs are known.

    Args:
        resume: `auto` continues a run of the same config; `never` wants an empty folder; a path is left to the caller.
        free: options that may differ between two starts of the same run, dotted (`trainer.devices`) or whole sections.
        places: options that only say where an input lies, by the input's name; such data may be moved, since its
            fingerprint tells whether it is still the same.
    """
    unmoved = RunFolder(run_dir, resume, config_yaml)
    if not is_main_process():  # it was started by, or together with, a process that does all this
        return unmoved
    saved = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run_dir {run_dir} is a file; choose a folder")
    if resume == "never" and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"--resume never: {run_dir} is not empty; choose another --run_dir")
    if resume != "auto" or not saved.is_file():
        return unmoved
    old, new = _flat(read_yaml(saved)), _flat(yaml.safe_load(config_yaml))
    recorded = _recorded_inputs(run_dir)
    input_at = {option: name for name, options in (places or {}).items() for option in options if name in recorded}
    # An option that the saved config lacks is newer than that run; `compile: auto`, newer too, goes on as it was.
    changed = {
        key: f"{key} was {old[key]}, is {value}"
        for key, value in new.items()
        if key in old and old[key] != value and not any(key == f or key.startswith(f"{f}.") for f in free)
        if (key, old[key], value) != ("trainer.compile", False, "auto")
    }
    _refuse_changes(run_dir, [sentence for key, sentence in changed.items() if key not in input_at])
    return RunFolder(run_dir, resume, config_yaml, {input_at[key]: sentence for key, sentence in changed.items()})


class OpenedOptions(Protocol):
    """What `open_run` reads of a run's options."""

    @property
    def run_dir(self) -> str: ...
    @property
    def resume(self) -> str: ...
    @property
    def trainer(self) -> TrainerOptions: ...


def open_run(
    config: OpenedOptions, config_yaml: str, free: Sequence[str] = (), places: Mapping[str, Sequence[str]] | None = None
) -> RunFolder:
    """`open_run_folder` of `config.run_dir`, on as many threads as its trainer has."""
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    return open_run_folder(Path(config.run_dir), config.resume, config_yaml, free, places)


def _refuse_changes(run_dir: Path, changed: Sequence[str]) -> None:
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{run_dir} holds a run with another configuration ({'; '.join(changed[:3])}{more}): "
            "choose another --run_dir, or delete that folder"
        )


def record_inputs(folder: Path, resume: str, inputs: Inputs) -> None:
    """Write down, in `folder`/inputs.json, fingerprints of what a stage learns from; refuse other ones.

    Args:
        folder: of the stage.
        resume: as the run has it; a checkpoint elsewhere goes on with the inputs of its own stage.

    Raises:
        UserError: naming the inputs that have changed.
    """
    if is_main_process():
        checkpoint = checkpoint_to_resume(resume, folder)
        resumed = folder if checkpoint is None else checkpoint.absolute().parent.parent
        record = _checked_inputs(folder, resumed, inputs)
        if record != _recorded_inputs(folder):
            write_json(folder / INPUTS, record)


def _checked_inputs(
    folder: Path, resumed: Path, inputs: Inputs, moved: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The record of a run or stage that goes on with these inputs, or begins with them where nothing was trained yet.

    Args:
        resumed: the folder that it goes on from, which is `folder` but for `--resume CHECKPOINT`.
        moved: see `RunFolder`.
    """
    found = {name: value() if callable(value) else value for name, value in inputs.items()}
    begun = holds_work(resumed)  # else it has failed before, perhaps because of the data that were now put right
    known = refuse_other_inputs(resumed, found, moved) if begun else {}
    unknown = [name for name in found if name not in known]
    if unknown and begun:
        print(
            f"{folder}: its {', '.join(unknown)} were not recorded when it was begun, so it cannot be checked whether "
            "they have changed; they are recorded now",
            file=sys.stderr,
        )
    return known | found


def say_other_inputs(origin: Path, inputs: Inputs, names: Sequence[str]) -> None:
    """Say where weights that a run starts from were trained with other inputs than the run has.

    Args:
        origin: the folder of the run that made the weights, if it is one.
        names: of the inputs whose meaning the weights have learned.
    """
    known = _recorded_inputs(origin)
    for name in names:
        if name in known and name in inputs:
            value = inputs[name]
            if known[name] != (value() if callable(value) else value) and is_main_process():
                print(
                    f"{origin}: these weights were trained with {_other(name)} than this run has, so what they have "
                    f"learned of the {name} means something else here",
                    file=sys.stderr,
                )


def holds_work(folder: Path) -> bool:
    """Whether a run has come so far that something below its folder was learned: a checkpoint or tensors."""
    return any(next(folder.rglob(pattern), None) for pattern in ("*.ckpt", "*.safetensors"))


def refuse_other_inputs(folder: Path, inputs: Inputs, moved: Mapping[str, str] | None = None) -> dict[str, str]:
    """What was written down in `folder` of a run's inputs, {} where nothing was.

    Args:
        inputs: as they are now; those that are no part of the record are left out.
        moved: see `RunFolder`.

    Raises:
        UserError: naming those of `inputs` that are others now.
    """
    known = _recorded_inputs(folder)
    found = {name: value() if callable(value) else value for name, value in inputs.items() if name in known}
    changed = [name for name, value in found.items() if known[name] != value]
    if not changed:
        return known
    names = " and ".join(map(_other, changed))
    details = [(moved or {}).get(name) or _difference(name, known[name], found[name]) for name in changed]
    detail = f" ({'; '.join(filter(None, details))})" if any(details) else ""
    raise UserError(
        f"{folder} was begun with {names} than there is now{detail}, and going on would mix the two: restore what "
        "it was begun with, choose another --run_dir, or delete that folder"
    )


def _recorded_inputs(folder: Path) -> dict[str, str]:
    return read_object(folder / INPUTS) if (folder / INPUTS).is_file() else {}


def _other(name: str) -> str:
    return f"{'other' if name == 'data' or name.endswith('s') else 'another'} {name}"


def _difference(name: str, old: str, new: str) -> str:
    """What changed in an input that people can read."""
    return f"{name} were {old}, are {new}" if "," in old + new and len(old + new) < 400 else ""


def _flat(config: Any) -> dict[str, Any]:
    """A config as {"section.option": value}."""

    def walk(prefix: str, node: Any) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        parts = (walk(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items())
        return {key: value for part in parts for key, value in part.items()}

    return walk("", config)


def quiet_lightning() -> None:
    """Silence Lightning's product tips and the warnings that do not apply to in-memory data."""
    for name in ("pytorch_lightning", "lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric"):
        warnings.filterwarnings("ignore", module=module)
    # Lightning points these at the caller, so the module filters miss them.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|Experiment logs directory).*")
    # With several threads oneDNN gives gradients of 1x1 kernels other strides, where a stride does not matter.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


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
    check_ranges(options, "trainer.")
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
    quiet_lightning()
    _lightning(options, "32-true" if options.precision == "auto" else options.precision, enable_progress_bar=False)


def build_trainer(
    folder: Path,
    options: TrainerOptions,
    *,
    steps: int,
    batch_size: int,
    precision: str | None = None,
    accumulate: int | None = None,
    grad_clip: float = 0.0,
    optimisers: int = 1,
    callbacks: Sequence[Callback] = (),
    logs: bool = True,
    checkpoints: bool | None = None,
    unit: tuple[str, float] = ("img", 1.0),
) -> pl.Trainer:
    """A Lightning Trainer with the house's conventions; everything is written below `folder`.

    `folder/checkpoints/last.ckpt` is replaced every `checkpoint_every` optimiser steps; TensorBoard and CSV logs go to
    `folder/logs/`. Training ends at `steps` optimiser steps.

    Args:
        batch_size: samples of one step over all processes, for the throughput.
        precision: what `options.precision` came to (see `common.precision`); needed where that is auto.
        accumulate: micro-batches of a step; None for those of `options`.
        grad_clip: largest norm of the gradient; 0 does not clip.
        optimisers: how many a module with manual optimisation steps at most per step; such a module counts its steps
            in `step_count` and ends training itself.
        logs, checkpoints: write them; checkpoints None: as `logs` says.
        unit: what the throughput counts, and how many of them a sample holds: ("tokens", 63.4).

    Raises:
        UserError: the machine has no such accelerator, or Lightning knows no such strategy or precision.
    """
    quiet_lightning()
    tune_allocator()
    fix_form(options.attention)
    checkpoints = logs if checkpoints is None else checkpoints
    # Equal forms round differently: a run that goes on takes the forms that it began with.
    choices = Choices(folder if checkpoints else None)
    use_choices(choices)
    products.use_choices(choices)
    place = folder / "checkpoints"
    chosen_precision = precision or options.precision
    own: list[Callback] = [StopOnNonFinite(place, every=1 if not torch.cuda.is_available() else 50)]
    if logs:
        own.append(ExpectedTime(folder.name.replace("_", " "), steps, chosen_precision))
    # Last: a step at which a signal ends the run has its samples, and what callbacks book is part of its checkpoint.
    saving = SaveEvery(place, options.checkpoint_every if checkpoints else 0, last=steps)
    strategy: Any = options.strategy
    if strategy in ("ddp", "ddp_find_unused_parameters_true"):
        # The averaged weights are buffers; every process keeps its own equal copy, so nothing has to be broadcast.
        strategy = DDPStrategy(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=strategy != "ddp"
        )
    show = options.progress and not os.environ.get("CI")
    if show:
        own.append(ThroughputBar(batch_size * unit[1], folder.name.replace("_", " "), steps, unit[0]))
    return _lightning(
        options,
        chosen_precision,
        strategy=strategy,
        default_root_dir=folder,
        max_steps=steps * optimisers,
        max_epochs=-1,
        accumulate_grad_batches=accumulate or options.accumulate,
        gradient_clip_val=grad_clip or None,
        callbacks=[*own, *callbacks, saving],
        logger=[
            CSVLogger(folder, name="logs", flush_logs_every_n_steps=options.log_every),
            *loggers(folder, options.logger),
        ]
        if logs
        else False,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=options.log_every,
        enable_progress_bar=show,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def _lightning(options: TrainerOptions, precision: str, **settings: Any) -> pl.Trainer:
    """A Lightning Trainer on the machine that the options name.

    Raises:
        UserError: the machine has no such accelerator, or Lightning knows no such strategy or precision.
    """
    machine: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "num_nodes": options.num_nodes,
        "strategy": options.strategy,
        "precision": precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    try:
        return pl.Trainer(**(machine | settings))
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise UserError(
            f"trainer options accelerator {options.accelerator}, devices {options.devices}, strategy "
            f"{options.strategy}, precision {precision} do not fit this machine: {' '.join(str(error).split())}"
        ) from None


def train(
    folder: Path,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    options: TrainerOptions,
    *,
    steps: int,
    batch_size: int,
    resume: str = "auto",
    grad_clip: float = 0.0,
    optimisers: int = 1,
    callbacks: Sequence[Callback] = (),
    logs: bool = True,
    checkpoints: bool | None = None,
    unit: tuple[str, float] = ("img", 1.0),
    networks: Sequence[nn.Module] = (),
    dynamic: bool = False,
) -> pl.Trainer:
    """Train or resume one stage of a run: what `build_trainer` builds, with `precision: auto` decided.

    Args:
        networks: what `options.compile` compiles for as long as this takes; without them nothing is.
        dynamic: they see inputs of many sizes.
        resume: auto goes on from `folder`'s last checkpoint, never starts anew, a path goes on from that file.
        logs: False writes none.
        checkpoints: False keeps nothing below `folder`, and starts anew; None: as `logs` says.

    Returns:
        the Trainer, after its work.

    Raises:
        UserError: as `build_trainer` and `fit`.
    """
    quiet_lightning()
    checkpoints = logs if checkpoints is None else checkpoints
    kept = folder if checkpoints else None
    checkpoint = checkpoint_to_resume(resume, folder) if checkpoints else None
    precision = choose_precision(kept, options, module, data)
    compiles = bool(networks) and choose_compile(kept, options, module, data, steps, precision, checkpoint is not None)
    trainer = build_trainer(
        folder,
        options,
        steps=steps,
        batch_size=batch_size,
        precision=precision,
        accumulate=None if module.automatic_optimization else 1,  # else it steps its optimisers itself
        grad_clip=grad_clip,
        optimisers=optimisers,
        callbacks=callbacks,
        logs=logs,
        checkpoints=checkpoints,
        unit=unit,
    )
    for callback in callbacks:
        if compiles and isinstance(callback, EveryNSteps):
            callback.networks = networks
    try:
        with compiled(networks if compiles else (), dynamic):
            fit(trainer, module, data, checkpoint)
    except Stopped as stopped:
        stopped.options = [] if resume == "auto" else ["--resume", "auto"]
        raise
    return trainer


@contextmanager
def compiled(networks: Sequence[nn.Module], dynamic: bool = False) -> Iterator[None]:
    """Networks that are compiled within; what is drawn with them before and after has other sizes."""
    for network in networks:
        network.compile(dynamic=dynamic or None)
    try:
        yield
    finally:
        for network in networks:
            network._compiled_call_impl = None


@contextmanager
def uncompiled(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Networks that are called as they are within, though they were compiled."""
    kept = [network._compiled_call_impl for network in networks]
    for network in networks:
        network._compiled_call_impl = None
    try:
        yield
    finally:
        for network, call in zip(networks, kept):
            network._compiled_call_impl = call


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, checkpoint: Path | None) -> None:
    """`trainer.fit`, with the user's mistakes as sentences.

    Raises:
        UserError: the checkpoint is damaged, pickled or of another network; the disk is full; the loss is not finite;
            another process ended.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and trainer.world_size > 1:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        start_process_group("nccl" if device.type == "cuda" else "gloo", seconds=1800)
    ranks = trainer.world_size

    def failed(number: int, how: str) -> str:
        rank = f"rank {number + 1} of {ranks}"
        return f"{rank} {how}, so the others were ended too; what was saved is whole. To go on: {command()}"

    with Guard(trainer.strategy.launcher, failed) as guard:
        _fit(trainer, module, data, checkpoint, guard)


def _fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    checkpoint: Path | None,
    guard: Guard,
) -> None:
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except RuntimeError as error:
        if lost_the_others(error) and (number := first_failure(guard.processes, patience=3)) is not None:
            end_all(guard.processes, patience=1)
            raise UserError(guard.said(number)) from None
        if checkpoint is None or "loading state_dict" not in str(error):
            raise
        raise of_another_network(checkpoint, error) from None


def of_another_network(checkpoint: Path, error: RuntimeError) -> UserError:
    """What to tell the user whose checkpoint `load_state_dict` refused."""
    detail = str(error).splitlines()[1:2] or [""]
    return UserError(
        f"checkpoint {checkpoint} belongs to another network ({detail[0].strip()[:160]}): "
        "give the options of the run that wrote it, or choose another --run_dir"
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """`folder/checkpoints/last.ckpt` if a run was interrupted there."""
    path = folder / "checkpoints" / LAST_CHECKPOINT
    return path if path.exists() else None  # DeepSpeed's checkpoints are folders


def checkpoint_to_resume(resume: str, folder: Path) -> Path | None:
    """The checkpoint from which the stage in `folder` goes on, if any."""
    if resume == "auto":
        return latest_checkpoint(folder)
    return None if resume == "never" else Path(resume)


def accelerator_device(options: TrainerOptions) -> torch.device:
    """Where a frozen teacher lives: beside its student."""
    if options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def booked(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's wall time to `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def write_metrics(
    path: Path, metrics: dict[str, Any], seconds: Mapping[str, float], total: float, trained: bool = True
) -> dict[str, Any]:
    """Write a run's final numbers with its wall times and return them.

    Args:
        seconds: by stage, in this process; those of an earlier start that ended are added.
        total: of this process; those of earlier starts are added, as far as they came to a checkpoint.
        trained: False where nothing was trained now: the times of the start that did it stand.
    """
    known = read_object(path).get("seconds", {}) if path.is_file() else {}
    if known and not trained:
        times = known
    else:
        before = {name: value for name, value in known.items() if name != "total"} if isinstance(known, dict) else {}
        clock = run_clock.clock_of(path.parent)
        times = {name: round(before.get(name, 0.0) + seconds.get(name, 0.0), 1) for name in {**before, **seconds}}
        times["total"] = round(clock.earlier + total, 1)
        if trained:
            write_json(path.parent / run_clock.SECONDS, {"seconds": times["total"]})
    content = {**metrics, "seconds": times}
    write_json(path, content)
    return content


def read_logs(folder: Path) -> dict[str, dict[int, float]]:
    """The logged quantities of a stage by step, over all its starts (a later start replaces what it did again)."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with reading(path, "delete it"), path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key not in ("step", "epoch") and value:
                        found.setdefault(key, {})[int(float(row["step"]))] = float(value)
    return found
