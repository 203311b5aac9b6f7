"""Draw pictures: `python pixart/sample.py --prompt "a red circle left of a blue square"` writes samples.png.

    python pixart/sample.py --prompt "a cyan star" --count 8                     # a grid of eight
    python pixart/sample.py --prompt "a red ring above a blue heart --ar 2:1"    # height:width, also as an option
    python pixart/sample.py --prompt "..." --weights runs/pixart-small/stage3b   # a stage of train.py
    python pixart/sample.py --prompt "..." --weights PixArt-XL-2-512x512.pth --vae sd-vae-ft-ema --text_encoder t5
    python pixart/sample.py --prompt "..." --weights PixArt-XL-2-512x512         # a diffusers pipeline directory
    python pixart/sample.py --prompt "..." --weights runs/pixart-control/controlnet --control picture.png

Without --weights: pixart/pretrained/shapes where it exists, else the newest finished stage below runs/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.files import read_object
from common.options import Count, NotNegative, Range, Seed
from common.paths import WORKPLACE, cache_dir, existing_path
from pixart.config import SamplingConfig, Steps

if TYPE_CHECKING:
    from torch import Tensor

    from pixart.controlnet import ControlPixArt
    from pixart.features import Codec
    from pixart.model import DiT, PixArt
    from pixart.text import TextEncoder

PRETRAINED = Path(__file__).parent / "pretrained" / "shapes"
ABOUT = "pixart.json"  # beside our weights: which codec and text encoder they were trained with
CONTROL = "controlnet.safetensors"
STEPS = {"dpm-solver": (1, 1000), "sa-solver": (1, 1000), "iddpm": (2, 1000)}  # fewest and most of a sampler
VAE = "vae"  # beside them too, so that a run folder draws by itself


@dataclass
class Painter:
    """A network with its codec and text encoder: captions (or classes) in, pictures out.

    Args:
        size: side of the square pictures it was trained on, the base of its aspect buckets.
    """

    network: PixArt | DiT | ControlPixArt
    codec: Codec
    encoder: TextEncoder | None
    size: int

    @property
    def multiple(self) -> int:
        """What picture sides must be divisible by."""
        return self.codec.factor * self.network.config.patch_size

    def captions(
        self,
        captions: Sequence[str],
        height: int,
        width: int,
        sampling: SamplingConfig,
        seed: int = 0,
        control_n3HW: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw captions: uint8 [N, 3, height, width]. Picture i depends on (seed, i) alone, not on the batch.

        Captions are encoded once, and their keys and values once for all steps; both guidance branches share a batch.

        Args:
            control_n3HW: pictures whose edges steer the samples (ControlNet), uint8: one for each, or one for all.
        """
        import torch

        from pixart.buckets import bucket_table, nearest_bucket
        from pixart.samplers import guided

        encoder, network = self.encoder, self.network
        assert encoder is not None
        table = bucket_table(self.size, self.multiple)
        ratio = table[nearest_bucket(table, height, width)].ratio
        control = None if control_n3HW is None else self._control(control_n3HW, height, width)

        def model(first: int, count: int, device: torch.device) -> Any:
            features, mask = (x.to(device) for x in encoder.encode(captions[first : first + count]))
            conditions = {
                "size_B2": torch.tensor([[height, width]], dtype=torch.float32, device=device).expand(count, 2),
                "ratio_B1": torch.full((count, 1), ratio, device=device),
            }
            if control is not None:
                mine = control if len(control) == 1 else control[first : first + count]
                conditions["control_BCHW"] = mine.to(device).expand(count, -1, -1, -1)
            has_null = getattr(network, "base_model", network).has_null_caption
            null = None if has_null else encoder.encode([""])
            return guided(network, features, mask, sampling.guidance, null=null, **conditions)

        return self._draw(len(captions), height, width, model, sampling, seed, progress)

    def classes(self, labels: Tensor, height: int, width: int, sampling: SamplingConfig, seed: int = 0) -> Tensor:
        """Draw class labels [N] with the class-conditional network: uint8 [N, 3, height, width]."""
        import torch

        from pixart.samplers import guide

        def model(first: int, count: int, device: torch.device) -> Any:
            label = labels[first : first + count].to(device)
            if sampling.guidance == 1:
                return lambda x, t: self.network(x, t, label)
            both = torch.cat([torch.full_like(label, self.network.config.classes), label])
            return guide(lambda x, t: self.network(x, t, both), sampling.guidance)

        return self._draw(len(labels), height, width, model, sampling, seed, False)

    def _draw(
        self, total: int, height: int, width: int, make: Any, sampling: SamplingConfig, seed: int, progress: bool
    ) -> Tensor:
        import torch
        from tqdm import tqdm

        from pixart.samplers import seeded_noise

        if height % self.multiple or width % self.multiple:
            raise UserError(f"pictures of {height} x {width} pixels: both sides must be multiples of {self.multiple}")
        device = next(self.network.parameters()).device
        grid = (self.codec.channels, height // self.codec.factor, width // self.codec.factor)
        parts = []
        starts = range(0, total, sampling.batch_size)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for first in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
                count = min(sampling.batch_size, total - first)
                noise = seeded_noise(seed, range(first, first + count), device)
                start = noise(torch.empty(count, *grid, device=device))
                z_BCHW = sample_latents(make(first, count, device), start, sampling, noise)
                parts.append(self.codec.decode(z_BCHW))
        return torch.cat(parts)

    def _control(self, pictures_n3HW: Tensor, height: int, width: int) -> Tensor:
        from common.images import resize_uint8
        from pixart.features import edge_map

        pictures = resize_uint8(pictures_n3HW, (height, width))
        return self.codec.scaling_factor * self.codec.moments(edge_map(pictures)).chunk(2, dim=1)[0]


def sample_latents(model: Any, start_BCHW: Tensor, sampling: SamplingConfig, noise: Any) -> Tensor:
    """Run the sampler that `sampling` names on a guided model, from standard normal noise to scaled latents."""
    from pixart.samplers import dpm_solver, iddpm, sa_solver

    if sampling.sampler == "dpm-solver":
        return dpm_solver(model, start_BCHW, sampling.steps)
    if sampling.sampler == "sa-solver":
        return sa_solver(model, start_BCHW, sampling.steps, noise=noise)
    return iddpm(model, start_BCHW, sampling.steps, noise=noise)


def open_painter(
    weights: Path,
    vae: str | None = None,
    text_encoder: str | None = None,
    device: str = "cpu",
    heads: int | None = None,
) -> Painter:
    """Everything needed to sample from our folder, an official .pth, or a diffusers directory.

    Args:
        vae, text_encoder: directories; needed where the weights do not come with their own.
        heads: attention heads of a .pth of another width than the authors'.

    Raises:
        UserError: nothing to load there, or a part is missing.
    """
    import torch

    from pixart.convert import is_diffusers, load_dit, load_transformer
    from pixart.features import Codec
    from pixart.text import TextEncoder

    folder = weights / "model" if (weights / "model" / "config.json").is_file() else weights
    about: dict[str, Any] = {}
    if (folder / ABOUT).is_file():
        about = read_object(folder / ABOUT)
    elif folder.is_dir() and is_diffusers(folder) and text_encoder is None and (folder / "text_encoder").is_dir():
        text_encoder = str(joined_text_encoder(folder))
    own = str(folder / VAE) if (folder / VAE / "config.json").is_file() else None
    vae, text_encoder = vae or own or about.get("vae"), text_encoder or about.get("text_encoder")
    if vae is None:
        raise UserError(f"--vae is missing: {weights} does not come with its AutoencoderKL directory")
    network: Any = load_dit(folder) if about.get("kind") == "class" else load_transformer(folder, heads=heads)
    if (folder / CONTROL).is_file():
        from pixart.controlnet import load_controlnet

        network = load_controlnet(folder / CONTROL, network)
    config = network.config
    codec = Codec(vae, device)
    if codec.channels != config.in_channels:
        raise UserError(f"vae {vae} has {codec.channels} latent channels, but {weights} was trained on another codec")
    encoder = None
    if about.get("kind") != "class":
        if not about and text_encoder is None and config.caption_channels != 384:
            raise UserError(
                f"--text_encoder is missing: {weights} reads caption features of {config.caption_channels} channels "
                "(the authors': a T5 v1.1 XXL encoder directory)"
            )
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        path = None if text_encoder is None else existing_path(text_encoder)
        encoder = TextEncoder(path, config.caption_tokens, device, dtype)
        if encoder.channels != config.caption_channels:
            raise UserError(
                f"text_encoder {encoder.path} makes {encoder.channels} channels, but {weights} reads "
                f"{config.caption_channels}"
            )
    return Painter(network.eval().to(device), codec, encoder, config.input_size * codec.factor)


def joined_text_encoder(pipeline: Path) -> Path:
    """One folder with the links to a pipeline's `text_encoder` and `tokenizer`, as the text encoder wants it."""
    import hashlib

    digest = hashlib.sha1(str(pipeline.resolve()).encode(), usedforsecurity=False).hexdigest()[:16]
    joined = cache_dir("pixart", f"text_encoder-{digest}")
    for part in ("text_encoder", "tokenizer"):
        for file in (pipeline / part).iterdir() if (pipeline / part).is_dir() else ():
            link = joined / file.name
            if not link.is_symlink():
                link.symlink_to(file.resolve())
    return joined


def default_weights() -> Path:
    """The committed small weights, else the newest finished text-conditional stage below runs/."""
    if PRETRAINED.is_dir():
        return PRETRAINED
    roots = {Path("runs").resolve(), (WORKPLACE / "runs").resolve()}
    found = [path for root in roots for path in root.glob(f"*/*/model/{ABOUT}")]
    found = [path for path in found if read_object(path).get("kind") == "text"]
    if not found:
        raise UserError(
            "--weights is missing, and no trained network was found below runs/: make one with "
            "`python pixart/train.py` (about 40 minutes on 2 cores), or give --weights DIR or FILE.pth"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--weights", type=Path, help="our folder, an official .pth, or a diffusers directory")
    parser.add_argument("--vae", help="diffusers AutoencoderKL directory, if the weights do not name theirs")
    parser.add_argument("--text_encoder", help="transformers encoder directory, if the weights do not name theirs")
    parser.add_argument("--heads", type=Count, help="attention heads of a .pth of another width than 1152")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="picture to write")
    parser.add_argument("--count", type=Count, default=1, help="pictures per prompt")
    parser.add_argument("--ar", help="HEIGHT:WIDTH, the shape of the pictures")
    parser.add_argument("--hw", help="HEIGHT:WIDTH in pixels")
    parser.add_argument("--steps", type=Steps, help="default 20 (dpm-solver), 25 (sa-solver), 100 (iddpm)")
    parser.add_argument(
        "--guidance", type=NotNegative, default=4.5, help="scale of classifier-free guidance; 1 draws without it"
    )
    parser.add_argument(
        "--sampler",
        choices=("dpm-solver", "iddpm", "sa-solver"),
        default="dpm-solver",
        help="iddpm takes a learned variance where the network has one, else beta; the others need none",
    )
    parser.add_argument("--control", type=Path, help="picture whose edges to follow (ControlNet weights)")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    options = parser.parse_args(argv)
    options.prompt = prompts_of(options.prompt, options.prompts, "a red circle left of a blue square")
    steps = (
        {"dpm-solver": 20, "sa-solver": 25, "iddpm": 100}[options.sampler] if options.steps is None else options.steps
    )
    Range(*STEPS[options.sampler]).check("steps", steps, int)
    return _write(options, SamplingConfig(options.sampler, steps, options.guidance))


def _write(options: argparse.Namespace, sampling: SamplingConfig) -> Path:
    import torch
    from PIL import Image

    from common.images import as_uint8, open_rgb, save_grid, save_png
    from pixart.buckets import Bucket, fit_to_bucket
    from pixart.text import parse_prompt

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = options.weights or default_weights()
    painter = open_painter(weights, options.vae, options.text_encoder, device, options.heads)
    if painter.encoder is None:
        raise UserError(f"{weights} is a class-conditional stage: it takes no prompt; choose a later stage")
    control = None
    if options.control is not None:
        if not hasattr(painter.network, "base_model"):
            raise UserError(f"--control: {weights} has no control branch ({CONTROL})")
        control = as_uint8(open_rgb(options.control)[None])
    flags = "".join(f" --{flag} {value}" for flag in ("ar", "hw") if (value := getattr(options, flag)))
    parsed = [parse_prompt(prompt + flags, painter.size, painter.multiple) for prompt in options.prompt]
    shapes = {(p.height, p.width) for p in parsed}
    if len(shapes) > 1:
        raise UserError(f"the prompts ask for pictures of {len(shapes)} shapes: draw them one shape at a time")
    first = parsed[0]
    texts = [p.text.strip() for p in parsed for _ in range(options.count)]
    images = painter.captions(
        texts, first.bucket.height, first.bucket.width, sampling, options.seed, control, sys.stderr.isatty()
    )
    if (first.height, first.width) != (first.bucket.height, first.bucket.width):
        wanted = Bucket(first.ratio, first.height, first.width)
        pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images)
        images = torch.stack([fit_to_bucket(picture, wanted) for picture in pictures])
    # Small pictures are shown larger, unless their size in pixels was asked for.
    factor = 1 if options.hw else max(1, 128 // min(images.shape[2:]))
    shown = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if len(shown) == 1:
        written = save_png(Image.fromarray(shown[0].permute(1, 2, 0).numpy()), options.out)
    else:
        written = save_grid(
            shown, options.out, columns=min(options.count, 8) if options.count > 1 else None, captions=texts
        )
    print(written)
    return written


if __name__ == "__main__":
    run_main(main)
