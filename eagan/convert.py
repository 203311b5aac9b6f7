"""Checkpoints of the authors' code to trained pairs of ours, and back.

    python eagan/convert.py --checkpoint eagan_c10.pth --genotype best_G,cifar10_D --out OUT/pair
    python eagan/convert.py --model runs/eagan-small/model --out OUT/authors.pth

Their files hold `avg_gen_state_dict` (the averaged generator), `gen_state_dict` and `dis_state_dict`, maybe below
`module.`, with every convolution twice; sizes are read from the tensors. Files that could run code are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Parser
from common.errors import UserError, run_main
from eagan.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor

    from eagan.genotypes import Genes

USUAL = "best_G,cifar10_D"
TWIN = re.compile(r"(.*\.ops\.\d+)\.op\.\d\.(.*)")  # a convolution's second name in their files


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without `module.` and second names; the two names of a convolution must hold the same."""
    import torch

    named = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for name, tensor in named.items():
        if twin := TWIN.fullmatch(name):
            firsts = [
                named[f"{twin[1]}.{kind}.{twin[2]}"]
                for kind in ("conv", "dilconv")
                if f"{twin[1]}.{kind}.{twin[2]}" in named
            ]
            if not firsts or not torch.equal(firsts[0], tensor):
                raise UserError(f"{name} differs from the convolution that it is another name of: the file is damaged")
    return {name: tensor for name, tensor in named.items() if not TWIN.fullmatch(name)}


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the second name of every convolution: behind a ReLU it is the list's entry 1, on edge c4 of a
    discriminator entry 0, since that has none.
    """
    found = dict(state)
    discriminator = any(name.startswith("block1.") for name in state)
    for name, tensor in state.items():
        if own := re.fullmatch(r"((\w+)\.(\w+)\.ops\.\d+)\.(?:conv|dilconv)\.(.*)", name):
            place = 0 if discriminator and own[3] == "c4" else 1
            found[f"{own[1]}.op.{place}.{own[4]}"] = tensor
    return found


def sizes_of(generator: Mapping[str, Tensor], discriminator: Mapping[str, Tensor] | None) -> NetworkConfig:
    """Read from the tensors' shapes.

    Raises:
        UserError: a tensor that says it is missing.
    """
    try:
        gf_dim = generator["to_rgb.0.weight"].shape[0]
        rows, part = generator["l1.weight"].shape
        df_dim = NetworkConfig.df_dim
        if discriminator is not None:
            width = discriminator["block1.c1.bias" if "block1.c1.bias" in discriminator else "block3.0.bias"]
            df_dim = width.shape[0]
    except KeyError as error:
        raise UserError(f"the checkpoint has no tensor {error}; expected one of the authors' networks") from None
    return NetworkConfig(gf_dim, df_dim, 3 * part, round((rows / gf_dim) ** 0.5))


def pair_of(told: object, given: str | None, path: Path) -> tuple[Genes, Genes | None]:
    """The genotypes that a file of ours tells, or that are given; no weight tells how a picture is enlarged.

    Raises:
        UserError: what it tells is damaged, or something else is given.
    """
    from eagan.config import RunConfig
    from eagan.genotypes import DISCRIMINATOR, GENERATOR, parse
    from eagan.run import given_pair

    pair = None if told is not None and given is None else given_pair(RunConfig(genotype=given or USUAL))
    if told is None:
        assert pair is not None
        return pair
    where = f"--checkpoint {path}: its genotype"
    try:
        genes = json.loads(str(told))
        own = genes["generator"], genes["discriminator"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is damaged; expected what --model writes") from None
    found = parse(GENERATOR, own[0], where), None if own[1] is None else parse(DISCRIMINATOR, own[1], where)
    if pair is not None and pair != found:
        raise UserError(f"--genotype {given} is not that of {path}, which tells its own: leave --genotype out")
    return found


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="of the authors' code (.pth)")
    source.add_argument("--model", type=Path, help="a trained pair of ours")
    parser.add_argument(
        "--genotype", help="with --checkpoint: names, or a JSON file (default: the file's, or best_G,cifar10_D)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder (from --checkpoint) or .pth file to write")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")

    import torch

    from common.files import write_atomically
    from common.training import load_checkpoint
    from common.weights import check_weights
    from eagan.model import Generator
    from eagan.retraining import load_discriminator, load_generator, save_pair
    from eagan.searching import new_discriminator

    if options.model is not None:
        made, judge = load_generator(options.model)[0], load_discriminator(options.model)
        genes = {"generator": made.genotype, "discriminator": judge.genotype}
        theirs = {
            "avg_gen_state_dict": to_authors(made.state_dict()),
            "dis_state_dict": to_authors(judge.state_dict()),
            "genotype": json.dumps(genes),  # the authors' code does not look here; weights do not tell it
        }
        write_atomically(options.out, lambda temporary: torch.save(theirs, temporary))
        return options.out
    content = load_checkpoint(options.checkpoint)
    states = {
        name: content[name] for name in ("avg_gen_state_dict", "gen_state_dict", "dis_state_dict") if name in content
    }
    averaged = states.get("avg_gen_state_dict", states.get("gen_state_dict"))
    if averaged is None:
        raise UserError(f"--checkpoint {options.checkpoint}: it has no avg_gen_state_dict; it has {', '.join(content)}")
    pair = pair_of(content.get("genotype"), options.genotype, options.checkpoint)
    named = (
        "its genotype"
        if options.genotype is None and "genotype" in content
        else f"--genotype {options.genotype or USUAL}"
    )
    tensors = from_authors(averaged)
    judged = from_authors(states["dis_state_dict"]) if "dis_state_dict" in states else None
    config = sizes_of(tensors, judged)
    generator = Generator(config, pair[0])
    discriminator = None if judged is None else new_discriminator(config, pair[1])
    for network, given in ((generator, tensors), (discriminator, judged)):
        if network is not None and given is not None:
            wanted = network.state_dict()
            counters = [name for name in wanted if name.endswith("num_batches_tracked")]
            check_weights(given, wanted, f"--checkpoint {options.checkpoint}", named, counters)
            network.load_state_dict(given, strict=False)
    save_pair(options.out, generator, discriminator, {"origin": options.checkpoint.name})
    return options.out


if __name__ == "__main__":
    run_main(main)
