"""States of the frozen text encoder, padded to one length; padding is read like text, as in the released code.

Shape suffixes: B batch, L text tokens, E width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.data.cache import FeatureCache, fingerprint_strings
from common.data.text import TextEncoder
from common.paths import cache_dir
from lightgen.config import TextConfig

IN_MEMORY = 2**28  # bytes of states that are held for prompts; older ones make room


class TextStates:
    """Captions to states, each distinct caption encoded once.

    Raises:
        UserError: no encoder there, or one that does not read so many tokens.
    """

    def __init__(self, config: TextConfig, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.encoder = TextEncoder(config.encoder, device)
        self.device = torch.device(device)
        self._known: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def fingerprint(self) -> str:
        """Of the encoder and the length."""
        return fingerprint_strings([self.encoder.fingerprint, f"whole, {self.config.length} tokens"])

    def check(self) -> None:
        """Refuse, before any work, a length that the encoder does not read."""
        self.encoder.encode([], self.config.length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, L, E] float32 on the device."""
        wanted = list(dict.fromkeys(texts))
        if missing := [text for text in wanted if text not in self._known]:
            if (len(self._known) + len(missing)) * self.config.length * self.width * 4 > IN_MEMORY:
                self._known = {text: self._known[text] for text in wanted if text in self._known}
            self._known.update(zip(missing, self._encoded(missing), strict=True))
        return torch.stack([self._known[text] for text in texts]).to(self.device)

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.encode(texts, self.config.length, whole=True)[0].float()

    def cached(self, captions: Sequence[str], progress: bool = True) -> Callable[[Tensor], Tensor]:
        """Caption numbers [B] to states [B, L, E]; made once, in half precision, and kept in the cache."""
        distinct = sorted(set(captions))
        row = {caption: number for number, caption in enumerate(distinct)}
        row_of = torch.tensor([row[caption] for caption in captions])
        data = fingerprint_strings(distinct)
        folder = cache_dir("lightgen", "text", fingerprint_strings([self.fingerprint, data])[:16])
        cache = FeatureCache.open_or_build(
            folder,
            len(distinct),
            self.fingerprint,
            data,
            lambda rows: {"states": self._encoded([distinct[i] for i in rows]).half()},
            progress=progress,
        )
        return lambda ids_B: cache[row_of[ids_B.cpu()]]["states"].float().to(ids_B.device)
