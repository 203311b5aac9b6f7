"""A teacher of a few thousand random weights and a run on it that takes seconds: what the trainer's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.training import read_logs
from tests.drills import words

CONFIG = """
pairs: {prompts: PROMPTS, count: 24, solver: DDIMScheduler, steps: 3, guidance: 2.0, batch_size: 8, shard_size: 8}
reflow: {steps: 6, batch_size: 8, lr: 1.0e-3}
distil: {pairs: 16, teacher_steps: 3, alpha: 1.5, steps: 6, batch_size: 8, lr: 1.0e-3}
perceptual: {steps: 4, batch_size: 4, lr: 1.0e-3}
optimiser: {warmup: 2, ema_decay: 0.9}
trainer: {precision: 32-true, accelerator: cpu, checkpoint_every: 2, sample_every: 0, log_every: 1, progress: false}
evaluation: {images: 12, grid: 4, batch_size: 8}
stages: [pairs, reflow, distil, perceptual]
"""
WORDS = ["a", "red", "blue", "green", "star", "ring", "cross", "heart", "two", "three", "of", "left", "right", "above"]
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "ring", "cross", "heart")]
STAGES = ("reflow_1", "distil", "perceptual")


def write_teacher(folder: Path, prediction_type: str = "epsilon", seed: int = 0, latents: int = 4) -> Path:
    """A random Stable Diffusion directory: 4x8x8 latents, 16x16 images, a two-layer BERT and its tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=latents,
            out_channels=latents,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=latents,
            norm_num_groups=4,
            sample_size=16,
        )
        text_encoder = BertModel(
            BertConfig(
                vocab_size=len(WORDS) + 4,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=8,
            )
        )
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def arguments(folder: Path, teacher: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG.replace("PROMPTS", str(prompts)))
    return ["--config", str(config), "--teacher", str(teacher), "--run_dir", str(folder), *words(**options)]


def train(folder: Path, teacher: Path, **options: Any) -> Path:
    """One start of the trainer."""
    from instaflow.train import main

    main(arguments(folder, teacher, **options))
    return folder


def losses(folder: Path, stage: str) -> dict[int, float]:
    """Loss by step over all starts of a stage."""
    return read_logs(folder / stage).get("train/loss", {})
