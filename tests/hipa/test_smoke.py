"""The smoke reproduction: the most robust claim at a budget of seconds, and what the plan counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa import reproduce
from tests.claims import smoke_records, write_ledger


@pytest.mark.smoke
def test_the_frozen_one_step_is_the_further_from_many_the_higher_the_frequency(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["H3"] and found["H3"]["tier"] == "smoke" and found["H3"]["holds"]
    measured = found["H3"]["measured"][0]
    assert measured["error_0"] < measured["error_1"] < measured["error_3"]
    assert measured["coherence_0"] > 0.4 and measured["coherence_4"] < 0.2
    assert measured["fd_one"] > 5 * measured["fd_many"]


def test_the_plan_counts_the_published_adaptor() -> None:
    from hipa import plan

    pairs, adaptor, progressive = plan.main(["--json"])
    assert adaptor["trained"] == 3_319_808 and adaptor["paper_days"] == 3.8
    assert progressive["trained"] == 9 * 865_910_724 and progressive["paper_days"] == 108.8
    assert pairs["forwards"] == 50 and adaptor["samples"] == 30_000 * 32
    # One U-Net forward of Stable Diffusion 2.1 at 64 x 64 is some 0.8 TFLOP.
    assert pairs["pflop"] * 1e15 / pairs["samples"] / 50 == pytest.approx(0.8e12, rel=0.15)


def test_the_figures_show_what_the_ledger_holds(tmp_path: Path) -> None:
    from hipa.figures import BANDS, draw_figures

    arms = ("frozen", "pixel", "spatial", "hipa")
    bands = {
        f"{kind}_{i}{arm}": 0.1
        for kind in ("coherence", "error")
        for i in range(len(BANDS))
        for arm in ("", *(f"_{name}" for name in arms))
    }
    distances = {f"fd_data_{name}": 10.0 for name in ("frozen", "two", "hipa", "many")}
    exchange = dict.fromkeys(("fd_one", "fd_many", "fd_low_one_high_many", "fd_low_many_high_one"), 20.0)
    tasks = {f"perceptual_{t}_{arm}": 1.0 for t in ("editing", "inpainting", "superres") for arm in ("frozen", "hipa")}
    values = bands | distances | exchange | tasks
    write_ledger(tmp_path / "hipa.json", "hipa", dict.fromkeys(("H1", "H2", "H3x", "H6"), values))
    draw_figures(tmp_path / "hipa.json", tmp_path / "figures")
    assert {file.name for file in (tmp_path / "figures").glob("*.png")} == {"one_step.png", "lacking.png", "tasks.png"}
