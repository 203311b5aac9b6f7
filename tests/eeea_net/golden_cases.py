"""Checks of the recorded cases, matched by kind; `.json` cases have no source and are matched by their stem."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import evolution as nsga2
from eeea_net.config import EvolutionOptions, NetworkConfig
from eeea_net.counting import build_on_meta, count, measured
from eeea_net.evolution import first_generation, is_small_enough
from eeea_net.genotypes import OPERATIONS, Genotype, published
from eeea_net.model import Network, make_operation
from eeea_net.official import official_crowding, official_fronts, official_survivors
from eeea_net.once_for_all import Block, Subnet, published_subnet, subnet_blocks
from eeea_net.space import Chromosome, Space, crossover, inversion, key, replaced
from tests.golden_case import Case, Check, assert_close, kind

TOLERANCE = 1e-5


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Recorded weights; the records lack batch norm's counters."""
    counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    module.load_state_dict({**counters, **weights}, strict=True)


def compare(module: nn.Module, x: Tensor, expected: dict[str, Tensor], name: str) -> None:
    """In eval mode first: a pass in training mode moves the running statistics."""
    for mode in ("eval", "train"):
        if f"{name}_{mode}" in expected:
            found = module.train(mode == "train")(x)
            assert_close(found, expected[f"{name}_{mode}"], f"{name} in {mode} mode", TOLERANCE)


def check_operations(case: Case) -> None:
    config = case.config
    for name in config["ops"]:
        for stride in config["strides"]:
            operation = make_operation(name, config["C"], stride)
            label = f"{name}_s{stride}"
            weights = case.group("param", f"{label}.")
            if not config.get("affine", True):  # no network of this paper has such norms
                for place, norm in operation.named_modules():
                    if isinstance(norm, nn.BatchNorm2d) and f"{place}.weight" not in weights:
                        norm.weight = norm.bias = None  # type: ignore[assignment]
            load(operation, weights)
            compare(operation, case.group("in")["x"], case.group("out"), label)


def network_config(config: dict[str, Any]) -> NetworkConfig:
    kinds = {"NetworkCIFAR": "cifar", "PyramidNetworkCIFAR": "cifar", "NetworkImageNet": "imagenet"}
    if config["class"] not in kinds:
        pytest.fail(f"unknown class of network {config['class']!r}; known: {', '.join(kinds)}")
    return NetworkConfig(
        channels=config["C"],
        layers=config["layers"],
        stem=kinds[config["class"]],  # type: ignore[arg-type]
        se=bool(config.get("SE", False)),
        increment=config.get("increment", 0),
        classes=config["num_classes"],
        in_channels=config.get("in_channels", 3),
        auxiliary=bool(config.get("auxiliary", False)),
    )


def check_network(case: Case) -> None:
    genotype = Genotype.of(case.config["genotype"])
    if case.config.get("genotype_name") in published():
        assert genotype == published()[case.config["genotype_name"]]
    network = Network(genotype, network_config(case.config))
    load(network, case.group("param"))
    given, expected = case.group("in"), case.group("out")
    compare(network, given["x"], expected, "logits")
    for name in expected:
        if "aux" in name:
            load(network, case.group("param"))
            assert_close(network.train().with_auxiliary(given["x"])[1], expected[name], name, TOLERANCE)  # type: ignore[arg-type]


