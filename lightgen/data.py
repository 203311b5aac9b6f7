"""Captioned pictures of a run, their latents, and the prompts that it is measured on.

Shape suffixes: N pictures, C channels, H, W sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.data.cache import FeatureCache, fingerprint_module, fingerprint_strings
from common.data.pairs import prompt_list
from common.data.rows import FEWEST_IMAGES, hold_out
from common.data.sampling import LazyTable, Table, TensorTable
from common.data.shapes import Shapes, Spec, prompts
from common.errors import UserError
from common.images import resize_uint8, to_uint8, to_unit
from common.paths import cache_dir
from common.pretrained import quiet_libraries, read_network, refuse_not_finite
from common.teacher import Teacher
from lightgen.config import DataConfig, LightgenConfig
from lightgen.synthesis import distil, unet_teacher

Part = Literal["train", "test"]
PIXELS = "pixels"
IN_MEMORY = 2**31  # bytes of latents that are held in memory; larger sets stay in the cache's files
GIVEN_SEED = 7919  # of the scenes that preferences are made of: none that was trained on
WORLDS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {
        "shapes": ("circle", "square", "triangle", "star"),
        "colours": ("red", "green", "blue", "yellow", "purple", "black"),
        "textures": ("solid",),
    },
}


@dataclass
class Captioned:
    """Pictures of one part.

    Args:
        images: numbers -> uint8 [n, 3, H, W], at the largest size of the run.
        fingerprint: of pictures and order.
    """

    captions: list[str]
    images: Callable[[list[int]], Tensor]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.captions)


class Autoencoder:
    """Pictures to latents and back: a diffusers VAE, or the pixels themselves.

    Args:
        where: a diffusers directory with vae/, or `pixels`.

    Raises:
        UserError: no such directory, or one that cannot be read.
    """

    def __init__(self, where: str | Path, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.vae: Any = None
        self.channels, self.stride = 3, 1
        if str(where) == PIXELS:
            return
        folder = Path(where) / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--autoencoder {where}: no vae/config.json there; expected a diffusers directory or pixels"
            )
        with quiet_libraries():
            from diffusers import AutoencoderKL

            vae = read_network(AutoencoderKL, folder)
        refuse_not_finite(vae, folder)
        self.vae = vae.float().eval().requires_grad_(False).to(self.device)
        self.channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def _scale(self) -> tuple[float, float]:
        config = self.vae.config
        return float(config.get("shift_factor") or 0.0), float(config.scaling_factor)

    @property
    def fingerprint(self) -> str:
        """Of the weights and the scale; latents are posterior means."""
        if self.vae is None:
            return PIXELS
        return fingerprint_strings([fingerprint_module(self.vae), f"{self._scale}", "posterior mean"])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents [N, C, H, W] of uint8 pictures, (mean - shift) * scale."""
        unit = to_unit(images.to(self.device))
        if self.vae is None:
            return unit
        shift, scale = self._scale
        return torch.cat([(self.vae.encode(part).latent_dist.mean - shift) * scale for part in unit.split(64)])

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """uint8 pictures on the CPU.

        Raises:
            UserError: some number is not finite.
        """
        bad = int((~torch.isfinite(latents_NCHW)).flatten(1).any(1).sum())
        if bad:
            raise UserError(f"{bad} of {len(latents_NCHW)} latents are not finite; try --clip 4 or less guidance")
        if self.vae is None:
            return to_uint8(latents_NCHW).cpu()
        shift, scale = self._scale
        parts = [self.vae.decode(part / scale + shift).sample for part in latents_NCHW.float().split(64)]
        return to_uint8(torch.cat(parts)).cpu()


def open_pictures(config: LightgenConfig, part: Part) -> Captioned:
    """What the `data` options describe, framed to the largest size; train and test share no picture.

    Raises:
        UserError: an option or a file of the user's is wrong.
    """
    data, size = config.data, config.stages.sizes[-1]
    limit = data.images if part == "train" else 6 * config.evaluation.per_task
    if data.name == "shapes":
        return scenes(part, limit, size, data.world)
    if data.name == "teacher":
        return folder_pictures(str(distilled(config)), size, config.seed)
    if data.name == "emoji":
        return emoji_pictures(part, size, limit)
    if data.path is None:
        raise UserError("--data.name folder needs --data.path: an image folder with captions, or a table with pictures")
    return folder_pictures(data.path, size, config.seed, part, limit, (data.image_column, data.text_column))


def scenes(part: Part, count: int, size: int, world: str, seed: int = 0) -> Captioned:
    """Rendered scenes with their captions."""
    drawn = Shapes(part, count, size, seed=seed, **WORLDS[world])
    pixels = torch.from_numpy(np.ascontiguousarray(drawn.images))
    return Captioned(list(drawn.captions), lambda rows: pixels[rows], f"shapes-{part}-{count}-{size}-{world}-{seed}")


