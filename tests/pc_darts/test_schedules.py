"""Learning rates, drop-path ramp and losses against tables of the authors' code and by their properties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
from pc_darts.losses import final_loss, label_smoothing_cross_entropy
from pc_darts.schedules import cosine, drop_path_ramp, imagenet_final, imagenet_search, rate


def test_cosine_starts_at_the_full_rate_and_is_half_way_in_the_middle() -> None:
    assert cosine(0, 50, 0.1) == 0.1
    assert cosine(25, 50, 0.1) == pytest.approx(0.05)
    assert cosine(49, 50, 0.1) == pytest.approx(9.866357858642206e-05, rel=1e-9)
    assert cosine(25, 50, 0.1, 0.001) == pytest.approx(0.0505)


def test_imagenet_search_warms_up_for_five_epochs_and_then_follows_the_cosine() -> None:
    assert [imagenet_search(epoch, 50, 0.5) for epoch in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert imagenet_search(5, 50, 0.5) == pytest.approx(cosine(5, 50, 0.5)) == pytest.approx(0.4877641290737884)


def test_imagenet_final_falls_linearly_and_five_times_slower_at_the_end() -> None:
    rates = [imagenet_final(epoch, 250, 0.5) for epoch in range(250)]
    assert rates[5:7] == pytest.approx([0.5 * 240 / 245, 0.5 * 239 / 245])
    slopes = [a - b for a, b in pairwise(rates[5:])]
    assert slopes[0] == pytest.approx(0.5 / 245)
    assert slopes[-1] == pytest.approx(0.5 / 245 / 5)
    assert rates[244] == pytest.approx(rates[245])
    assert min(rates) > 0


def test_drop_path_rises_linearly_from_zero() -> None:
    assert [drop_path_ramp(epoch, 50, 0.3) for epoch in (0, 1, 49)] == pytest.approx([0.0, 0.006, 0.294])


@pytest.mark.parametrize("epoch", [-1, 10])
def test_epoch_outside_the_run_is_refused(epoch: int) -> None:
    with pytest.raises(UserError, match="outside a schedule of 10 epochs"):
        cosine(epoch, 10, 0.1)


def test_named_schedules_are_the_functions() -> None:
    assert rate("cosine", 3, 10, 0.1, 0.01) == cosine(3, 10, 0.1, 0.01)
    assert rate("imagenet_search", 1, 10, 0.1, warmup=2) == imagenet_search(1, 10, 0.1, 2)
    assert rate("imagenet_final", 9, 10, 0.1, warmup=2) == imagenet_final(9, 10, 0.1, 2)
    with pytest.raises(UserError, match="'linear' is unknown"):
        rate("linear", 0, 10, 0.1)


def test_smoothed_cross_entropy_is_that_of_the_smoothed_target() -> None:
    logits, target = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    soft = F.one_hot(target, 5) * 0.9 + 0.1 / 5
    expected = -(soft * F.log_softmax(logits, 1)).sum(1).mean()
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, target, 0.1), expected)
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, target, 0.0), F.cross_entropy(logits, target))
    with pytest.raises(UserError, match="label smoothing 1"):
        label_smoothing_cross_entropy(logits, target, 1.0)


def test_auxiliary_head_counts_with_its_weight() -> None:
    logits, auxiliary, target = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    both = final_loss(logits, auxiliary, target, 0.4, 0.0)
    torch.testing.assert_close(both, F.cross_entropy(logits, target) + 0.4 * F.cross_entropy(auxiliary, target))
    torch.testing.assert_close(final_loss(logits, None, target, 0.4, 0.0), F.cross_entropy(logits, target))
    assert math.isfinite(float(both))
