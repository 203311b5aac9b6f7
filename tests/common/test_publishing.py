"""What publishing a run shares: half precision, captions, tables, cards, the program's one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file

from common import publishing
from common.errors import UserError
from common.ledger import hardware, note_start, starts_of
from common.paths import REPOSITORY


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


ABOUT = publishing.About(
    "tiny",
    "text-to-image",
    "diffusers",
    data="ten shapes",
    seeds=[0, 1],
    commit="0123456789ab",
    measured={"fid": 12.3456789},
    judge="Lite0",
    held_out="200 held-out pictures",
    base_model="ldm/pretrained/shapes32-v",
)


def test_a_card_is_front_matter_title_and_paragraphs() -> None:
    table = publishing.facts_table({"a": "b"})
    assert table == "| | |\n|---|---|\n| a | b |"
    card = publishing.model_card(ABOUT, "One.", table + "\n")
    assert card.endswith("\n".join(["---", "# tiny", "", "One.", "", table, ""]))
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "diffusers", "text-to-image")
    assert (data.base_model, data.seeds, data.commit) == ("shapes32-v", [0, 1], "0123456789ab")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("fid", 12.345679, "fid (Lite0)")
    assert (result.dataset_name, data.training_data) == ("200 held-out pictures", "ten shapes")
    bare = ModelCard(publishing.model_card(replace(ABOUT, library=None, base_model=None), "One.")).data
    assert bare.library_name is None and bare.base_model is None


def test_a_card_names_the_code_that_trained_and_none_that_no_commit_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.ledger.commit", lambda: "0123456789ab")
    note_start(tmp_path / "a")
    monkeypatch.setattr("common.ledger.commit", lambda: "ba9876543210")
    note_start(tmp_path / "a")  # gone on with other code
    note_start(tmp_path / "a")
    assert len(starts_of(tmp_path / "a")) == 2
    found = publishing.origin([tmp_path / "a"], "torch")
    assert found["commit"] == "0123456789ab; ba9876543210"
    assert found["versions"] == f"torch {version('torch')}" and found["hardware"] == hardware()
    assert publishing.origin([tmp_path / "b"])["commit"] == "ba9876543210"  # begun before starts were noted
    monkeypatch.setattr("common.ledger.commit", lambda: "0123456789ab-dirty")
    note_start(tmp_path / "a")
    with pytest.raises(UserError, match=r"changes that were not committed.*train again"):
        publishing.origin([tmp_path / "b", tmp_path / "a"])


# Published before a card had to name a commit: what ran was this commit with changes that nobody kept.
BEFORE = {"ldm/shapes32-eps", "ldm/shapes32-v", "instaflow/shapes32"}
TASKS = {"text-to-image", "text-generation", "image-segmentation", "image-feature-extraction", "image-classification"}


def published() -> list[Path]:
    return sorted(path for path in REPOSITORY.glob("*/pretrained/*") if path.is_dir())


def test_published_folders_are_found() -> None:
    assert len(published()) >= 8


@pytest.mark.parametrize("folder", published(), ids=lambda folder: f"{folder.parts[-3]}/{folder.name}")
def test_a_published_folder_is_what_the_hub_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`upload_folder` up to the request that would send the files: all of them go, and the card is complete."""
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.license == "apache-2.0" and data.pipeline_tag in TASKS
    assert data.library_name in (None, "diffusers", "transformers", "pytorch")
    if data.base_model is not None:
        validate_repo_id(data.base_model)
    assert data.training_data and data.seeds and all(isinstance(seed, int) for seed in data.seeds)
    key = f"{folder.parts[-3]}/{folder.name}"
    for commit in data.commit.split("; "):  # one a start of the run that another commit made
        assert re.fullmatch(r"[0-9a-f]{12}" + ("(-dirty)?" if key in BEFORE else ""), commit)
    assert data.eval_results and all(math.isfinite(result.metric_value) for result in data.eval_results)
    assert {result.metric_type for result in data.eval_results} == set(data.metrics)
    for target in re.findall(r"\]\(([^)]+)\)", card.text):
        assert target.startswith("https://") or (folder / target).is_file(), f"{target} is not in the folder"

    sent: list[str] = []

    def commit(self: HfApi, repo_id: str, operations: Iterable[CommitOperationAdd], **_: object) -> None:
        sent.extend(operation.path_in_repo for operation in operations)
        raise InterruptedError

    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)  # the hub's own, a request
    with pytest.raises(InterruptedError):
        HfApi().upload_folder(folder_path=folder, repo_id="user/name")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(sent) == files and any(name.endswith(".safetensors") for name in files)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
