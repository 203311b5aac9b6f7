"""The loop over claims and seeds: kept measurements, settings, records, and the options of every reproduce.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.ledger import Claim, PaperValue, Target
from common.reproduction import chosen_claims, ledger_path, measure_claims, options_parser

CLAIM = Claim("X1", "more is more", PaperValue("1", "table 1"), Target("at least 1", "gain", ">=", 1.0), "smoke")
SEEDS = (3, 5)


def test_an_interrupted_measurement_continues_after_its_last_finished_seed(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(name: str, seed: int) -> dict[str, float]:
        calls.append(seed)
        if calls == [3, 5]:
            raise KeyboardInterrupt
        return {"gain": float(seed)}

    arguments = ([CLAIM], lambda _: SEEDS, measure, tmp_path / "kept", tmp_path / "out.json")
    with pytest.raises(KeyboardInterrupt):
        measure_claims(*arguments)
    assert not (tmp_path / "out.json").exists()
    (record,) = measure_claims(*arguments)
    assert calls == [3, 5, 5]
    assert [(row["seed"], row["gain"]) for row in record["measured"]] == [(3, 3.0), (5, 5.0)]
    assert record["mean"] == 4.0 and record["holds"]
    assert json.loads((tmp_path / "out.json").read_text())["claims"][0]["id"] == "X1"


def test_other_settings_measure_again_and_equal_ones_do_not(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(name: str, seed: int) -> dict[str, float]:
        calls.append(seed)
        return {"gain": 2.0}

    for settings in ({"rate": 1}, {"rate": 1}, {"rate": 2}):
        measure_claims([CLAIM], lambda _: [0], measure, tmp_path, tmp_path / "out.json", settings=settings)
    assert len(calls) == 2


def test_without_writing_the_measurements_are_kept_and_no_record_is_made(tmp_path: Path) -> None:
    done = measure_claims(
        [CLAIM], lambda _: [1], lambda *_: {"gain": 2.0}, tmp_path, tmp_path / "out.json", write=False
    )
    assert done == [] and not (tmp_path / "out.json").exists()
    assert json.loads((tmp_path / "X1-seed1.json").read_text())["values"] == {"gain": 2.0}


def test_a_number_that_is_not_finite_fails_the_claim_also_when_read_again(tmp_path: Path) -> None:
    for _ in range(2):
        (record,) = measure_claims(
            [CLAIM], lambda _: [0], lambda *_: {"gain": float("nan")}, tmp_path, tmp_path / "out.json"
        )
        assert record["mean"] is None and not record["holds"]


def test_a_changed_target_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    measure_claims([CLAIM], lambda _: [0], lambda *_: {"gain": 2.0}, tmp_path, output)
    looser = Claim("X1", CLAIM.statement, CLAIM.paper, Target("at least 0", "gain", ">=", 0.0), "smoke")
    with pytest.raises(UserError, match="X1"):
        measure_claims([looser], lambda _: [9], lambda *_: pytest.fail("measured"), tmp_path, output)


def test_options_name_the_tiers_claims_and_the_place_of_the_ledger(tmp_path: Path) -> None:
    parser = options_parser("paper", "about")
    options = parser.parse_args(["--tier", "smoke", "--claims", "A", "B"])
    assert chosen_claims(options, ["A", "B", "C"]) == ["A", "B"]
    assert ledger_path(options, "paper").name == "paper-smoke.json"
    assert chosen_claims(parser.parse_args([]), ("A", "C")) == ["A", "C"]
    assert ledger_path(parser.parse_args([]), "paper").parts[-2:] == ("results", "paper.json")
    assert ledger_path(parser.parse_args(["--output", str(tmp_path / "x.json")]), "paper") == tmp_path / "x.json"
    with pytest.raises(UserError, match="--claims D: tier small has A, C"):
        chosen_claims(parser.parse_args(["--claims", "D"]), ["A", "C"])
