"""The profile: operators fall into their groups, shares sum to one, a machine keeps its first numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.arms import training_step
from benchmarks.profile import COLUMNS, WORKS, measured, merged, rendered


def record(milliseconds: float, commit: str) -> dict[str, Any]:
    return {"milliseconds": milliseconds, **dict.fromkeys(COLUMNS, 1 / len(COLUMNS)), "commit": commit}


def test_shares_of_a_step_sum_to_one_and_name_what_it_does() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.LayerNorm(256), torch.nn.GELU())
    x = torch.randn(512, 256)
    found = measured(training_step(network, lambda index: network(x).square().mean(), 1e-3, 0.0, fused=True))
    assert sum(found[name] for name in COLUMNS) == pytest.approx(1.0)
    assert all(found[name] > 0 for name in ("products", "normalisation", "activations", "optimiser"))
    assert found["attention"] == 0 and found["milliseconds"] > 0


def test_a_row_measured_again_keeps_the_machines_first_numbers() -> None:
    (paper, work), *_ = WORKS
    here = {"paper": paper, "work": work, "precision": "bf16", "hardware": "one"}
    records = merged([], here, record(20.0, "a"))
    records = merged(records, here, record(10.0, "b"))
    records = merged(records, {**here, "hardware": "two"}, record(30.0, "b"))
    assert [(r["hardware"], r["first"]["milliseconds"], r["latest"]["milliseconds"]) for r in records] == [
        ("one", 20.0, 10.0),
        ("two", 30.0, 30.0),
    ]
    page = rendered(records)
    assert "| 10.0 (20.0) |" in page and "| 30.0 |" in page and page.count("## ") == 2


def test_rows_stand_in_the_order_of_the_papers() -> None:
    keys = list(WORKS)
    records: list[dict[str, Any]] = []
    for paper, work in reversed(keys):
        records = merged(
            records, {"paper": paper, "work": work, "precision": "float32", "hardware": "one"}, record(1.0, "a")
        )
    assert [(r["paper"], r["work"]) for r in records] == keys
