"""Checks of the recorded cases that concern the search space, the architecture step and the final networks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pc_darts.architect import Architect
from pc_darts.config import FinalConfig, SearchConfig
from pc_darts.counting import count
from pc_darts.genotypes import PUBLISHED, Genotype, derive, edge_softmax, node_count
from pc_darts.model import AuxiliaryHead, FinalNetwork
from pc_darts.operations import channel_shuffle, drop_path
from pc_darts.search_space import Cell, MixedOp, SearchNetwork
from tests.golden_case import Case, Check, assert_close, kind, load

TOLERANCE = 1e-5


def in_both_modes(module: nn.Module, run: Callable[[], Tensor], expected: dict[str, Tensor], name: str) -> None:
    """Compare eval mode first: a pass in training mode moves the running statistics."""
    for mode in ("eval", "train"):
        if f"{name}_{mode}" in expected:
            module.train(mode == "train")
            assert_close(run(), expected[f"{name}_{mode}"], f"{name} in {mode} mode", TOLERANCE)


def check_shuffle(case: Case) -> None:
    assert_close(channel_shuffle(case.group("in")["x"], case.config["groups"]), case.group("out")["y"], "y", 0.0)


def check_drop_path(case: Case) -> None:
    given = case.group("in")
    dropped = drop_path(given["x"], case.config["drop_prob"], given["mask"])
    assert_close(dropped, case.group("out")["y"], "y", TOLERANCE)


def check_mixed_op(case: Case) -> None:
    config, given, expected = case.config, case.group("in"), case.group("out")
    op = MixedOp(config["C"], config["stride"], config["k"])
    load(op, case)
    x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
    in_both_modes(op, lambda: op(x, weights), expected, "y")
    load(op, case)
    (op.train()(x, weights) * given["grad_y"]).sum().backward()
    assert x.grad is not None and weights.grad is not None
    assert_close(x.grad, expected["grad_x_train"], "gradient of x", TOLERANCE)
    assert_close(weights.grad, expected["grad_weights_train"], "gradient of the weights", TOLERANCE)


def check_cell(case: Case) -> None:
    config, given, expected = case.config, case.group("in"), case.group("out")
    refuse_other_outputs(config, config["steps"])
    search = SearchConfig(channels=config["C"], nodes=config["steps"], partial=config["k"])
    for fused in (False, True):
        cell = Cell(
            search,
            config["C_prev_prev"],
            config["C_prev"],
            config["C"],
            config["reduction"],
            config["reduction_prev"],
            fused=fused,
        )
        load(cell, case)
        op_weights, edge_weights = given["alphas"].softmax(-1), edge_softmax(given["betas"])
        assert_close(op_weights, expected["op_weights"], "op weights", TOLERANCE)
        assert_close(edge_weights, expected["edge_weights"], "edge weights", TOLERANCE)
        run = lambda: cell(given["s0"], given["s1"], op_weights, edge_weights)  # noqa: B023, E731
        in_both_modes(cell, run, expected, "y")


def refuse_other_outputs(config: dict[str, Any], nodes: int) -> None:
    """What the authors' constructors take beside the number of nodes, and ours do not."""
    multiplier, stem = config.get("multiplier", nodes), config.get("stem_multiplier", 3)
    assert multiplier == nodes, f"multiplier {multiplier} with {nodes} nodes: a cell's output is all its nodes here"
    assert stem == 3, f"stem_multiplier {stem}: it is 3 here"


def network_of(case: Case, stem: str, fused: bool) -> SearchNetwork:
    """A search network with the recorded weights, alphas and betas; the number of nodes follows from the alphas."""
    config, given = case.config, case.group("in")
    nodes = node_count(len(given["alphas_normal"]))
    refuse_other_outputs(config, nodes)
    network = SearchNetwork(
        SearchConfig(
            channels=config["C"],
            cells=config["layers"],
            nodes=nodes,
            classes=config["num_classes"],
            partial=config["k"],
            stem=stem,  # type: ignore[arg-type]
        ),
        fused,
    )
    load(network, case, {name: value for name, value in given.items() if name.startswith(("alphas", "betas"))})
    return network


