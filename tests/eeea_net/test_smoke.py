"""The smoke reproduction, what the plan counts, and the figures of a ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.ledger import read_claims
from eeea_net import plan, reproduce, scores
from eeea_net.experiments import percentile_beta
from eeea_net.figures import draw_figures
from tests.claims import smoke_records, write_ledger


@pytest.mark.smoke
def test_early_exit_saves_and_evolution_beats_random_networks(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["E1", "E1f", "E4", *(["E6", "E6s", "E6p"] if scores.installed() else ["E6s"])]
    assert found["E1"]["holds"] and found["E1"]["measured"][0]["parameters_ratio"] < 1
    volumes = [found["E4"]["measured"][0][f"hypervolume_{number}"] for number in range(4)]
    assert volumes == sorted(volumes) and found["E4"]["measured"][0]["falls"] == 0
    measured = found["E6s"]["measured"][0]
    assert measured["miou_gap"] == pytest.approx(measured["miou_searched"] - measured["miou_mobilenetv3"])
    assert measured["macs_m_mobilenetv3"] == pytest.approx(measured["macs_m_searched"], rel=0.04)


def test_every_claim_has_a_function_that_measures_it() -> None:
    for claim in read_claims("eeea_net", "small"):
        assert callable(getattr(reproduce, claim.lower()))
    assert percentile_beta(30) < percentile_beta(50) < percentile_beta(70)


def test_the_plan_counts_the_papers_search_and_trainings() -> None:
    found = {line.name: line for line in plan.main(["--json"])}
    assert found["search-C"].networks == 1084 and found["search-C"].gpu_days == pytest.approx(0.52)
    assert found["train-C"].parameters == 3_513_358 and found["train-C"].macs == 562_696_416
    assert found["search-A"].parameters < found["search-EA"].parameters
    assert found["train-A"].pflop == pytest.approx(6 * 271_008_576 * 50_000 * 600 / 1e15)


def test_figures_are_drawn_for_the_claims_that_there_are(tmp_path: Path) -> None:
    ratios = {"parameters_ratio": 0.9, "macs_ratio": 0.9, "seconds_ratio": 0.9}
    errors = {"error_random": 50.0, "error_unfiltered": 49.0, "error_beta50": 48.0}
    values = {"E1": ratios, "E1f": ratios, "E2": errors, "E3": {"error_beta30": 50.0, "error_beta70": 49.0}}
    values["E4"] = {"hypervolume_0": 0.1, "hypervolume_1": 0.2, "hypervolume_random": 0.15}
    for claim, metric in (("E6", "ap50"), ("E6s", "miou"), ("E6p", "ap")):
        values[claim] = {f"{metric}_searched": 60.0, f"{metric}_mobilenetv3": 58.0}
    write_ledger(tmp_path / "ledger.json", "eeea_net", values)
    draw_figures(tmp_path / "ledger.json", tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "hypervolume.png",
        "cost.png",
        "errors.png",
        "transfer.png",
    }
