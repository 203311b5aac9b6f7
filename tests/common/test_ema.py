"""Averages of weights: the rate at which they follow, going on, and that borrowing them leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.ema import Ema
from tests.refusals import refused


@torch.no_grad()
def move(module: nn.Linear, by: float | Tensor = 1.0) -> Tensor:
    """Change the weights; returns the new ones."""
    module.weight += by
    return module.weight.detach().clone()


def test_average_is_lent_to_the_module_and_its_own_weights_come_back_also_after_an_error() -> None:
    module = nn.Linear(3, 2)
    ema, start = Ema(module, 0.99), module.weight.detach().clone()
    own = move(module)
    ema.update(module)
    with ema.swapped_into(module):
        torch.testing.assert_close(module.weight.detach(), start + 9 / 11)  # first update: decay 2 / 11
    assert torch.equal(module.weight, own)
    with pytest.raises(RuntimeError), ema.swapped_into(module):
        assert not torch.equal(module.weight, own)
        raise RuntimeError
    assert torch.equal(module.weight, own)


def test_a_resumed_average_continues_as_if_never_stopped_with_its_own_decay() -> None:
    module = nn.Linear(3, 2)
    first, second = Ema(module, 0.9), Ema(module, 0.5)
    for _ in range(5):
        move(module, torch.randn(2, 3))
        first.update(module)
    second.load_state_dict(first.state_dict())
    move(module)
    first.update(module)
    second.update(module)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_decay_that_is_none_is_refused() -> None:
    refused("decay", Ema, nn.Linear(3, 2), 1.5)
