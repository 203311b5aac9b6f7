"""Training conventions every paper shares: run folder, exact resume, atomic checkpoints, NaN stop, EMA-safe sampling,
throughput in the progress bar, logs. The loop itself is Lightning's."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from common.choices import Choices
from common.cpu import tune_allocator
from common.data.sampling import generator_step
from common.errors import UserError
from common.files import write_atomically, write_json
from common.kernels.attention import fix_form, use_choices
from common.options import TrainerOptions
from common.precision import choose_precision
from common.processes import is_main_process

LAST_CHECKPOINT = "last.ckpt"


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """`torch.load` with `weights_only=True` and a clear sentence for a missing, truncated or pickled file."""
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
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


def stop_if_not_finite(loss: float, step: int, last: Path | None, advice: str, what: str = "loss") -> None:
    """End a run whose loss is NaN or infinite, before its next checkpoint.

    Args:
        last: the latest checkpoint, if there is one.
        advice: what the user should try.

    Raises:
        UserError: it is not finite.
    """
    if math.isfinite(loss):
        return
    found = last is not None and last.exists()
    kept = f"the last good checkpoint is {last}" if found else "no checkpoint had been written yet"
    raise UserError(f"the {what} became {loss} at step {step}: stopped; {kept}. Try {advice}")


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
            stop_if_not_finite(float(loss.detach()), generator_step(trainer), last, advice)


class SaveEvery(Callback):
    """Replaces `folder/last.ckpt` every `every` steps and after the last one.

    Steps are those of the main network: Lightning's own callback looks at global_step, which moves by two where a
    discriminator is trained as well and may then miss every multiple.
    """

    def __init__(self, folder: Path, every: int, last: int) -> None:
        self.path, self.every, self.last = folder / LAST_CHECKPOINT, every, last
        self._saved = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = generator_step(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = generator_step(trainer)
        if step != self._saved and (step % self.every == 0 or step == self.last):
            self._saved = step
            trainer.save_checkpoint(self.path)


class ThroughputBar(TQDMProgressBar):
    """Lightning's bar over the whole run (not per epoch), with the throughput; sparse where it is written to a file.

    Args:
        per_step: what one step gets through, counted in `unit`.
        label: what is being trained, shown in front.
        steps: of the whole run.
    """

    def __init__(self, per_step: float, label: str, steps: int, unit: str = "img") -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else max(1, steps // 20))
        self.per_step, self.label, self.unit = per_step, label, unit
        self._last = (time.perf_counter(), 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last = (time.perf_counter(), generator_step(trainer))

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
    """Calls `action(step)` on the main process every `every` steps (sample grids)."""

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
                self.action(step)


def open_run_folder(run_dir: Path, resume: str, config_yaml: str, free: Sequence[str] = ()) -> None:
    """Create the run folder and save the config; refuse to mix two different runs in one folder.

    Args:
        resume: `auto` continues a run of the same config; `never` wants an empty folder; a path is left to the caller.
        free: options that may differ between two starts of the same run, dotted (`trainer.devices`) or whole sections.
    """
    if not is_main_process():  # it was started by, or together with, a process that does all this
        return
    saved = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run_dir {run_dir} is a file; choose a folder")
    if resume == "never" and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"--resume never: {run_dir} is not empty; choose another --run_dir")
    if resume == "auto" and saved.is_file():
        old, new = _flat(saved.read_text()), _flat(config_yaml)
        # An option that the saved config lacks is newer than that run.
        changed = [
            f"{key} was {old[key]}, is {value}"
            for key, value in new.items()
            if key in old and old[key] != value and not any(key == f or key.startswith(f"{f}.") for f in free)
        ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{run_dir} holds a run with another configuration ({'; '.join(changed[:3])}{more}): "
                "choose another --run_dir, or delete that folder"
            )
    write_atomically(saved, lambda temporary: temporary.write_text(config_yaml))


def _flat(text: str) -> dict[str, Any]:
    """A YAML config as {"section.option": value}."""

    def walk(prefix: str, node: Any) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        parts = (walk(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items())
        return {key: value for part in parts for key, value in part.items()}

    return walk("", yaml.safe_load(text))


def quiet_lightning() -> None:
    """Silence Lightning's product tips and the warnings that do not apply to in-memory data."""
    for name in ("pytorch_lightning", "lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric"):
        warnings.filterwarnings("ignore", module=module)
    # Lightning points these at the caller, so the module filters miss them.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|Experiment logs directory).*")


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
    use_choices(Choices(folder if checkpoints else None))
    place = folder / "checkpoints"
    chosen_precision = precision or options.precision
    own: list[Callback] = [StopOnNonFinite(place, every=1 if not torch.cuda.is_available() else 50)]
    if logs:
        own.append(ExpectedTime(folder.name.replace("_", " "), steps, chosen_precision))
    strategy: Any = options.strategy
    if strategy in ("ddp", "ddp_find_unused_parameters_true"):
        # The averaged weights are buffers; every process keeps its own equal copy, so nothing has to be broadcast.
        strategy = DDPStrategy(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=strategy != "ddp"
        )
    show = options.progress and not os.environ.get("CI")
    if show:
        own.append(ThroughputBar(batch_size * unit[1], folder.name.replace("_", " "), steps, unit[0]))
    saving = [SaveEvery(place, options.checkpoint_every, last=steps)] if checkpoints else []
    settings: dict[str, Any] = dict(
        default_root_dir=folder,
        max_steps=steps * optimisers,
        max_epochs=-1,
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=strategy,
        precision=chosen_precision,
        accumulate_grad_batches=accumulate or options.accumulate,
        gradient_clip_val=grad_clip or None,
        # Without logs it is the callbacks that book a step, and what they book is part of its checkpoint.
        callbacks=[*own, *saving, *callbacks] if logs else [*own, *callbacks, *saving],
        logger=[
            CSVLogger(folder, name="logs", flush_logs_every_n_steps=options.log_every),
            TensorBoardLogger(folder, name="tensorboard"),
        ]
        if logs
        else False,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=options.log_every,
        enable_checkpointing=False,
        enable_progress_bar=show,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    try:
        return pl.Trainer(**settings)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"trainer options accelerator {options.accelerator}, devices {options.devices}, strategy "
            f"{options.strategy}, precision {chosen_precision} do not fit this machine: {' '.join(str(error).split())}"
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
) -> pl.Trainer:
    """Train or resume one stage of a run: what `build_trainer` builds, with `precision: auto` decided.

    Args:
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
    precision = choose_precision(folder if checkpoints else None, options, module, data)
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
    fit(trainer, module, data, checkpoint_to_resume(resume, folder) if checkpoints else None)
    return trainer


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, checkpoint: Path | None) -> None:
    """`trainer.fit`, with the user's mistakes as sentences.

    Raises:
        UserError: the checkpoint is damaged, pickled or of another network; the disk is full; the loss is not finite.
    """
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except RuntimeError as error:
        if checkpoint is None or "loading state_dict" not in str(error):
            raise
        raise of_another_network(checkpoint, error) from None
    except OSError as error:
        raise UserError(
            f"cannot write below {trainer.default_root_dir}: {error} (is the disk full?); "
            "the last checkpoint there is whole, so starting again continues from it"
        ) from error


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


def write_metrics(
    path: Path, metrics: dict[str, Any], seconds: Mapping[str, float], total: float, trained: bool = True
) -> dict[str, Any]:
    """Write a run's final numbers with its wall times and return them.

    Args:
        seconds: by stage, in this process.
        total: of this process.
        trained: False where nothing was trained now: the times of the start that did it stand.
    """
    times = {**{name: round(value, 1) for name, value in seconds.items()}, "total": round(total, 1)}
    if not trained and path.is_file():
        times = json.loads(path.read_text(encoding="utf-8")).get("seconds", times)
    content = {**metrics, "seconds": times}
    write_json(path, content)
    return content


def read_logs(folder: Path) -> dict[str, dict[int, float]]:
    """The logged quantities of a stage by step, over all its starts (a later start replaces what it did again)."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key not in ("step", "epoch") and value:
                        found.setdefault(key, {})[int(float(row["step"]))] = float(value)
    return found
