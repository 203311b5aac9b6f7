"""Event files: numbers and pictures of Lightning's trainers and of loops of a paper's own; W&B only where asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import events
from common.errors import UserError
from common.events import Board
from common.paths import REPOSITORY, papers
from common.training import EveryNSteps, fit
from tests.common.test_training import Line, data, trainer


def read(folder: Path) -> EventAccumulator:
    (version,) = folder.glob("tensorboard/version_*")
    return EventAccumulator(str(version)).Reload()


def test_the_grids_that_a_trainer_draws_are_in_its_event_files(tmp_path: Path) -> None:
    def draw(step: int) -> None:
        (tmp_path / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (step, 0, 0)).save(tmp_path / "samples" / f"step_{step:06d}.png")

    fit(trainer(tmp_path, callbacks=[EveryNSteps(5, draw)]), Line(), data(), None)
    found = read(tmp_path)
    images = found.Images("samples/step")
    assert [(image.step, image.width, image.height) for image in images] == [(5, 6, 4), (10, 6, 4)]
    assert "wandb" not in sys.modules


def test_a_board_writes_each_row_once_and_each_picture_where_it_was_drawn(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 2.0, "note": "words"}]
    before = threading.active_count()
    with pytest.raises(InterruptedError), Board(tmp_path, "tensorboard", step=0) as board:
        assert not list(tmp_path.iterdir())
        board.keep(rows, 10)
        (tmp_path / "epochs").mkdir()
        square = '<rect width="4" height="8" fill="rgb(255,0,0)"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8">{square}</svg>'
        (tmp_path / "epochs" / "001_normal.svg").write_text(svg)
        rows.append({"step": 20, "loss": 1.0, "note": "words"})
        board.keep(rows, 20)
        board.keep(rows, 20)
        raise InterruptedError
    assert threading.active_count() <= before, "a thread that is left would be forked into other processes"
    found = read(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(10, 2.0), (20, 1.0)]
    (image,) = found.Images("epochs/normal")
    assert (image.step, image.width, image.height) == (20, 8, 8)
    pixels = events._pixels(tmp_path / "epochs" / "001_normal.svg")
    assert pixels[4, 1].tolist() == [255, 0, 0] and pixels[4, 6].tolist() == [255, 255, 255]


def test_a_start_that_goes_on_writes_neither_the_rows_nor_the_pictures_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "rounds" / "01.png")
    with Board(tmp_path, "tensorboard", step=10) as board:
        board.keep([{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}], 20)
    found = read(tmp_path)
    assert [event.step for event in found.Scalars("loss")] == [20] and found.Tags()["images"] == []


@pytest.mark.parametrize(("kind", "main"), [("none", True), ("tensorboard", False)])
def test_none_and_the_other_processes_of_a_run_write_nothing(tmp_path: Path, kind: Any, main: bool) -> None:
    Board(tmp_path, kind, main=main).keep([{"step": 1, "loss": 1.0}], 1)
    assert not list(tmp_path.iterdir())


class Recorder:
    """In place of Lightning's W&B logger."""

    made: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        Recorder.made = given


@pytest.mark.parametrize(("mode", "offline"), [(None, True), ("offline", True), ("disabled", True), ("online", False)])
def test_wandb_keeps_its_runs_on_disk_unless_it_is_told_to_send_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, offline: bool
) -> None:
    monkeypatch.setattr(events, "WandbLogger", Recorder)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    first, second = events.loggers(tmp_path / "run" / "stage", "wandb")
    assert isinstance(first, TensorBoardLogger) and isinstance(second, Recorder)
    assert Recorder.made["offline"] is offline and Recorder.made["name"] == "run-stage"
    assert [type(logger) for logger in events.loggers(tmp_path, "tensorboard")] == [TensorBoardLogger]


def test_wandb_that_is_not_installed_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: Any) -> None:
        raise ModuleNotFoundError("wandb")

    monkeypatch.setattr(events, "WandbLogger", missing)
    with pytest.raises(UserError, match="Weights & Biases is not installed; pip install wandb"):
        events.loggers(tmp_path, "wandb")


def test_a_wandb_run_is_kept_with_its_numbers_and_pictures(tmp_path: Path) -> None:
    """With the extra: a process of its own, since wandb starts a service."""
    pytest.importorskip("wandb")
    Image.new("RGB", (4, 4)).save(tmp_path / "step_000001.png")
    code = (
        "import sys; from pathlib import Path; from common.events import Board; here = Path(sys.argv[1]); "
        "b = Board(here, 'wandb').__enter__(); (here / 'samples').mkdir(); "
        "(here / 'step_000001.png').rename(here / 'samples' / 'step_000001.png'); "
        "b.keep([{'step': 1, 'loss': 2.0}], 1); b.__exit__(None)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("paper", [*papers(), "common"])
def test_every_paper_with_a_loop_of_its_own_writes_event_files(paper: str) -> None:
    texts = [file.read_text(encoding="utf-8") for file in (REPOSITORY / paper).glob("*.py")]
    loops = sum("steps.ended(" in text for text in texts)
    assert not loops or any("board.keep(" in text for text in texts)
    assert loops or any("common.training import" in text for text in texts)
