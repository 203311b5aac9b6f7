"""Training conventions every paper shares: run folder, exact resume, atomic checkpoints, NaN stop, EMA-safe sampling,
throughput in the progress bar, logs. The loop itself is Lightning's."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
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

from common.cpu import tune_allocator
from common.data.sampling import generator_step
from common.errors import UserError
from common.files import write_atomically

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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints replaced in one step and read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        bad = [k for k, v in checkpoint.get("state_dict", {}).items() if _is_float(v) and not torch.isfinite(v).all()]
        if bad:
            raise UserError(
                f"step {checkpoint.get('global_step')}: {bad[0]} is not finite; {Path(path).name} not overwritten"
            )
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

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
            kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written yet"
            raise UserError(
                f"the loss became {float(loss.detach())} at step {generator_step(trainer)}: stopped; {kept}. "
                "Try a lower optimiser.lr or precision 32-true"
            )


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


class CpuBudget(Callback):
    """Ends training after so many CPU-seconds of this process (budgets of the claims do not depend on other load)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.used = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.used = time.process_time() - self._start
        if self.used >= self.seconds:
            trainer.should_stop = True


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


def is_main_process() -> bool:
    """Whether this process writes the shared files: known from the launcher's variables before any Trainer exists."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


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
    *,
    steps: int,
    batch_size: int,
    precision: str = "32-true",
    accumulate: int = 1,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    grad_clip: float | None = None,
    optimisers: int = 1,
    checkpoint_every: int = 500,
    log_every: int = 20,
    progress: bool = True,
    callbacks: list[Callback] | None = None,
    logs: bool = True,
    unit: tuple[str, float] = ("img", 1.0),
) -> pl.Trainer:
    """A Lightning Trainer with the house's conventions; everything is written below `folder`.

    `folder/checkpoints/last.ckpt` is replaced every `checkpoint_every` optimiser steps; TensorBoard and CSV logs go to
    `folder/logs/`. Training ends at `steps` optimiser steps.

    Args:
        batch_size: samples of one step over all processes, for the throughput.
        unit: what the throughput counts, and how many of them a sample holds: ("tokens", 63.4).
        optimisers: how many a module with manual optimisation steps at most per step; such a module counts its steps
            in `step_count` and ends training itself.

    Raises:
        UserError: the machine has no such accelerator, or Lightning knows no such strategy or precision.
    """
    quiet_lightning()
    tune_allocator()
    checkpoints = folder / "checkpoints"
    own: list[Callback] = [StopOnNonFinite(checkpoints, every=1 if not torch.cuda.is_available() else 50)]
    if logs:
        own.append(SaveEvery(checkpoints, checkpoint_every, last=steps))
    if strategy == "ddp":
        # The averaged weights are buffers; every process keeps its own equal copy, so nothing has to be broadcast.
        chosen: Any = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    else:
        chosen = strategy
    show = progress and not os.environ.get("CI")
    if show:
        own.append(ThroughputBar(batch_size * unit[1], folder.name.replace("_", " "), steps, unit[0]))
    options: dict[str, Any] = dict(
        default_root_dir=folder,
        max_steps=steps * optimisers,
        max_epochs=-1,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=chosen,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=grad_clip,
        callbacks=[*own, *(callbacks or [])],
        logger=[
            CSVLogger(folder, name="logs", flush_logs_every_n_steps=log_every),
            TensorBoardLogger(folder, name="tensorboard"),
        ]
        if logs
        else False,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=log_every,
        enable_checkpointing=False,
        enable_progress_bar=show,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    try:
        return pl.Trainer(**options)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"trainer options accelerator {accelerator}, devices {devices}, strategy {strategy}, precision {precision} "
            f"do not fit this machine: {' '.join(str(error).split())}"
        ) from None


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
        detail = str(error).splitlines()[1:2] or [""]
        raise UserError(
            f"checkpoint {checkpoint} belongs to another network ({detail[0].strip()[:160]}): "
            "give the options of the run that wrote it, or choose another --run_dir"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write below {trainer.default_root_dir}: {error} (is the disk full?); "
            "the last checkpoint there is whole, so starting again continues from it"
        ) from error


def latest_checkpoint(folder: Path) -> Path | None:
    """`folder/checkpoints/last.ckpt` if a run was interrupted there."""
    path = folder / "checkpoints" / LAST_CHECKPOINT
    return path if path.exists() else None  # DeepSpeed's checkpoints are folders
