"""Released weights of the generators to folders of this program, and back.

    python instella_t2i/convert_generator.py --released diffusion.pt --tokenizer TOKENIZER --text OLMO --out diffusion
    python instella_t2i/convert_generator.py --released ar.pt --tokenizer TOKENIZER --text OLMO --out ar
    python instella_t2i/convert_generator.py --model DIFFUSION --out released.safetensors

Parameters bear the same names in both; which generator it is, and every size, is read from the tensors. TOKENIZER is a
folder made by convert.py, whose codes alone mean something to the generator, OLMO that of AMD-OLMo-1B. The released
weights are under a research licence, which a conversion does not change.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Parser
from common.errors import UserError, first_line, run_main
from instella_t2i.config import StreamConfig, TextConfig

if TYPE_CHECKING:
    from torch import Tensor

    from instella_t2i.generators import Shape

NOTE = "instella_t2i"  # in the header of what we write
TARGETS = ("epsilon", "x")
UNUSED = "time_embed."  # of autoregressive weights: 4.2M numbers that nothing reads


def without_unused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights without what nothing reads."""
    causal = "split_token" in state
    return {name: tensor for name, tensor in state.items() if not (causal and name.startswith(UNUSED))}


def infer_generator(state: Mapping[str, Tensor]) -> tuple[str, StreamConfig, Shape]:
    """(kind, stream, shape) that released tensors belong to.

    Raises:
        UserError: a tensor that tells a size is missing.
    """
    from instella_t2i.generators import Shape

    def tensor(name: str) -> Tensor:
        if name not in state:
            raise UserError(f"--released: {name} is missing; expected the tensors of a released generator")
        return state[name]

    kind = "autoregression" if "split_token" in state else "diffusion"
    numbers = [int(found[1]) for name in state if (found := re.match(r"transformer_blocks\.(\d+)\.", name))]
    head_dim = tensor("transformer_blocks.0.attn.norm_q.weight").shape[0]
    width = tensor("transformer_blocks.0.attn.q_proj.weight").shape[0]
    rows = tensor("transformer_blocks.0.pos_emb").shape[1]
    shape = Shape(
        tokens=rows - (kind == "autoregression"),
        bits=tensor("x_embedder.weight").shape[1],
        text_width=tensor("transformer_blocks.0.proj_cond.weight").shape[1],
    )
    return kind, StreamConfig(max(numbers) + 1, width // head_dim, head_dim), shape


def read_released(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pt file under `module`; nothing in it is run.

    Raises:
        UserError: there is no such file, or it holds more than tensors.
    """
    import torch

    from common.weights import read_weights

    if path.suffix == ".safetensors":
        return read_weights(path, "--released")[0]
    if not path.is_file():
        raise UserError(f"--released {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"--released {path}: not tensors alone ({first_line(error)}); make it a .safetensors file with a tool that "
            "you trust"
        ) from None
    content = content.get("module", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"--released {path}: expected tensors by name, alone or under `module`")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--released", type=Path, help="released weights, .pt or .safetensors")
    source.add_argument("--model", type=Path, help="folder of a generator, to be written in the released layout")
    parser.add_argument("--out", type=Path, required=True, help="folder, or with --model the file, to write")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer whose codes it makes")
    parser.add_argument("--text", help="folder of the language model that it reads")
    parser.add_argument("--target", choices=TARGETS, help="of a denoiser (default: the file's, or epsilon)")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")
    if options.released and not (options.tokenizer and options.text):
        raise UserError("--released needs --tokenizer and --text, the folders of what the generator works with")

    import torch

    from common.weights import check_weights, json_note, save_weights
    from instella_t2i.codes import fingerprint
    from instella_t2i.generation import Trained, load_generator, save_generator
    from instella_t2i.generators import make_generator
    from instella_t2i.text import CausalText
    from instella_t2i.tokenizer import load_tokenizer

    if options.model:
        trained = load_generator(options.model, option="--model")
        save_weights(options.out, trained.network.state_dict(), {NOTE: json.dumps({"target": trained.target})})
        return options.out
    given = {name: tensor.float() for name, tensor in without_unused(read_released(options.released)).items()}
    kind, stream, shape = infer_generator(given)
    with torch.device("meta"):
        network = make_generator(kind, stream, shape)
    check_weights(given, network.state_dict(), f"--released {options.released}", "the network that its tensors tell")
    network.load_state_dict(given, assign=True)
    tokenizer = load_tokenizer(options.tokenizer, option="--tokenizer")
    if (tokenizer.config.tokens, tokenizer.config.bits) != (shape.tokens, shape.bits):
        raise UserError(
            f"--tokenizer {options.tokenizer} makes {tokenizer.config.tokens} tokens of {tokenizer.config.bits} bits, "
            f"the generator {shape.tokens} of {shape.bits}"
        )
    reader = CausalText(TextConfig(encoder=options.text), stream.layers)
    if reader.width != shape.text_width:
        raise UserError(
            f"--text {options.text} is {reader.width} wide, the generator reads features {shape.text_width} wide"
        )
    target = options.target or json_note(options.released, NOTE, "--released").get("target", TARGETS[0])
    if target not in TARGETS:
        raise UserError(f"--released {options.released}: the target in its header is {target!r}; expected epsilon or x")
    save_generator(Trained(network, target, reader.fingerprint, fingerprint(tokenizer)), options.out)
    print(f"{options.out}: {kind}, {sum(p.numel() for p in network.parameters()):,} parameters")
    return options.out


if __name__ == "__main__":
    run_main(main)
