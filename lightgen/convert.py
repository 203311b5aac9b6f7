"""The authors' weights and ours, both ways.

    python lightgen/convert.py --official LIGHTGEN.pth --autoencoder SD35 --text FLAN_T5 --size 512 --out model
    python lightgen/convert.py --model runs/lightgen-small/model --out OFFICIAL.safetensors
    python lightgen/convert.py --mar MAR_CHECKPOINT.pth --out mar.safetensors

A checkpoint of the authors holds trained and averaged weights: --weights says which (their own scripts take the trained
ones). Sizes are read from the weights; heads are those of the published widths, else --heads says how many. In files
that --model wrote heads, size, length and sampling stand in the header.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count

if TYPE_CHECKING:
    from torch import Tensor

    from lightgen.config import NetworkConfig
    from lightgen.model import Mar, MarConfig

HEADS = {768: 12, 1024: 16, 1280: 16}
NOTE = "lightgen"  # in the header of what we write: heads, sizes and sampling, which weights do not tell
STATES = {"ema": "model_ema", "trained": "model"}


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--official", type=Path, help="LightGen's checkpoint (.pth or .safetensors)")
    source.add_argument("--mar", type=Path, help="a checkpoint of MAR")
    source.add_argument("--model", type=Path, help="a model of ours, to write with the official names")
    parser.add_argument("--out", type=Path, required=True, help="folder (--official) or .safetensors file to write")
    parser.add_argument("--weights", choices=tuple(STATES), default="ema", help="which of a checkpoint's weights")
    parser.add_argument("--autoencoder", default="pixels", help="diffusers directory with vae/, with --official")
    parser.add_argument("--text", help="transformers directory of the text encoder, with --official")
    parser.add_argument(
        "--length", type=Count, help="tokens of a caption, with --official (default: the file's, or 128)"
    )
    parser.add_argument(
        "--size", type=Count, help="side of what it draws, with --official (default: the file's, or 256)"
    )
    parser.add_argument("--heads", type=Count, help="of all attention, for widths that were not published")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")
    if options.official:
        return from_official(options)

    from common.weights import save_weights

    if options.mar:
        state = renamed(read_official(options.mar, options.weights, "--mar"), "mar", options.mar)
        config = mar_config(state, options.heads)
        check_mar(state, config, options.mar)
        save_weights(options.out, state, {"config": json.dumps(asdict(config)), "kind": "mar"})
        return options.out
    from lightgen.model import official
    from lightgen.painter import Painter

    painter = Painter.load(options.model)
    theirs = {official(name): value for name, value in painter.model.state_dict().items()}
    known = {
        "network": asdict(painter.model.config),
        "length": painter.text.config.length,
        "size": painter.size,
        "sampling": asdict(painter.sampling),
    }
    save_weights(options.out, {str(name): value for name, value in theirs.items()}, {NOTE: json.dumps(known)})
    return options.out


def from_official(options: argparse.Namespace) -> Path:
    """A model folder of LightGen's weights."""
    from common.weights import check_weights, json_note
    from lightgen.config import NetworkConfig, SamplingConfig, TextConfig
    from lightgen.data import Autoencoder
    from lightgen.model import Fluid
    from lightgen.painter import Painter
    from lightgen.text import TextStates

    state = renamed(read_official(options.official, options.weights, "--official"), "fluid", options.official)
    known = json_note(options.official, NOTE, "--official")
    autoencoder = Autoencoder(options.autoencoder)
    try:
        told = NetworkConfig(**known["network"]) if known and options.heads is None else None
        sampling = SamplingConfig(**known.get("sampling", {}))
    except (KeyError, TypeError) as error:
        raise UserError(f"--official {options.official}: the note {NOTE} in its header is damaged ({error})") from None
    config = told or network_config(state, autoencoder.channels, options.heads, options.official)
    size = options.size or known.get("size", 256)
    text = TextStates(TextConfig(options.text, options.length or known.get("length", 128)))
    wanted = state["text.first.weight"].shape[1]
    if text.width != wanted:
        raise UserError(
            f"--text {options.text}: its states have {text.width} numbers, the checkpoint wants {wanted} "
            "(FLAN-T5-XXL has 4096)"
        )
    model = Fluid(config, autoencoder.channels, text.width)
    check_weights(state, model.state_dict(), f"--official {options.official}", "the network that its sizes describe")
    model.load_state_dict(state)
    painter = Painter(model.eval(), text, autoencoder, sampling, size)
    painter.grid(size, size)
    painter.save(options.out, options.autoencoder, {"origin": f"{options.official.name}, {options.weights}"})
    return options.out


