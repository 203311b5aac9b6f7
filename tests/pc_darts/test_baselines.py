"""Random cells, random search within a budget, DARTS as K = 1."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from common.errors import UserError
from pc_darts.baselines import OPERATIONS, darts_options, random_genotype, random_search
from pc_darts.config import SearchOptions
from pc_darts.genotypes import Genotype


def test_random_cells_are_valid_repeatable_and_spread_over_the_space() -> None:
    cells = [random_genotype(seed) for seed in range(300)]
    assert random_genotype(7) == cells[7] and len(set(cells)) == 300
    operations = Counter(name for cell in cells for name, _ in (*cell.normal, *cell.reduce))
    assert set(operations) == set(OPERATIONS) and "none" not in operations
    assert max(operations.values()) < 1.25 * min(operations.values())
    for cell in cells:
        for choices in (cell.normal, cell.reduce):
            for node in range(4):
                (_, first), (_, second) = choices[2 * node : 2 * node + 2]
                assert first != second and max(first, second) < 2 + node


def test_darts_is_the_search_with_all_channels_no_edge_weights_and_a_smaller_batch() -> None:
    options = darts_options(SearchOptions(partial=4, batch_size=256, warmup_epochs=15))
    assert (options.partial, options.edge_normalisation, options.warmup_epochs) == (1, False, 0)
    assert options.batch_size == 64 and options.lr == SearchOptions().lr
    assert darts_options(SearchOptions(), 96).batch_size == 96


def test_random_search_keeps_the_best_within_its_budget_and_continues(tmp_path: Path) -> None:
    calls: list[int] = []

    def evaluate(genotype: Genotype, number: int) -> tuple[float, float]:
        calls.append(number)
        return [0.5, 0.8, 0.7, 0.9][number], 10.0

    found = random_search(evaluate, 35.0, tmp_path, seed=3)
    assert calls == [0, 1, 2] and found.seconds == 30
    assert found.best == random_genotype(found.candidates[1].seed)
    again = random_search(evaluate, 45.0, tmp_path, seed=3)
    assert calls == [0, 1, 2, 3] and again.best == random_genotype(again.candidates[3].seed)
    assert again.candidates[:3] == found.candidates
    with pytest.raises(UserError, match="another random search"):
        random_search(evaluate, 45.0, tmp_path, seed=4)


def test_random_search_trains_at_least_one_and_at_most_as_told(tmp_path: Path) -> None:
    one = random_search(lambda *_: (0.1, 100.0), 1.0, tmp_path / "a", seed=0)
    assert len(one.candidates) == 1
    two = random_search(lambda *_: (0.1, 1.0), 100.0, tmp_path / "b", seed=0, at_most=2)
    assert len(two.candidates) == 2
