"""Training conventions every paper shares: run folder, exact resume, atomic checkpoints, NaN stop, EMA-safe sampling,
throughput in the progress bar, logs. The loop itself is Lightning's."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

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
        return load_checkpoint(Path(path), map_location or "cpu")


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
                f"the loss became {float(loss.detach())} at step {trainer.global_step}: stopped; {kept}. "
                "Try a lower optimiser.lr or precision 32-true"
            )


class ThroughputBar(TQDMProgressBar):
    """Lightning's bar over the whole run (not per epoch), with images per second."""

    def __init__(self, samples_per_step: int) -> None:
        super().__init__(refresh_rate=1)
        self.samples_per_step = samples_per_step
        self._last = (time.perf_counter(), 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last = (time.perf_counter(), trainer.global_step)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        now, step = time.perf_counter(), trainer.global_step
        then, before = self._last
        if step > before and now > then:
            metrics["img/s"] = f"{(step - before) * self.samples_per_step / (now - then):.0f}"
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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = (batch_idx + 1) // trainer.accumulate_grad_batches
        if (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches) == 0 and trainer.is_global_zero:
            self.action(step)


def open_run_folder(run_dir: Path, resume: str, config_yaml: str) -> None:
    """Create the run folder and save the config; refuse to mix two different runs in one folder.

    Args:
        resume: `auto` continues a run with the same config; `never` wants an empty folder; a path is left to the caller.
    """
    saved = run_dir / "config.yaml"
    if resume == "never" and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"--resume never: {run_dir} is not empty; choose another --run_dir")
    if resume == "auto" and saved.is_file() and saved.read_text() != config_yaml:
        old, new = saved.read_text().splitlines(), config_yaml.splitlines()
        changed = [line.strip() for line in new if line not in old][:3]
        raise UserError(
            f"{run_dir} holds a run with another configuration (changed: {'; '.join(changed)}): "
            "choose another --run_dir, or delete that folder"
        )
    write_atomically(saved, lambda temporary: temporary.write_text(config_yaml))


def quiet_lightning() -> None:
    """Silence Lightning's product tips and the warnings that do not apply to in-memory data."""
    for name in ("pytorch_lightning", "lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")


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
    checkpoint_every: int = 500,
    log_every: int = 20,
    progress: bool = True,
    callbacks: list[Callback] | None = None,
    logs: bool = True,
) -> pl.Trainer:
    """A Lightning Trainer with the house's conventions; everything is written below `folder`.

    `folder/checkpoints/last.ckpt` is replaced every `checkpoint_every` optimiser steps; TensorBoard and CSV logs go to
    `folder/logs/`. Training ends at `steps` optimiser steps.
    """
    quiet_lightning()
    checkpoints = folder / "checkpoints"
    own: list[Callback] = [StopOnNonFinite(checkpoints, every=1 if not torch.cuda.is_available() else 50)]
    if logs:
        own.append(
            ModelCheckpoint(
                dirpath=checkpoints,
                filename=LAST_CHECKPOINT.removesuffix(".ckpt"),
                every_n_train_steps=checkpoint_every,
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            )
        )
    if strategy == "ddp":
        # The averaged weights are buffers; every process keeps its own equal copy, so nothing has to be broadcast.
        chosen: Any = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    else:
        chosen = strategy
    show = progress and not os.environ.get("CI")
    if show:
        own.append(ThroughputBar(batch_size))
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=chosen,
        precision=precision,  # type: ignore[arg-type]
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
        enable_checkpointing=logs,
        enable_progress_bar=show,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """`folder/checkpoints/last.ckpt` if a run was interrupted there."""
    path = folder / "checkpoints" / LAST_CHECKPOINT
    return path if path.is_file() else None
