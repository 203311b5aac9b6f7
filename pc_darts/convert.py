"""Checkpoints of the authors' code to ours.

    python pc_darts/convert.py weights.pt final.safetensors --genotype PC_DARTS_cifar      # a final network
    python pc_darts/convert.py checkpoint.pth.tar search.safetensors --search              # a search network

The names of weights are the same. What differs: files of torch with a state dict, alone or under "state_dict", maybe
with the "module." of DataParallel and counters of batches, become one .safetensors that holds the network's arguments
as JSON in its header (`config`). The authors' search checkpoints lack alphas and betas; ours then start at zero, unless
the file has them. No weights of the paper were ever published; files that users trained with the authors' code load.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError, run_main
from common.files import write_atomically
from pc_darts.genotypes import Genotype, node_count
from pc_darts.model import FinalNetwork
from pc_darts.search_space import ARCHITECTURE, STEM_MULTIPLIER, SearchConfig, SearchNetwork

StateDict = dict[str, Tensor]


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
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
                return clean(state), json.loads((file.metadata() or {}).get("config", "{}"))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no state dict")
    return clean(content), {}


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
        config["genotype"] = Genotype(**config["genotype"])
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
            "genotype": genotype,
            "channels": last if imagenet else last // STEM_MULTIPLIER,
            "layers": _cells(state),
            "classes": state["classifier.weight"].shape[0],
            "stem": "imagenet" if imagenet else "cifar",
            "auxiliary": "auxiliary_head.classifier.weight" in state,
            "in_channels": entrance.shape[1],
        }
    return _filled(FinalNetwork(**config), state, path)


def _filled(network: Any, state: StateDict, path: Path) -> Any:
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: the weights do not fit the network: {detail[:200]}") from None
    return network


def save(network: SearchNetwork | FinalNetwork, path: Path) -> None:
    """One .safetensors with the authors' names and the network's arguments, written atomically."""
    if isinstance(network, SearchNetwork):
        config: dict[str, Any] = asdict(network.config)
    else:
        config = {
            "genotype": asdict(network.genotype),
            "channels": network.channels,
            "layers": network.layers,
            "classes": network.classes,
            "stem": network.stem_kind,
            "auxiliary": network.auxiliary_head is not None,
            "in_channels": network.in_channels,
        }
    # Running statistics may be views of one tensor (`fused.py`).
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(state, str(temporary), {"config": json.dumps(config)}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help=".safetensors")
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
