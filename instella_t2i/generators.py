"""The stream of image tokens that both generators share, the binary denoiser and the autoregressive model.

Block i of the stream reads layer i of a frozen language model: text tokens enter as further keys and values, they
neither attend nor change, so that they are read once for all evaluations (`read_text`). Parameters bear the names of
the released weights. Shape suffixes: B batch, K image tokens, n of them, D bits, E width, A heads, N their width, L
text tokens, S layers of text features, F their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.kernels.adaln_modulate import adaln_modulate, gated_residual
from common.kernels.attention import attention
from common.kernels.products import Linear
from common.recorded import Recorder
from instella_t2i.config import StreamConfig
from instella_t2i.tokenizer import RmsNorm

EPS = 1e-6  # of every norm


class Text(NamedTuple):
    """Features of prompts, padded on the left."""

    features_SBLF: Tensor  # one layer of the language model a block
    mask_BL: Tensor  # True where a token is

    def to(self, device: torch.device | str) -> Text:
        return Text(self.features_SBLF.to(device), self.mask_BL.to(device))


class Memory(NamedTuple):
    """Keys and values of text, block by block."""

    keys: list[tuple[Tensor, Tensor]]  # [B, A, L, N]
    mask_BL: Tensor | None  # None where all of them count

    def mask(self, image_nk: Tensor | None, queries: int, keys: int, like: Tensor) -> Tensor | None:
        """What n queries may see of L text and k image tokens, [B or 1, 1, n or 1, L + k]; None: everything."""
        if self.mask_BL is None and image_nk is None:
            return None
        length = self.keys[0][0].shape[2]
        if self.mask_BL is None:
            text = torch.ones(1, 1, 1, length, dtype=torch.bool, device=like.device)
        else:
            text = self.mask_BL[:, None, None]
        if image_nk is None:
            image = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=like.device)
        else:
            image = image_nk[None, None]
        rows = 1 if image_nk is None else queries
        return torch.cat([text.expand(-1, -1, rows, -1), image.expand(len(text), -1, rows, -1)], -1)


class CrossedAttention(nn.Module):
    """Queries of image tokens, keys and values of [text; image]; an RMS norm of every head's queries and keys."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(width, width, bias=False) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(head_dim), RmsNorm(head_dim)

    def _heads(self, x_BnE: Tensor) -> Tensor:
        return x_BnE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def key_value(self, x_BnE: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self._heads(self.k_proj(x_BnE))), self._heads(self.v_proj(x_BnE))

    def forward(self, x_BnE: Tensor, before: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Args:
        before: keys and values that stand before those of x.
        """
        key, value = self.key_value(x_BnE)
        return self.attend(x_BnE, torch.cat([before[0], key], 2), torch.cat([before[1], value], 2), mask)

    def attend(self, x_BnE: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q = self.norm_q(self._heads(self.q_proj(x_BnE)))
        return self.o_proj(attention(q, key, value, mask).transpose(1, 2).flatten(2))


class Projected(nn.Module):
    """GELU (tanh form) of a linear map; the released name of the layer is `proj`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class Mlp(nn.Module):
    """4 times as wide inside, with biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projected(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Modulation(nn.Module):
    """Linear(SiLU(t)), cut into parts."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear, self.parts = Linear(width, parts * width), parts

    def forward(self, t_BE: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(t_BE)).chunk(self.parts, -1)


class TimeEmbedding(nn.Module):
    """Two linear maps of the bare number t in [0, 1]; no sinusoids."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(1, width), Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t_B[:, None])))


class DiffusionBlock(nn.Module):
    """AdaLN-Zero form: (shift, scale, gate) of the attention, then of the MLP; the position table after the norm."""

    def __init__(self, config: StreamConfig, tokens: int, text_width: int) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens, width))
        self.norm1 = Modulation(width, 6)
        self.proj_cond = Linear(text_width, width)
        self.attn, self.ff = CrossedAttention(config.heads, config.head_dim), Mlp(width)

    def forward(self, x_BKE: Tensor, t_BE: Tensor, text: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(t_BE)
        normal_BKE = adaln_modulate(x_BKE, shift, scale, EPS) + self.pos_emb
        x_BKE = gated_residual(x_BKE, self.attn(normal_BKE, text, mask), gate)
        return gated_residual(x_BKE, self.ff(adaln_modulate(x_BKE, shift_mlp, scale_mlp, EPS)), gate_mlp)


class CausalBlock(nn.Module):
    """Pre-norm; the position table after the norm. Its last row is never used in training."""

    def __init__(self, config: StreamConfig, tokens: int, text_width: int) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens + 1, width))
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width), RmsNorm(width)
        self.proj_cond = Linear(text_width, width)
        self.attn, self.mlp = CrossedAttention(config.heads, config.head_dim), Mlp(width)

    def placed(self, x_BnE: Tensor, first: int) -> Tensor:
        """The normalised input of the attention of tokens `first`, ..."""
        return self.input_layernorm(x_BnE) + self.pos_emb[:, first : first + x_BnE.shape[1]]

    def forward(self, x_BnE: Tensor, text: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x_BnE = x_BnE + self.attn(self.placed(x_BnE, 0), text, mask)
        return x_BnE + self.mlp(self.post_attention_layernorm(x_BnE))


@dataclass(frozen=True)
class Shape:
    """What a generator has to fit: tokens and bits of the tokenizer, width of the text features."""

    tokens: int
    bits: int
    text_width: int


class Generator(nn.Module):
    """What both have: blocks, the map of a token's bits to the stream and back, text read block by block."""

    transformer_blocks: nn.ModuleList

    def __init__(self, config: StreamConfig, shape: Shape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.width = config.heads * config.head_dim
        self.x_embedder = Linear(shape.bits, self.width)
        self.proj_out = Linear(self.width, shape.bits)

    def start(self) -> None:
        """Xavier-uniform linear maps without biases, AdaLN's too; position tables are 0 (released code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def read_text(self, text: Text) -> Memory:
        """Keys and values of the text in every block.

        Raises:
            UserError: the features have another number of layers or another width.
        """
        layers, _, _, width = text.features_SBLF.shape
        if (layers, width) != (len(self.transformer_blocks), self.shape.text_width):
            raise UserError(
                f"text features of {layers} layers, {width} wide: this generator reads "
                f"{len(self.transformer_blocks)} layers, {self.shape.text_width} wide"
            )
        keys = []
        for block, features_BLF in zip(self.transformer_blocks, text.features_SBLF):
            assert isinstance(block, (DiffusionBlock, CausalBlock))
            keys.append(block.attn.key_value(block.proj_cond(features_BLF)))
        full = text.mask_BL.shape[1] == 0 or bool(text.mask_BL.all())
        return Memory(keys, None if full else text.mask_BL)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.config.recompute and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class Denoiser(Generator):
    """Noisy bits and t to a logit a bit; every image token sees all others and all text."""

    def __init__(self, config: StreamConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.time_embed = TimeEmbedding(self.width)
        self.transformer_blocks = nn.ModuleList(
            DiffusionBlock(config, shape.tokens, shape.text_width) for _ in range(config.layers)
        )
        self.norm_out = Modulation(self.width, 2)
        self.start()

    def forward(self, x_BKD: Tensor, t_B: Tensor, text: Text | Memory) -> Tensor:
        """Logits [B, K, D] of noisy bits (0 or 1) at t in [0, 1]."""
        memory = self.read_text(text) if isinstance(text, Text) else text
        device = x_BKD.device.type
        known = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if known else nullcontext():  # t has more digits than bf16
            t_BE = self.time_embed(t_B.double() if x_BKD.dtype == torch.float64 else t_B.float())
        x_BKE = self.x_embedder(x_BKD)
        mask = memory.mask(None, x_BKE.shape[1], x_BKE.shape[1], x_BKE)
        for block, keys in zip(self.transformer_blocks, memory.keys):
            x_BKE = self._run(block, x_BKE, t_BE, keys, mask)
        scale, shift = self.norm_out(t_BE)  # the other order than in the blocks
        return self.proj_out(adaln_modulate(x_BKE, shift, scale, EPS))


class Autoregressor(Generator):
    """Start token and the first n codes to logits of the first n + 1; a token sees all text and what came before."""

    def __init__(self, config: StreamConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.split_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.transformer_blocks = nn.ModuleList(
            CausalBlock(config, shape.tokens, shape.text_width) for _ in range(config.layers)
        )
        self.norm_out = RmsNorm(self.width)
        self.start()
        self.recorder = Recorder(self, _next_token)

    def forward(self, code_BnD: Tensor, text: Text | Memory) -> Tensor:
        """Logits [B, n + 1, D] after the start token and n codes."""
        memory = self.read_text(text) if isinstance(text, Text) else text
        x_BnE = self.x_embedder(code_BnD)
        x_BnE = torch.cat([self.split_token.expand(len(code_BnD), -1, -1).to(x_BnE.dtype), x_BnE], 1)
        count = x_BnE.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=x_BnE.device).tril()
        mask = memory.mask(causal, count, count, x_BnE)
        for block, keys in zip(self.transformer_blocks, memory.keys):
            x_BnE = self._run(block, x_BnE, keys, mask)
        return self.proj_out(self.norm_out(x_BnE))


class Cache:
    """Keys and values of text and of the tokens so far, for `step`: the same logits as a whole pass, token by token.

    Every step has the same shapes, places that are still empty masked, so that it is recorded once (`common.recorded`).
    """

    def __init__(self, model: Autoregressor, memory: Memory) -> None:
        self.model, self.count, tokens = model, 0, model.shape.tokens
        self.keys = [F.pad(x, (0, 0, 0, tokens)) for pair in memory.keys for x in pair]
        batch, self.length = self.keys[0].shape[0], memory.keys[0][0].shape[2]
        text_BL = memory.mask_BL
        if text_BL is None:
            text_BL = torch.ones(batch, self.length, dtype=torch.bool, device=self.keys[0].device)
        self.seen_B11S = F.pad(text_BL, (0, tokens))[:, None, None]

    def step(self, code_BD: Tensor | None) -> Tensor:
        """Logits [B, D] of the next token.

        Args:
            code_BD: the token before it; None at the start.
        """
        model = self.model
        x_BE = model.split_token[0].expand(len(self.keys[0]), -1) if code_BD is None else model.x_embedder(code_BD)
        place = torch.tensor([self.count, self.length + self.count], device=x_BE.device)
        self.seen_B11S[..., self.length + self.count] = True
        self.count += 1
        return model.recorder(x_BE.contiguous(), self.seen_B11S, place, *self.keys)


def _next_token(model: nn.Module, x_BE: Tensor, seen_B11S: Tensor, place: Tensor, *keys: Tensor) -> Tensor:
    """Logits [B, D] after one more token, whose keys and values are added to those of all blocks.

    Args:
        seen_B11S: which text and tokens it may look at, itself included.
        place: of the token among the tokens, and behind the text.
        keys: of every block keys and values [B, A, S, N].
    """
    assert isinstance(model, Autoregressor)
    token, column = place
    for block, key_BASN, value_BASN in zip(model.transformer_blocks, keys[::2], keys[1::2]):
        assert isinstance(block, CausalBlock)
        placed_B1E = (block.input_layernorm(x_BE) + block.pos_emb[0].index_select(0, token))[:, None]
        for kept, new in zip((key_BASN, value_BASN), block.attn.key_value(placed_B1E)):
            kept.index_copy_(2, column, new.to(kept.dtype))
        x_BE = x_BE + block.attn.attend(placed_B1E, key_BASN, value_BASN, seen_B11S)[:, 0]
        x_BE = x_BE + block.mlp(block.post_attention_layernorm(x_BE))
    return model.proj_out(model.norm_out(x_BE))


def make_generator(kind: str, config: StreamConfig, shape: Shape) -> Denoiser | Autoregressor:
    """`diffusion` or `autoregression`."""
    return Denoiser(config, shape) if kind == "diffusion" else Autoregressor(config, shape)


def layers_read(blocks: int, layers: int) -> Sequence[int]:
    """Which layer of a language model each block reads, from 0: its own where there are as many, else spread evenly,
    the last block the last layer."""
    return [-(-(i + 1) * layers // blocks) - 1 for i in range(blocks)]
