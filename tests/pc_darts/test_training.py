"""Training of derived cells: exact resume, drop path, reports, refusal of foreign files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.training import load_checkpoint
from pc_darts.baselines import random_genotype
from pc_darts.model import FinalNetwork
from pc_darts.retraining import Retraining, RetrainResult, load_model, retrain
from pc_darts.training import Machine, accuracy, open_machine
from tests.pc_darts.tiny_run import AUGMENT, CELL, RETRAIN, digits, on_two_processes, training


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrain")
    training(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.ckpt")["network"]


def test_training_leaves_result_weights_and_log(reference: Path) -> None:
    result = RetrainResult.load(reference / "retrain.json")
    assert result.steps == 6 and [row["epoch"] for row in result.history] == [0, 1]
    assert 0 <= result.test_accuracy <= 1 and result.test_error == 1 - result.test_accuracy
    assert [row["drop_path"] for row in result.history] == pytest.approx([0.0, 0.1])
    assert (reference / "log.csv").read_text().count("\n") == 7
    network = FinalNetwork(CELL, RETRAIN.network(len(digits().classes), digits().channels))
    auxiliary = network.auxiliary_head
    assert auxiliary is not None
    whole = sum(p.numel() for p in network.parameters())
    assert result.parameters == whole - sum(p.numel() for p in auxiliary.parameters())


def test_saved_network_gives_the_reported_accuracy(reference: Path) -> None:
    network, about = load_model(reference / "model")
    result = RetrainResult.load(reference / "retrain.json")
    assert accuracy(network, digits(), digits().test) == result.test_accuracy
    assert about["classes"] == list(digits().classes) and network.genotype == CELL


def test_two_processes_train_what_one_does(reference: Path, tmp_path: Path) -> None:
    on_two_processes(lambda machine: training(tmp_path / "run", machine), tmp_path / "store")
    ours, theirs = (RetrainResult.load(folder / "retrain.json") for folder in (tmp_path / "run", reference))
    assert len(ours.history) == 2 and ours.history[1]["drop_path"] > 0
    for a, b in zip(ours.history, theirs.history):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_finished_training_is_read_and_another_cell_refused(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("trained again"))
    assert training(reference).steps == 6
    with pytest.raises(UserError, match="result of another cell"):
        retrain(random_genotype(0, 2), RETRAIN, digits(), AUGMENT, reference)


def test_unfinished_training_of_another_cell_is_refused(tmp_path: Path) -> None:
    retrain(CELL, RETRAIN, digits(), AUGMENT, tmp_path, stop_after=1)
    with pytest.raises(UserError, match="training of another cell"):
        retrain(random_genotype(0, 2), RETRAIN, digits(), AUGMENT, tmp_path)


def test_seed_decides_weights(reference: Path, tmp_path: Path) -> None:
    training(tmp_path, seed=1)
    ours, theirs = weights(tmp_path), weights(reference)
    assert any(not torch.equal(ours[name], value) for name, value in theirs.items())


def test_nan_loss_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pc_darts.retraining.final_loss", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(UserError, match=r"the training loss became nan at step 1: stopped; no checkpoint"):
        training(tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


def test_checkpoint_with_a_nan_weight_is_not_written(tmp_path: Path) -> None:
    loop = Retraining(CELL, RETRAIN, digits(), AUGMENT, tmp_path, 0, Machine(), None)
    loop.save()
    loop.step, weight = 2, next(loop.network.parameters())
    weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"step 2: \S+ is not finite; last.ckpt not overwritten"):
        loop.save()
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 0


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_damaged_model_is_refused(reference: Path, tmp_path: Path, name: str) -> None:
    for file in (reference / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(UserError, match=r"not valid JSON|truncated"):
        load_model(tmp_path)


def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="has no CUDA device"):
        open_machine("cuda")
    assert open_machine("auto").device.type == "cpu"


def test_mean_over_one_process_is_the_value() -> None:
    values: list[Any] = [torch.ones(2), torch.zeros(3)]
    Machine().average(values)
    assert torch.equal(values[0], torch.ones(2))
