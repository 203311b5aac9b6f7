"""The shared training conventions on a module of one weight, and what protects a run folder."""

from __future__ import annotations

import errno
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from common.data.sampling import StepDataModule, TensorTable
from common.errors import UserError
from common.options import TrainerOptions
from common.training import (
    EveryNSteps,
    build_trainer,
    fit,
    is_main_process,
    latest_checkpoint,
    load_checkpoint,
    open_run_folder,
    save_checkpoint,
    train,
)
from tests.refusals import refused


class Line(pl.LightningModule):
    """Fits y = w x by gradient descent."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch["x"][:, None] - 3 * batch["x"][:, None]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimisers(Line):
    """Steps a second optimiser from step 3 on, as a discriminator does; counts its own steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def step_count(self) -> int:
        return int(self.steps)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in (self.weight, self.other)]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        optimisers: Any = self.optimizers()
        loss = (self.weight + self.other - 1).square().mean()
        self.manual_backward(loss)
        for optimiser in optimisers[: 1 + (self.step_count >= 3)]:
            optimiser.step()
            optimiser.zero_grad()
        self.steps += 1
        return loss.detach()


def data(steps: int = 10) -> StepDataModule:
    return StepDataModule(TensorTable({"x": torch.linspace(0.5, 1.5, 8)}), 4, steps, seed=0)


def options_of(**given: Any) -> TrainerOptions:
    return TrainerOptions(
        **{"precision": "32-true", "accelerator": "cpu", "progress": False, "log_every": 1, **given}  # type: ignore[arg-type]
    )


def trainer(folder: Path, **given: Any) -> pl.Trainer:
    own = {name: given.pop(name) for name in list(given) if name in TrainerOptions.__dataclass_fields__}
    return build_trainer(folder, options_of(**own), **{"steps": 10, "batch_size": 4, **given})


