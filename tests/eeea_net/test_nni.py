"""The optional strategy for nni: where nni is installed a search runs through it; where not, a sentence says so."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from itertools import pairwise
from typing import Any

import pytest
from torch import nn

from common.errors import UserError

needs_nni = pytest.mark.skipif(importlib.util.find_spec("nni") is None, reason="nni is not installed (optional)")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_without_nni_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eeea_net.nni_strategy", raising=False)
    monkeypatch.setitem(sys.modules, "nni.mutable", None)
    with pytest.raises(UserError, match=r"needs nni 3.0, .*make setup EXTRAS=dev,nas"):
        importlib.import_module("eeea_net.nni_strategy")


WIDTHS = (1, 2, 4, 8, 16)


def sizes(sample: dict[str, Any]) -> list[float]:
    return [sum(float(width) for width in sample.values()) / 10]


def search(**options: Any) -> Any:
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.execution import SequentialExecutionEngine
    from nni.nas.nn.pytorch import LayerChoice, ModelSpace
    from nni.nas.space import RawFormatModelSpace

    strategy_module = importlib.import_module("eeea_net.nni_strategy")

    class Space(ModelSpace):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for place in range(4):
                layers = {str(width): nn.Linear(2, width) for width in WIDTHS}
                self.add_module(f"layer{place}", LayerChoice(layers, label=f"layer{place}"))

    def accuracy(model: Any) -> None:
        import nni

        widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
        nni.report_final_result(sum(widths) / (sum(widths) + 5))

    strategy = strategy_module.Nsga2(sizes, **options)
    strategy(RawFormatModelSpace(Space(), FunctionalEvaluator(accuracy)), SequentialExecutionEngine())
    return strategy


@needs_nni
def test_a_search_runs_in_nni_and_ends_with_a_front() -> None:
    strategy = search(population=8, generations=4, seed=1)
    assert len(strategy.members) == 8 + 3 * 4  # no sample is tried twice
    front = strategy.front()
    values = [member.objectives for member in front]
    assert values == sorted(values) and all(a[1] >= b[1] for a, b in pairwise(values))
    (best,) = strategy.list_models()
    assert best.sample == dict(front[0].chromosome)
    again = search(population=8, generations=4, seed=1)
    assert [member.key for member in again.front()] == [member.key for member in front]


@needs_nni
def test_early_exit_bounds_the_first_generation_only() -> None:
    strategy = search(population=6, generations=3, beta=1.5, mutation=1.0)
    tried = list(strategy.members.values())
    assert all(member.objectives[1] <= 1.5 for member in tried[:6])
    assert len(tried) == 6 + 2 * 3
