"""Trainer options: ranges are checked before anything is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.options import RunOptions, TrainerOptions, at_least, check_run, check_trainer, free_options, within


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"accumulate": 0}, r"--trainer\.accumulate 0: expected a number of at least 1"),
        ({"devices": -1}, r"--trainer\.devices -1"),
        ({"log_every": 0}, r"--trainer\.log_every 0"),
        ({"checkpoint_every": 0}, r"--trainer\.checkpoint_every 0"),
        ({"threads": -2}, r"--trainer\.threads -2: expected a number of at least 0"),
        ({"accumulate": 3}, r"--trainer\.batch_size 8 cannot be divided into --trainer\.accumulate 3"),
    ],
)
def test_a_number_out_of_range_is_named(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_trainer(TrainerOptions(**given), {"trainer.batch_size": 8})


def test_sharding_refuses_averages_and_clipping_and_resume_wants_a_file(tmp_path: Path) -> None:
    check_trainer(TrainerOptions(strategy="fsdp"), {})
    with pytest.raises(UserError, match=r"set --optimiser\.ema_decay 0"):
        check_trainer(TrainerOptions(strategy="fsdp"), {}, ema_decay=0.99)
    with pytest.raises(UserError, match=r"--resume .*nothing: no such file"):
        check_trainer(TrainerOptions(), {}, resume=str(tmp_path / "nothing"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_numbers_that_are_not_finite_or_too_small_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="expected a number of at least 1"):
        at_least("x", value, 1)
    with pytest.raises(UserError, match="expected a number from 1 to 2"):
        within("x", value, 1, 2)


def test_free_options_are_the_trainers_and_the_papers_own() -> None:
    free = free_options("sampling")
    assert {"sampling", "run_dir", "resume", "trainer.devices", "trainer.threads"} <= set(free)
    assert "trainer.precision" not in free and "trainer.accumulate" not in free


def test_a_loop_of_its_own_has_these_options_without_a_section() -> None:
    free = free_options("device", section="")
    assert {"device", "run_dir", "resume", "threads", "checkpoint_every", "log_every", "progress"} <= set(free)
    check_run(RunOptions())
    with pytest.raises(UserError, match="--log_every 0: expected a number of at least 1"):
        check_run(RunOptions(log_every=0))
