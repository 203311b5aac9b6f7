"""A fast tokenizer of whole words, for encoders of a few random weights."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: str, template: str = "", by_spaces: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of these words, numbered in their order; others are "[UNK]".

    Args:
        words: separated by spaces, special tokens among them.
        template: "[CLS] $A [SEP]": what is put around a text.
        by_spaces: keep punctuation with its word.
        options: of the tokenizer, `pad_token="[PAD]"` for example.
    """
    numbers = {word: i for i, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if by_spaces else pre_tokenizers.Whitespace()
    if template:
        special = [(word, numbers[word]) for word in template.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(template, None, special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
