"""Publishing a finished recipe: complete folders only, and a table whose numbers are the run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from common.errors import UserError
from pixart import publish as publishing
from pixart.publish import publish, read_stages, stage_table

SCORES = {task: 0.25 for task in publishing.TASKS}
SUMMARY = {"kid_lite0": 0.5, "fid_lite0": 400.0, "floor/kid_lite0": 0.01, "floor/fid_lite0": 90.0}
METRICS: dict[str, Any] = {
    "task": "text",
    "seconds": {"training": 10.0, "features": 2.0, "evaluation": 3.0},
    "held_out": {"mse": 0.0321, "penalty": 1.5},
    "summary": {**SUMMARY, "metrics_at_floor_n/fid_lite0": 420.0},
    "own_captions": SCORES,
    "shapes_score": SCORES,
    "judge": {"n_fake": 20, "n_real": 30},
    "sampling": {"steps": 20, "sampler": "dpm-solver", "guidance": 4.5},
    "parameters": 123,
}


def finished_run(folder: Path) -> Path:
    sampling = {"sampler": "dpm-solver", "steps": 20, "guidance": 4.5}
    config = {
        "seed": 0,
        "data": {"size": 32},
        "sampling": sampling,
        "trainer": {"max_steps": 7, "batch_size": 4, "threads": 1},
    }
    for name, metrics in (("stage1", {"task": "class", "seconds": METRICS["seconds"]}), ("stage2", METRICS)):
        (folder / name / "model").mkdir(parents=True)
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / name / "metrics.json").write_text(json.dumps(metrics))
        (folder / name / "samples.png").write_bytes(b"picture of " + name.encode())
        save_file({"w": torch.arange(3.0)}, folder / name / "model" / "model.safetensors")
        for file in ("config.json", "pixart.json"):
            (folder / name / "model" / file).write_text("{}")
        start = {"hardware": "a machine", "versions": {"torch": "2"}, "commit": "0123456789ab"}
        (folder / name / "origin.json").write_text(json.dumps({"starts": [start]}))
    (folder / "metrics.json").write_text(
        json.dumps({"stages": {"stage1": {}, "stage2": {}}, "seconds": {"total": 90.0}})
    )
    return folder


def test_a_stage_without_pictures_has_dashes_and_the_other_its_own_numbers(tmp_path: Path) -> None:
    lines = stage_table(read_stages(finished_run(tmp_path))).splitlines()
    assert lines[2] == "| stage1 | 32 | 7 x 4 | 1 | 10 | 5 | - | - | - | - | - |"
    assert lines[3] == "| stage2 | 32 | 7 x 4 | 1 | 10 | 5 | 0.0321 | 1.50 | 400 | 0.25 | 0.25 |"


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Sheets are not drawn: the first has one prompt right, each later one one more; returns whose they were."""
    drawn: list[Path] = []

    def draw(weights: Path, data: Any, sampling: Any, picture: Path | None) -> list[bool]:
        drawn.append(weights)
        if picture is not None:
            picture.write_bytes(b"a sheet")
        return [place < len(drawn) for place in range(24)]

    monkeypatch.setattr(publishing, "draw_sheet", draw)
    return drawn


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    results = tmp_path / "results"
    (results / "runs").mkdir(parents=True)
    monkeypatch.setattr(publishing, "RESULTS", results)
    monkeypatch.setattr(publishing, "PRETRAINED", tmp_path / "pretrained")
    return results


def test_published_folder_holds_the_last_stage_in_half_precision(
    tmp_path: Path, results: Path, sheets: list[Path]
) -> None:
    target = publish(finished_run(tmp_path / "pixart-small"), "tiny")
    assert load_file(target / "model.safetensors")["w"].dtype == torch.float16
    assert (target / "samples.png").read_bytes() == b"a sheet" and sheets == [target]
    text = (target / "README.md").read_text()
    assert "| mean | 0.250 | 0.250 |" in text and "1 of 24 fixed prompts are right by the exact verifier. 20" in text
    assert json.loads((results / "runs" / "pixart-small.json").read_text())["stages"]["stage2"]["held_out"]["mse"]
    assert (results / "figures" / "pixart" / "pretrained_sheet.png").read_bytes() == b"a sheet"
    table = (results / "run_pixart.md").read_text()
    assert table.count("| stage2 |") == 1 and "1.5 minutes in all on" in table
    assert (results / "figures" / "pixart" / "default_run_stage2.png").read_bytes() == b"picture of stage2"


def test_another_run_takes_the_place_of_the_weights_and_leaves_the_default_runs_pictures(
    tmp_path: Path, results: Path, sheets: list[Path]
) -> None:
    publish(finished_run(tmp_path / "pixart-small"), "tiny")
    kept = (results / "run_pixart.md").read_bytes()
    target = publish(finished_run(tmp_path / "other"), "tiny")
    text = (target / "README.md").read_text()
    assert "3 of 24 fixed prompts are right by the exact verifier (with the weights that were here before 2)." in text
    told = (results / "pretrained_pixart.md").read_text()
    assert "| fixed sheet | 3 of 24 fixed prompts" in told and "| held-out eps-MSE | 0.0321 |" in told
    assert (results / "runs" / "other.json").is_file() and (results / "run_pixart.md").read_bytes() == kept


def test_the_sheet_has_four_prompts_of_each_task_and_the_verifiers_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Drawn:
        size = 32

        def captions(self, texts: list[str], height: int, width: int, *_: Any) -> torch.Tensor:
            asked.extend(texts)
            return torch.full((len(texts), 3, height, width), 255, dtype=torch.uint8)

    monkeypatch.setattr("pixart.sample.open_painter", lambda _: Drawn())
    world = {"shapes": ["circle", "star", "heart"], "colours": ["red", "blue", "pink"]}
    right = publishing.draw_sheet(tmp_path, world, METRICS["sampling"], tmp_path / "sheet.png")
    assert right == [False] * 24 and len(asked) == 24  # white pictures show nothing
    assert not any(word in " ".join(asked) for word in ("square", "green", "striped"))
    assert (tmp_path / "sheet.png").is_file()


def test_an_unfinished_recipe_is_refused_by_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.json is missing"):
        read_stages(tmp_path)
    run = finished_run(tmp_path / "run")
    (run / "stage2" / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"stage2.*model\.safetensors is missing"):
        read_stages(run)
