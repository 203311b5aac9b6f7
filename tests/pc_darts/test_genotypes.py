"""Genotypes are read, written and derived as the paper and the authors' code do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pc_darts.config import FinalConfig
from pc_darts.counting import count, size_cap
from pc_darts.genotypes import PUBLISHED, Genotype, derive, edge_count, edge_softmax, node_count
from pc_darts.model import FinalNetwork
from pc_darts.operations import PRIMITIVES


def random_weights(seed: int, nodes: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edges = edge_count(nodes)
    shapes = [(edges, len(PRIMITIVES))] * 2 + [(edges,)] * 2
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_and_files_give_the_genotype_back(name: str, tmp_path: Path) -> None:
    genotype = PUBLISHED[name]
    assert Genotype.parse(genotype.to_json()) == genotype == Genotype.load(name)
    genotype.save(tmp_path / "cell.json")
    assert Genotype.load(tmp_path / "cell.json") == genotype


def test_a_genotype_logged_by_the_authors_programs_is_read() -> None:
    cell = "[('sep_conv_3x3', 1), ('skip_connect', 0), ('max_pool_3x3', 2), ('dil_conv_5x5', 0)]"
    text = f"Genotype(normal={cell}, normal_concat=range(2, 4), reduce={cell}, reduce_concat=[2, 3])"
    genotype = Genotype.parse(text)
    assert genotype.normal[2] == ("max_pool_3x3", 2) and genotype.normal_concat == genotype.reduce_concat == (2, 3)


def test_text_that_would_run_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(UserError, match="cannot be read"):
        Genotype.parse(f"Genotype(normal=open({str(target)!r}, 'w'), normal_concat=[2], reduce=[], reduce_concat=[2])")
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": (("none", 0), ("skip_connect", 1))}, "'none'"),
        ({"normal": (("skip_connect", 0), ("skip_connect", 2))}, "reads state 2"),
        ({"reduce": (("skip_connect", 0),)}, "1 choices"),
        ({"reduce_concat": (9,)}, "does not have"),
        ({"normal": ((0,), ("skip_connect", 1))}, "pairs"),
    ],
)
def test_an_impossible_cell_is_refused(change: dict, message: str) -> None:
    pair = (("skip_connect", 0), ("skip_connect", 1))
    fields: dict = {"normal": pair, "normal_concat": (2,), "reduce": pair, "reduce_concat": (2,)}
    with pytest.raises(UserError, match=message):
        Genotype(**{**fields, **change})


def test_an_unknown_name_says_what_is_known() -> None:
    with pytest.raises(UserError, match="PC_DARTS_image"):
        Genotype.load("no_such_cell")


def test_edges_are_counted_both_ways() -> None:
    assert [edge_count(nodes) for nodes in (1, 2, 3, 4, 5)] == [2, 5, 9, 14, 20]
    assert all(node_count(edge_count(nodes)) == nodes for nodes in range(1, 9))
    with pytest.raises(UserError, match="13 edges"):
        node_count(13)


def test_edge_softmax_sums_to_one_at_every_node() -> None:
    weights = edge_softmax(torch.randn(14))
    torch.testing.assert_close(torch.stack([part.sum() for part in weights.split([2, 3, 4, 5])]), torch.ones(4))


def test_none_is_never_chosen_but_weakens_its_edge() -> None:
    alphas = torch.zeros(5, 8)
    alphas[2, 0] = 5.0  # edge 0 -> node 1 is mostly "none"
    alphas[:, 4] = 1.0
    genotype = derive(alphas, alphas)
    assert all(name == "sep_conv_3x3" for name, _ in genotype.normal)
    assert {state for _, state in genotype.normal[2:]} == {1, 2}


@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_cap_knows_the_exact_size(measure: str, stem: str) -> None:
    side, config = 64 if stem == "imagenet" else 33, FinalConfig(6, 4, stem, 7)  # type: ignore[arg-type]
    cap = size_cap(1, measure, config, side)  # type: ignore[arg-type]
    for seed in range(3):
        genotype = derive(*random_weights(seed))
        with torch.device("meta"):
            found = count(FinalNetwork(genotype, config), side)
        assert cap.total(genotype) == getattr(found, measure)


def test_a_capped_cell_is_within_the_cap_and_as_free_as_it_may() -> None:
    weights = random_weights(5)
    free = derive(*weights)
    total = size_cap(1, "parameters", FinalConfig(16, 8)).total
    for share in (0.9, 0.7, 0.5):
        cell = derive(*weights, cap=size_cap(share * total(free), "parameters", FinalConfig(16, 8)))
        assert 0.3 * total(free) < total(cell) <= share * total(free)
    assert derive(*weights, cap=size_cap(total(free), "parameters", FinalConfig(16, 8))) == free


def test_a_cap_below_every_cell_is_refused() -> None:
    with pytest.raises(UserError, match="the cheapest one has"):
        derive(*random_weights(0), cap=size_cap(10, "parameters", FinalConfig(16, 8)))
