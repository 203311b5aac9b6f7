"""Measure a trained network, let it name your own pictures, count a cell's network, or see how many random networks
early exit lets in.

    python eeea_net/evaluate.py --model runs/eeea_net-small/eeea_net_0/model
    python eeea_net/evaluate.py --model MODEL --data folder --path PHOTOS          # other pictures, the same classes
    python eeea_net/evaluate.py --model MODEL --predict PHOTOS                     # class of every picture of a folder
    python eeea_net/evaluate.py --genotype EEEA_C                                  # parameters and MACs, 36 channels
    python eeea_net/evaluate.py --genotype EEEA_C --channels 32 --layers 20 --classes 100
    python eeea_net/evaluate.py --subnet EEEA_C2                                   # of the once-for-all space
    python eeea_net/evaluate.py --acceptance --operations 10 --blocks 4 --concat all

`--acceptance` draws random networks and prints the share of them that each beta lets into the first generation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_json
from common.options import Count, Seed

BETAS = (2.0, 3.0, 4.0, 5.0, 6.0)
SETS = {"EmojiGroups": "emoji", "Fashion-MNIST": "fashion-mnist"}


def evaluate_model(folder: Path, name: str | None, path: str | None) -> dict[str, Any]:
    """Test error of a trained network on its set, or on another with the same classes.

    Raises:
        UserError: no network there, or the pictures have other classes or channels.
    """
    from dataclasses import replace

    import torch

    from common.data.augmentation import evaluation_batches
    from eeea_net.config import DataConfig
    from eeea_net.data import open_data
    from eeea_net.proxy import EVALUATION_BATCH, compare
    from eeea_net.training import load_model

    network, about = load_model(folder)
    chosen = name or SETS.get(about["data"], about["data"])
    if chosen not in ("emoji", "digits", "textures", "fashion-mnist", "cifar10", "cifar100", "folder"):
        raise UserError(f"{folder} was trained on a folder called {chosen}: give --data folder --path FOLDER")
    data = open_data(DataConfig(name=chosen, path=path, size=about["size"]))  # type: ignore[arg-type]
    if list(data.classes) != about["classes"]:
        raise UserError(
            f"{data.name} has the classes {', '.join(data.classes[:3])}, ...; the network knows "
            f"{', '.join(about['classes'][:3])}, ..."
        )
    if data.channels != len(about["mean"]):
        raise UserError(f"{data.name} has {data.channels} channels, the network takes {len(about['mean'])}")
    # The network is used with the statistics that it was trained with.
    data = replace(data, mean_C=torch.tensor(about["mean"]), std_C=torch.tensor(about["std"]))
    error, loss = compare(network, list(evaluation_batches(data, data.test, EVALUATION_BATCH)))
    return {"model": str(folder), "data": data.name, "test_pictures": len(data.test), "test_error": error, "loss": loss}


def predict(folder: Path, pictures: Path, output: Path | None) -> dict[str, Any]:
    """Print the class of every picture; see `common.predicting`."""
    from common.predicting import label_pictures, told
    from eeea_net.training import load_model

    found = {"model": str(folder), "pictures": told(label_pictures(*load_model(folder), pictures))}
    if output is not None:
        write_json(output, found)
    return found


def count_genotype(name: str, channels: int, layers: int, classes: int, size: int) -> dict[str, Any]:
    """Parameters and MACs of a cell's network."""
    from eeea_net.config import NetworkConfig
    from eeea_net.counting import count
    from eeea_net.genotypes import Genotype

    network = NetworkConfig(channels=channels, layers=layers, classes=classes)
    return {"genotype": name, **count(Genotype.load(name), network, size).__dict__}


def count_subnet(name: str, size: int | None) -> dict[str, Any]:
    """Parameters and MACs of a network of the once-for-all space, at its own resolution by default."""
    from eeea_net.counting import measured
    from eeea_net.once_for_all import on_meta, published_subnet

    choice = published_subnet(name)
    side = size or choice.resolution
    parameters, macs = measured(on_meta(choice), side)
    return {"subnet": name, "resolution": side, "parameters": parameters, "macs": macs}


def acceptance(operations: int, blocks: int, concat: str, draws: int, seed: int) -> dict[str, Any]:
    """Share of random networks with at most beta million parameters (36 channels, 20 cells), by beta."""
    import numpy as np

    from eeea_net.config import LargeOptions, SpaceOptions
    from eeea_net.search import Scale
    from eeea_net.space import Space

    space = Space.of(SpaceOptions(blocks, operations, concat))  # type: ignore[arg-type]
    scale, random = Scale(space, LargeOptions()), np.random.default_rng(seed)
    sizes = np.array([scale.parameters(space.draw(random)) for _ in range(draws)])
    shares = {f"{beta:g}": float((sizes <= beta).mean()) for beta in BETAS}
    return {"draws": draws, "median_parameters_m": float(np.median(sizes)), "accepted": shares}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a trained network")
    parser.add_argument("--genotype", help="a published name or a file: count its network")
    parser.add_argument("--subnet", help="EEEA_C1 or EEEA_C2: count this network")
    parser.add_argument("--acceptance", action="store_true", help="early exit of random networks by beta")
    parser.add_argument("--data", help="with --model: a data set, as --data.name of train.py")
    parser.add_argument("--path", help="with --model: folder of the data")
    parser.add_argument("--predict", type=Path, metavar="PICTURES", help="with --model: a picture or folder to label")
    parser.add_argument("--channels", type=Count, default=36, help="width of the first cell")
    parser.add_argument("--layers", type=Count, default=20, help="number of cells")
    parser.add_argument("--classes", type=Count, default=10, help="of the classifier")
    parser.add_argument("--size", type=Count, help="side of the pictures (default: 32; of a subnet its own)")
    parser.add_argument("--operations", choices=("9", "10"), default="9", help="of the search space")
    parser.add_argument("--blocks", type=Count, default=5, help="blocks of a cell")
    parser.add_argument("--concat", choices=("unused", "all"), default="unused", help="what a cell gives out")
    parser.add_argument("--draws", type=Count, default=1000, help="random networks")
    parser.add_argument("--seed", type=Seed, default=0, help="seed of the random networks")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    given = parser.parse_args(argv)
    asked = [given.model is not None, given.genotype is not None, given.subnet is not None, given.acceptance]
    if sum(asked) != 1:
        raise UserError("give one of --model FOLDER, --genotype NAME_OR_FILE, --subnet NAME and --acceptance")
    if given.predict is not None and (given.model is None or given.data or given.path):
        raise UserError("--predict goes with --model alone")
    if given.predict is not None:
        return predict(given.model, given.predict, given.output)
    if given.model is not None:
        found = evaluate_model(given.model, given.data, given.path)
    elif given.genotype is not None:
        found = count_genotype(given.genotype, given.channels, given.layers, given.classes, given.size or 32)
    elif given.subnet is not None:
        found = count_subnet(given.subnet, given.size)
    else:
        found = acceptance(int(given.operations), given.blocks, given.concat, given.draws, given.seed)
    if given.output is not None:
        write_json(given.output, found)
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    run_main(main)
