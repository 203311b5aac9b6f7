"""Released tokenizer weights to a folder of this program, and back.

    python instella_t2i/convert.py --released WEIGHTS.safetensors --out TOKENIZER
    python instella_t2i/convert.py --model TOKENIZER --out RELEASED.safetensors

Parameters bear the same names in both. Widths, layers, tokens, bits and the patch are read from the tensors; what they
do not say (after which blocks the grid is resized, the axes of the coordinates, the scale) is taken as released unless
options or the header of a file from here say otherwise. The released weights are under a research licence, which a
conversion does not change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import NotNegative, Positive, Whole
from instella_t2i.config import NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor

NOTE = "instella_t2i"  # in the header of what we write
UNTOLD = ("down_after", "up_after", "axes", "theta", "scale")  # options that no tensor tells
REPA = "decoder.repa_proj."  # supervision of the released training; no part of the tokenizer


def infer_network(state: Mapping[str, Tensor], **said: Any) -> NetworkConfig:
    """The network that released tensors belong to.

    Args:
        said: options that tensors do not tell; None stands for the released value.

    Raises:
        UserError: a tensor that tells an option is missing.
    """

    def tensor(name: str) -> Tensor:
        if name not in state:
            raise UserError(f"--released: {name} is missing; expected the tensors of a released tokenizer")
        return state[name]

    def layers(part: str) -> int:
        numbers = [
            int(found[1]) for name in state if (found := re.match(rf"{part}\.transformer_blocks\.(\d+)\.", name))
        ]
        return max(numbers, default=-1) + 1

    sizes: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        head_dim = tensor(f"{part}.transformer_blocks.0.attn.norm_q.weight").shape[0]
        width = tensor(f"{part}.transformer_blocks.0.attn.q_proj.weight").shape[0]
        sizes |= {
            f"{part}_layers": layers(part),
            f"{part}_heads": width // head_dim,
            f"{part}_head_dim": head_dim,
        }
    given = {name: value for name, value in said.items() if value is not None}
    return NetworkConfig(
        patch=tensor("encoder.patch_embedder.weight").shape[-1],
        tokens=tensor("encoder.latent_tokens").shape[1],
        bits=tensor("quantizer.embed").shape[0],
        **sizes,
        **given,
    )


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--released", type=Path, help="released weights, .safetensors")
    source.add_argument("--model", type=Path, help="folder of a tokenizer, to be written in the released layout")
    parser.add_argument("--out", type=Path, required=True, help="folder, or with --model the file, to write")
    parser.add_argument("--down_after", type=Whole, nargs="*", help="encoder blocks that halve the grid; released: 7")
    parser.add_argument("--up_after", type=Whole, nargs="*", help="decoder blocks that double the grid; released: 7")
    parser.add_argument(
        "--axes", type=Whole, nargs=3, help="head width of token number, row, column; released: 8 28 28"
    )
    parser.add_argument("--scale", type=NotNegative, help="pixels of stretched coordinates, 0 for none; released: 1024")
    parser.add_argument("--theta", type=Positive, help="base of the rotary frequencies; released: 10000")
    parser.add_argument(
        "--size", type=Whole, help="side of the pictures that it is to encode (default: the file's, or 512)"
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")

    import torch

    from common.weights import check_weights, json_note, read_weights, save_weights
    from instella_t2i.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

    if options.model:
        tokenizer = load_tokenizer(options.model, option="--model")
        config = tokenizer.config
        if (config.quantizer, config.layout, config.rotary) != ("binary", "line", "released"):
            raise UserError(
                f"--model {options.model}: the released layout knows quantizer binary, layout line and rotary released "
                f"alone, this is {config.quantizer}, {config.layout}, {config.rotary}"
            )
        known = {name: getattr(config, name) for name in UNTOLD} | {"size": tokenizer.size}
        save_weights(options.out, tokenizer.state_dict(), {NOTE: json.dumps(known)})
        print(f"{options.out}; other readers than this program need to be told {known}")
        return options.out
    state, _ = read_weights(options.released, "--released")
    left = sorted(name for name in state if name.startswith(REPA))
    state = {name: tensor.float() for name, tensor in state.items() if name not in left}
    if left:
        print(f"left out {len(left)} tensors {REPA}*: they supervised the training and are no part of the tokenizer")
    known = json_note(options.released, NOTE, "--released")
    said = {name: getattr(options, name) for name in UNTOLD if getattr(options, name) is not None}
    told = {name: known[name] for name in UNTOLD if name in known} | said
    scale = told.pop("scale", NetworkConfig.scale)
    config = infer_network(state, **told)
    config.scale = scale or None
    with torch.device("meta"):
        tokenizer = Tokenizer(config, options.size or known.get("size", 512))
    check_weights(state, tokenizer.state_dict(), f"--released {options.released}", "the network that its tensors tell")
    tokenizer.load_state_dict(state, assign=True)
    return save_tokenizer(tokenizer, options.out, {"converted": options.released.name})


if __name__ == "__main__":
    run_main(main)
