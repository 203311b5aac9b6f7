"""NSGA-II's sorting, crowding and hypervolume, beside pymoo."""

from __future__ import annotations

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from common import evolution


def _points(kind: str, seed: int, objectives: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    points = random.random((30, objectives))
    if kind == "ties":
        points = random.integers(0, 4, (30, objectives)).astype(float)
    elif kind == "equal column":
        points[:, 0] = 0.5
    elif kind == "infinities":
        points[random.integers(0, 30, 5), random.integers(0, objectives, 5)] = np.inf
    elif kind == "single":
        points = points[:1]
    return points


KINDS = ["plain", "ties", "equal column", "infinities", "single"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_fronts_and_crowding_distances_are_pymoos(kind: str, objectives: int) -> None:
    for seed in range(5):
        points = _points(kind, seed, objectives)
        theirs = NonDominatedSorting().do(points)
        assert evolution.fronts(points) == [sorted(front.tolist()) for front in theirs]
        for front in theirs:
            with np.errstate(invalid="ignore"):
                expected = calc_crowding_distance(points[np.sort(front)])
            np.testing.assert_allclose(evolution.crowding_distance(points[np.sort(front)]), expected, rtol=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_hypervolume_is_pymoos_and_a_share_of_the_box_where_asked(objectives: int) -> None:
    points = _points("plain", 0, objectives)
    reference = [0.9] * objectives
    expected = HV(ref_point=np.array(reference))(points)
    assert evolution.hypervolume(points, reference) == pytest.approx(expected, rel=1e-12)
    share = evolution.hypervolume(points, reference, ideal=[-0.1] * objectives)
    assert share == pytest.approx(expected)  # the box is a unit cube


def test_a_point_that_is_not_better_than_the_reference_adds_no_volume() -> None:
    assert evolution.hypervolume([[1, 1], [2, 0], [np.nan, 0]], [2, 2]) == 1.0
    assert evolution.hypervolume([[3, 0]], [2, 2]) == 0.0


def test_an_individual_that_is_not_a_number_is_the_worst_of_all() -> None:
    objectives = [[np.nan, 0.0, 0.0], [9.0, 9.0, 9.0], [1.0, 1.0, 1.0], [0.0, np.nan, 5.0]]
    assert evolution.fronts(objectives) == [[2], [1], [0, 3]]
    assert evolution.survivors(objectives, 2) == [2, 1]
    assert not evolution.dominates(objectives[0], objectives[1])
    winners = evolution.tournament(objectives[:2], 200, evolution.generation_random(0, 0))
    assert winners.count(0) < 80  # only the duels against itself, a quarter of them


def test_the_ends_of_a_front_survive_and_the_most_crowded_member_goes_first() -> None:
    front = [[0.0, 1.0], [0.5, 0.5], [0.52, 0.48], [0.54, 0.46], [1.0, 0.0]]
    assert sorted(evolution.survivors(front, 4)) == [0, 1, 3, 4]
    assert sorted(evolution.survivors([*front, [1.0, 1.0]], 5)) == [0, 1, 2, 3, 4]


def test_equal_individuals_share_a_front_and_keep_their_order() -> None:
    objectives = [[1.0, 1.0]] * 4
    assert evolution.fronts(objectives) == [[0, 1, 2, 3]]
    assert evolution.survivors(objectives, 3) == [0, 1, 2]
    assert evolution.crowding_distance(objectives).tolist() == [0.0] * 4


def test_a_duel_goes_to_the_better_front_then_to_the_less_crowded() -> None:
    objectives = [[0.0, 1.0], [1.0, 0.0], [0.4, 0.6], [0.6, 0.4], [2.0, 2.0]]
    ranks, crowding = evolution.ranks_and_crowding(objectives)
    winners = evolution.tournament(objectives, 2000, evolution.generation_random(3, 5))
    counts = np.bincount(winners, minlength=5)
    assert ranks.tolist() == [0, 0, 0, 0, 1]
    assert counts[4] == pytest.approx(2000 / 25, abs=40)  # only against itself
    assert counts[0] > 1.3 * counts[2]
    assert crowding[0] == np.inf
    assert winners == evolution.tournament(objectives, 2000, evolution.generation_random(3, 5))
    assert winners != evolution.tournament(objectives, 2000, evolution.generation_random(3, 6))


def test_models_spread_along_the_front_are_the_most_accurate_one_and_those_far_from_it() -> None:
    objectives = [[0.5, 0.5], [0.0, 1.0], [0.01, 0.99], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [np.nan, 0.0]]
    assert evolution.spread(objectives, 3) == [1, 3, 0]
    assert evolution.spread(objectives, 9) == [1, 3, 0, 2]


def test_without_individuals_there_are_no_fronts() -> None:
    empty = np.zeros((0, 3))
    assert evolution.fronts(empty) == []
    assert evolution.survivors(empty, 3) == []
    assert evolution.hypervolume(empty, [1, 1, 1]) == 0.0