def read_official(path: Path, which: str, option: str) -> dict[str, Tensor]:
    """The tensors of the authors' checkpoint, or of a plain file of weights.

    Raises:
        UserError: it holds no such weights.
    """
    from common.weights import read_weights

    if path.suffix == ".safetensors":
        return read_weights(path, option)[0]
    import torch

    from common.training import load_checkpoint

    with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' options, beside the tensors
        content = load_checkpoint(path)
    if all(hasattr(value, "shape") for value in content.values()):
        return content
    if STATES[which] not in content:
        raise UserError(f"{option} {path} has no {STATES[which]!r}: expected {' and '.join(STATES.values())} in it")
    return dict(content[STATES[which]])


def renamed(state: Mapping[str, Tensor], kind: str, path: Path) -> dict[str, Tensor]:
    """Official weights under our names.

    Raises:
        UserError: a weight that the official network does not have.
    """
    from lightgen.model import ours

    found: dict[str, Tensor] = {}
    for name, value in state.items():
        own = ours(name, kind)
        if own is None:
            raise UserError(
                f"{path}: unknown weight {name}; expected a checkpoint of {'MAR' if kind == 'mar' else 'LightGen'}"
            )
        found[own] = value
    return found


def _need(state: Mapping[str, Tensor], name: str, path: object) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"{path}: {name} is missing; expected a whole checkpoint")
    return tuple(state[name].shape)


def _depth(state: Mapping[str, Tensor], start: str) -> int:
    return len({name.split(".")[start.count(".")] for name in state if name.startswith(start)})


def _heads(width: int, given: int | None) -> int:
    if given is None and width not in HEADS:
        raise UserError(f"width {width} was not published, so its heads are not known: give --heads")
    return given or HEADS[width]


def network_config(
    state: Mapping[str, Tensor], channels: int, heads: int | None = None, path: object = "the weights"
) -> NetworkConfig:
    """The sizes that our names and their shapes tell."""
    from lightgen.config import NetworkConfig

    width, token = _need(state, "token_in.weight", path)
    patch = math.isqrt(token // channels)
    if patch**2 * channels != token:
        raise UserError(f"{path}: tokens of {token} numbers are no squares of {channels} channels; see --autoencoder")
    many = _heads(width, heads)
    return NetworkConfig(
        width=width,
        encoder_depth=_depth(state, "encoder."),
        decoder_depth=_depth(state, "decoder."),
        cross_depth=_depth(state, "cross."),
        text_depth=_depth(state, "text.blocks."),
        encoder_heads=many,
        decoder_heads=many,
        cross_heads=many,
        mlp_ratio=_need(state, "encoder.0.mlp.fc1.weight", path)[0] / width,
        patch=patch,
        grid=math.isqrt(_need(state, "encoder_positions", path)[1]),
        head_width=_need(state, "head.input.weight", path)[0],
        head_depth=_depth(state, "head.blocks."),
    )


def mar_config(state: Mapping[str, Tensor], heads: int | None = None, path: object = "the weights") -> MarConfig:
    """The sizes of a MAR."""
    from lightgen.model import MarConfig

    inner, token = _need(state, "token_in.weight", path)
    outer = _need(state, "decoder_in.weight", path)[0]
    count = _need(state, "head_positions", path)[1]
    return MarConfig(
        encoder_width=inner,
        encoder_depth=_depth(state, "encoder."),
        encoder_heads=_heads(inner, heads),
        decoder_width=outer,
        decoder_depth=_depth(state, "decoder."),
        decoder_heads=_heads(outer, heads),
        mlp_ratio=_need(state, "encoder.0.mlp.fc1.weight", path)[0] / inner,
        tokens=math.isqrt(count),
        token=token,
        buffer=_need(state, "encoder_positions", path)[1] - count,
        classes=_need(state, "classes.weight", path)[0],
        head_width=_need(state, "head.input.weight", path)[0],
        head_depth=_depth(state, "head.blocks."),
    )


def check_mar(state: Mapping[str, Tensor], config: MarConfig, path: object) -> None:
    """Refuse weights that are not exactly those of the network."""
    import torch

    from common.weights import check_weights
    from lightgen.model import Mar

    with torch.device("meta"):
        wanted = Mar(config).state_dict()
    check_weights(state, wanted, f"--mar {path}", "the network that its sizes describe")


def load_mar(path: Path) -> Mar:
    """The MAR that `--mar` wrote.

    Raises:
        UserError: another file.
    """
    from common.weights import read_weights
    from lightgen.model import Mar, MarConfig

    state, notes = read_weights(path)
    try:
        config: dict[str, Any] = json.loads(notes["config"])
        model = Mar(MarConfig(**config))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is no MAR that lightgen/convert.py wrote") from None
    model.load_state_dict(state)
    return model.eval()


if __name__ == "__main__":
    run_main(main)
