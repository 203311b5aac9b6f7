"""Prompts to images with a flow directory: one step by default.

    python instaflow/sample.py --model runs/instaflow/pipeline --prompt "a red star" --out star.png
    python instaflow/sample.py --model runs/instaflow/reflowed --steps 4 --guidance 1.5 --negative red --prompt "a bell"
    python instaflow/sample.py --model DIR --interpolate --prompt "a red star" --prompt "a blue ring"
    python instaflow/sample.py --model 2_rectified_flow_from_sd_1_5 --layout official --steps 25 --prompt "a fox"

Image i of a run depends on (--seed, i) and its prompt alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Range, Seed, device

if TYPE_CHECKING:
    from torch import Tensor

    from instaflow.pipeline import InstaFlowPipeline


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory written by train.py, or a published one")
    parser.add_argument("--layout", choices=("diffusers", "official"), help="of a directory that does not say")
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--negative", default="", help="what to keep away from; acts with guidance above 1")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="picture to write")
    parser.add_argument("--count", type=Count, default=8, help="images per prompt, or along the interpolation")
    parser.add_argument("--steps", type=Count, default=1, help="Euler steps of a picture")
    parser.add_argument("--guidance", type=NotNegative, default=1.0, help="alpha of the guided velocity; acts above 1")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--interpolate", action="store_true", help="between two prompts (or one) and seeds S, S + 1")
    parser.add_argument("--lora", type=Path, help="weight differences of a fine-tuned teacher (.safetensors)")
    scale = Annotated[float, Range(-100, 100)]
    parser.add_argument("--lora_scale", type=scale, default=1.0, help="what multiplies the differences of --lora")
    parser.add_argument("--latents", type=Path, help=".safetensors with `latents` [N, C, H, W] to start from")
    parser.add_argument("--save_latents", type=Path, help="write the final latents there (.safetensors)")
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    options = parser.parse_args(argv)
    options.prompt = prompts_of(options.prompt, options.prompts, "a red star")
    pipeline = open_pipeline(options)
    images, captions = draw(pipeline, options)
    from common.images import save_grid

    tile = max(images.shape[-1], 128 // images.shape[-1] * images.shape[-1])
    print(save_grid(images, options.out, columns=options.count, captions=captions, tile=tile))


def open_pipeline(options: argparse.Namespace) -> InstaFlowPipeline:
    """The pipeline of `--model`, with `--lora` merged."""
    import torch

    from common.weights import read_weights
    from instaflow.pipeline import InstaFlowPipeline, merge_delta

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipeline = InstaFlowPipeline.load(options.model, device, dtype, options.layout)
    if options.lora:
        merge_delta(pipeline.flow, read_weights(options.lora, "--lora")[0], options.lora_scale, pipeline.card.init)
    return pipeline.channels_last()


def draw(pipeline: InstaFlowPipeline, options: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """uint8 images and the caption of each."""
    from common.weights import read_weights, save_weights

    prompts: list[str] = options.prompt
    if options.interpolate:
        if len(prompts) > 2:
            raise UserError(f"--interpolate goes between 1 or 2 prompts, {len(prompts)} were given")
        ends = (prompts[0], prompts[-1])
        images = pipeline.interpolate(ends, (options.seed, options.seed + 1), options.count, options.steps)
        return images, [ends[0], *[""] * (options.count - 2), ends[1]][: options.count]
    wanted = [prompt for prompt in prompts for _ in range(options.count)]
    latents = None
    if options.latents:
        tensors, _ = read_weights(options.latents, "--latents")
        if "latents" not in tensors:
            raise UserError(f"{options.latents}: no tensor named latents in it")
        latents = tensors["latents"]
    final = pipeline(
        wanted,
        steps=options.steps,
        guidance=options.guidance,
        negative_prompts=options.negative,
        latents=latents,
        seed=options.seed,
        output="latent",
    )
    if options.save_latents:
        save_weights(options.save_latents, {"latents": final.float()})
    return pipeline.decode(final), wanted


if __name__ == "__main__":
    run_main(main)
