"""The networks of Stable Diffusion 1.x with random weights, for plans and benchmarks."""

from __future__ import annotations

from typing import Any


def stable_diffusion_unet(**options: Any) -> Any:
    """The U-Net of Stable Diffusion 1.x (859,520,964 parameters), or with other options of diffusers.

    Build it under `torch.device("meta")` to count.
    """
    from diffusers import UNet2DConditionModel

    published: dict[str, Any] = dict(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    )
    return UNet2DConditionModel(**{**published, **options})


def stable_diffusion_vae() -> Any:
    """The autoencoder of Stable Diffusion 1.x."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
        scaling_factor=0.18215,
    )
