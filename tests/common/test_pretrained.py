"""Folders of diffusers and transformers are read by one loader, and never run code that comes with them."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.paths import REPOSITORY
from common.pretrained import CONFIGS, from_folder, refuse_code
from common.teacher import Teacher, open_pipeline
from tests.common.tiny_teacher import save_teacher
from tests.refusals import refused
from tests.test_house import modules

CODE = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit('code of a model was run')\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher with Python files in every part; a question ends the test."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run a folder's code"))
    folder = save_teacher(tmp_path / "teacher")
    for place in (folder, *(part for part in folder.iterdir() if part.is_dir())):
        for name in ("own.py", "pipeline.py", "modeling_own.py"):
            (place / name).write_text(CODE)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_that_no_config_names_is_not_in_the_way(folder: Path) -> None:
    assert Teacher.load(folder).latent_shape == (4, 8, 8) and not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"_class_name": "MyPipeline"},
        {"unet": ["own", "MyUNet"]},
        {"scheduler": ["own", "MyScheduler"]},
        {"text_encoder": ["modeling_own", "MyEncoder"]},
    ],
    ids=str,
)
def test_a_pipeline_of_its_own_code_is_refused(index: dict[str, Any], folder: Path) -> None:
    edit(folder / "model_index.json", **index)
    assert str(folder) in refused("_class_name|cannot be read|expected a transformers class", open_pipeline, folder)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_names_code_is_refused_without_a_question(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}}))
    refused(f"{name}: auto_map asks to run Python code", refuse_code, tmp_path)


def test_every_program_with_a_folder_refuses_its_code(folder: Path, tmp_path: Path) -> None:
    from common.data.text import TextEncoder
    from instaflow.sample import main as instaflow_sample
    from instaflow.train import main as instaflow_train
    from ldm.sample import main as ldm_sample
    from pixart.captioner import Captioner
    from pixart.sample import main as pixart_sample

    auto_map = {"AutoModel": "modeling_own.Own", "AutoConfig": "modeling_own.Config", "AutoTokenizer": ["own.T", None]}
    for part in ("vae", "text_encoder"):
        edit(folder / part / "config.json", auto_map=auto_map)
    out = ["--out", str(tmp_path / "out.png"), "--prompt", "a red star"]
    flow = Path(shutil.copytree(folder, tmp_path / "flow"))
    encoder = folder / "text_encoder"
    programs = [
        lambda: ldm_sample(["--model", str(folder), *out]),
        lambda: instaflow_sample(["--model", str(flow), "--layout", "official", *out]),
        lambda: instaflow_train(["--teacher", str(folder), "--run_dir", str(tmp_path / "run")]),
        lambda: pixart_sample(["--vae", str(folder / "vae"), *out]),
        lambda: pixart_sample(["--text_encoder", str(encoder), *out]),
        lambda: TextEncoder(encoder),
        lambda: Captioner(encoder),
    ]
    for program in programs:
        refused("auto_map asks to run Python code that comes with the files", program)
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "out.png").exists()
    assert not (tmp_path / "run").exists(), "refused before anything is written"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    refused("absent: no such folder; expected one that transformers has written", from_folder, AutoTokenizer, "absent")


def test_no_other_module_opens_such_folders() -> None:
    others = [
        name
        for name, file in modules(REPOSITORY).items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and name != "common.pretrained"
    ]
    assert others == []
