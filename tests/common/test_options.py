"""Ranges of numbers and the trainer's options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from common.errors import UserError
from common.options import (
    Count,
    Portion,
    Range,
    RunOptions,
    TrainerOptions,
    check_ranges,
    device,
    free_options,
    refuse_large_batch,
)
from common.training import check_trainer


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"accumulate": 0}, r"--trainer\.accumulate 0: expected a whole number of at least 1"),
        ({"devices": -1}, r"--trainer\.devices -1"),
        ({"log_every": 0}, r"--trainer\.log_every 0"),
        ({"checkpoint_every": 0}, r"--trainer\.checkpoint_every 0"),
        ({"threads": -2}, r"--trainer\.threads -2: expected a whole number from 0 to 4096"),
        ({"accumulate": 3}, r"--trainer\.batch_size 8 cannot be divided into --trainer\.accumulate 3"),
    ],
)
def test_a_number_out_of_range_is_named(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_trainer(TrainerOptions(**given), {"trainer.batch_size": 8})


def test_sharding_refuses_averages_and_clipping_and_resume_wants_a_file(tmp_path: Path) -> None:
    check_trainer(TrainerOptions(strategy="ddp"), {}, ema_decay=0.99, grad_clip=1.0)
    with pytest.raises(UserError, match=r"set --optimiser\.ema_decay 0"):
        check_trainer(TrainerOptions(strategy="fsdp"), {}, ema_decay=0.99)
    with pytest.raises(UserError, match=r"--resume .*nothing: no such file"):
        check_trainer(TrainerOptions(), {}, resume=str(tmp_path / "nothing"))


@pytest.mark.parametrize("given", [{"strategy": "magic"}, {"accelerator": "abacus"}, {"accelerator": "tpu"}])
def test_a_machine_that_is_not_there_is_refused_before_anything_is_written(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"trainer options .*{next(iter(given.values()))}.* do not fit this machine"):
        check_trainer(TrainerOptions(**given), {})


@pytest.mark.parametrize(
    ("kind", "allowed", "value", "sentence"),
    [
        (int, Range(1), 0, "--x 0: expected a whole number of at least 1"),
        (int, Range(1), 1.5, r"--x 1\.5: expected a whole number of at least 1"),
        (int, Range(1), 10**22, "expected a whole number from 1 to 1000000000"),
        (int, Range(1), True, "--x True: expected a whole number"),
        (int, Range(1), "many", "--x many: expected a whole number"),
        (float, Range(0), math.nan, "--x nan: expected a number of at least 0"),
        (float, Range(0), math.inf, "--x inf: expected a number of at least 0"),
        (float, Range(0), 1e30, r"--x 1e\+30: expected a number from 0 to 1000000$"),
        (float, Range(0, 1), -0.1, "expected a number from 0 to 1"),
        (float, Range(0, 1, above=True), 0.0, "expected a number above 0 and at most 1"),
        (float, Range(0, above=True), 0, "expected a number above 0$"),
    ],
)
def test_what_no_range_holds_is_refused_by_name(kind: type, allowed: Range, value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        allowed.check("x", value, kind)


def test_the_ends_of_a_range_belong_to_it() -> None:
    for value in (1, 10**9):
        Range(1).check("x", value, int)
    for value in (0, 0.5, 1):
        Range(0, 1).check("x", value, float)


@dataclass
class Part:
    share: Portion = 0.5
    bits: Annotated[int, Range(2, 8)] = 4


@dataclass
class Whole:
    widths: list[Count] = field(default_factory=lambda: [1, 2])
    heads: Literal[-1] | Count = -1
    limit: Count | None = None
    name: str = "x"
    note: str = ""
    part: Part = field(default_factory=Part)
    then: Part | None = None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"widths": [3, 0]}, "--widths 0: expected a whole number"),
        ({"heads": -2}, "--heads -2"),
        ({"limit": 0}, "--limit 0"),
        ({"name": " "}, "--name ' ': expected text that is not empty"),
        ({"name": "a\0b"}, "--name .*expected text"),
        ({"note": "\udcff"}, "--note .*expected text"),
        ({"part": Part(bits=9)}, r"--part\.bits 9: expected a whole number from 2 to 8"),
        ({"then": Part(share=0)}, r"--then\.share 0: expected a number above 0 and at most 1"),
    ],
)
def test_every_value_of_nested_options_is_checked(given: dict[str, Any], sentence: str) -> None:
    check_ranges(Whole())
    check_ranges(Whole(heads=4, limit=1, then=Part()))
    with pytest.raises(UserError, match=sentence):
        check_ranges(Whole(**given))


@pytest.mark.parametrize("word", ["foo", "", "cuda:x", "cpu:0", "mps", "cuda:64"])
def test_a_device_that_is_none_is_refused(word: str) -> None:
    assert device("cpu") == "cpu"
    with pytest.raises(UserError, match=f"--device {word}: (expected cpu, cuda or cuda:N|this machine has)"):
        device(word)


def test_free_options_are_the_trainers_and_the_papers_own() -> None:
    free = free_options("sampling")
    assert {"sampling", "run_dir", "resume", "trainer.devices", "trainer.threads"} <= set(free)
    assert "trainer.precision" not in free and "trainer.accumulate" not in free


def test_a_loop_of_its_own_has_these_options_without_a_section() -> None:
    free = free_options("device", section="")
    assert {"device", "run_dir", "resume", "threads", "checkpoint_every", "log_every", "progress"} <= set(free)
    with pytest.raises(UserError, match="--log_every 0: expected a whole number of at least 1"):
        check_ranges(RunOptions(log_every=0))


def test_a_small_set_may_be_smaller_than_a_batch_but_not_by_much() -> None:
    refuse_large_batch("trainer.batch_size", 64, 16)
    with pytest.raises(UserError, match=r"^--trainer\.batch_size 65: expected at most 4 times the 16 pictures$"):
        refuse_large_batch("trainer.batch_size", 65, 16, "pictures")
