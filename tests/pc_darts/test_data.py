"""Options -> set, augmentation and the halves of a search."""

from __future__ import annotations

import pytest

from common.errors import UserError
from pc_darts.config import DataConfig
from pc_darts.data import augmentation, open_data, search_halves


def test_search_halves_share_no_picture_and_use_all() -> None:
    digits = open_data(DataConfig(name="digits", size=8))
    weights, alphas = search_halves(digits.train, [0.5, 0.5], 0)
    first, second = set(weights.index_N.tolist()), set(alphas.index_N.tolist())
    assert not first & second
    assert first | second == set(digits.train.index_N.tolist())
    assert abs(len(weights) - len(alphas)) <= 10
    with pytest.raises(UserError, match="expected two shares"):
        search_halves(digits.train, [0.5], 0)


def test_jitter_takes_no_strength_or_four() -> None:
    assert augmentation(DataConfig()).jitter == (0, 0, 0, 0)
    assert augmentation(DataConfig(jitter=[0.4, 0.3, 0.2, 0.1])).jitter == (0.4, 0.3, 0.2, 0.1)
    with pytest.raises(UserError, match=r"data\.jitter \[0\.4\]: expected \[\] or four strengths"):
        augmentation(DataConfig(jitter=[0.4]))
