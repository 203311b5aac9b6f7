"""Checkpoints of the authors' code to ours.

    python pc_darts/convert.py weights.pt final.safetensors --genotype PC_DARTS_cifar      # a final network
    python pc_darts/convert.py checkpoint.pth.tar search.safetensors --search              # a search network

The names of weights are the same. What differs: files of torch with a state dict, alone or under "state_dict", maybe
with the "module." of DataParallel and counters of batches, become one .safetensors that holds the network's arguments
as JSON in its header (`config`). The authors' search checkpoints lack alphas and betas; ours then start at zero, unless
the file has them. No weights of the paper were ever published; files that users trained with the authors' code load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.cli import Parser
from common.errors import UserError, run_main
from common.training import load_checkpoint
from common.weights import check_weights, read_weights, save_weights
from pc_darts.config import FinalConfig, SearchConfig
from pc_darts.genotypes import Genotype, node_count
from pc_darts.model import FinalNetwork
from pc_darts.search_space import ARCHITECTURE, STEM_MULTIPLIER, SearchNetwork

StateDict = dict[str, Tensor]
Network = TypeVar("Network", SearchNetwork, FinalNetwork)


def clean(content: Mapping[str, Any]) -> StateDict:
    """The tensors of an official checkpoint under our names.

    Raises:
        UserError: there is no state dict in it.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise UserError("checkpoint: state_dict is not a table of tensors")
    found = {
        str(name).removeprefix("module."): value.detach().clone()
        for name, value in state.items()
        if isinstance(value, Tensor) and not str(name).endswith("num_batches_tracked")
    }
    for name in ARCHITECTURE:  # where users saved them beside the state dict
        if isinstance(content.get(name), Tensor):
            found[name] = content[name].detach().clone()
    if "classifier.weight" not in found:
        raise UserError("checkpoint: no classifier.weight; expected the state dict of a PC-DARTS or DARTS network")
    return found


def read(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """Tensors and, from one of our files, the network's arguments. No pickled code runs.

    Raises:
        UserError: not a readable checkpoint.
    """
    if path.suffix != ".safetensors":
        return clean(load_checkpoint(path)), {}
    state, notes = read_weights(path)
    try:
        return clean(state), json.loads(notes.get("config", "{}"))
    except ValueError as error:
        raise UserError(f"{path}: the note `config` is no JSON ({error})") from None


def _cells(state: Mapping[str, Tensor]) -> int:
    numbers = [int(name.split(".")[1]) for name in state if name.startswith("cells.")]
    if not numbers:
        raise UserError("checkpoint: it has no cells; expected the state dict of a PC-DARTS or DARTS network")
    return max(numbers) + 1


def infer_search_config(state: Mapping[str, Tensor]) -> SearchConfig:
    """The arguments of the search network that a state dict belongs to.

    Raises:
        UserError: it is not that of a search network.
    """
    try:
        imagenet = "stem0.0.weight" in state
        first = state["stem1.1.weight" if imagenet else "stem.0.weight"]
        entrance = state["stem0.0.weight" if imagenet else "stem.0.weight"]
        channels = first.shape[0] // STEM_MULTIPLIER
        edges = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("cells.0._ops."))
        # The width of cell 0 is the number of channels unless it reduces.
        width = state["cells.0.preprocess1.op.1.weight"].shape[0]
        processed = state["cells.0._ops.0._ops.4.op.1.weight"].shape[0]
        return SearchConfig(
            channels=channels,
            cells=_cells(state),
            nodes=node_count(edges),
            classes=state["classifier.weight"].shape[0],
            partial=width // processed,
            stem="imagenet" if imagenet else "cifar",
            in_channels=entrance.shape[1],
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"checkpoint: not a search network ({error} is missing)") from None


def load_search_network(path: Path, fused: bool = True) -> SearchNetwork:
    """A search network from an official or one of our files; alphas and betas that are not in it are zero."""
    state, config = read(path)
    network = SearchNetwork(SearchConfig(**config) if config else infer_search_config(state), fused)
    for name in ARCHITECTURE:
        state.setdefault(name, torch.zeros_like(getattr(network, name)))
    return _filled(network, state, path)


def load_final_network(path: Path, genotype: Genotype | None = None) -> FinalNetwork:
    """A final network from an official or one of our files; official ones need the genotype.

    Raises:
        UserError: the genotype is missing or another one than that of the weights.
    """
    state, config = read(path)
    if config:
        genotype = Genotype(**config.pop("genotype"))
    elif genotype is None:
        raise UserError(f"{path}: give --genotype; the weights do not tell which state an operation reads")
    else:
        try:
            imagenet = "stem0.0.weight" in state
            entrance = state["stem0.0.weight" if imagenet else "stem.0.weight"]
            last = state["stem1.1.weight" if imagenet else "stem.0.weight"].shape[0]
        except KeyError as error:
            raise UserError(f"{path}: not a final network ({error} is missing)") from None
        config = {
            "channels": last if imagenet else last // STEM_MULTIPLIER,
            "layers": _cells(state),
            "classes": state["classifier.weight"].shape[0],
            "stem": "imagenet" if imagenet else "cifar",
            "auxiliary": "auxiliary_head.classifier.weight" in state,
            "in_channels": entrance.shape[1],
        }
    return _filled(FinalNetwork(genotype, FinalConfig(**config)), state, path)


def _filled(network: Network, state: StateDict, path: Path) -> Network:
    check_weights(state, network.state_dict(), str(path), "the network")
    network.load_state_dict(state)
    return network


def save(network: SearchNetwork | FinalNetwork, path: Path) -> None:
    """One .safetensors with the authors' names and the network's arguments, written atomically."""
    config = asdict(network.config)
    if isinstance(network, FinalNetwork):
        config["genotype"] = asdict(network.genotype)
    save_weights(path, network.state_dict(), {"config": json.dumps(config)})


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("source", type=Path, help="checkpoint of the authors' code (.pt, .pth.tar) or .safetensors")
    parser.add_argument("target", type=Path, help="file to write, .safetensors")
    parser.add_argument("--genotype", help="of a final network: a published name or a file")
    parser.add_argument("--search", action="store_true", help="the source is a search network")
    options = parser.parse_args(argv)
    if options.target.suffix != ".safetensors":
        raise UserError(f"{options.target}: the target must end in .safetensors")
    network: SearchNetwork | FinalNetwork
    if options.search:
        network = load_search_network(options.source)
    else:
        network = load_final_network(options.source, Genotype.load(options.genotype) if options.genotype else None)
    save(network, options.target)
    print(f"{options.target}: {sum(p.numel() for p in network.parameters())} parameters")


if __name__ == "__main__":
    run_main(main)