def check_supernet(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    stem = "imagenet" if "imagenet" in case.source else "cifar"
    for fused in (False, True):
        network = network_of(case, stem, fused)
        in_both_modes(network, lambda: network(given["x"]), expected, "logits")  # noqa: B023
        loss = F.cross_entropy(network(given["x"]), given["target"])
        assert_close(loss, expected["loss_train"], "loss", TOLERANCE)
        loss.backward()
        parameters = dict(network.named_parameters())
        for name, gradient in expected.items():
            if name.startswith("grad_"):
                actual = parameters[name.removeprefix("grad_")].grad
                assert actual is not None
                # Relative to the gradient's own size: many are far below 1.
                scale = float(gradient.abs().max())
                assert_close(actual / scale, gradient / scale, f"{name}, fused={fused}", TOLERANCE)
        assert network.genotype() == Genotype.parse(case.config["genotype"])


def check_architect(case: Case) -> None:
    config, given, expected = case.config, case.group("in"), case.group("out")
    for fused in (False, True):
        network = network_of(case, "cifar", fused).double().train()
        weights = torch.optim.SGD(
            network.weights(), config["eta"], momentum=config["momentum"], weight_decay=config["weight_decay"]
        )
        architect = Architect(
            network,
            weights,
            config["arch_learning_rate"],
            tuple(config["arch_betas"]),
            config["arch_weight_decay"],
        )
        for step in range(config["steps"]):
            x_train, x_val = given[f"x_train{step}"].double(), given[f"x_val{step}"].double()
            y_train, y_val = given[f"y_train{step}"], given[f"y_val{step}"]
            architect.step(x_train, y_train, x_val, y_val, config["eta"], config["unrolled"])
            found: dict[str, Any] = {
                f"grad_{n}": p.grad for n, p in network.named_parameters() if "alphas" in n or "betas" in n
            }
            found = {name: gradient.clone() for name, gradient in found.items()}
            weights.zero_grad()
            loss = F.cross_entropy(network(x_train), y_train)
            loss.backward()
            found["train_loss"] = loss
            found["grad_norm"] = nn.utils.clip_grad_norm_(network.weights(), config["grad_clip"])
            weights.step()
            found |= dict(network.named_parameters())
            for name, value in expected.items():
                if name.startswith(f"step{step}."):
                    what = name.partition(".")[2]
                    assert_close(found[what], value, f"{name}, fused={fused}", 1e-6)


def check_genotypes(case: Case) -> None:
    given = case.group("in")
    for i, recorded in enumerate(case.config["genotypes"]):
        rows = [given[n][i] for n in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")]
        assert derive(rows[0], rows[1], rows[2], rows[3]) == Genotype(**recorded), f"row {i}"


def check_final_network(case: Case) -> None:
    config = case.config
    genotype = Genotype(**config["genotype"])
    if config.get("genotype_name") in PUBLISHED:
        assert genotype == PUBLISHED[config["genotype_name"]]
    stem = "imagenet" if "ImageNet" in config["class"] else "cifar"
    shape = (config["C"], config["layers"], stem, config["num_classes"], bool(config["auxiliary"]))
    network = FinalNetwork(genotype, FinalConfig(*shape))
    load(network, case)
    in_both_modes(network, lambda: network(case.group("in")["x"]), case.group("out"), "logits")


def by_formula(text: str, shape: torch.Size) -> Tensor:
    """`a*sin(b*i+c)` over the flat index i, in float64."""
    found = re.match(r"\s*([\d.eE+-]+)\*sin\(([\d.eE+-]+)\*i\+([\d.eE+-]+)\)", text)
    assert found, f"unknown formula {text!r}"
    a, b, c = map(float, found.groups())
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * torch.sin(b * index + c)).float().reshape(shape)


def check_auxiliary_head(case: Case) -> None:
    config = case.config
    head = AuxiliaryHead(config["C"], config["num_classes"], "imagenet" if "ImageNet" in config["class"] else "cifar")
    state = head.state_dict()
    load(head, case, {n: by_formula(t, state[n].shape) for n, t in config["formula_params"].items()})
    in_both_modes(head, lambda: head(case.group("in")["x"]), case.group("out"), "y")


def check_counts(case: Case) -> None:
    for name, recorded in case.config["final"].items():
        genotype = Genotype(**recorded["genotype"])
        assert name not in PUBLISHED or genotype == PUBLISHED[name]
        for label, expected in recorded.items():
            if label == "genotype":
                continue
            data, channels, layers = re.match(r"(\w+?)_C(\d+)_L(\d+)", label).groups()  # type: ignore[union-attr, assignment]
            classes = 1000 if data == "imagenet" else int(data.removeprefix("cifar"))
            stem, side = ("imagenet", 224) if data == "imagenet" else ("cifar", 32)
            with torch.device("meta"):
                arguments = (int(channels), int(layers), stem, classes)
                plain, full = (
                    FinalNetwork(genotype, FinalConfig(*arguments, auxiliary)) for auxiliary in (False, True)
                )  # type: ignore[arg-type]
            found = {"params": count(plain, side).parameters, "macs": count(plain, side).macs}
            found["params_with_aux"] = count(full, side).parameters_with_auxiliary
            assert {k: found[k] for k in expected} == expected, f"{name} {label}"
    for label, expected in case.config["supernet_params"].items():
        data, channels, cells, partial, classes = re.match(  # type: ignore[union-attr, assignment]
            r"(\w+?)_C(\d+)_L(\d+)_k(\d+)(?:_(\d+)cls)?", label
        ).groups()
        with torch.device("meta"):
            network = SearchNetwork(
                SearchConfig(int(channels), int(cells), classes=int(classes or 10), partial=int(partial), stem=data)  # type: ignore[arg-type]
            )
        assert sum(p.numel() for p in network.weights()) == expected, label


CHECKS = [
    Check("channel shuffle", kind("channel_shuffle", "channel_shuffle"), check_shuffle),
    Check("drop path", kind("drop_path", "drop_path"), check_drop_path),
    Check("mixed operation", kind("mixedop", "MixedOp"), check_mixed_op),
    Check("search cell", kind("cell", "Cell"), check_cell),
    Check("search network", kind("supernet", "Network"), check_supernet),
    Check("architecture step", kind("architect", "Architect"), check_architect),
    Check("derivation", kind("genotype", "genotype"), check_genotypes),
    Check("final network", kind("final", "model.py:Network"), check_final_network),
    Check("auxiliary head", kind("aux_head", "AuxiliaryHead"), check_auxiliary_head),
    Check("sizes", lambda case: "supernet_params" in case.config and "final" in case.config, check_counts),
]
