"""Chromosomes, cells and the operators that breed them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from common.errors import UserError
from eeea_net.config import NetworkConfig, SpaceOptions
from eeea_net.counting import build_on_meta, count, measured
from eeea_net.genotypes import KNOWN, OPERATIONS, Cell, Genotype, published
from eeea_net.model import AuxiliaryHead, Network, make_operation
from eeea_net.space import Space, inversion, key


def test_a_chromosome_is_the_cell_that_it_decodes_to() -> None:
    for blocks, operations, concat in ((5, 9, "unused"), (4, 10, "all"), (1, 9, "unused")):
        space = Space.of(SpaceOptions(blocks, operations, concat))  # type: ignore[arg-type]
        random = np.random.default_rng(0)
        for _ in range(20):
            chromosome = space.draw(random)
            genotype = space.decode(chromosome)
            assert space.holds(chromosome) and space.encode(genotype) == chromosome
            assert genotype.normal.blocks == blocks
            if concat == "all":
                assert genotype.normal.concat == tuple(range(2, 2 + blocks))


def test_no_block_reads_its_direct_predecessor_and_all_choices_come_up() -> None:
    space, random = Space(), np.random.default_rng(0)
    drawn = [space.draw(random) for _ in range(400)]
    for gene in range(0, space.genes, 2):
        assert {one[gene] for one in drawn} == set(OPERATIONS)
        assert {one[gene + 1] for one in drawn} == set(range(gene % 20 // 4 + 1))


def test_every_published_cell_concatenates_what_no_later_block_reads() -> None:
    for name in ("EA", "EEEA_A", "EEEA_B", "EEEA_C"):
        genotype = published()[name]
        assert genotype.normal.concat == genotype.normal.unread()
        assert genotype.reduce.concat == genotype.reduce.unread()


def test_mutation_changes_one_pair_and_leaves_the_parent_alone() -> None:
    space, random = Space(), np.random.default_rng(0)
    parent = space.draw(random)
    before = tuple(parent)
    for _ in range(50):
        child = space.mutate(parent, random)
        pairs = {place // 2 for place in range(space.genes) if child[place] != parent[place]}
        assert len(pairs) <= 1 and space.holds(child)
    assert parent == before


def test_inversion_swaps_two_neighbouring_pairs_and_stays_in_the_space() -> None:
    space, random = Space(), np.random.default_rng(0)
    parent = space.draw(random)
    for _ in range(50):
        child = space.invert(parent, random)
        assert space.holds(child) and sorted(map(str, child)) == sorted(map(str, parent))
    twice = inversion(inversion(parent, 8), 8)
    assert twice == parent
    assert inversion(parent, space.genes - 2) == inversion(parent, space.genes - 4)  # the last pair and the one before


def test_a_childs_genes_are_its_parents() -> None:
    space, random = Space(), np.random.default_rng(1)
    mother, father = space.draw(random), space.draw(random)
    child = space.breed(mother, father, random, mutation=0.0, inversion=0.0)
    assert all(gene in (hers, theirs) for gene, hers, theirs in zip(child, mother, father))
    assert child not in (mother, father)
    assert len({key(one) for one in (mother, father, child)}) == 3


@pytest.mark.parametrize(
    ("network", "side"),
    [
        (NetworkConfig(channels=4, layers=5), 17),
        (NetworkConfig(channels=8, layers=4, stem="imagenet"), 47),
        (NetworkConfig(channels=16, layers=3, se=True, in_channels=1), 15),
        (NetworkConfig(channels=6, layers=4, increment=2, auxiliary=True), 16),
        (NetworkConfig(channels=6, layers=1), 9),
    ],
)
def test_formulas_count_what_the_network_has(network: NetworkConfig, side: int) -> None:
    random, space = np.random.default_rng(0), Space()
    for _ in range(3):
        genotype = space.decode(space.draw(random))
        counts = count(genotype, network, side)
        built = build_on_meta(genotype, network)
        assert (counts.parameters, counts.macs) == measured(built, side, network.in_channels)
    everything = Genotype(*(Cell(tuple((name, 0) for name in KNOWN), (2, 6)) for _ in range(2)))
    counts = count(everything, network, side)
    assert (counts.parameters, counts.macs) == measured(build_on_meta(everything, network), side, network.in_channels)


def test_published_networks_have_the_papers_sizes() -> None:
    sizes = {name: count(published()[name], NetworkConfig(), 32) for name in ("EA", "EEEA_A", "EEEA_B", "EEEA_C")}
    assert {name: one.parameters for name, one in sizes.items()} == {
        "EA": 2_925_046,
        "EEEA_A": 1_769_230,
        "EEEA_B": 1_870_318,
        "EEEA_C": 3_513_358,
    }
    assert round(sizes["EEEA_B"].macs / 1e6, 1) == 301.9


def test_cells_that_others_published_are_networks_too() -> None:
    """NASNet-A and AmoebaNet-A: separable 7x7 convolutions, blocks of states that the search never reads."""
    for name, blocks in (("NASNet", 5), ("AmoebaNet", 5), ("CARS_H", 4)):
        genotype = published()[name]
        assert genotype.normal.blocks == blocks and Space(blocks).encode(genotype)
        network = Network(genotype, NetworkConfig(channels=4, layers=3, classes=7)).eval()
        assert network(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert not Space().holds(Space().encode(published()["NASNet"]))


@pytest.mark.parametrize("stride", [1, 2])
def test_none_is_no_connection(stride: int) -> None:
    x = torch.randn(2, 3, 7, 6)
    found = make_operation("none", 3, stride)(x)
    assert torch.equal(found, torch.zeros_like(torch.nn.functional.max_pool2d(x, 3, stride, 1)))


@pytest.mark.parametrize(("stem", "sides", "stride"), [("cifar", (8, 9, 10), 3), ("imagenet", (7, 8), 2)])
def test_the_auxiliary_head_has_the_authors_windows_where_they_fit(
    stem: Literal["cifar", "imagenet"], sides: tuple[int, ...], stride: int
) -> None:
    head = AuxiliaryHead(4, 5, stem).eval()
    pooling = torch.nn.AvgPool2d(5, stride, padding=0, count_include_pad=False)
    for side in sides:
        x = torch.randn(2, 4, side, side)
        wanted = head.classifier(head.features[2:](pooling(x.relu())).flatten(1))
        torch.testing.assert_close(head(x), wanted)
    for side in (1, 2, 3, 4, 5, 6, 11, 20):
        assert head(torch.randn(1, 4, side, side)).shape == (1, 5)


def test_a_genotype_file_of_pc_darts_or_of_a_log_is_read(tmp_path: Path) -> None:
    genotype = published()["PC_DARTS"]
    genotype.save(tmp_path / "cell.json")
    assert Genotype.load(tmp_path / "cell.json") == genotype
    fields = genotype.fields()
    text = f"Genotype(normal={fields['normal']}, normal_concat=range(2, 6), reduce={fields['reduce']}, "
    (tmp_path / "log.txt").write_text(text + "reduce_concat=range(2, 6))")
    assert Genotype.load(tmp_path / "log.txt") == genotype
    from pc_darts.genotypes import Genotype as Theirs

    assert Theirs.load(tmp_path / "cell.json") == Theirs.load("PC_DARTS_cifar")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{}", "needs the lists normal, normal_concat"),
        ("[1, 2]", "needs the lists"),
        ("Genotype(__import__('os'))", "expected JSON or a logged"),
        ("not json", "expected JSON or a logged Genotype"),
        (
            json.dumps({"normal": [["warp", 0]], "normal_concat": [2], "reduce": [], "reduce_concat": []}),
            "two for every",
        ),
        (
            json.dumps({"normal": [["warp", 0]] * 2, "normal_concat": [2], "reduce": [], "reduce_concat": []}),
            "'warp' is unknown",
        ),
        (
            json.dumps({"normal": [["skip_connect", 2]] * 2, "normal_concat": [2], "reduce": [], "reduce_concat": []}),
            "reads state 2, which does not come before",
        ),
    ],
)
def test_a_file_that_is_no_genotype_is_a_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        Genotype.load(tmp_path / "cell.json")
    with pytest.raises(UserError, match="neither a file nor one of EA"):
        Genotype.load("EEEA_Z")
