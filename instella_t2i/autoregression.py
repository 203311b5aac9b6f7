"""Autoregression over binary vectors: token by token, the bits of a token independent of each other given what came
before.

Shape suffixes: B batch, K tokens, D bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from instella_t2i.diffusion import draw, guided
from instella_t2i.generators import Autoregressor, Cache, Memory


def autoregression_loss(logits_BKD: Tensor, code_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """(binary cross-entropy, share of bits on the right side), means over everything, in float32."""
    logits_BKD = logits_BKD.float()
    accuracy = ((logits_BKD > 0) == (code_BKD > 0.5)).float().mean()
    return F.binary_cross_entropy_with_logits(logits_BKD, code_BKD), accuracy


@torch.no_grad()
def sample(
    model: Autoregressor,
    memory: Memory,
    uniform_BKD: Tensor,
    *,
    w: float,
    temperature: float = 1.0,
    cached: bool = True,
    trace: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Codes [B, K, D].

    Args:
        memory: of the text of rows [conditional; unconditional], 2 B.
        w, temperature: see `diffusion.guided`; temperature 0 takes the likelier bit.
        cached: keep keys and values; without it every token takes a whole pass, with the same result.
        trace: called with each token's logits [2 B, D].
    """
    batch, tokens, _ = uniform_BKD.shape
    cache = Cache(model, memory) if cached else None
    codes = uniform_BKD.new_empty(batch, 0, uniform_BKD.shape[2])
    for i in range(tokens):
        both = torch.cat([codes, codes])
        if cache is None:
            logits = model(both, memory)[:, -1]
        else:
            logits = cache.step(both[:, -1] if i else None)
        if trace is not None:
            trace(logits)
        bits_BD = draw(guided(logits, w, temperature), uniform_BKD[:, i])
        codes = torch.cat([codes, bits_BD[:, None]], 1)
    return codes
