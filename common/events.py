"""Event files for TensorBoard, and Weights & Biases where it was asked for: numbers by step, and the pictures drawn.

Lightning's trainers get `loggers`, loops of a paper's own a `Board`. W&B is an extra, and its runs are kept on disk:
nothing is sent unless WANDB_MODE=online says so (`wandb sync` sends them later).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from common.errors import UserError
from common.options import Events

DRAWN = ("samples", "epochs", "rounds", "generations")  # folders in which a stage draws while it goes on


def loggers(folder: Path, events: Events) -> list[Logger]:
    """Where the numbers and pictures of the stage in `folder` go.

    Raises:
        UserError: W&B was asked for and is not installed.
    """
    if events == "none":
        return []
    found: list[Logger] = [TensorBoardLogger(folder, name="tensorboard")]
    if events == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found.append(
                WandbLogger(
                    name=f"{folder.parent.name}-{folder.name}",
                    save_dir=folder,
                    project="less-compute",
                    offline=os.environ.get("WANDB_MODE") != "online",
                )
            )
        except ModuleNotFoundError:
            raise UserError(
                "logger wandb: Weights & Biases is not installed; pip install wandb, or make setup EXTRAS=dev,wandb"
            ) from None
    return found


def show_picture(to: Iterable[Logger], path: Path, step: int) -> None:
    """Send a picture (.png or .svg) to those loggers that take some, under its name without the digits."""
    name = f"{path.parent.name}/{path.stem.strip('0123456789_') or 'picture'}"
    for logger in to:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, _pixels(path), step, dataformats="HWC")
            logger.experiment.flush()
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [_pixels(path)], step)


def _pixels(path: Path) -> Any:
    """uint8 [H, W, 3]."""
    import io

    import numpy as np
    from PIL import Image

    if path.suffix == ".svg":
        import resvg_py

        with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"))))) as drawn:
            on_white = Image.new("RGBA", drawn.size, "white")
            on_white.alpha_composite(drawn.convert("RGBA"))
            return np.asarray(on_white.convert("RGB")).copy()
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).copy()


class Board:
    """The event files of a loop that keeps rows of numbers and draws into folders of its own.

    Args:
        folder: of the stage. events: where they go to. step: made before this start, whose rows are written already.
        main: False writes nothing (another process of the run does).
    """

    def __init__(self, folder: Path, events: Events, step: int = 0, main: bool = True) -> None:
        self.folder, self.events, self.main = folder, events if main else "none", main
        self._written = step
        self._shown = set(self._pictures())
        self._loggers: list[Logger] | None = None

    def keep(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write the rows since the last call, each with its `step`, and the pictures that were drawn since."""
        if self.events == "none":
            return
        if self._loggers is None:  # with the first numbers, so that a run that ends before writes nothing
            self._loggers = loggers(self.folder, self.events)
        for row in rows:
            if row["step"] > self._written:
                numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
                for logger in self._loggers:
                    logger.log_metrics(numbers, int(row["step"]))
        self._written = max(self._written, step)
        for path in self._pictures():
            if path not in self._shown:
                self._shown.add(path)
                show_picture(self._loggers, path, step)
        for logger in self._loggers:
            logger.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """No more will come, also where the loop failed: the writers' threads end."""
        for logger in self._loggers or ():
            logger.finalize("success" if kind is None else "failed")
        self._loggers = None

    def _pictures(self) -> list[Path]:
        found = (path for name in DRAWN for path in (self.folder / name).glob("*") if path.suffix in (".png", ".svg"))
        return sorted(found)
