"""Every paper's trainer writes down what it learns from, and goes on with nothing else; every loop stops on NaN."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

from common.paths import REPOSITORY, papers
from common.training import RunFolder
from tests.refusals import refused


class Begun(Exception):
    """The run has begun and would train now."""


@pytest.mark.parametrize("paper", papers())
def test_trainer_records_its_data_before_it_trains_and_refuses_others_by_name(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = RunFolder.begin

    def stop(self: RunFolder, inputs: dict[str, str]) -> None:
        begin(self, inputs)
        raise Begun

    monkeypatch.setattr(RunFolder, "begin", stop)
    main = importlib.import_module(f"{paper}.train").main
    arguments = ["--config", str(REPOSITORY / paper / "configs" / "smoke.yaml"), "--run_dir", str(tmp_path / "run")]
    for _ in range(2):  # the same data are the same when it goes on
        with pytest.raises(Begun):
            main(arguments)
    (record,) = (tmp_path / "run").rglob("inputs.json")
    known = json.loads(record.read_text())
    assert known and all(isinstance(value, str) and value for value in known.values())
    assert known.keys() & {"data", "teacher"}, f"{paper} learns from something that it does not record"
    config = record.with_name("config.yaml")
    record.with_name("last.ckpt").touch()  # from here on there is something to go on with
    written = config.stat().st_ino
    record.write_text(json.dumps(dict.fromkeys(known, "of other files")))
    sentence = refused("was begun with .* than there is now", main, arguments)
    assert all(f"other {name}" in sentence for name in known)  # "other data", "another tokenizer"
    assert config.stat().st_ino == written  # a start that is refused rewrites nothing


def loops_without_the_stop(tree: ast.Module) -> list[str]:
    """Functions in which a loop takes gradients and an optimiser's steps and nothing looks at the loss."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
        inside = {
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            for loop in loops
            for call in ast.walk(loop)
            if isinstance(call, ast.Call)
        }
        if {"backward", "step"} <= inside and "stop_if_not_finite" not in inside:
            found.append(function.name)
    return found


def test_every_loop_of_ours_stops_when_its_loss_is_not_finite() -> None:
    rooms = [*papers(), "common", "benchmarks"]
    files = [file for name in rooms for file in (REPOSITORY / name).rglob("*.py") if "template" not in file.parts]
    texts = {str(file.relative_to(REPOSITORY)): file.read_text(encoding="utf-8") for file in files}
    bare = {name: loops_without_the_stop(ast.parse(text)) for name, text in texts.items() if ".backward(" in text}
    assert {file: names for file, names in bare.items() if names} == {}
    code = "def f():\n for x in y:\n  loss.backward()\n  optimiser.step()\n"
    assert loops_without_the_stop(ast.parse(code)) == ["f"]
