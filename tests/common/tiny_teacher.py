"""A teacher of a few thousand random weights with every part that a real one has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from common.teacher import Teacher
from tests.word_tokenizer import word_tokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] a the red blue green star ring cross heart two three of left right above and"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@lru_cache
def _modules(seed: int = 11) -> tuple[Any, Any, Any, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.4,
        )
        text_encoder = BertModel(
            BertConfig(
                vocab_size=len(WORDS.split()),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=6,
            )
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = word_tokenizer(WORDS, "[CLS] $A [SEP]", model_max_length=6, **special)
    return unet, vae, text_encoder, tokenizer


def tiny_teacher(prediction_type: str = "epsilon", **scheduler: Any) -> Teacher:
    """Weights are shared between calls and frozen; copy before changing them."""
    return Teacher(*_modules(), {**SCHEDULER, "prediction_type": prediction_type, **scheduler})


def save_teacher(
    folder: Path, prediction_type: str = "epsilon", scheduler: str = "DDIMScheduler", seed: int = 11
) -> Path:
    """The tiny teacher (or another one, of other weights) as stock diffusers saves it."""
    import diffusers

    unet, vae, text_encoder, tokenizer = _modules(seed)
    options = {key: value for key, value in SCHEDULER.items() if key != "_class_name"}
    parts = getattr(diffusers, scheduler).from_config({**options, "prediction_type": prediction_type})
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=parts,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
