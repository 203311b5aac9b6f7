"""The wall time of a run counts all its starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common import run_clock
from common.errors import UserError
from common.files import write_json
from common.training import save_checkpoint, write_metrics


@pytest.fixture(autouse=True)
def no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_clock, "_current", None)


def kept(folder: Path) -> float:
    return json.loads((folder / "seconds.json").read_text())["seconds"]


def test_a_checkpoint_keeps_the_time_and_the_next_start_counts_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_json(run / "seconds.json", {"seconds": 1000.0})
    run_clock.begin(run)
    weights = {"weight": torch.zeros(2)}
    save_checkpoint(tmp_path / "other" / "last.ckpt", {"state_dict": weights}, weights, 1)  # of no run
    assert kept(run) == 1000.0
    run_clock._current.earlier = 1500.0  # type: ignore[union-attr]
    save_checkpoint(run / "stage" / "last.ckpt", {"state_dict": weights}, weights, 1)
    assert 1500.0 <= kept(run) < 1560.0
    run_clock.begin(run)  # after signal 9
    found = write_metrics(run / "metrics.json", {"fid": 3.0}, {"training": 40.0}, 60.0)
    assert found["seconds"]["training"] == 40.0 and 1560.0 <= found["seconds"]["total"] < 1620.0
    assert kept(run) == found["seconds"]["total"]


def test_stages_of_starts_that_ended_are_added_and_a_start_that_trained_nothing_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    run_clock.begin(tmp_path)
    write_metrics(path, {}, {"pairs": 10.0, "training": 20.0}, 35.0)
    run_clock.begin(tmp_path)
    again = write_metrics(path, {"fid": 1.0}, {}, 5.0, trained=False)
    assert again == {"fid": 1.0, "seconds": {"pairs": 10.0, "training": 20.0, "total": 35.0}}
    run_clock.begin(tmp_path)
    more = write_metrics(path, {}, {"training": 2.0, "distillation": 7.0}, 9.0)
    assert more["seconds"] == {"pairs": 10.0, "training": 22.0, "distillation": 7.0, "total": 44.0}


@pytest.mark.parametrize("seconds", [90.0, {"training": 80.0, "total": 90.0}])
def test_a_run_before_there_was_a_clock_goes_on_from_its_metrics(tmp_path: Path, seconds: object) -> None:
    write_json(tmp_path / "metrics.json", {"seconds": seconds})
    run_clock.begin(tmp_path)
    assert 90.0 <= run_clock.clock_of(tmp_path).keep() < 120.0
    assert run_clock.clock_of(tmp_path / "other").earlier == 0.0


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text('{"seconds": "many"}')
    with pytest.raises(UserError, match=r"seconds\.json"):
        run_clock.begin(tmp_path)
