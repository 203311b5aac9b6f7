"""Clocks of runs that were stopped and gone on."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json
from common.loops import Clock


def test_a_run_that_goes_on_counts_its_earlier_starts(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    assert 0 <= Clock.of_run(metrics).seconds < 60
    write_json(metrics, {"seconds": 1000.5})
    clock = Clock.of_run(metrics)
    assert 1000.5 <= clock.seconds < 1060


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"seconds": "many"}')
    with pytest.raises(UserError, match=r"metrics\.json"):
        Clock.of_run(metrics)
