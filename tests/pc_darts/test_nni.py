"""The optional nni adapter: where nni is installed a tiny search runs through it; where not, a sentence says so."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError

INSTALLED = importlib.util.find_spec("nni") is not None
needs_nni = pytest.mark.skipif(not INSTALLED, reason="nni is not installed (optional)")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_without_nni_the_adapter_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pc_darts.nni_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "nni.nas.nn.pytorch", None)
    with pytest.raises(UserError, match=r"needs nni 3.0, .*pip install nni==3.0"):
        importlib.import_module("pc_darts.nni_adapter")


@pytest.fixture
def adapter() -> Any:
    return importlib.import_module("pc_darts.nni_adapter")


def tiny_space(adapter: Any, partial: int = 4) -> Any:
    return adapter.DartsSpace(channels=8, cells=3, nodes=2, classes=3, partial=partial, in_channels=1)


@needs_nni
def test_cell_and_sample_are_each_others_inverse(adapter: Any) -> None:
    from pc_darts.baselines import random_genotype

    space = tiny_space(adapter)
    for seed in range(5):
        cell = random_genotype(seed, 2)
        back = adapter.genotype_of(adapter.sample_of(cell, space.simplify()), 2)
        for kind in ("normal", "reduce"):
            ours, theirs = getattr(cell, kind), getattr(back, kind)
            assert [set(ours[i : i + 2]) for i in (0, 2)] == [set(theirs[i : i + 2]) for i in (0, 2)]


@needs_nni
def test_frozen_space_computes_only_the_chosen_operations(adapter: Any) -> None:
    from pc_darts.baselines import random_genotype

    space = tiny_space(adapter, partial=1)
    model = space.freeze(adapter.sample_of(random_genotype(1, 2), space.simplify()))
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in space.parameters())


@needs_nni
def test_supernet_of_nni_equals_ours_with_its_alphas_and_betas(adapter: Any, tmp_path: Path) -> None:
    from pc_darts.config import SearchConfig
    from pc_darts.search_space import SearchNetwork

    strategy = adapter.PartialDarts()
    space = strategy.mutate_model(tiny_space(adapter))
    ours = SearchNetwork(SearchConfig(channels=8, cells=3, nodes=2, classes=3, in_channels=1), fused=False)
    renamed = {}
    for name, value in space.state_dict().items():
        if "_arch_alpha" in name:
            continue
        parts = name.split(".")
        if "edges" in parts and "choice" in parts:
            cell, edge, operation = parts[1], parts[3], parts[5]
            number = adapter.PRIMITIVES.index(operation)
            name = ".".join(["cells", cell, "_ops", edge, "_ops", str(number), *parts[6:]])
        renamed[name] = value
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    assert not unexpected and all(key.startswith(("alphas", "betas")) for key in missing)
    strategy._mutated_model_space = type("Space", (), {"model_space": space})()
    with torch.no_grad():
        for name, value in strategy.architecture().items():
            value.copy_(torch.randn_like(value))
            getattr(ours, name).copy_(value)
        for module in space.modules():
            if isinstance(module, (adapter.DifferentiableMixedLayer, adapter.DifferentiableMixedInput)):
                short = str(module.label).rsplit("/", 1)[-1]
                kind, place = short.split("_")
                if place.startswith("edge"):
                    module._arch_alpha.copy_(getattr(ours, f"alphas_{kind}")[int(place[4:])])
                else:
                    node = int(place[4:])
                    first = sum(2 + k for k in range(node))
                    module._arch_alpha.copy_(getattr(ours, f"betas_{kind}")[first : first + 2 + node])
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(space(x), ours(x), rtol=1e-4, atol=1e-5)
    assert strategy.genotype() == ours.genotype()


@needs_nni
def test_search_through_nni_ends_with_a_cell(adapter: Any, tmp_path: Path) -> None:
    from nni.nas.evaluator.pytorch import Classification
    from nni.nas.execution import SequentialExecutionEngine
    from nni.nas.space import RawFormatModelSpace
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))
    loader = DataLoader(data, batch_size=8)
    evaluator = Classification(
        learning_rate=0.05,
        num_classes=3,
        train_dataloaders=loader,
        val_dataloaders=loader,
        max_epochs=2,
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    strategy = adapter.PartialDarts(warmup_epochs=1)
    strategy(RawFormatModelSpace(tiny_space(adapter), evaluator), SequentialExecutionEngine())
    cell = strategy.genotype()
    assert cell.nodes == 2
    model = next(iter(strategy.list_models()))
    assert adapter.genotype_of(model.sample, 2).nodes == 2
