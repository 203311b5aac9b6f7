"""The space of architectures: what is valid, how it is drawn and varied."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from eagan.config import RunConfig
from eagan.drawing import main as draw_main
from eagan.drawing import svg
from eagan.genotypes import (
    DISCRIMINATOR,
    GENERATOR,
    KEEP,
    PUBLISHED,
    Genes,
    Space,
    breed,
    fresh,
    one_edge,
    open_genes,
    save_genes,
)
from eagan.run import given_pair
from tests.refusals import refused

SPACES = (GENERATOR, DISCRIMINATOR)
of_space = pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)


def sampled(space: Space, count: int) -> list[Genes]:
    random = Random(0)
    return [space.sample(random) for _ in range(count)]


def changed(a: Genes, b: Genes) -> list[tuple[int, int]]:
    return [(c, e) for c in range(3) for e in range(7) if a[c][e] != b[c][e]]


@of_space
def test_samples_are_valid_and_reach_every_gene_of_every_edge(space: Space) -> None:
    found = sampled(space, 600)
    assert all(space.valid(genes) for genes in found)
    for cell in range(3):
        for edge, choice in enumerate(space.choices):
            assert {genes[cell][edge] for genes in found} == set(choice), (
                cell,
                edge,
            )  # the released code never draws c1


@of_space
def test_a_mutation_changes_one_edge_and_is_valid(space: Space) -> None:
    for genes in sampled(space, 20):
        for edge, child in space.mutations(genes):
            assert space.valid(child) and child != genes
            assert edge in changed(genes, child)
            both = space is DISCRIMINATOR and {KEEP} & ({*genes[edge[0]][5:]} | {*child[edge[0]][5:]})
            assert len(changed(genes, child)) == 1 or both


@of_space
def test_a_crossover_takes_one_edge_of_the_other_parent(space: Space) -> None:
    a, b = sampled(space, 2)
    children = [child for _, child in space.crossovers(a, b)]
    assert children
    for child in children:
        assert space.valid(child) and all(child[c][e] == b[c][e] for c, e in changed(a, child))


@of_space
def test_a_crossover_of_equal_parents_ends_without_a_child(space: Space) -> None:
    (genes,) = sampled(space, 1)
    assert not list(space.crossovers(genes, genes))
    assert one_edge(space.crossovers(genes, genes), Random(0), ()) is None


def test_down_sampling_edges_are_switched_off_and_on_together() -> None:
    genes = PUBLISHED["base_D"]
    assert DISCRIMINATOR.change(genes, 0, 5, KEEP)[0][5:] == (KEEP, KEEP)
    assert DISCRIMINATOR.change(genes, 1, 6, 3)[1][5:] == (3, 3)
    assert DISCRIMINATOR.change(genes, 0, 6, 4)[0][5:] == (0, 4)
    assert not DISCRIMINATOR.valid(((3, 0, 3, 0, 1, KEEP, 2), *genes[1:]))


@of_space
def test_children_are_never_repeated_and_come_from_their_parents(space: Space) -> None:
    random, parents = Random(1), sampled(space, 4)
    taken = set(parents)
    for _ in range(60):
        child, parent = breed(space, parents, random, taken, 0.3, 0.5)
        assert child not in taken and parent is not None
        assert 1 <= len({c for c, _ in changed(parents[parent], child)}) <= 2  # one edge of another, and one new gene
        taken.add(child)


def test_where_all_surroundings_are_used_up_a_fresh_sample_takes_the_place() -> None:
    (parent,) = sampled(GENERATOR, 1)
    taken = {parent, *(child for _, child in GENERATOR.mutations(parent))}
    child, origin = breed(GENERATOR, [parent], Random(0), taken, 0.0, 1.0)
    assert origin is None and child not in taken and GENERATOR.valid(child)
    assert fresh(GENERATOR, Random(0), ()) == GENERATOR.sample(Random(0))


def test_a_genotype_file_is_read_back_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    save_genes(path, generator=PUBLISHED["best_G"], discriminator=PUBLISHED["cifar10_D"])
    assert open_genes(GENERATOR, str(path), "--genotype") == PUBLISHED["best_G"]
    assert open_genes(DISCRIMINATOR, str(path), "--genotype") == PUBLISHED["cifar10_D"]
    refused("--genotype nothing: no such file; published", open_genes, GENERATOR, "nothing", "--genotype")
    refused("no valid generator", open_genes, GENERATOR, "base_D", "--genotype")
    path.write_text(json.dumps({"generator": [[1, 2]]}))
    refused("is no genotype", open_genes, GENERATOR, str(path), "--genotype")
    refused("it has no discriminator; it has generator", open_genes, DISCRIMINATOR, str(path), "--genotype")


def test_the_authors_files_are_read_and_never_unpickled(tmp_path: Path) -> None:
    paths = [tmp_path / "best_gen_80_2.npy", tmp_path / "dis.npy", tmp_path / "pickled.npy", tmp_path / "half.npy"]
    for path, content in zip(paths, (PUBLISHED["best_G"], PUBLISHED["stl10_D"], [{}], [[0.5] * 7] * 3)):
        np.save(path, np.array(content))
    pair = given_pair(RunConfig(genotype=f"{paths[0]},{paths[1]}"))
    assert pair == (PUBLISHED["best_G"], PUBLISHED["stl10_D"])
    refused("no valid discriminator", open_genes, DISCRIMINATOR, str(paths[0]), "--genotype")
    refused("--genotype .*pickled.npy is no array of numbers", open_genes, GENERATOR, str(paths[2]), "--genotype")
    refused(
        "half.npy: .* is no genotype; expected 3 lists of 7 whole", open_genes, GENERATOR, str(paths[3]), "--genotype"
    )
    refused("--genotype nothing: no such file", given_pair, RunConfig(genotype="best_G,nothing"))


def test_every_edge_that_is_not_none_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = svg(GENERATOR, PUBLISHED["best_G"])
    lines = sum(gene != 0 or edge < 2 for cell in PUBLISHED["best_G"] for edge, gene in enumerate(cell))
    assert drawn.count("<path") == lines == 15
    assert svg(DISCRIMINATOR, PUBLISHED["base_D"]).count(">keep</text>") == 4
    path = draw_main(["cifar10_D", str(tmp_path / "d.svg")])
    assert path.read_text().startswith("<svg") and "cell 2: c0 skip, c2 conv 3x3" in capsys.readouterr().out
