"""Checks for the recorded EAGAN cases; sizes, genotypes and counts come from each case itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import costs
from common.ema import Ema
from common.evolution import fronts
from common.metrics.distribution import fid, inception_score
from eagan.config import NetworkConfig
from eagan.genotypes import DISCRIMINATOR, GENERATOR, Genes, Space
from eagan.losses import decayed, discriminator_loss, generator_loss
from eagan.model import Discriminator, Generator, SimpleDiscriminator, write_out
from eagan.selection import Fitness, cars_pools, cars_stages, objectives, select
from tests.golden_case import Case, Check, assert_close, kind

AUTHORS = "marsggbo/EAGAN"


def genes_of(content: Sequence[Sequence[int]]) -> Genes:
    return tuple(tuple(cell) for cell in content)


def unknown(case: Case, *read: str) -> None:
    """Fail by name where a case has an option or a result that its check does not read."""
    left = sorted(set(case.config) - set(read) - {"note", "definition", "source"})
    assert not left, f"{case.path.name}: options that are not read: {left}"


def config_of(case: Case) -> NetworkConfig:
    """Sizes as far as the case names them; the side of a discriminator's pictures is the pictures' own."""
    known = {"gf_dim", "df_dim", "latent_dim", "bottom_width"}
    other = (
        set(case.config) - known - {"genotype_G", "genotype_D", "genotypes_G", "genotypes_D", "img", "spectral_norm"}
    )
    assert not other, f"options of this case that the networks do not have: {', '.join(sorted(other))}"
    spectral = str(case.config.get("spectral_norm", "defaults (1 power iteration, eps 1e-12)"))
    told = "1 power iteration" in spectral and "eps 1e-12" in spectral
    assert told or not normalised(case), f"another spectral norm: {spectral}"
    return NetworkConfig(**{name: case.config[name] for name in known & set(case.config)})


def normalised(case: Case) -> bool:
    """Whether a discriminator's first block and last layer have spectral norm, which is an option of the authors'."""
    return not any(name.endswith(("block1.c1.weight", "l5.weight")) for name in case.group("param"))


def filled(network: nn.Module, case: Case, prefix: str = "") -> nn.Module:
    """With the recorded tensors, of which the authors' files hold every convolution twice."""
    tensors = case.group("param", prefix)
    own = {name: tensor for name, tensor in tensors.items() if ".op." not in name}
    counters = {n: t for n, t in network.state_dict().items() if n.endswith("num_batches_tracked")}
    network.load_state_dict({**counters, **own}, strict=True)
    return network


