"""The first stage of a run (section 3.1): built as its options say, read from a file, and what it keeps of images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.images import to_uint8, to_unit
from common.training import load_checkpoint
from common.weights import check_weights, read_weights
from ldm.autoencoder import AutoencoderKL, FirstStage, IdentityFirstStage, VQModel
from ldm.config import FirstStageConfig


def build_first_stage(config: FirstStageConfig, size: int, channels: int = 3) -> FirstStage:
    """The autoencoder that the config describes (untrained)."""
    if config.kind == "pixels":
        return IdentityFirstStage(channels)
    network = AutoencoderKL if config.kind == "kl" else VQModel
    return network(config, size, in_channels=channels, out_channels=channels)


def load_first_stage(
    path: Path, config: FirstStageConfig, size: int, option: str = "first_stage.weights"
) -> FirstStage:
    """Weights from .safetensors or .ckpt in the authors' names, or from a diffusers `vae/` directory."""
    if path.is_dir():
        from ldm.convert import autoencoder_from_diffusers_dir

        return autoencoder_from_diffusers_dir(path)
    model = build_first_stage(config, size)
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file or directory")
    if path.suffix == ".safetensors":
        state, _ = read_weights(path, option)
    else:
        state = load_checkpoint(path)
    tensors: dict[str, Tensor] = state.get("state_dict", state)  # type: ignore[assignment]
    state = {k: v for k, v in tensors.items() if not k.startswith("loss.")}
    check_weights(state, model.state_dict(), f"{option} {path}", "the first_stage options")
    model.load_state_dict(state)
    return model


def freeze(model: FirstStage) -> FirstStage:
    return model.eval().requires_grad_(False)  # type: ignore[return-value]


@torch.no_grad()
def reconstruct(model: FirstStage, images_uint8: Tensor, batch_size: int = 100) -> Tensor:
    """Encode and decode uint8 images [N, 3, H, W]; deterministic (posterior mean)."""
    parts = []
    for x in images_uint8.split(batch_size):
        moments = model.moments(to_unit(x))
        mean = moments.chunk(2, dim=1)[0] if isinstance(model, AutoencoderKL) else moments
        parts.append(to_uint8(model.decode_latent(mean)))
    return torch.cat(parts)
