"""Generate text under a memory budget: `python se_moe/serve.py --prompt "The people of this nation"`.

    python se_moe/serve.py --prompt "..." --model runs/se_moe-small/model      # what train.py left there
    python se_moe/serve.py --prompt "..." --device_mb 12                       # experts behind a ring that fits
    python se_moe/serve.py --prompt "..." --sections 2 --mode export           # K = 2, torch.export graphs
    python se_moe/serve.py --prompt "..." --devices 2 --device_mb 11           # two sub-graphs, 11 MB each
    python se_moe/serve.py --prompt "..." --prune_text my.txt --save served/   # drop experts that my.txt never visits

All expert weights wait in host memory; the device holds the dense part and K layers' experts (section 3.3.2). Without
--sections the program takes the largest K that fits --device_mb, or keeps everything on the device if that fits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.data.lines import read_text
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Seed, device
from common.paths import WORKPLACE

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from se_moe.inference import ServedModel, Server

PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "small"
UNLIMITED_MB = 1 << 20


def default_model() -> Path:
    """The model that comes with the repository, else the newest that train.py wrote."""
    if (PRETRAINED / "config.json").exists():
        return PRETRAINED
    found = sorted((WORKPLACE / "runs").glob("se_moe*/model/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("there is no trained model yet: run `make se_moe-train`, or name a folder with --model")
    return found[-1].parent


def load(folder: Path) -> tuple[ServedModel, Tokenizer]:
    """A folder of train.py (config.json) or of `--save` (model.json), with its vocabulary.

    Raises:
        UserError: the folder is neither, or files are missing or damaged.
    """
    from tokenizers import Tokenizer

    from se_moe.checkpoint import load_model
    from se_moe.inference import load_served, serving_form

    if (folder / "model.json").exists():
        served = load_served(folder)
    elif (folder / "config.json").exists():
        served = serving_form(load_model(folder))
    else:
        raise UserError(f"--model {folder}: expected a folder with config.json or model.json; train.py writes one")
    path = folder / "tokenizer.json"
    try:
        return served, Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: cannot read the vocabulary ({error})") from None


def text_batches(text: str, tokenizer: Tokenizer, length: int) -> list[torch.Tensor]:
    """The text as ids [16, length] (the rest that fills no row is left out)."""
    import torch

    ids = tokenizer.encode(text, add_special_tokens=False).ids
    rows = len(ids) // length
    if rows == 0:
        raise UserError(f"--prune_text: {len(ids)} tokens are too few, at least {length} are needed")
    return list(torch.tensor(ids[: rows * length]).view(rows, length).split(16))


def pruned(folder: Path, tokenizer: Tokenizer, text_file: Path) -> ServedModel:
    """The model without the experts that no token of the text visits."""
    from se_moe.checkpoint import load_model
    from se_moe.inference import expert_usage, prune_experts, serving_form

    if not (folder / "config.json").exists():
        raise UserError(f"--prune_text needs a model of train.py (config.json), {folder} has none")
    text = read_text(text_file)
    model = load_model(folder)
    usage = expert_usage(model, text_batches(text, tokenizer, model.config.sequence))
    return serving_form(model, prune_experts(model, usage))


def start(
    served: ServedModel, device_mb: float, sections: int | None, mode: str, devices: int, device: str
) -> tuple[Server, int | None]:
    """A server within the budget, and its ring sections (None: all experts resident).

    Raises:
        UserError: not even one section fits.
    """
    from se_moe.inference import Server
    from se_moe.storage import DeviceArena

    budget = int((device_mb or UNLIMITED_MB) * 1e6)
    moe_layers = sum(bool(layer) for layer in served.experts)
    if sections is not None:
        choices: list[int | None] = [sections]
    else:
        choices = [None, *range(moe_layers - 1, 0, -1)]
    # Without a limit a ring must not take all of it: twice the largest layer, for every layer, is more than it needs.
    largest = max((sum(t.nbytes for t in layer.values()) for layer in served.experts), default=0)
    room = None if device_mb else 2 * max(1, moe_layers * largest)
    failure: UserError | None = None
    for choice in choices:
        try:
            arenas = [DeviceArena(budget, device, room) for _ in range(devices)]
            return Server(served, arenas, choice, mode), choice
        except UserError as error:
            failure = error
    assert failure is not None
    raise failure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--prompt", required=True, help="text to go on with")
    parser.add_argument("--model", type=Path, help="folder of a trained model (default: the newest)")
    parser.add_argument("--tokens", type=Count, default=60, help="tokens to generate")
    parser.add_argument("--temperature", type=NotNegative, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=Seed, default=0, help="of the draws")
    parser.add_argument(
        "--device_mb", type=NotNegative, default=0, help="memory budget of each device in MB; 0: no limit"
    )
    parser.add_argument("--sections", type=Count, help="ring sections K (default: as many as fit)")
    parser.add_argument("--mode", choices=("eager", "export", "compile"), default="eager", help="how layers run")
    parser.add_argument("--devices", type=Count, default=1, help="sub-graphs of the model, each with its memory")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--prune_text", type=Path, help="drop experts that this text never visits")
    parser.add_argument("--save", type=Path, help="write the model as it is served to this folder")
    parser.add_argument("--json", action="store_true", help="print the text and the numbers as JSON")
    options = parser.parse_args(arguments)

    import torch

    from se_moe.inference import save_served

    folder = options.model or default_model()
    served, tokenizer = load(folder)
    if options.prune_text is not None:
        served = pruned(folder, tokenizer, options.prune_text)
    if options.save is not None:
        save_served(served, options.save, tokenizer.to_str())
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    if not prompt:
        raise UserError("--prompt is empty; give at least one word")
    server, sections = start(served, options.device_mb, options.sections, options.mode, options.devices, options.device)
    generator = torch.Generator().manual_seed(options.seed)
    with server:
        began = time.perf_counter()
        ids = server.generate(torch.tensor([prompt]), options.tokens, options.temperature, generator)[0].tolist()
        seconds = time.perf_counter() - began
        numbers: dict[str, Any] = {
            "text": tokenizer.decode(ids),
            "tokens_per_second": options.tokens / seconds,
            "device_peak_bytes": server.device_peak_bytes,
            "resident_bytes": served.dense_bytes + served.expert_bytes,
            "sections": sections,
            "experts_kept": served.kept,
        }
    if options.json:
        print(json.dumps(numbers))
        return
    held = "all experts on the device" if sections is None else f"ring of {sections} section(s)"
    peak = sum(numbers["device_peak_bytes"]) / 1e6
    print(numbers["text"])
    print(
        f"[{numbers['tokens_per_second']:.1f} tokens/s; {held}; peak {peak:.2f} MB on the device, the whole model has "
        f"{numbers['resident_bytes'] / 1e6:.2f} MB]"
    )


if __name__ == "__main__":
    run_main(main)