def emoji_pictures(part: Part, size: int, limit: int) -> Captioned:
    """Captioned artwork."""
    from common.data.emoji import EmojiCap

    emoji = EmojiCap(part, size=size)
    items = [emoji[i] for i in range(min(len(emoji), limit or len(emoji)))]
    pixels = torch.stack([item["image"] for item in items])
    captions = [item["caption"] for item in items]
    return Captioned(captions, lambda rows: pixels[rows], fingerprint_strings([f"emoji-{size}", *captions]))


def folder_pictures(
    path: str,
    size: int,
    seed: int,
    part: Part | None = None,
    limit: int = 0,
    columns: tuple[str | None, str | None] = (None, None),
) -> Captioned:
    """The user's pictures; `part` None takes all of them."""
    from common.data.folders import Framing, Images, need_words, open_source

    source = open_source(path, image=columns[0], text=columns[1])
    chosen = list(range(len(source)))
    if part is not None:
        rows, held_out = hold_out(source)
        if not held_out:
            raise UserError(f"--data.path {path}: {len(source)} pictures are too few; expected {FEWEST_IMAGES} or more")
        chosen = (rows if part == "train" else held_out)[: limit or None]
    need_words(source, chosen)
    images = Images(source, Framing(size), seed).part(chosen)
    return Captioned(
        images.captions(), lambda rows: torch.stack([images[row]["image"] for row in rows]), images.fingerprint
    )


def captions_to_draw(data: DataConfig, part: Part = "train") -> list[str]:
    """The captions that a teacher draws, or those held out."""
    if data.captions == "shapes":
        return list(Shapes(part, data.images, 32, **WORLDS[data.world]).captions)
    found = prompt_list(data.captions, data.images, part)
    return [found[i % len(found)] for i in range(data.images)] if part == "train" else found


def distilled(config: LightgenConfig) -> Path:
    """The set that a run's teacher draws, in the cache: runs with equal teacher, captions and seed share it."""
    data = config.data
    cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    teacher = Teacher.load(config.teacher, "cpu" if cpu else "cuda")
    draw, identity = unet_teacher(teacher, data.teacher_steps, data.teacher_guidance, config.seed)
    captions = captions_to_draw(data)
    key = fingerprint_strings([json.dumps(identity, sort_keys=True), *captions])[:16]
    return distil(draw, identity, captions, cache_dir("lightgen", "distilled", key), config.trainer.progress)


def given_pictures(config: LightgenConfig, pictures: Captioned, count: int) -> Captioned:
    """Real pictures with their captions, the winners of preferences: fresh scenes, else those of the set."""
    if is_shapes(config.data):
        return scenes("train", count, config.stages.sizes[-1], config.data.world, GIVEN_SEED)
    return Captioned(pictures.captions[:count], pictures.images, f"{pictures.fingerprint}-{count}")


def is_shapes(data: DataConfig) -> bool:
    """Whether captions describe scenes, so that pictures can be checked."""
    return data.name == "shapes" or (data.name == "teacher" and data.captions == "shapes")


def evaluation_prompts(config: LightgenConfig) -> tuple[list[str], list[Spec] | None, Tensor | None]:
    """(held-out prompts, what their pictures must show or None, held-out pictures or None)."""
    if is_shapes(config.data):
        specs = prompts(config.evaluation.per_task, "test", **WORLDS[config.data.world])
        return [spec.caption for spec in specs], specs, None
    count = 6 * config.evaluation.per_task
    if config.data.name == "teacher":
        return captions_to_draw(config.data, "test")[:count], None, None
    held_out = open_pictures(config, "test")
    return held_out.captions, None, held_out.images(list(range(len(held_out))))


def latents(pictures: Captioned, size: int, autoencoder: Autoencoder, flip: bool, progress: bool = True) -> Table:
    """Latents at a size, beside them those of the mirrored pictures, with their captions' numbers.

    Columns: latent [N, 1 or 2, C, H, W], prompt [N]. Encoded once and kept, by autoencoder, pictures, size and flip.
    """
    encoder = autoencoder.fingerprint

    def encode(rows: list[int]) -> dict[str, Tensor]:
        images = resize_uint8(pictures.images(rows), size)
        both = [images, images.flip(-1)] if flip else [images]
        return {"latent": torch.stack([autoencoder.encode(view).cpu() for view in both], dim=1)}

    data = fingerprint_strings([pictures.fingerprint, f"{size}", f"flip {flip}"])
    folder = cache_dir("lightgen", "latents", fingerprint_strings([encoder, data])[:16])
    count = len(pictures)
    cache = FeatureCache.open_or_build(folder, count, encoder, data, encode, progress=progress)
    if cache[0]["latent"].nbytes * count <= IN_MEMORY:
        return TensorTable({"latent": cache[slice(None)]["latent"], "prompt": torch.arange(count)})
    return LazyTable(count, lambda i: {"latent": cache[i]["latent"], "prompt": torch.tensor(i)})
