"""Checkpoints of the authors' code to ours: cell networks, and EEEA-Net-C1 and C2.

    python eeea_net/convert.py weights.pt model.safetensors --genotype EEEA_C
    python eeea_net/convert.py eeea_c2.pt model.safetensors --subnet EEEA_C2

Names of weights are the same. What differs: files of torch with a state dict, alone or under "state_dict", maybe with
the "module." of DataParallel, and the non-local layers that the authors' cells allocate and never use without `--se`,
which are left out. Channels, cells, classes, SE and the auxiliary head are read from the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import Parser
from common.errors import UserError, run_main
from common.training import load_checkpoint
from common.weights import check_weights, read_weights, save_weights
from eeea_net.config import NetworkConfig
from eeea_net.genotypes import Genotype
from eeea_net.model import Network, widths
from eeea_net.once_for_all import Design, Subnet, from_authors, on_meta, published_subnet

StateDict = dict[str, Tensor]


def read(path: Path) -> StateDict:
    """The tensors of a checkpoint; no pickled code runs.

    Raises:
        UserError: not a readable checkpoint.
    """
    content: Mapping[str, Any] = read_weights(path)[0] if path.suffix == ".safetensors" else load_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: state_dict is not a table of tensors")
    found = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not any(name.startswith("classifier.") for name in found):
        raise UserError(f"{path}: no classifier; expected the state dict of a network of this paper")
    return found


def infer_config(state: Mapping[str, Tensor]) -> NetworkConfig:
    """The network that a cell network's weights are of.

    Raises:
        UserError: weights that no network of cells has.
    """
    cells = {int(name.split(".")[1]) for name in state if name.startswith("cells.")}
    stem = "cifar" if "stem.0.weight" in state else "imagenet"
    first = state.get("stem.0.weight", state.get("stem0.0.weight"))
    if not cells or first is None or "cells.0.preprocess1.norm.weight" not in state:
        raise UserError("these weights are of no network of cells: expected stem, cells and classifier")
    found = [len(state.get(f"cells.{layer}.preprocess1.norm.weight", ())) for layer in range(max(cells) + 1)]
    config = NetworkConfig(
        channels=len(first) // 3 if stem == "cifar" else 2 * len(first),
        layers=len(found),
        stem=stem,  # type: ignore[arg-type]
        se="cells.0.se_layer.fc.0.weight" in state,
        classes=len(state["classifier.bias"]),
        in_channels=first.shape[1],
        auxiliary="auxiliary_head.classifier.bias" in state,
    )
    if found == widths(config) or len(found) == 1:
        return config
    return replace(config, increment=max(0, found[1] - found[0]))


def with_counters(state: StateDict, wanted: Mapping[str, Tensor]) -> StateDict:
    """Old checkpoints lack the counters of batch norms, which nothing reads."""
    counters = {name: torch.zeros((), dtype=torch.long) for name in wanted if name.endswith("num_batches_tracked")}
    return {**counters, **state}


def convert_cells(state: StateDict, genotype: Genotype, label: str) -> tuple[StateDict, dict[str, Any]]:
    """(weights, what model.json needs of the network) of a network of cells.

    Raises:
        UserError: the weights are of another genotype.
    """
    config = infer_config(state)
    if not config.se:
        state = {name: value for name, value in state.items() if ".nl_layer." not in name}
    with torch.device("meta"):
        wanted = Network(genotype, config).state_dict()
    state = with_counters(state, wanted)
    check_weights(state, wanted, label, "the network of --genotype")
    return state, {"genotype": genotype.fields(), "network": asdict(config)}


def convert_subnet(state: StateDict, name: str, label: str) -> tuple[StateDict, dict[str, Any]]:
    """(weights, the choice) of a network of the once-for-all space.

    Raises:
        UserError: the weights are of another network.
    """
    choice = published_subnet(name)
    state = from_authors(state)
    design = Design(classes=len(state["classifier.linear.bias"]) if "classifier.linear.bias" in state else 1000)
    wanted = on_meta(choice, design).state_dict()
    state = with_counters(state, wanted)
    check_weights(state, wanted, label, f"the network {name}")
    return state, {"choice": asdict(choice), "design": asdict(design)}


def load_subnet(path: Path) -> Subnet:
    """The network of a file that `main` wrote for `--subnet`, in eval mode."""
    state, notes = read_weights(path)
    try:
        about = json.loads(notes["config"])
        name, classes = about["name"], about["design"]["classes"]
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is no network that convert.py wrote with --subnet") from None
    network = Subnet.of(published_subnet(name), Design(classes=classes))
    check_weights(state, network.state_dict(), str(path), f"the network {name}")
    network.load_state_dict(state)
    return network.eval()


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("weights", type=Path, help="a checkpoint of the authors' code, or .safetensors")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--genotype", help="cell of the network: a published name or a file")
    parser.add_argument("--subnet", help="EEEA_C1 or EEEA_C2")
    given = parser.parse_args(argv)
    if (given.genotype is None) == (given.subnet is None):
        raise UserError("give either --genotype NAME_OR_FILE or --subnet NAME")
    state, label = read(given.weights), str(given.weights)
    if given.genotype is not None:
        weights, about = convert_cells(state, Genotype.load(given.genotype), label)
    else:
        weights, about = convert_subnet(state, given.subnet, label)
        about["name"] = given.subnet
    save_weights(given.output, weights, {"config": json.dumps(about)})
    return given.output


if __name__ == "__main__":
    run_main(main)
