"""A causal language model of a few thousand random weights, as a transformers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import OlmoConfig, OlmoForCausalLM

from instella_t2i.language_model import learn_tokenizer

CAPTIONS = ["a red star", "a blue ring above a green cross", "two yellow hearts", "there is a small black square"]


def save_language_model(folder: Path, layers: int = 2, width: int = 16) -> Path:
    """Written once."""
    if not folder.is_dir():
        tokenizer = learn_tokenizer(CAPTIONS, 300)
        torch.manual_seed(0)
        config = OlmoConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
        OlmoForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
