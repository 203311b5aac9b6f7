"""The loop over claims and seeds: kept measurements, settings, records, and the options of every reproduce.py."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from common import reproduction
from common.ledger import read_claims
from common.reproduction import chosen_claims, ledger_path, measure_claim, options_parser
from common.study import Study
from tests.refusals import refused

FILE = """
tiers:
  small: {seeds: [0, 1, 2], budget: {steps: 10}}
  smoke: {seeds: [3, 5], budget: {steps: 1}}
claims:
  - id: X1
    statement: more is more
    paper: {value: 1, source: table 1}
    target: {text: at least 1, metric: gain, op: ">=", value: 1.0}
    tiers: [small, smoke]
  - id: X2
    statement: even more is more
    paper: {value: 1, source: table 2}
    target: {text: at least 2, metric: gain, op: ">=", value: 2.0}
    tiers: [small]
"""


class Toy:
    """A paper with two claims; `calls` are the (claim, seed) that were measured."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ledger = folder / "study", folder / "out.json"
        self.file = folder / "toy" / "claims.yaml"
        self.file.parent.mkdir()
        self.file.write_text(FILE, encoding="utf-8")
        self.calls: list[tuple[str, int]] = []
        self.gain = 2.0
        self.stop_at: int | None = None
        self.settings: dict[str, Any] = {}
        monkeypatch.setattr("common.ledger.REPOSITORY", folder)
        monkeypatch.setattr("common.ledger.commit", lambda: "none")

    def __call__(self, *arguments: str, **hooks: Any) -> list[dict[str, Any]]:
        def measured(name: str, seed: int) -> Mapping[str, float]:
            self.calls.append((name, seed))
            if len(self.calls) == self.stop_at:
                raise KeyboardInterrupt
            return {"gain": self.gain, "seed_again": seed}

        def x1(study: Study[Any], seed: int) -> Mapping[str, float]:
            return measured("X1", seed)

        def x2(study: Study[Any], seed: int) -> Mapping[str, float]:
            return measured("X2", seed)

        settings = self.settings

        class ToyStudy(Study[None]):
            @property
            def settings(self) -> dict[str, Any]:
                return settings

        own = ["--folder", str(self.folder), "--output", str(self.ledger)]
        return reproduction.main(
            "toy", "about", (x1, x2), lambda options: ToyStudy(None, options.folder), argv=[*own, *arguments], **hooks
        )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return Toy(tmp_path, monkeypatch)


def test_an_interrupted_measurement_continues_after_its_last_finished_seed(toy: Toy) -> None:
    toy.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        toy("--tier", "smoke")
    assert not toy.ledger.exists()
    (record,) = toy("--tier", "smoke")
    assert toy.calls == [("X1", 3), ("X1", 5), ("X1", 5)]
    assert [(row["seed"], row["seed_again"]) for row in record["measured"]] == [(3, 3), (5, 5)]
    assert record["mean"] == 2.0 and record["holds"] and record["tier"] == "smoke"
    assert json.loads(toy.ledger.read_text())["claims"][0]["id"] == "X1"


def test_the_ledger_is_written_and_figures_are_drawn_after_each_claim(toy: Toy) -> None:
    drawn: list[tuple[Path, list[str]]] = []

    def figures(study: Study[Any], ledger: Path) -> None:
        drawn.append((study.figures, [claim["id"] for claim in json.loads(ledger.read_text())["claims"]]))

    toy(figures=figures)
    place = toy.ledger.parent / "figures" / "toy"
    assert drawn == [(place, ["X1"]), (place, ["X1", "X2"])]
    toy("--tier", "smoke", figures=lambda *_: pytest.fail("drawn for a smoke run"))


def test_another_budget_or_other_settings_measure_again_and_equal_ones_do_not(toy: Toy) -> None:
    for _ in range(2):
        toy("--tier", "smoke")
    assert len(toy.calls) == 2
    toy.file.write_text(FILE.replace("steps: 1}", "steps: 2}"))
    toy("--tier", "smoke")
    assert len(toy.calls) == 4
    toy.settings = {"rate": 1}
    toy("--tier", "smoke")
    assert len(toy.calls) == 6


def test_a_rung_has_its_own_arms_budget_and_record(toy: Toy) -> None:
    toy.file.write_text(FILE.replace("budget: {steps: 10}", "budget: {steps: 10}, rungs: [1, 4]"))
    refused("--rung 2: claim X1 of tier small has 1, 4", toy, "--rung", "2", "--claims", "X1")
    refused("--rung 4: claim X1 of tier smoke has 1", toy, "--rung", "4", "--tier", "smoke", "--claims", "X1")
    toy("--claims", "X1")
    toy.gain = 0.5
    (record,) = toy("--rung", "4", "--claims", "X1", "--folder", str(toy.folder) + "-rung4")
    assert record["rung"] == 4 and not record["holds"]
    (kept,) = json.loads(toy.ledger.read_text())["claims"]
    assert kept["mean"] == 2.0 and kept["holds"] and [(r["rung"], r["mean"]) for r in kept["rungs"]] == [(4, 0.5)]
    note = json.loads((toy.ledger.parent / "arms" / "out" / "X1-rung4-seed2.json").read_text())
    assert note["budget"] == {"steps": 40} and note["values"] == {"gain": 0.5, "seed_again": 2}
    assert len(list((toy.ledger.parent / "arms" / "out").glob("X1-rung1-seed*.json"))) == 3


