"""The table of measured networks: what is read from it, and the search over it."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from eeea_net import table
from eeea_net.config import EvolutionOptions

needs_table = pytest.mark.skipif(not table.installed(), reason="nas-bench-graph is not installed (optional)")
OPTIONS = EvolutionOptions(population=12, generations=5, survivors=0.5, mutation=0.3)


def test_a_networks_number_is_its_links_and_operations() -> None:
    assert table.hash_of((8, 0, 1, 2, 3)) == 80_123
    assert table.genes_of(80_123) == (8, 0, 1, 2, 3)


def test_without_the_package_a_sentence_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nas_bench_graph", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    table.read_table.cache_clear()
    with pytest.raises(UserError, match="make setup EXTRAS=dev,nas"):
        table.read_table("cora")


def test_a_table_that_names_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> object:
            return print, ("executed",)

    (tmp_path / "x.bench").write_bytes(pickle.dumps({1: Payload()}))
    with (tmp_path / "x.bench").open("rb") as file, pytest.raises(UserError, match="it is no table of numbers"):
        table._Numbers(file).load()


@needs_table
def test_the_table_has_its_networks_and_children_are_among_them() -> None:
    rows = table.read_table("cora")
    assert len(rows) == 26_206
    assert all(0 <= error <= 1 and size > 0 for error, size, _ in list(rows.values())[:500])
    space, random = table.TableSpace("cora"), np.random.default_rng(0)
    parents = [space.draw(random) for _ in range(20)]
    assert all(space.breed(a, b, random, 0.5, 0.5) in rows for a in parents[:5] for b in parents)


@needs_table
def test_evolution_beats_as_many_random_networks_and_repeats_none() -> None:
    members = table.search("cora", OPTIONS, seed=0)
    assert len({member.key for member in members}) == len(members) == 12 + 4 * 6
    found = table.compare("cora", OPTIONS, 30, seed=0)
    assert found["hypervolume_nsga2_cora"] > found["hypervolume_random_cora"]
    assert found["parameters_early_exit_cora"] < found["parameters_random_cora"]