def test_training_ends_at_its_steps_and_leaves_one_checkpoint_and_both_logs(tmp_path: Path) -> None:
    run = trainer(tmp_path, checkpoint_every=4)
    fit(run, Line(), data(), None)
    assert run.global_step == 10
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and load_checkpoint(checkpoint)["global_step"] == 10
    assert [p.name for p in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert len((tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()) == 11
    assert list(tmp_path.glob("tensorboard/version_0/events*"))


@pytest.mark.parametrize("asked", [True, False])
def test_networks_are_compiled_while_they_are_trained_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    seen: list[bool] = []

    class Layered(Line):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            seen.append(self.layer._compiled_call_impl is not None)
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # the compiler itself takes half a minute
    module, drawn = Layered(), []
    draw = EveryNSteps(1, lambda _: drawn.append(module.layer._compiled_call_impl))
    train(
        tmp_path,
        module,
        data(2),
        options_of(compile=asked),
        steps=2,
        batch_size=4,
        logs=False,
        callbacks=[draw],
        networks=[module.layer],
    )
    assert seen == [asked] * 2 and module.layer._compiled_call_impl is None
    assert drawn == [None] * 2  # pictures on the way have other sizes


def test_checkpoints_come_at_their_steps_although_global_step_jumps(tmp_path: Path) -> None:
    saved = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            path = latest_checkpoint(tmp_path)
            saved.append(int(load_checkpoint(path)["state_dict"]["steps"]) if path else 0)
            trainer.should_stop = pl_module.step_count == 9

    # From step 3 on global_step is odd (3, 5, 7, ...): it meets no multiple of 4.
    fit(trainer(tmp_path, optimisers=2, checkpoint_every=4, callbacks=[Watch()]), TwoOptimisers(), data(), None)
    assert saved == [0, 0, 0, 0, 4, 4, 4, 4, 8]  # as they were before the step's own


def test_action_runs_once_every_n_steps_whatever_is_accumulated(tmp_path: Path) -> None:
    steps: list[int] = []
    loader = StepDataModule(TensorTable({"x": torch.linspace(0.5, 1.5, 8)}), 4, 10, seed=0, accumulate=2)
    fit(trainer(tmp_path, accumulate=2, logs=False, callbacks=[EveryNSteps(3, steps.append)]), Line(), loader, None)
    assert steps == [3, 6, 9] and not list(tmp_path.iterdir())


def test_bar_shows_stage_and_throughput_in_few_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    fit(trainer(tmp_path / "first_stage", steps=100, progress=True), Line(), data(100), None)
    printed = capfd.readouterr()
    assert "first stage" in printed.out and "img/s=" in printed.out and "100/100" in printed.out
    assert printed.out.count("\r") + printed.out.count("\n") < 60, "a log file must not get a line per step"
    assert "Tip" not in printed.out + printed.err and "GPU available" not in printed.err


def test_the_bar_of_a_run_that_goes_on_knows_its_label_its_end_and_its_rate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    folder = tmp_path / "first_stage"

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 80

    fit(trainer(folder, steps=100, checkpoint_every=80, callbacks=[Stop()]), Line(), data(100), None)
    capfd.readouterr()
    going_on = trainer(folder, steps=100, progress=True)
    fit(going_on, Line(), data(100), latest_checkpoint(folder))
    shown = capfd.readouterr().out
    assert "first stage:  80%" in shown and "100/100" in shown and "/?" not in shown.split("80/100")[1]
    bar = going_on.progress_bar_callback.train_progress_bar  # type: ignore[union-attr]
    assert (bar.initial, bar.n, bar.total) == (80, 100, 100)  # its rate counts 20 steps


def test_network_of_another_shape_and_unusable_options_are_one_sentence(tmp_path: Path) -> None:
    fit(trainer(tmp_path), Line(), data(), None)
    with pytest.raises(UserError, match=r"last.ckpt belongs to another network .*size mismatch for weight") as failure:
        fit(trainer(tmp_path), Line(width=2), data(), latest_checkpoint(tmp_path))
    assert "\n" not in str(failure.value)
    for options in ({"strategy": "dpp"}, {"precision": "12-mixed"}, {"accelerator": "abacus"}):
        refused(r"trainer options .* do not fit this machine", trainer, tmp_path, **options)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, checkpoint_every=5), Line()
    fit(run, module, data(), None)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    before = path.read_bytes()
    module.weight.data.fill_(float("nan"))
    refused(r"step 10: weight is not finite; last.ckpt not overwritten", run.save_checkpoint, path)
    assert path.read_bytes() == before


CONFIG = "lr: 0.1\ntrainer: {devices: 1, steps: 5}\nrun_dir: a\n"


def test_run_folder_takes_the_same_run_again_and_no_other(tmp_path: Path) -> None:
    free = ("run_dir", "trainer.devices")
    for text in (
        CONFIG,
        CONFIG.replace("devices: 1", "devices: 2").replace("a\n", "b\n"),
        CONFIG + "newer_option: 3\n",
    ):
        open_run_folder(tmp_path / "run", "auto", text, free).begin({})
        assert (tmp_path / "run" / "config.yaml").read_text() == text
    with pytest.raises(UserError, match=r"another configuration \(trainer.steps was 5, is 6\)"):
        open_run_folder(tmp_path / "run", "auto", CONFIG.replace("steps: 5", "steps: 6"), free)
    assert "steps: 5" in (tmp_path / "run" / "config.yaml").read_text()
    for before, after in (("false", "auto"), ("true", "auto")):  # before there was auto, nothing was compiled unasked
        texts = [CONFIG.replace("steps: 5", f"compile: {value}") for value in (before, after)]
        open_run_folder(tmp_path / before, "auto", texts[0], free).begin({})
        if before == "false":
            open_run_folder(tmp_path / before, "auto", texts[1], free).begin({})
        else:
            refused("trainer.compile was True, is auto", open_run_folder, tmp_path / before, "auto", texts[1], free)
    refused(r"--resume never: .* is not empty", open_run_folder, tmp_path / "run", "never", CONFIG, free)
    refused("is a file", open_run_folder, tmp_path / "run" / "config.yaml", "auto", CONFIG, free)


def begin(folder: Path, text: str = CONFIG, resume: str = "auto", **inputs: str) -> None:
    open_run_folder(folder, resume, text, ("trainer.devices",), {"data": ["run_dir"]}).begin(inputs)


def test_run_goes_on_with_what_it_was_begun_with_and_names_what_is_another(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", CONFIG.replace("devices: 1", "devices: 2")
    begin(folder, data="9")  # and fails, since the data were bad; now they are better
    begin(folder, data="1", tokenizer="2", classes="cat, dog")
    (folder / "last.ckpt").touch()
    begin(folder, data="1", tokenizer="2", classes="cat, dog")
    for changed, sentence in (
        ({"data": "3"}, "was begun with other data than there is now, and"),
        ({"tokenizer": "3"}, "was begun with another tokenizer than"),
        ({"classes": "ape, dog"}, r"other classes .*\(classes were cat, dog, are ape, dog\)"),
        ({"data": "3", "tokenizer": "3"}, "other data and another tokenizer"),
    ):
        refused(sentence, begin, folder, other, **{"data": "1", "tokenizer": "2", "classes": "cat, dog", **changed})
        assert (folder / "config.yaml").read_text() == CONFIG  # nothing is written before a refusal
    begin(folder, other, data="1", tokenizer="2", classes="cat, dog")
    assert (folder / "config.yaml").read_text() == other


def test_data_may_be_moved_where_their_fingerprint_is_known(tmp_path: Path) -> None:
    moved = CONFIG.replace("run_dir: a", "run_dir: b")
    begin(tmp_path / "old")
    (tmp_path / "old" / "last.ckpt").touch()
    refused(r"another configuration \(run_dir was a, is b\)", begin, tmp_path / "old", moved, data="1")
    begin(tmp_path / "run", data="1")
    (tmp_path / "run" / "last.ckpt").touch()
    refused(r"other data .*\(run_dir was a, is b\)", begin, tmp_path / "run", moved, data="2")
    refused(r"another configuration \(run_dir was a, is b\)", begin, tmp_path / "run", moved)  # there is none now
    begin(tmp_path / "run", moved, data="1")


def test_run_of_before_there_were_records_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "run")
    (tmp_path / "run" / "last.ckpt").touch()
    capsys.readouterr()
    begin(tmp_path / "run", data="1")
    assert "its data were not recorded when it was begun" in capsys.readouterr().err
    begin(tmp_path / "run", data="1")
    assert capsys.readouterr().err == ""
    refused("other data", begin, tmp_path / "run", data="2")


def test_checkpoint_of_another_folder_goes_on_with_that_folders_inputs(tmp_path: Path) -> None:
    begin(tmp_path / "run", data="1")
    checkpoint = tmp_path / "run" / "stage" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    refused(f"{tmp_path / 'run'} was begun with other data", begin, tmp_path / "b", resume=str(checkpoint), data="2")
    assert not (tmp_path / "b").exists()
    begin(tmp_path / "b", resume=str(checkpoint), data="1")


def test_flipped_bits_of_a_checkpoint_never_change_what_is_read(tmp_path: Path) -> None:
    path, weight = tmp_path / "last.ckpt", torch.randn(500)
    save_checkpoint(path, {"weight": weight, "step": 7}, {}, 7)
    whole, refusals = path.read_bytes(), 0
    for number in torch.randint(8 * len(whole), (100,)).tolist():
        content = bytearray(whole)
        content[number // 8] ^= 1 << number % 8
        path.write_bytes(content)
        try:
            found = load_checkpoint(path)
            assert torch.equal(found["weight"], weight) and found["step"] == 7  # a bit that says nothing
        except UserError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 50


def test_only_the_main_process_touches_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_main_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_main_process()
    open_run_folder(tmp_path / "run", "never", CONFIG).begin({"data": "1"})
    assert not (tmp_path / "run").exists()


def test_full_disk_stops_with_a_sentence_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(content: Any, path: Any) -> None:
        if latest_checkpoint(tmp_path) is not None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    sentence = r"cannot write .*last.ckpt: .*No space left.*last.ckpt is kept"
    refused(sentence, fit, trainer(tmp_path, checkpoint_every=3), Line(), data(), None)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and [p.name for p in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert load_checkpoint(checkpoint)["global_step"] == 3


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


CHECKPOINT = io.BytesIO()
torch.save({"state_dict": {}, "optimizer_states": [], "loops": {}}, CHECKPOINT)
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "truncated": (lambda path: path.write_bytes(CHECKPOINT.getvalue()[:900]), "truncated or not a torch checkpoint"),
    "with code": (lambda path: torch.save({"state_dict": Harmful()}, path), "holds pickled Python objects.*refused"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "refused|truncated"),
    "tensors only": (lambda path: torch.save({"state_dict": {}}, path), "has no 'optimizer_states'"),
    "a list": (lambda path: torch.save([1, 2], path), "holds a list"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_checkpoint_is_refused_and_its_code_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, sentence = DAMAGED[kind]
    bad = tmp_path / "bad.ckpt"
    write(bad)
    assert str(bad) in refused(sentence, fit, trainer(tmp_path), Line(), data(), bad)
    assert not (tmp_path / "harm").exists()
