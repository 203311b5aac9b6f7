"""Prompts to pictures, by binary diffusion and by autoregression side by side.

    python instella_t2i/sample.py --run_dir runs/instella_t2i-small --prompt "a red star" --out star.png
    python instella_t2i/sample.py --run_dir runs/instella_t2i-small --prompt "a bell" --by diffusion --guidance 4
    python instella_t2i/sample.py --run_dir runs/instella_t2i-small --prompt "a bell" --size 96 128       # other sizes
    python instella_t2i/sample.py --model DIFFUSION AR --tokenizer TOKENIZER --text OLMO --prompt "a fox"

Picture i of a run depends on (--seed, i) and its prompt alone. One code decodes at any size: --size changes neither the
code nor the time that it takes to find it. A guidance of w is the usual guidance scale less 1.
"""

from __future__ import annotations

from pathlib import Path

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Positive, Seed


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a run of instella_t2i/train.py with a generator")
    parser.add_argument("--model", type=Path, nargs="+", help="folders of generators instead, one of each kind at most")
    parser.add_argument("--tokenizer", type=Path, help="with --model: folder of their tokenizer")
    parser.add_argument("--text", help="with --model: folder of their language model")
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument(
        "--by", choices=("both", "diffusion", "autoregression"), default="both", help="which generators"
    )
    parser.add_argument("--count", type=Count, default=4, help="pictures a prompt and generator")
    parser.add_argument("--size", type=Count, nargs="+", help="side, or height and width; default: as it was trained")
    parser.add_argument("--steps", type=Count, help="evaluations of the denoiser; default: the run's")
    parser.add_argument("--guidance", type=NotNegative, help="w of both; default: the run's")
    parser.add_argument("--temperature", type=NotNegative, help="of both, 0 takes the likelier bit; default: the run's")
    parser.add_argument("--rho", type=Positive, help="exponent of the denoiser's times; default: the run's")
    parser.add_argument(
        "--protocol", choices=("renoise", "approximate", "exact"), help="step of the denoiser; default: the run's"
    )
    parser.add_argument("--seed", type=Seed, default=0, help="of everything drawn")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    options = parser.parse_args(argv)
    options.prompt = prompts_of(options.prompt, options.prompts, "a red star")
    if (options.run_dir is None) == (options.model is None):
        raise UserError("expected either --run_dir, a run, or --model, folders of generators")
    if options.model and not (options.tokenizer and options.text):
        raise UserError("--model needs --tokenizer and --text, the folders of what the generators work with")
    if options.size and len(options.size) > 2:
        raise UserError(f"--size {options.size}: expected a side, or height and width")

    import torch

    from common.images import save_grid
    from instella_t2i.config import SamplingConfig, TextConfig
    from instella_t2i.generation import open_painter
    from instella_t2i.run import Run
    from instella_t2i.tokenizer import load_tokenizer

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.run_dir:
        run = Run.existing(options.run_dir)
        sampling = run.config.sampling
        painter = run.painter(None if options.by == "both" else options.by, device)
    else:
        sampling = SamplingConfig()
        tokenizer = load_tokenizer(options.tokenizer, option="--tokenizer")
        painter = open_painter(tokenizer, TextConfig(encoder=options.text), options.model, device)
    for name in ("steps", "guidance", "temperature", "rho", "protocol"):
        if getattr(options, name) is not None:
            setattr(sampling, name, getattr(options, name))
            if name in ("guidance", "temperature"):
                setattr(sampling, f"ar_{name}", getattr(options, name))
    size = None if options.size is None else (options.size[0], options.size[-1])
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    rows = [painter.draw(kind, prompts, sampling, options.seed, size) for kind in painter.generators]
    captions = [f"{kind}: {prompt}" for kind in painter.generators for prompt in prompts]
    if len(rows) == 1:
        captions = prompts
    side = rows[0].shape[-1]
    tile = max(side, 128 // side * side)
    print(save_grid(torch.cat(rows), options.out, options.count, captions, tile))
    return options.out


if __name__ == "__main__":
    run_main(main)