def test_with_seeds_the_measurements_are_kept_and_no_record_is_made(toy: Toy) -> None:
    assert toy("--seeds", "1", figures=lambda *_: pytest.fail("drawn from a part")) == []
    assert toy.calls == [("X1", 1), ("X2", 1)] and not toy.ledger.exists()
    assert json.loads((toy.folder / "X1-seed1.json").read_text())["values"]["gain"] == 2.0
    toy("--claims", "X1")
    assert toy.calls[2:] == [("X1", 0), ("X1", 2)]


def test_a_number_that_is_not_finite_fails_the_claim_also_when_read_again(toy: Toy) -> None:
    toy.gain = float("nan")
    for _ in range(2):
        (record,) = toy("--tier", "smoke")
        assert record["mean"] is None and not record["holds"]
    assert len(toy.calls) == 2


def test_a_changed_target_is_refused_before_anything_is_measured(toy: Toy) -> None:
    toy("--tier", "smoke")
    toy.file.write_text(FILE.replace("value: 1.0", "value: 0.0"))
    refused("X1", toy, "--tier", "smoke")
    assert len(toy.calls) == 2


def test_unknown_claims_and_seeds_are_refused(toy: Toy) -> None:
    refused("--claims X2: tier smoke has X1", toy, "--tier", "smoke", "--claims", "X2")
    refused("--seeds 7: claim X1 of tier smoke has 3, 5", toy, "--tier", "smoke", "--seeds", "7")
    assert not toy.calls


def test_a_claim_that_the_machine_cannot_measure_is_left_out_unless_asked_for(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {"X1": "it needs a library"}
    assert [record["id"] for record in toy(without=without)] == ["X2"]
    assert "X1 is left out: it needs a library" in capsys.readouterr().out
    assert [record["id"] for record in toy("--claims", "X1", without=without)] == ["X1"]


def test_an_option_of_the_paper_is_done_in_place_of_the_claims(toy: Toy) -> None:
    seen: list[bool] = []

    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--calibrate", action="store_true")

    def instead(study: Study[Any], given: Any) -> bool:
        seen.append(given.calibrate)
        return bool(given.calibrate)

    assert toy("--calibrate", options=options, instead=instead) == [] and not toy.calls
    assert len(toy("--claims", "X1", options=options, instead=instead)) == 1
    assert seen == [True, False]


def test_claims_are_measured_in_one_thread(toy: Toy) -> None:
    torch.set_num_threads(2)
    toy("--tier", "smoke")
    assert torch.get_num_threads() == 1


def test_options_name_the_tiers_claims_and_the_place_of_the_ledger(tmp_path: Path) -> None:
    parser = options_parser("paper", "about")
    options = parser.parse_args(["--tier", "smoke", "--claims", "A", "B"])
    assert chosen_claims(options, ["A", "B", "C"]) == ["A", "B"]
    assert ledger_path(options, "paper").name == "paper-smoke.json"
    assert chosen_claims(parser.parse_args([]), ("A", "C")) == ["A", "C"]
    assert ledger_path(parser.parse_args([]), "paper").parts[-2:] == ("results", "paper.json")
    assert ledger_path(parser.parse_args(["--output", str(tmp_path / "x.json")]), "paper") == tmp_path / "x.json"
    refused("--claims D: tier small has A, C", chosen_claims, parser.parse_args(["--claims", "D"]), ["A", "C"])


def test_a_claims_seconds_count_the_pieces_that_it_shares_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "claims.yaml").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr("common.ledger.commit", lambda: "none")
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def piece() -> dict[str, float]:
        clock[0] += 100.0
        return {"loss": 1.0}

    def measure(study: Study[Any], seed: int) -> Mapping[str, float]:
        study.values("shared", piece)
        study.values("shared", piece)  # asked for twice, counted once
        clock[0] += 1.0
        return {"gain": study.values(f"own-{seed}", piece)["loss"]}

    claims = read_claims(tmp_path / "claims.yaml", "small")
    study: Study[None] = Study(None, tmp_path / "study")
    first = measure_claim(claims["X1"], study, measure)
    second = measure_claim(claims["X2"], study, measure)
    assert first is not None and second is not None
    assert first["seconds"] == second["seconds"] == 3 * 201.0
