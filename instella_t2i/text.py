"""Prompts to the features of every layer of a frozen causal language model, by any folder that transformers wrote.

Shape suffixes: B prompts, L tokens, S layers (one a block of the stream), F width, T tokens of all captions together, U
layers that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.cache import fingerprint_path
from common.data.text import say_lost, unknown_texts
from common.errors import UserError, first_line
from common.files import read_object
from common.pretrained import from_folder, read_network, refuse_code
from common.processes import say_once
from instella_t2i.config import TextConfig
from instella_t2i.generators import Text, layers_read

BATCH = 64  # prompts that are encoded at once
WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model")


class CausalText:
    """A frozen language model.

    Args:
        blocks: of the stream that reads it; with another number of layers these are spread over the blocks.
        device: where it runs.

    Raises:
        UserError: the folder holds no causal language model.
    """

    def __init__(self, options: TextConfig, blocks: int, device: str | torch.device = "cpu") -> None:
        self.options, self.device, self.folder = options, torch.device(device), Path(options.encoder)
        about = self.folder / "config.json"
        if not about.is_file():
            raise UserError(
                f"--text.encoder {self.folder}: no config.json there; expected the folder of a causal language model"
            )
        self.config = read_object(about)
        names = [str(name) for name in self.config.get("architectures") or []]
        if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
            raise UserError(
                f"--text.encoder {self.folder} holds {', '.join(names) or 'a network without a name'}; expected a "
                "causal language model (...ForCausalLM)"
            )
        refuse_code(self.folder)
        count = self.config.get("num_hidden_layers", self.config.get("n_layer"))
        width = self.config.get("hidden_size", self.config.get("n_embd"))
        if not isinstance(count, int) or not isinstance(width, int):
            raise UserError(f"{about}: num_hidden_layers or hidden_size is missing")
        self.width = width
        self.layers = [count - 1] * blocks if options.layers == "last" else list(layers_read(blocks, count))
        if options.layers == "each" and count != blocks:
            say_once(f"{self.folder} has {count} layers, the stream {blocks} blocks: they read layers {self.layers}")
        self._said = False

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, tokenizer and configuration, and of how they are read."""
        return f"{fingerprint_path(self.folder, WEIGHTS)} {self.limit} {self.options.layers}"

    @cached_property
    def limit(self) -> int:
        """Tokens of a prompt that are read."""
        most = self.config.get("max_position_embeddings", self.config.get("n_positions")) or self.options.length
        return min(self.options.length, int(most))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return from_folder(AutoTokenizer, self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.folder}: no tokenizer that transformers can read ({first_line(error)})") from error

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        try:
            model = read_network(AutoModel, self.folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{self.folder}: no weights that transformers can read ({first_line(error)})") from error
        return model.eval().requires_grad_(False).to(self.device)

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each prompt, cut at the end; the empty prompt may have none."""
        if not prompts:
            return []
        rows: list[list[int]] = self._tokenizer(list(prompts))["input_ids"]
        if not self._said:
            cut = [i for i, row in enumerate(rows) if len(row) > self.limit]
            unknown = unknown_texts(self._tokenizer, rows)
            self._said = bool(cut or unknown)
            say_lost("prompts", prompts, cut, f"cut to {self.limit} tokens")
            say_lost("prompts", prompts, unknown, "unknown to the tokenizer")
        return [row[: self.limit] for row in rows]

    @torch.no_grad()
    def features(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Features [n, U, F] of the n tokens of each row, for the layers that are read, in their order.

        Rows are padded on the right here, where a causal model does not see it: positions and results are those of the
        prompt alone.
        """
        kept = sorted(set(self.layers))
        found: list[Tensor] = [torch.zeros(0, len(kept), self.width)] * len(rows)
        order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            longest = max(len(rows[i]) for i in part)
            ids_BL = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in part], device=self.device)
            states = self._model(input_ids=ids_BL, output_hidden_states=True, use_cache=False).hidden_states[1:]
            states_BLUF = torch.stack([states[layer] for layer in kept], 2).float().cpu()
            for states_LUF, i in zip(states_BLUF, part):
                found[i] = states_LUF[: len(rows[i])].clone()
        return found

    def padded(self, rows: Sequence[Tensor]) -> Text:
        """Features [n, U, F] of some prompts as one batch, padded on the left; features of a pad are 0."""
        longest = max(len(row) for row in rows)
        features_BLUF = torch.zeros(len(rows), longest, len(set(self.layers)), self.width)
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            features_BLUF[i, longest - len(row) :] = row
            mask_BL[i, longest - len(row) :] = True
        return self.arranged(features_BLUF, mask_BL)

    def arranged(self, features_BLUF: Tensor, mask_BL: Tensor) -> Text:
        """The layers that are kept, given to the blocks that read them."""
        kept = sorted(set(self.layers))
        place = [kept.index(layer) for layer in self.layers]
        features_SBLF = features_BLUF.permute(2, 0, 1, 3)
        return Text(features_SBLF if place == [*range(len(kept))] else features_SBLF[place], mask_BL)

    def encode(self, prompts: Sequence[str]) -> Text:
        """A batch of prompts."""
        distinct = list(dict.fromkeys(prompts))
        found = dict(zip(distinct, self.features(self.tokens(distinct))))
        return self.padded([found[prompt] for prompt in prompts])


class FeatureTable:
    """Text of captions by their number, encoded once where memory allows it.

    Args:
        captions: number -1 stands for the empty one.
    """

    def __init__(self, reader: CausalText, captions: Sequence[str]) -> None:
        self.reader = reader
        distinct = list(dict.fromkeys([*captions, ""]))
        number = {caption: i for i, caption in enumerate(distinct)}
        self.number = torch.tensor([number[caption] for caption in [*captions, ""]])  # -1 is the last
        self.rows = reader.tokens(distinct)
        self.counts = torch.tensor([len(row) for row in self.rows])
        size = 4 * int(self.counts.sum()) * len(set(reader.layers)) * reader.width
        self.flat_TUF: Tensor | None = None
        if size <= reader.options.cache_gb * 2**30:
            self.flat_TUF = torch.cat(
                [*reader.features(self.rows), torch.zeros(1, len(set(reader.layers)), reader.width)]
            )
            self.first = self.counts.cumsum(0) - self.counts

    def __call__(self, ids_B: Tensor) -> Text:
        """The batch of these captions."""
        numbers_B = self.number[ids_B.cpu()]
        if self.flat_TUF is None:
            distinct, place_B = numbers_B.unique(return_inverse=True)
            found = self.reader.features([self.rows[i] for i in distinct.tolist()])
            return self.reader.padded([found[i] for i in place_B.tolist()])
        counts_B = self.counts[numbers_B]
        longest = int(counts_B.max())
        offset_BL = torch.arange(longest) - (longest - counts_B)[:, None]
        mask_BL = offset_BL >= 0
        rows_BL = torch.where(mask_BL, self.first[numbers_B][:, None] + offset_BL, len(self.flat_TUF) - 1)
        return self.reader.arranged(self.flat_TUF[rows_BL], mask_BL)
