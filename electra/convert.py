"""Weights of the official TensorFlow code and of transformers, both ways.

    python electra/convert.py import CHECKPOINT OUT  # official -> transformers: OUT/ and OUT/generator/
    python electra/convert.py export DIR OUT.npz     # transformers (DIR/ and its generator, if any) -> official

CHECKPOINT is a checkpoint of the official code (its folder, or the part of its files' names before ".index"), or an
.npz or .safetensors file of its variables. `--heads` is needed where heads are not 64 wide: weights do not tell.
A fine-tuned checkpoint becomes the network of transformers that has its head, and back (electra/finetuned.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically
from common.options import Whole
from common.weights import check_weights, not_finite, save_weights
from electra.finetuned import export_finetuned, import_finetuned, official_tasks
from electra.layouts import (
    PRETRAINED,
    StateDict,
    encoder_folder,
    from_official,
    generator_folder,
    infer_config,
    load_pretrained,
    pretraining_state,
    read_variables,
    to_official,
    write_networks,
)
from electra.model import Encoder


def import_official(
    variables: Mapping[str, Tensor], directory: Path, heads: int = 0, generator_heads: int = 0
) -> list[Path]:
    """Write transformers directories from official variables; returns the directories."""
    state = from_official(variables)
    if official_tasks(variables):
        return import_finetuned(variables, state, directory, heads)
    config = infer_config(state, heads, generator_heads)
    with torch.device("meta"):
        wanted = {f"electra.{name}": value for name, value in Encoder(config).state_dict().items()}
    found = {name: value for name, value in state.items() if name.startswith("electra.")}
    check_weights(found, wanted, "the official checkpoint", "the network that its sizes describe")
    if bad := not_finite(state):
        raise UserError(f"the official checkpoint: {bad[0]} holds numbers that are not finite")
    return write_networks(directory, config, state)


def export_official(directory: Path, task: str = "") -> StateDict:
    """Official variables of a transformers directory (or an arm's folder) and of its generator, where there is one.

    Args:
        task: the official name of what a fine-tuned network does (`squad`, `chunk`).
    """
    directory = encoder_folder(directory)
    main, place = load_pretrained(directory), generator_folder(directory)
    generator = load_pretrained(place) if place else None
    if main.config.relative_positions:
        raise UserError(f"{directory}: the official code has no relative positions")
    if main.architecture not in PRETRAINED:
        if not task:
            raise UserError(f"{directory} is a fine-tuned network ({main.architecture}): name its task with --task")
        return export_finetuned(main, task)
    return to_official(pretraining_state(main, generator)[1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="official checkpoint -> transformers directories")
    importer.add_argument(
        "checkpoint", type=Path, help="TensorFlow checkpoint, .npz or .safetensors of official variables"
    )
    importer.add_argument("out", type=Path, help="folder (import) or file (export) to write")
    importer.add_argument("--heads", type=Whole, default=0, help="of the main network (default: hidden size / 64)")
    importer.add_argument("--generator-heads", type=Whole, default=0, help="of the generator (default: likewise)")
    exporter = commands.add_parser(
        "export", help="transformers directory -> .npz or .safetensors of official variables"
    )
    exporter.add_argument("directory", type=Path, help="a transformers directory with its generator/")
    exporter.add_argument("out", type=Path, help="folder (import) or file (export) to write")
    exporter.add_argument("--task", default="", help="official name of a fine-tuned network's task (squad, chunk)")
    options = parser.parse_args(arguments)
    if options.command == "import":
        variables = read_variables(options.checkpoint)
        for folder in import_official(variables, options.out, options.heads, options.generator_heads):
            print(f"wrote {folder}")
        return
    variables = export_official(options.directory, options.task)
    if options.out.suffix == ".npz":
        arrays: dict[str, Any] = {k: v.numpy() for k, v in variables.items()}

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **arrays)

        write_atomically(options.out, write)
    elif options.out.suffix == ".safetensors":
        save_weights(options.out, variables)
    else:
        raise UserError(f"{options.out}: expected a name that ends in .npz or .safetensors")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_main(main)
