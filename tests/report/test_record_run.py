"""A finished run's table and numbers as they come into results/."""

import json
from pathlib import Path

import pytest

from report.record_run import record
from tests.refusals import refused


def finished_run(folder: Path, seconds: object) -> Path:
    folder.mkdir()
    (folder / "table.md").write_text("| arm |\n|---|\n| ours |\n")
    (folder / "metrics.json").write_text(json.dumps({"seconds": seconds, "hardware": "a laptop"}))
    (folder / "curves.png").write_bytes(b"picture")
    return folder


@pytest.mark.parametrize("seconds", [90.0, {"total": 90.0}])
def test_table_time_machine_and_pictures_are_kept(tmp_path, seconds, monkeypatch):
    monkeypatch.setattr("report.record_run.bf16_possible", lambda *_: True)
    run = finished_run(tmp_path / "electra-small", seconds)
    text = record("electra", run, {"curves.png": "Losses."}, tmp_path / "results").read_text()
    assert text == "| arm |\n|---|\n| ours |\n\n1.5 minutes in all on a laptop.\n"
    kept = json.loads((tmp_path / "results/runs/electra-small.json").read_text())
    assert kept["seconds"] == seconds and kept["versions"]["torch"] and kept["commit"]
    figures = tmp_path / "results/figures/electra"
    assert (figures / "default_run_curves.png").read_bytes() == b"picture"
    assert json.loads((figures / "captions.json").read_text()) == {"default_run_curves.png": "Losses."}


def test_another_run_of_a_paper_has_names_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("report.record_run.bf16_possible", lambda *_: True)
    run = finished_run(tmp_path / "electra-long", 60.0)
    path = record("electra", run, {"curves.png": "Losses."}, tmp_path / "results", "long")
    assert path.name == "run_electra_long.md" and (tmp_path / "results/runs/electra-long.json").is_file()
    assert (tmp_path / "results/figures/electra/default_run_long_curves.png").is_file()


def test_what_is_missing_is_named(tmp_path):
    run = finished_run(tmp_path / "run", 1.0)
    refused("unknown paper 'bert'", record, "bert", run, results=tmp_path)
    refused(r"grid\.png is missing", record, "electra", run, {"grid.png": "A grid."}, tmp_path)
    (run / "metrics.json").write_text("{}")
    refused("wall time", record, "electra", run, results=tmp_path)
    (run / "table.md").unlink()
    refused(r"table\.md is missing", record, "electra", run, results=tmp_path)
    assert not (tmp_path / "run_electra.md").exists()


def test_a_run_on_a_cpu_without_bf16_stands_beside_the_record(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "electra-small", 90.0)
    stage = run / "electra"
    stage.mkdir()
    (run / "config.yaml").write_text("trainer: {precision: auto}")
    (stage / "choices.json").write_text('{"precision": {"chosen": "32-true"}}')
    monkeypatch.setattr("report.record_run.bf16_possible", lambda *_: False)
    path = record("electra", run, results=tmp_path / "results", note="one thread")
    assert path.name == "electra-small-without-bf16.json" and not (tmp_path / "results/run_electra.md").exists()
    kept = json.loads(path.read_text())
    assert (kept["bf16_instructions"], kept["precision"], kept["seconds"]) == (False, "32-true", 90.0)
    assert kept["hardware"].endswith("; one thread")
