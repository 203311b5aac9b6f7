"""What publishing a run shares: half precision, captions, tables, cards, the program's one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import publishing
from common.errors import UserError


def test_an_unfinished_run_is_refused_by_the_missing_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("a: 1")
    assert publishing.read_run(tmp_path) == ({"a": 1}, {})
    with pytest.raises(UserError, match=r"picture\.png is missing; expected a finished run"):
        publishing.read_run(tmp_path, "picture.png")


def test_weights_are_halved_in_place_and_counters_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(3.0), "steps": torch.tensor([7])}, path)
    publishing.copy_half(path, path)
    state = load_file(path)
    assert state["w"].dtype == torch.float16 and state["steps"].tolist() == [7]
    assert publishing.weights_megabytes(tmp_path) == path.stat().st_size / 1e6


def test_a_copied_pipeline_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    for name in ("run", "published"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text("{}")
    publishing.copy_pipeline(tmp_path / "run", tmp_path / "published")
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["run.json"]


def test_a_picture_goes_with_its_caption(tmp_path: Path) -> None:
    (tmp_path / "samples.png").write_bytes(b"picture")
    publishing.copy_picture(tmp_path / "samples.png", tmp_path / "figures" / "default_run.png", "Samples.")
    assert json.loads((tmp_path / "figures" / "captions.json").read_text()) == {"default_run.png": "Samples."}


def test_a_card_is_front_matter_title_and_paragraphs() -> None:
    table = publishing.facts_table({"a": "b"})
    assert table == "| | |\n|---|---|\n| a | b |"
    card = publishing.model_card("tiny", "diffusers", "One.", table + "\n")
    fields = ["license: apache-2.0", "library_name: diffusers", "pipeline_tag: text-to-image"]
    assert card == "\n".join(["---", *fields, "---", "# tiny", "", "One.", "", table, ""])
    assert "library_name" not in publishing.model_card("tiny", None, "One.")
