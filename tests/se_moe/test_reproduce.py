"""Claims, budgets and figures of the reproduction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.ledger import check_targets, record, write_claims
from se_moe import reproduce
from se_moe.experiments import BATCHES, PLANS, elastic_layouts, replay, zipf_trace
from se_moe.figures import draw_figures


def test_targets_are_those_of_the_specification(tmp_path: Path) -> None:
    known = reproduce.claims("small")
    assert list(known) == [f"M{n}" for n in range(1, 11)]
    headlines = {name: (c.target.metric, c.target.op, c.target.value) for name, c in known.items()}
    assert headlines == {
        "M1": ("speedup", ">=", 5.0),
        "M2": ("speedup", ">=", 1.33),
        "M3": ("gain_under_shift", ">=", 0.05),
        "M4": ("largest_error", "<=", 0.05),
        "M5": ("gain", ">=", 0.18),
        "M6": ("speedup", ">=", 1.15),
        "M7": ("speedup", ">=", 1.5),
        "M8": ("time_ratio", "<=", 1.25),
        "M9": ("cpu_ratio", "<=", 0.75),
        "M10": ("gap_closed", ">=", 0.3),
    }
    assert len(reproduce.SEEDS["small"]) >= 3
    write_claims(tmp_path / "empty.json", [])
    check_targets(tmp_path / "empty.json", list(known.values()))


def test_an_interrupted_reproduction_goes_on_from_its_finished_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measure(study: reproduce.Study, seed: int) -> dict[str, float]:
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"speedup": 9.0, "equal": 1.0}

    monkeypatch.setitem(reproduce.MEASURES, "M1", measure)
    monkeypatch.setitem(reproduce.SEEDS, "smoke", (0, 1))
    study = reproduce.Study(PLANS["smoke"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(study, "smoke", ["M1"], tmp_path / "out.json")
    (finished,) = reproduce.reproduce(study, "smoke", ["M1"], tmp_path / "out.json")
    assert calls == [0, 1, 1]
    assert finished["holds"] and len(finished["measured"]) == 2


def test_unknown_claims_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--claims M99: tier small has M1, "):
        reproduce.main(["--claims", "M99"])


def test_layouts_split_heavy_tasks_and_put_light_ones_together() -> None:
    layouts = elastic_layouts()
    assert layouts["one_each"].allocation.loads == list(BATCHES)
    assert layouts["balanced"].allocation.loads == [16] * 8
    assert [len(layouts["balanced"].group(task)) for task in range(4)] == [4, 2, 1, 1]
    assert layouts["merged"].allocation.loads == [64, 64]


def test_replay_counts_hits_and_writes_of_a_trace_worked_out_by_hand() -> None:
    # Two slots, LRU: 1 and 2 miss, 1 hits, 3 pushes 2 out, 2 pushes 1 out; both are written then, 3 and 2 at the end.
    rate, writes = replay([1, 2, 1, 3, 2], 2, rule="lru", period=0)
    assert rate == 1 / 5
    assert writes == 4


def test_zipf_popularity_changes_its_order_at_every_shift() -> None:
    trace = zipf_trace(16, 4000, seed=0, shifts=4)
    assert len(trace) == 4000 and set(trace) <= set(range(16))
    parts = [trace[i : i + 1000] for i in range(0, 4000, 1000)]
    assert len({max(set(part), key=part.count) for part in parts}) > 1


def test_figures_are_drawn_for_the_claims_that_are_there(tmp_path: Path) -> None:
    known = reproduce.claims("small")
    times = {"time_ratio": 1.1, "time_ratio_serial": 1.5, "time_ratio_ring2": 1.2, "hidden": 0.8, "equal": 1.0}
    rows = [{**times, "device_share": 0.3, "device_share_ring2": 0.2}] * 3
    write_claims(tmp_path / "r.json", [record(known["M8"], rows, seconds=1.0, peak_memory_bytes=1)])
    draw_figures(tmp_path / "r.json", tmp_path / "figures")
    assert [path.name for path in (tmp_path / "figures").glob("*.png")] == ["ring.png"]
    assert list(json.loads((tmp_path / "figures" / "captions.json").read_text())) == ["ring.png"]
