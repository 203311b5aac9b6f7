"""What the frozen encoders make of a stage's pictures, computed once and kept on disk (appendix A.5).

Latents are kept as mean and standard deviation of the codec's posterior, so that every epoch draws fresh latents from
them; captions as token features in float16 with their mask.

Shape suffixes: N = pictures, n = pictures asked for, C latent channels, h w latent sides, L caption tokens, D width of
the text encoder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from common.data.cache import FeatureCache, fingerprint_files, fingerprint_strings
from common.errors import UserError
from common.files import read_object, replace_folder
from common.paths import cache_dir, existing_path
from common.pretrained import read_network
from common.teacher import decode_latents, to_uint8
from pixart.config import DataConfig
from pixart.data import Pictures
from pixart.text import TextEncoder

ENCODE_BATCH = 64
TEXT_SHARD, LATENT_SHARD = 512, 1024

Rows = Callable[[list[int]], dict[str, Tensor]]


class Codec:
    """A frozen diffusers AutoencoderKL: pictures to latents and back.

    Args:
        path: its directory (config.json and weights); a pipeline directory with `vae/` in it serves too.

    Attributes: `channels` of the latents, `factor` between picture and latent sides, `scaling_factor` that brings the
    latents to about unit variance.

    Raises:
        UserError: no such directory, or none that diffusers can read.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        from diffusers import AutoencoderKL

        folder = codec_folder(path)
        try:
            vae = read_network(AutoencoderKL, folder, torch_dtype=torch.float32)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"vae {path}: diffusers cannot read it ({str(error).splitlines()[0]})") from None
        self.folder, self.device = folder, torch.device(device)
        self._vae: Any = vae.eval().requires_grad_(False).to(self.device)
        config = vae.config
        self.channels = int(config.latent_channels)
        self.factor = codec_factor(path)
        self.scaling_factor = float(config.scaling_factor)

    @property
    def files(self) -> list[Path]:
        """Its configuration and weights."""
        return [p for p in sorted(self.folder.iterdir()) if p.suffix in (".json", ".safetensors", ".bin")]

    @property
    def fingerprint(self) -> str:
        """Checksum of configuration and weights."""
        return codec_fingerprint(self.folder)

    def save(self, folder: Path) -> None:
        """Copy its configuration and weights, all or none."""

        def fill(place: Path) -> None:
            for file in self.files:
                shutil.copyfile(file, place / file.name)

        if any(file.parent.resolve() != folder.resolve() for file in self.files):
            replace_folder(folder, fill)

    @torch.no_grad()
    def moments(self, images_n3HW: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, float32 [n, 2C, h, w], not scaled."""
        parts = []
        for images in images_n3HW.split(ENCODE_BATCH):
            posterior = self._vae.encode(images.to(self.device).float() / 127.5 - 1).latent_dist
            parts.append(torch.cat([posterior.mean, posterior.std], dim=1).float().cpu())
        return torch.cat(parts)

    def latents(self, moments_n2Chw: Tensor, noise_nChw: Tensor) -> Tensor:
        """A draw from the posterior, scaled: what the network learns on."""
        mean, std = moments_n2Chw.chunk(2, dim=1)
        return self.scaling_factor * (mean + std * noise_nChw)

    @torch.no_grad()
    def decode(self, z_nChw: Tensor) -> Tensor:
        """Scaled latents to uint8 pictures [n, 3, H, W]."""
        parts = (decode_latents(self._vae, z.to(self.device)) for z in z_nChw.split(ENCODE_BATCH))
        return torch.cat([to_uint8(images).cpu() for images in parts])


def codec_folder(path: str | Path) -> Path:
    """The AutoencoderKL directory itself, for one or for a pipeline with one; UserError where there is none."""
    given = existing_path(path)
    for folder in (given, given / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"vae {path}: expected a diffusers AutoencoderKL directory (config.json and weights)")


def codec_fingerprint(path: str | Path) -> str:
    """Checksum of the codec's configuration and weights, without loading them."""
    folder = codec_folder(path)
    return fingerprint_files([p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin")], folder)


def codec_factor(path: str | Path) -> int:
    """Between picture and latent sides, by the codec's config alone."""
    return 2 ** (len(read_object(codec_folder(path) / "config.json")["block_out_channels"]) - 1)


def edge_map(images_n3HW: Tensor) -> Tensor:
    """Edges as a picture, uint8 [n, 3, H, W]: the gradient's magnitude of the brightness (Sobel), 255 at its maximum.

    Stands in for the HED detector of appendix A.9, which is a network of its own.
    """
    grey_n1HW = images_n3HW.float().mean(1, keepdim=True)
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernel_211HW = torch.stack([across, across.T])[:, None].to(grey_n1HW)
    gradient = F.conv2d(F.pad(grey_n1HW, (1, 1, 1, 1), mode="replicate"), kernel_211HW)
    strength_n1HW = gradient.square().sum(1, keepdim=True).sqrt()
    peak = strength_n1HW.amax((1, 2, 3), keepdim=True).clamp(min=1.0)
    return (255 * strength_n1HW / peak).round().to(torch.uint8).expand(-1, 3, -1, -1)


class FeatureTable(Dataset[dict[str, Tensor]]):
    """A stage's training data as the network sees it, fetched a batch (of one bucket) at a time.

    A batch holds `moments` [n, 2C, h, w], `label` [n], `size` [n, 2] and `ratio` [n, 1] of micro-conditioning, with a
    text encoder `caption` [n, L, D] float16 and `mask` [n, L], with `edges` also `edges` [n, C, h, w] (unscaled mean).

    Args:
        latents: rows of one bucket -> features, for every bucket that has pictures.
        texts: numbers of different captions -> features; text_N: which caption each picture has.
    """

    def __init__(self, pictures: Pictures, latents: dict[int, Rows], texts: Rows | None, text_N: Tensor | None) -> None:
        self.bucket_N = pictures.bucket_N
        self.labels_N = pictures.labels_N
        self.size_N2 = pictures.originals_N2.float()
        self.ratio_N = pictures.ratios_N.float()
        self.latents, self.texts, self.text_N = latents, texts, text_N
        self.row_N = torch.zeros(len(pictures), dtype=torch.long)
        for bucket in latents:
            members = torch.tensor(pictures.members(bucket))
            self.row_N[members] = torch.arange(len(members))

    def __len__(self) -> int:
        return len(self.bucket_N)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices)
        bucket = int(self.bucket_N[chosen[0]])
        batch = dict(self.latents[bucket](self.row_N[chosen].tolist()))
        batch["label"] = self.labels_N[chosen]
        batch["size"] = self.size_N2[chosen]
        batch["ratio"] = self.ratio_N[chosen, None]
        if self.texts is not None:
            assert self.text_N is not None
            batch |= self.texts(self.text_N[chosen].tolist())
        return batch


def caption_rows(captions: Sequence[str], encoder: TextEncoder) -> Rows:
    """Numbers of captions -> token features [n, L, D] in float16 and their mask."""

    def encode(rows: list[int]) -> dict[str, Tensor]:
        features_nLD, mask_nL = encoder.encode([captions[i] for i in rows])
        return {"caption": features_nLD.to(torch.float16), "mask": mask_nL.bool()}

    return encode


def latent_rows(pictures: Pictures, bucket: int, codec: Codec, edges: bool) -> Rows:
    """Positions among a bucket's pictures -> moments of their latents, with `edges` also the edge map's latents."""
    members = pictures.members(bucket)

    def encode(rows: list[int]) -> dict[str, Tensor]:
        images = pictures.images([members[i] for i in rows])
        found = {"moments": codec.moments(images)}
        if edges:
            found["edges"] = codec.moments(edge_map(images)).chunk(2, dim=1)[0].contiguous()
        return found

    return encode


def open_features(
    pictures: Pictures,
    codec: Codec,
    encoder: TextEncoder | None,
    config: DataConfig,
    edges: bool = False,
    progress: bool = True,
) -> FeatureTable:
    """The feature table of some pictures: from the cache (made first where it is missing), or encoded in every step.

    Args:
        encoder: of the captions; None leaves them out (stage 1).
        edges: also keep latents of the edge maps (ControlNet).

    Raises:
        UserError: the cache in `config.cache_dir` was made from other pictures or by other encoders.
    """
    latents: dict[int, Rows] = {}
    for bucket in sorted(set(pictures.bucket_N.tolist())):
        compute = latent_rows(pictures, bucket, codec, edges)
        if config.cache:
            size = pictures.buckets[bucket]
            kind = f"latents{'-edges' if edges else ''}-{size.height}x{size.width}"
            count = len(pictures.members(bucket))
            compute = _cached(kind, count, codec.fingerprint, pictures.fingerprint, compute, config, progress)
        latents[bucket] = compute
    if encoder is None:
        return FeatureTable(pictures, latents, None, None)
    different = list(dict.fromkeys(pictures.captions))
    encoder.say_lost(different)
    number = {caption: i for i, caption in enumerate(different)}
    texts = caption_rows(different, encoder)
    if config.cache:
        data = fingerprint_strings(different)
        texts = _cached("captions", len(different), encoder.fingerprint, data, texts, config, progress)
    text_N = torch.tensor([number[caption] for caption in pictures.captions])
    return FeatureTable(pictures, latents, texts, text_N)


def _cached(kind: str, count: int, encoder: str, data: str, compute: Rows, config: DataConfig, progress: bool) -> Rows:
    if config.cache_dir is not None:
        folder = Path(config.cache_dir) / kind
    else:
        folder = cache_dir("pixart") / f"{kind}-{fingerprint_strings([json.dumps([count, encoder, data])])[:16]}"
    size = TEXT_SHARD if kind == "captions" else LATENT_SHARD
    cache = FeatureCache.open_or_build(folder, count, encoder, data, compute, shard_size=size, progress=progress)
    return lambda rows: cache[rows]
