"""Released checkpoints to a model folder, and back.

    python scenesplat/convert.py --checkpoint model_best.pth --text SIGLIP2_FOLDER --out lang-model
    python scenesplat/convert.py --model runs/scenesplat-small/model --out backbone.safetensors

Both released language models (11 and 14 attributes) and the five-stage encoder are known by their tensors. What the
official loader skips silently is said here: tensors that are missing or of another shape are refused, and those that
are no part of the encoder (heads, an average's copy) are listed. Files that --model wrote tell their network's options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Portion
from scenesplat.config import FIVE_STAGES, NetworkConfig

if TYPE_CHECKING:
    from torch import Tensor

NOTE = "scenesplat"  # in the header of what we write: options, voxel, attributes and classes
STEM = "embedding.stem.conv.weight"
PREFIXES = ("module.", "backbone_student.", "backbone.")  # DDP's, the self-supervised wrapper's, the pre-trainer's
COUNTS = "num_batches_tracked"  # of no effect, absent from some exports


def encoder_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors by our names, and the names of all others."""
    found: dict[str, Tensor] = {}
    others = []
    for name, tensor in state.items():
        bare = name
        for prefix in PREFIXES:
            bare = bare.removeprefix(prefix)
        if bare.split(".")[0] in ("embedding", "enc", "dec", "mask_token"):
            found[bare] = tensor
        else:
            others.append(name)
    return found, others


def options_of(found: Mapping[str, Tensor], where: str) -> NetworkConfig:
    """The published network that these tensors are of.

    Raises:
        UserError: they are of none.
    """
    if STEM not in found:
        raise UserError(f"{where}: no {STEM}; expected the state of a SceneSplat encoder")
    five = any(name.startswith("enc.enc4.") for name in found)
    options = FIVE_STAGES if five else NetworkConfig()
    token = "mask_token" in found
    return replace(
        options, in_channels=found[STEM].shape[-1], mask_token=token, pooling="max" if token else options.pooling
    )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state of a .pth checkpoint (no pickled code) or of a .safetensors file."""
    from torch import Tensor

    from common.training import load_checkpoint
    from common.weights import read_weights

    if path.suffix == ".safetensors":
        return read_weights(path, "--checkpoint")[0]
    content = load_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--checkpoint {path}: no state_dict of tensors in it")
    return state


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="released weights, .pth or .safetensors")
    source.add_argument("--model", type=Path, help="a folder of ours, to be written as the released code reads it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; with --model a .safetensors file")
    parser.add_argument("--text", help="the SigLIP2 folder that texts are to be encoded with; a table of names")
    parser.add_argument(
        "--voxel", type=Portion, help="side of a voxel in metres that the weights expect (default: the file's, or 0.02)"
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")

    from common.weights import check_weights, json_note, save_weights
    from scenesplat.export import SceneModel, network_options
    from scenesplat.model import PointTransformer
    from scenesplat.text import TextSpace

    if options.model:
        model = SceneModel.load(options.model)
        about: dict[str, Any] = {"network": asdict(model.network.options), "voxel": model.voxel}
        about |= {"attributes": model.attributes, "classes": model.classes}
        state = {f"backbone.{name}": value for name, value in model.network.state_dict().items()}
        save_weights(options.out, state, {NOTE: json.dumps(about)})
        print(f"left behind: the space of its texts ({model.text.source}), which --text is to name again")
        return options.out
    state = read_checkpoint(options.checkpoint)
    found, others = encoder_tensors(state)
    known = json_note(options.checkpoint, NOTE, "--checkpoint")
    told = known.get("network")
    shape = (
        network_options(told, options.checkpoint) if told else options_of(found, f"--checkpoint {options.checkpoint}")
    )
    network = PointTransformer(shape)
    wanted = network.state_dict()
    counts = [name for name in wanted if name.endswith(COUNTS)]
    against = "the network in its header" if told else f"the published {len(shape.enc_depths)}-stage encoder"
    check_weights(found, wanted, f"--checkpoint {options.checkpoint}", against, counts)
    network.load_state_dict(found, strict=False)
    print(f"{len(state)} tensors read, {len(found)} of the encoder, none missing, none of another shape")
    print(f"not used: {', '.join(others)}" if others else "not used: none")
    text = TextSpace(options.text)
    if options.text is None:
        print("no --text: queries will need the encoder that these weights were trained with (SigLIP2)")
    elif text.width != shape.dec_channels[0]:
        raise UserError(
            f"--text {options.text}: its texts have {text.width} numbers, these weights answer with "
            f"{shape.dec_channels[0]}; expected google/siglip2-base-patch16-512 (768)"
        )
    attributes = ["colour", "opacity", "quaternion", "scale"] + ["normal"] * (shape.in_channels == 14)
    voxel = options.voxel if options.voxel is not None else known.get("voxel", 0.02)
    model = SceneModel(network, text, voxel, known.get("attributes", attributes), known.get("classes", []))
    return model.save(options.out)


if __name__ == "__main__":
    run_main(main)
