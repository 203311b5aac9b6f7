"""Rows about whole runs of query.py, with a program in its place that ends at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import scenesplat as bench
from benchmarks.arms import Pace


def test_a_query_is_measured_from_start_to_end_against_what_a_person_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "sys", SimpleNamespace(executable="true"))
    monkeypatch.setattr(bench, "house", lambda count: bench.cloud(count))
    rows = bench.query_rows("query_large", 50, tmp_path, Pace(2, 1, 1), 1.0)
    assert (tmp_path / "house.ply").is_file()
    assert [row["unit"] for row in rows] == ["s", "MiB"] and all(row["holds"] for row in rows)
    assert rows[0]["peer"] == 60.0 and "(50 Gaussians)" in rows[0]["name"]
    (alone,) = bench.query_rows("query", 50, tmp_path, Pace(1, 1, 1), None)
    assert alone["peer"] == 10.0 and alone["holds"] is None
    monkeypatch.setattr(bench, "sys", SimpleNamespace(executable="false"))
    with pytest.raises(RuntimeError, match="ended with status 1"):
        bench.query_rows("query", 50, tmp_path, Pace(1, 1, 1), None)


def test_a_house_has_as_many_gaussians_as_asked_for() -> None:
    house = bench.house(3000)
    assert len(house) == 3000 and house.labels_N is not None
