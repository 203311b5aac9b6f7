"""The whole program at toy size: search, drawings, trainings, table; evaluation and transfer of what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pc_darts import evaluate
from pc_darts.config import CONFIGS
from pc_darts.train import main

SMOKE = ["--config", str(CONFIGS / "smoke.yaml"), "--progress", "false", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, main([*SMOKE, "--run_dir", str(folder)])


@pytest.mark.smoke
def test_one_command_searches_draws_trains_and_compares(run: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = run
    names = [arm["name"] for arm in metrics["arms"]]
    assert names == ["PC-DARTS", "DARTS", "random search", "random cell 1", "random cell 2"]
    for name in ("pc_darts", "darts", "random_search", "random_0", "random_1"):
        assert {"normal.svg", "reduce.svg", "genotype.json", "retrain"} <= {p.name for p in (folder / name).iterdir()}
    table = (folder / "table.md").read_text()
    assert "| PC-DARTS |" in table and "| DARTS |" in table and "2 random cells" in table
    arm = metrics["arms"][0]
    assert arm["search_memory_bytes"] > 0 and arm["search_seconds"] > 0 and 0 <= arm["test_error"] <= 1
    assert json.loads((folder / "metrics.json").read_text())["arms"] == metrics["arms"]


@pytest.mark.smoke
def test_started_again_it_repeats_nothing(run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, metrics = run
    monkeypatch.setattr("torch.optim.SGD.step", lambda *_: pytest.fail("trained again"))
    again = main([*SMOKE, "--run_dir", str(folder)])
    assert again["arms"] == metrics["arms"]
    with pytest.raises(UserError, match="another configuration"):
        main([*SMOKE, "--run_dir", str(folder), "--search.partial", "2"])


@pytest.mark.smoke
def test_trained_network_and_cell_can_be_evaluated(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, metrics = run
    model = folder / "pc_darts" / "retrain" / "model"
    found = evaluate.main(["--model", str(model), "--output", str(tmp_path / "out.json")])
    assert found["test_error"] == pytest.approx(metrics["arms"][0]["test_error"])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    with pytest.raises(UserError, match="to take its cell to other classes, use --genotype"):
        evaluate.main(["--model", str(model), "--data", "textures"])


def test_cell_is_transferred_to_another_set(tmp_path: Path) -> None:
    cell = tmp_path / "cell.json"
    from tests.pc_darts.tiny_run import CELL

    CELL.save(cell)
    options = ["--data.name", "textures", "--data.size", "16", "--data.images", "300", "--retrain.epochs", "1"]
    found = evaluate.main(["--genotype", str(cell), *SMOKE, "--run_dir", str(tmp_path / "run"), *options])
    (arm,) = found["arms"]
    assert found["data"]["name"] == "textures" and arm["search_seconds"] is None and arm["parameters"] > 0
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_published_cell_has_the_published_size() -> None:
    found = evaluate.main(["--genotype", "PC_DARTS_cifar", "--count", "--config", str(CONFIGS / "cifar.yaml")])
    assert found["parameters"] == 3_634_678 and found["macs"] == pytest.approx(556.7e6, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --model FOLDER or --genotype"),
        (["--model", "x", "--genotype", "y"], "give either"),
        (["--model", "nowhere"], "nowhere holds no network"),
        (["--model", "nowhere", "--steps", "3"], "unknown option --steps"),
        (["--genotype", "PC_DARTS_mars", "--count"], "neither a readable file nor one of"),
    ],
)
def test_mistakes_of_the_user_are_sentences(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        evaluate.main(arguments)


def test_two_caps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        main([*SMOKE, "--run_dir", str(tmp_path), "--max_parameters", "1", "--max_macs", "1"])
