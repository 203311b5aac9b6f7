"""A teacher of a few thousand random weights with every part that a real one has, and teachers whose flow is known."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.flow import NoiseSchedule, UNetFlow
from instaflow.teacher import Teacher

WORDS = ("a", "the", "red", "blue", "star", "ring", "of", "left", "two", "and")
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
def _modules() -> tuple[Any, Any, Any, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
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
                vocab_size=len(WORDS) + 4,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=6,
            )
        )
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=6,
    )
    return unet, vae, text_encoder, fast


def tiny_teacher(prediction_type: str = "epsilon", **scheduler: Any) -> Teacher:
    """Weights are shared between calls and frozen; copy before changing them."""
    return Teacher(*_modules(), {**SCHEDULER, "prediction_type": prediction_type, **scheduler})


def save_teacher(folder: Path, prediction_type: str = "epsilon", scheduler: str = "DDIMScheduler") -> Path:
    """The tiny teacher as stock diffusers saves it."""
    import diffusers

    unet, vae, text_encoder, tokenizer = _modules()
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


class GaussianNetwork(nn.Module):
    """The best possible diffusion network for data N(0, spread^2): its flow sends the noise z to spread * z."""

    def __init__(self, schedule: NoiseSchedule, spread: float) -> None:
        super().__init__()
        self.schedule, self.spread = schedule, spread
        self.unused = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=4, sample_size=2)

    def forward(self, x: Tensor, tau: Tensor, states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        # Between training steps log(alpha/sigma) is linear, as matched_time assumes.
        alpha2 = self.schedule.alphas_cumprod_T
        log_snr = 0.5 * (alpha2.log() - (1 - alpha2).log())
        low = tau.double().floor().long().clamp(max=len(alpha2) - 2)
        between = torch.lerp(log_snr[low], log_snr[low + 1], tau.double() - low)
        alpha = torch.sigmoid(2 * between).sqrt().float().view(-1, 1, 1, 1)
        sigma = torch.sigmoid(-2 * between).sqrt().float().view(-1, 1, 1, 1)
        # The input has unit variance only for unit-variance data: undo the flow's scaling to reach the true x_tau.
        x1 = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2) * x
        eps = sigma / (alpha**2 * self.spread**2 + sigma**2) * x
        kind = self.schedule.prediction_type
        return ({"epsilon": eps, "v_prediction": alpha * eps - sigma * x1, "sample": x1}[kind],)


def gaussian_flow(prediction_type: str, spread: float = 0.5) -> UNetFlow:
    from instaflow.teacher import read_schedule

    schedule = read_schedule({**SCHEDULER, "prediction_type": prediction_type})
    return UNetFlow(GaussianNetwork(schedule, spread), schedule)