def spaces(case: Case) -> Iterator[tuple[str, Space]]:
    """Recorded choices of every gene are those of our space."""
    recorded = case.config["choices"]
    if all(key.isdigit() for key in recorded):
        recorded = {f"{len(recorded) // 8} blocks, {len(recorded['0'])} ops": recorded}
    for name, choices in recorded.items():
        space = Space(len(choices) // 8, tuple(choices["0"]))
        for gene in range(0, space.genes, 2):
            assert tuple(choices[str(gene)]) == space.operations
            assert choices[str(gene + 1)] == list(range(space.states(gene)))
        assert set(space.operations) <= set(OPERATIONS)
        yield name, space


def check_chromosomes(case: Case) -> None:
    assert list(spaces(case))
    network = NetworkConfig()
    for recorded in case.config["cases"]:
        chromosome: Chromosome = tuple(recorded["chromosome"])
        assert key(chromosome) == recorded["md5"]
        everything = Space(recorded["n_blocks"], OPERATIONS, "all")
        assert everything.decode(chromosome) == Genotype.of(recorded["decoded"])
        unused = Space(recorded["n_blocks"], OPERATIONS, "unused").decode(chromosome)
        assert [*unused.normal.concat, "|", *unused.reduce.concat] == recorded["decoded_unused_concat"]
        assert everything.encode(unused) == chromosome
        for genotype, end in ((everything.decode(chromosome), ""), (unused, "_unused")):
            counts = count(genotype, network, 32)
            assert counts.parameters == recorded[f"params_clean{end}"]
            assert counts.official_parameters == round(1e6 * recorded[f"params_official_M{end}"])
            if not end:
                for beta, accepted in recorded["early_exit_accept"].items():
                    size = counts.official_parameters / 1e6
                    assert is_small_enough(size, float(beta), official=True) == accepted


class Stream:
    """A space whose draws are the recorded candidates."""

    def __init__(self, candidates: list[list[Any]]) -> None:
        self.candidates = iter(candidates)

    def draw(self, random: np.random.Generator) -> Chromosome:
        return tuple(next(self.candidates))

    def key(self, chromosome: Chromosome) -> str:
        return key(chromosome)

    def breed(self, *_: Any) -> Chromosome:
        raise NotImplementedError


def check_early_exit(case: Case) -> None:
    config = case.config
    candidates = config["candidates"]
    sizes: dict[Chromosome, float] = {}
    for candidate, recorded in zip(candidates, config["params_M"], strict=True):
        space = Space(len(candidate) // 8, OPERATIONS, "all")
        sizes[tuple(candidate)] = count(space.decode(tuple(candidate)), NetworkConfig(), 32).official_parameters / 1e6
        assert sizes[tuple(candidate)] == pytest.approx(recorded, abs=1e-9)
    options = EvolutionOptions(population=config["population"], beta=config["beta_M"], selection="official_compat")
    random = np.random.default_rng(0)
    first = first_generation(Stream(candidates), options, random, sizes.__getitem__)
    assert [candidates.index(list(member.chromosome)) for member in first.members] == config["accepted"]
    assert first.draws == config["draws_used"]
    share = sum(is_small_enough(size, config["beta_M"], official=True) for size in config["params_M"]) / len(candidates)
    assert share == pytest.approx(config["accept_rate"])


def check_counts(case: Case) -> None:
    for name, recorded in case.config["models"].items():
        found = re.fullmatch(r"(\w+)_C(\d+)(?:_L(\d+))?", name)
        assert found, f"{name}: expected GENOTYPE_Cchannels"
        genotype, channels = Genotype.of(recorded["genotype"]), int(found[2])
        assert found[1] not in published() or genotype == published()[found[1]]
        network = NetworkConfig(channels=channels, layers=int(found[3] or 20))
        counts = count(genotype, network, 32)
        assert (counts.parameters, counts.macs) == (recorded["params_clean"], recorded["macs"])
        assert (counts.parameters, counts.macs) == measured(build_on_meta(genotype, network), 32)
        assert counts.official_parameters == round(1e6 * recorded["params_official_M"])
        if "params_clean_100cls" in recorded:
            more = NetworkConfig(channels=channels, layers=network.layers, classes=100)
            assert count(genotype, more, 32).parameters == recorded["params_clean_100cls"]


def check_operators(case: Case) -> None:
    ((_, space),) = spaces(case)
    config = case.config
    for one in config["crossover"]:
        assert list(crossover(tuple(one["mother"]), tuple(one["father"]), one["mask"])) == one["child"]
    for one in config["mutation"]:
        assert list(replaced(tuple(one["parent"]), one["position"], one["new_pair"])) == one["mutant"]
        assert one["new_pair"][1] < space.states(one["position"])
    for one in config["inversion"]:
        assert list(inversion(tuple(one["parent"]), one["drawn_position"])) == one["inversion_swap"]
    if config.get("tournament"):
        pytest.fail("genetic_operators: recorded tournaments are not known to this check")


def check_nsga2(case: Case) -> None:
    config = case.config
    fitness = config["fitness"]

    def values(recorded: list[float | None]) -> list[float]:
        return [math.inf if value is None else value for value in recorded]

    assert official_fronts(fitness) == config["official_fronts"]
    np.testing.assert_allclose(official_crowding(fitness), values(config["official_crowding"]), rtol=1e-9)
    assert official_survivors(fitness) == config["official_survival_order"]
    assert nsga2.fronts(fitness) == [sorted(front) for front in config["textbook_fronts"]]
    _, crowding = nsga2.ranks_and_crowding(fitness)
    np.testing.assert_allclose(crowding, values(config["textbook_crowding"]), rtol=1e-9)
    best = nsga2.survivors(fitness, len(fitness) // 2)
    assert set(config["textbook_best_half_certain"]) <= set(best)
    front = [fitness[index] for index in nsga2.fronts(fitness)[0]]
    assert nsga2.hypervolume(front, config["ref_point"]) == pytest.approx(config["hypervolume_front0"], rel=1e-9)


def check_subnet(case: Case) -> None:
    config = case.config
    blocks = [
        Block(b["in"], b["out"], b["kernel"], b["stride"], b["expand"], b["mid"], b["act"], b["se"], b["shortcut"])
        for b in config["blocks"]
    ]
    network = Subnet(
        blocks,
        config["first_conv_out"],
        config["final_expand"],
        config["feature_mix"],
        config["num_classes"],
        config["bn_eps"],
        config["bn_momentum"],
    )
    load(network, case.group("param"))
    x, expected = case.group("in")["x"], case.group("out")
    assert x.shape[-1] == config["resolution"]
    network.eval()
    assert_close(network.first_conv(x), expected["after_first_conv_eval"], "first convolution", TOLERANCE)
    for name in expected:
        if found := re.fullmatch(r"after_block(\d+)_eval", name):
            y = network.first_conv(x)
            for block in network.blocks[: int(found[1]) + 1]:
                y = block(y)
            assert_close(y, expected[name], name, TOLERANCE)
    compare(network, x, expected, "logits")
    assert network.eval()(x[:1]).shape == (1, config["num_classes"])  # the authors' squeeze() breaks a batch of one


def check_published_subnet(case: Case) -> None:
    config = case.config
    subnet = config["subnet"]
    blocks = subnet_blocks(subnet["ks"], subnet["e"], subnet["d"])
    assert [block.record() for block in blocks] == config["blocks"]
    with torch.device("meta"):
        network = Subnet(
            blocks, config["first_conv_out"], config["final_expand"], config["feature_mix"], config["num_classes"]
        )
    for side, macs in config["macs"].items():
        assert measured(network, int(side)) == (config["params"], macs)
    names = list(network.state_dict())
    inner = config["state_dict_keys_block1"]
    block = inner[0].split(".")[1]
    assert [name for name in names if name.startswith(f"blocks.{block}.")] == inner
    assert [name for name in names if not name.startswith("blocks.")] == config["state_dict_other"]
    for name in ("EEEA_C1", "EEEA_C2"):
        known = published_subnet(name)
        if (known.kernels, known.expands, known.depths) == tuple(map(tuple, (subnet["ks"], subnet["e"], subnet["d"]))):
            assert known.resolution == subnet["r"]


CHECKS = [
    Check("operations", kind("ops_", "operations.py"), check_operations),
    Check("cell network", kind("net_", "network/model.py"), check_network),
    Check("chromosomes", kind("chromosome", ""), check_chromosomes),
    Check("early-exit initialisation", kind("early_exit", ""), check_early_exit),
    Check("published counts", kind("published_cifar", ""), check_counts),
    Check("genetic operators", kind("genetic", ""), check_operators),
    Check("NSGA-II", kind("nsga2", ""), check_nsga2),
    Check("ImageNet subnet", kind("imagenet_subnet", "darmo"), check_subnet),
    Check("published ImageNet subnet", kind("imagenet_", ""), check_published_subnet),
]