def both_forms(network: nn.Module, given: tuple[Any, ...], wanted: Tensor, what: str) -> None:
    """Our equal form, and the one that is written out as in the paper."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        assert_close(network(*given), wanted, what)
        network.load_state_dict(state)  # batch norm and spectral norm have moved
        assert_close(write_out(network)(*given), wanted, f"{what}, written out")
    network.load_state_dict(state)


def generator(case: Case) -> None:
    network = filled(Generator(config_of(case), genes_of(case.config["genotype_G"])), case)
    for mode in ("eval", "train"):
        both_forms(network.train(mode == "train"), (case.tensors["in/z"],), case.tensors[f"out/img_{mode}"], mode)


def discriminator(case: Case) -> None:
    network = filled(Discriminator(config_of(case), genes_of(case.config["genotype_D"]), normalised(case)), case)
    x = case.tensors["in/x"]
    assert x.shape[-1] == case.config.get("img", x.shape[-1])
    both_forms(network.eval(), (x,), case.tensors["out/logit_eval"], "eval")
    both_forms(network.train(), (x,), case.tensors["out/logit_train_one_power_iteration"], "train")


def supernets(case: Case) -> None:
    config = config_of(case)
    generator = filled(Generator(config, aliased=True), case, "G.").eval()
    discriminator = filled(Discriminator(config, spectral=normalised(case)), case, "D.").eval()
    for number, genes in enumerate(case.config.get("genotypes_G", ())):
        wanted = case.tensors[f"out/img{number}_eval"]
        both_forms(generator, (case.tensors["in/z"], genes_of(genes)), wanted, f"generator {number}")
    for number, genes in enumerate(case.config.get("genotypes_D", ())):
        wanted = case.tensors[f"out/logit{number}_eval"]
        both_forms(discriminator, (case.tensors["in/x"], genes_of(genes)), wanted, f"discriminator {number}")


def simple_discriminator(case: Case) -> None:
    unknown(case, "formula", "parameter_order", "n_params")
    formula = case.config["formula"]
    assert "1+0.1*sin(0.9*i+j)" in formula and "0.05*sin(0.7*i+j)" in formula, f"another formula: {formula}"
    width = 2 * len(case.tensors["param/block1.1.running_mean"])
    network = SimpleDiscriminator(NetworkConfig(df_dim=width))
    state = network.state_dict() | case.group("param")
    for j, name in enumerate(case.config["parameter_order"]):
        i = torch.arange(state[name].numel(), dtype=torch.float64)
        value = 1 + 0.1 * torch.sin(0.9 * i + j) if "1.weight" in name else 0.05 * torch.sin(0.7 * i + j)
        state[name] = value.float().view_as(state[name])
    network.load_state_dict(state)
    assert costs.parameter_count(network) == case.config["n_params"]
    with torch.no_grad():
        assert_close(network.eval()(case.tensors["in/x"]), case.tensors["out/logit_eval"], "eval")


def hinge(case: Case) -> None:
    unknown(case)
    given, wanted = case.group("in"), case.group("out")
    assert_close(discriminator_loss(given["real_logits"], given["fake_logits"]), wanted["d_loss"], "discriminator")
    assert_close(generator_loss(given["fake_logits"]), wanted["g_loss"], "generator")


def scores(case: Case) -> None:
    config, given = dict(case.config), case.group("in")
    a, b, p = given["features_a"], given["features_b"], given["logits"].double().softmax(1)
    score = inception_score(p, config.pop("splits"))
    found = {"fid": fid(b, a), "is_mean": score.value, "is_std": score.std}
    for name in config:
        if first := re.fullmatch(r"fid_first_(\d+)_vs_b", name):
            found[name] = fid(b, a[: int(first[1])])
        elif splits := re.fullmatch(r"is_(mean|std)_(\d+)splits?", name):
            found[name] = getattr(inception_score(p, int(splits[2])), "value" if splits[1] == "mean" else "std")
    assert set(config) <= set(found), f"numbers of this case that are not known: {set(config) - set(found)}"
    assert {name: found[name] for name in config} == pytest.approx(config, rel=1e-5)


def selection(case: Case) -> None:
    config = case.config
    pairs = [name for name in config if name.startswith("fronts_")]
    unknown(case, "IS", "FID", "params_M", "paper_fronts", "cars_pool_stage", "cars_certain", "cars_candidates", *pairs)
    fitness = [Fitness(*row) for row in zip(config["IS"], config["FID"], config["params_M"])]
    table = objectives(fitness)
    columns = {"invIS": table[:, 0], "FID": table[:, 1], "params": table[:, 2]}
    columns |= {"invFID": 1 / table[:, 1], "invparams": 1 / table[:, 2]}

    def sorted_by(names: str) -> list[list[int]]:
        return fronts(torch.stack([torch.tensor(columns[name]) for name in names.split("_")], 1).numpy())

    for name in pairs:
        assert sorted_by(name.removeprefix("fronts_")) == config[name], name
    for name, wanted in config["paper_fronts"].items():
        assert sorted_by(name) == wanted, name
    assert cars_pools(fitness) == config["cars_pool_stage"]
    for count, wanted in config["cars_certain"].items():
        sure, candidates = cars_stages(fitness, int(count))
        assert sorted(sure) == wanted, count
        if len(sure) < int(count):  # else nobody is drawn
            assert sorted(candidates) == config["cars_candidates"][count], count
        kept = select(fitness, int(count), "cars", Random(0))
        assert set(wanted) <= set(kept) <= {*wanted, *candidates} and len(set(kept)) == int(count)
    whole = config["paper_fronts"]["invIS_FID_params"]
    assert set(select(fitness, len(whole[0]), "nsga2", Random(0))) == set(whole[0])


def genetic_operators(case: Case) -> None:
    config = case.config
    known = {f"{what}_{net}" for what in ("samples", "mutation", "crossover") for net in "GD"} | {"note", "source"}
    assert set(config) <= known, f"operators that are not known: {set(config) - known}"
    for letter, space in (("G", GENERATOR), ("D", DISCRIMINATOR)):
        for sample in config.get(f"samples_{letter}", ()):
            assert space.valid(genes_of(sample)), sample
        for entry in config.get(f"mutation_{letter}", ()):
            parent = genes_of(entry["parent"])
            one_change(space, parent, entry, dict((child, edge) for edge, child in space.mutations(parent)))
        for entry in config.get(f"crossover_{letter}", ()):
            a, b = genes_of(entry["a"]), genes_of(entry["b"])
            assert all(new == b[cell][edge] for cell, edge, _, new in entry["diff"]), entry
            one_change(space, a, entry, dict((child, edge) for edge, child in space.crossovers(a, b)))


def one_change(space: Space, parent: Genes, entry: dict[str, Any], ours: dict[Genes, tuple[int, int]]) -> None:
    """The recorded child is one of ours, by the edge that it names.

    The released operators may leave one of two down-sampling edges at -1; ours then change both.
    """
    child = genes_of(entry["child"])
    assert space.connected(child) == entry.get("valid", True), entry
    for cell, edge, old, new in entry["diff"] if space.connected(child) else ():
        made = space.change(parent, cell, edge, new)
        assert parent[cell][edge] == old and (made == child or space.half_paired(child[cell])), entry
        assert made in ours, entry


def counts(case: Case) -> None:
    unknown(case, "models")
    for name, model in case.config["models"].items():
        sizes = ("gf_dim", "df_dim", "latent_dim", "bottom_width")
        other = set(model) - {*sizes, "genotype", "img", "params", "macs"}
        assert not other, f"{name}: options that are not read: {other}"
        config = NetworkConfig(**{key: model[key] for key in sizes if key in model})
        with torch.device("meta"):
            network: nn.Module = SimpleDiscriminator(config)
            if "genotype" in model:
                network = (Generator if name.startswith("G") else Discriminator)(config, genes_of(model["genotype"]))
            given = (
                torch.empty(1, config.latent_dim) if name.startswith("G") else torch.empty(1, 3, *[model["img"]] * 2)
            )
            assert costs.parameter_count(network) == model["params"], name
            with torch.no_grad():
                assert costs.flop(partial(write_out(network).eval(), given)) == 2 * model["macs"], name
                assert not name.startswith("G") or network(given).shape[-1] == model["img"]


def decay_and_average(case: Case) -> None:
    config = case.config
    unknown(case, "lr0", "end", "lr", "ema")
    for step, lr in config["lr"].items():
        # At step 0 and after the end the authors leave the optimiser alone; the value is the same.
        assert decayed(config["lr0"], int(step), config["end"]) == pytest.approx(lr, rel=1e-9, abs=1e-18), step
    parameter = nn.ParameterList([nn.Parameter(torch.tensor(config["ema"]["avg0"]))])
    average = Ema(parameter, config["ema"].get("decay", 0.999), warmup=False)
    for value, wanted in zip(config["ema"]["p_sequence"], config["ema"]["avg"]):
        parameter[0].data.fill_(value)
        average.update(parameter)
        with average.swapped_into(parameter):
            assert_close(parameter[0], torch.tensor(wanted), f"average after {value}")


def named(*stems: str) -> Any:
    """JSON cases name no source: their stems tell."""
    return lambda case: case.path.suffix == ".json" and case.stem.startswith(stems)


CHECKS = [
    Check("generator", kind("generator", AUTHORS), generator),
    Check("discriminator", kind("discriminator", AUTHORS), discriminator),
    Check("supernets", kind("supernets", AUTHORS), supernets),
    Check("simple discriminator", kind("simple_discriminator", AUTHORS), simple_discriminator),
    Check("hinge", kind("hinge", AUTHORS), hinge),
    Check("IS and FID", kind("is_fid", AUTHORS), scores),
    Check("selection", named("selection"), selection),
    Check("operators", named("genetic_operators"), genetic_operators),
    Check("counts", named("counts"), counts),
    Check("decay and average", named("lr_and_ema"), decay_and_average),
]
