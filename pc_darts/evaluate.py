"""Measure a trained network, let it name your own pictures, or take a cell to another data set and train it there.

    python pc_darts/evaluate.py --model runs/pc_darts-small/pc_darts/retrain/model
    python pc_darts/evaluate.py --model MODEL --data folder --path PHOTOS          # other pictures, the same classes
    python pc_darts/evaluate.py --model MODEL --predict PHOTOS                     # class of every picture of a folder
    python pc_darts/evaluate.py --genotype runs/pc_darts-small/pc_darts/genotype.json --config my.yaml
    python pc_darts/evaluate.py --genotype PC_DARTS_cifar --data.name fashion-mnist    # transfer: train from scratch
    python pc_darts/evaluate.py --genotype PC_DARTS_cifar --count                  # parameters and MACs only

With `--genotype` all options of train.py hold (`--config`, `--retrain.epochs`, ...); nothing is searched. The result is
written to `<run_dir>/evaluation.json` (or `--output`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from pc_darts.config import SMALL, DataConfig, read_config


def evaluate_model(folder: Path, name: str | None, path: str | None, device: str = "auto") -> dict[str, Any]:
    """Accuracy of a trained network on the test pictures of its set, or of another with the same classes.

    Raises:
        UserError: no network there, or the pictures have other classes, sizes or channels.
    """
    import dataclasses

    import torch

    from pc_darts.data import open_data
    from pc_darts.retraining import load_model
    from pc_darts.training import accuracy, open_machine

    network, about = load_model(folder)
    names = {"EmojiGroups": "emoji", "Fashion-MNIST": "fashion-mnist"}
    chosen = name or names.get(about["data"], about["data"])
    if chosen not in ("emoji", "digits", "textures", "fashion-mnist", "cifar10", "cifar100", "folder"):
        raise UserError(f"{folder} was trained on a folder called {chosen}: give --data folder --path FOLDER")
    data = open_data(DataConfig(name=chosen, path=path, size=about["size"]))  # type: ignore[arg-type]
    if list(data.classes) != about["classes"]:
        raise UserError(
            f"{data.name} has the classes {', '.join(data.classes[:3])}, ...; the network knows "
            f"{', '.join(about['classes'][:3])}, ...: to take its cell to other classes, use --genotype"
        )
    if data.channels != network.config.in_channels:
        raise UserError(f"{data.name} has {data.channels} channels, the network takes {network.config.in_channels}")
    machine = open_machine(device)
    # The network is used with the statistics that it was trained with.
    data = dataclasses.replace(data, mean_C=torch.tensor(about["mean"]), std_C=torch.tensor(about["std"]))
    right = accuracy(network.to(machine.device), data, data.test, machine)
    return {"model": str(folder), "data": data.name, "test_pictures": len(data.test), "test_error": 1 - right}


def predict(folder: Path, pictures: Path, output: Path | None) -> dict[str, Any]:
    """Print the class of every picture; see `common.predicting`."""
    from common.files import write_json
    from common.predicting import label_pictures, told
    from pc_darts.retraining import load_model

    found = {"model": str(folder), "pictures": told(label_pictures(*load_model(folder), pictures))}
    if output is not None:
        write_json(output, found)
    return found


def count_genotype(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Parameters and MACs of a cell's final network, for the options of `train.py`; nothing is trained."""
    import torch

    from pc_darts.counting import count
    from pc_darts.genotypes import Genotype
    from pc_darts.model import FinalNetwork

    config, _ = read_config(argv, __doc__.splitlines()[0], SMALL)
    options = config.retrain
    with torch.device("meta"):
        network = FinalNetwork(Genotype.load(name), options.network(classes=10))
    counts = count(network, config.data.size)
    return {"genotype": name, "channels": options.channels, "layers": options.layers, **counts.__dict__}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a trained network")
    parser.add_argument("--genotype", help="a published name or a JSON file")
    parser.add_argument("--data", help="with --model: a data set, as --data.name of train.py")
    parser.add_argument("--path", help="with --model: folder of the data")
    parser.add_argument("--predict", type=Path, metavar="PICTURES", help="with --model: a picture or folder to label")
    parser.add_argument("--count", action="store_true", help="with --genotype: only count parameters and MACs")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options, rest = parser.parse_known_args(argv)
    if (options.model is None) == (options.genotype is None):
        raise UserError("give either --model FOLDER or --genotype NAME_OR_FILE")
    if options.predict is not None and (options.model is None or options.data or options.path):
        raise UserError("--predict goes with --model alone")
    if options.model is not None:
        if rest:
            raise UserError(f"unknown option {rest[0]}; --model takes --data, --path, --predict and --output")
        if options.predict is not None:
            return predict(options.model, options.predict, options.output)
        result = evaluate_model(options.model, options.data, options.path)
        output = options.output
    elif options.count:
        result, output = count_genotype(options.genotype, rest), options.output
    else:
        from pc_darts.train import run

        if not any(word == "--run_dir" or word.startswith("--run_dir=") for word in rest):
            rest = [*rest, "--run_dir", f"runs/pc_darts-transfer/{Path(options.genotype).stem}"]
        config, text = read_config([*rest, "--genotype", options.genotype], __doc__.splitlines()[0], SMALL)
        result = run(config, text)
        output = options.output or Path(config.run_dir) / "evaluation.json"
    if output is not None:
        from common.files import write_json

        write_json(output, result)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    run_main(main)
