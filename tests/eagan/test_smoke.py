"""The smoke reproduction: the most robust claim at a budget of seconds, and what the plan counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagan import reproduce
from tests.claims import smoke_records


@pytest.mark.smoke
def test_weight_resetting_starts_all_pairs_of_a_round_alike(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["E3"] and found["E3"]["tier"] == "smoke" and found["E3"]["holds"]
    measured = found["E3"]["measured"][0]
    assert measured["spread_with"] == 0 < measured["spread_without"]
    assert measured["fid_with"] > 0 and measured["fid_without_round_1"] > 0


def test_the_plan_counts_the_published_recipe() -> None:
    from eagan import plan

    stage_g, stage_d, full = plan.main(["--json"])
    assert stage_g["parameters_g"] == 7_142_403 and stage_g["parameters_d"] == 906_240
    assert stage_g["mmac_g"] == pytest.approx(1889.566720) and stage_g["mmac_d"] == pytest.approx(262.635648)
    assert stage_g["steps"] == stage_d["steps"] == 62_500 + 18 * 12_500 and full["steps"] == 600 * 1250
    assert (stage_g["paper_days"], stage_d["paper_days"], full["paper_days"]) == (0.8, 0.4, None)
    for line in (stage_g, stage_d, full):
        assert 0.5 < line["pflop"] / line["pflop_as_written"] < 0.95  # the equal forms, and no gradient for nobody


def test_the_plan_of_stl10_has_its_own_sizes() -> None:
    from eagan import plan

    *_, full = plan.main(["--json", "--config", "eagan/configs/stl10.yaml"])
    assert full["parameters_g"] == 11_550_723 and full["parameters_d"] == 1_578_112
    assert full["mmac_g"] == pytest.approx(4251.525120) and full["paper_days"] is None
