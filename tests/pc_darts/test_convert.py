"""Checkpoints of the authors' code load, and ours come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pc_darts.config import FinalConfig, SearchConfig
from pc_darts.convert import infer_search_config, load_final_network, load_search_network, main, save
from pc_darts.genotypes import PUBLISHED
from pc_darts.model import FinalNetwork
from pc_darts.search_space import ARCHITECTURE, SearchNetwork


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_an_official_final_checkpoint_becomes_a_file_of_ours(tmp_path: Path, stem: str, auxiliary: bool) -> None:
    torch.manual_seed(0)
    network = FinalNetwork(PUBLISHED["PC_DARTS_cifar"], FinalConfig(4, 3, stem, 5, auxiliary))  # type: ignore[arg-type]
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["module.cells.0.preprocess0.op.2.num_batches_tracked"] = torch.tensor(7)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth.tar")
    main([str(tmp_path / "checkpoint.pth.tar"), str(tmp_path / "final.safetensors"), "--genotype", "PC_DARTS_cifar"])
    assert same(load_final_network(tmp_path / "final.safetensors"), network)


@pytest.mark.parametrize(
    "config",
    [
        SearchConfig(8, 2, nodes=2, partial=4),
        SearchConfig(8, 1, nodes=2, classes=3, partial=1, in_channels=1),
        SearchConfig(16, 2, nodes=3, partial=2, stem="imagenet"),
    ],
)
def test_a_search_network_is_recognised_by_its_weights(tmp_path: Path, config: SearchConfig) -> None:
    network = SearchNetwork(config)
    assert infer_search_config(network.state_dict()) == config
    weights = {name: value for name, value in network.state_dict().items() if name not in ARCHITECTURE}
    torch.save(weights, tmp_path / "weights.pt")
    loaded = load_search_network(tmp_path / "weights.pt")
    assert not loaded.alphas_normal.any() and not loaded.betas_reduce.any()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())


def test_our_files_keep_alphas_betas_and_options(tmp_path: Path) -> None:
    network = SearchNetwork(SearchConfig(8, 1, nodes=2, sampling="shift", edge_normalisation=False))
    network(torch.randn(2, 3, 8, 8))  # running statistics become views of one tensor
    save(network, tmp_path / "search.safetensors")
    loaded = load_search_network(tmp_path / "search.safetensors")
    assert same(loaded, network) and loaded.config == network.config


def test_another_genotype_than_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    network = FinalNetwork(PUBLISHED["PC_DARTS_cifar"], FinalConfig(4, 2))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="does not fit the network"):
        load_final_network(tmp_path / "weights.pt", PUBLISHED["DARTS_V1"])
    with pytest.raises(UserError, match="--genotype"):
        load_final_network(tmp_path / "weights.pt")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"bad\.pt (is truncated or not a torch checkpoint|holds pickled)"):
        load_search_network(tmp_path / "bad.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"classifier\.weight"):
        load_search_network(tmp_path / "other.pt")
