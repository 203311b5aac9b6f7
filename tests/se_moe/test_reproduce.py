"""Arms and figures of the reproduction."""

from __future__ import annotations

import json
from pathlib import Path

from se_moe.experiments import BATCHES, elastic_layouts, replay, zipf_trace
from se_moe.figures import draw_figures
from tests.claims import write_ledger


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
    times = {"time_ratio": 1.1, "time_ratio_serial": 1.5, "time_ratio_ring2": 1.2, "hidden": 0.8, "equal": 1.0}
    write_ledger(tmp_path / "r.json", "se_moe", {"M8": {**times, "device_share": 0.3, "device_share_ring2": 0.2}})
    draw_figures(tmp_path / "r.json", tmp_path / "figures")
    assert [path.name for path in (tmp_path / "figures").glob("*.png")] == ["ring.png"]
    assert list(json.loads((tmp_path / "figures" / "captions.json").read_text())) == ["ring.png"]
