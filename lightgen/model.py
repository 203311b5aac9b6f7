"""The masked autoregressive network: encoder over known tokens, decoder over all positions, cross stage to the text.

Beside it its class-conditional ancestor MAR, whose published weights it reads.

Shape suffixes: B batch, C latent channels, H, W sides of the latent, N tokens of a picture, K known and M masked ones,
P numbers of a token, D width, L text tokens, E width of the text encoder, A heads, V width of a head, G table entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.kernels.attention import attention
from common.kernels.products import Linear
from lightgen.config import NetworkConfig
from lightgen.head import DiffusionHead, RegressionHead

EPS = 1e-6
OFFSET = 0.1  # of DINO's resizing of positions, which keeps the table at its own size exactly
Grid = tuple[int, int]
KeysValues = tuple[Tensor, Tensor]


def patchify(latent_BCHW: Tensor, patch: int) -> Tensor:
    """Tokens [B, N, P] row by row; the numbers of a token in the order (channel, row, column)."""
    return F.unfold(latent_BCHW, patch, stride=patch).transpose(1, 2)


def unpatchify(tokens_BNP: Tensor, grid: Grid, patch: int) -> Tensor:
    """Latents [B, C, H, W] of tokens."""
    side = (grid[0] * patch, grid[1] * patch)
    return F.fold(tokens_BNP.transpose(1, 2), side, patch, stride=patch)


def resized_positions(table_1GD: Tensor, grid: Grid, offset: float = OFFSET, turned: bool = False) -> Tensor:
    """A square position table for another grid (rows, columns) [1, N, D], bicubic with DINO's offset (section 4.1).

    An offset of 0 resizes to the grid itself; `turned` hands over (columns, rows) as the released code does.

    The released code hands (columns, rows) to an interpolation that wants (rows, columns); here they are the right way
    round, which differs for pictures that are not square only.
    """
    side = math.isqrt(table_1GD.shape[1])
    if grid == (side, side):
        return table_1GD
    grid = grid[::-1] if turned else grid
    square = table_1GD.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        scale = [(length + offset) / side for length in grid]
        found = F.interpolate(square, scale_factor=scale, mode="bicubic")
    else:
        found = F.interpolate(square, size=grid, mode="bicubic")
    return found.flatten(2).transpose(1, 2).to(table_1GD.dtype)


def known_positions(masked_BN: Tensor) -> Tensor:
    """Positions [B, K] that are not masked, in raster order; every sample has as many."""
    batch, count = masked_BN.shape
    return (~masked_BN).nonzero()[:, 1].view(batch, count - int(masked_BN[0].sum()))


def gathered(x_BND: Tensor, at_BM: Tensor) -> Tensor:
    """Rows [B, M, D] of each sample; one sample stands for all where there is one."""
    if len(x_BND) == 1:
        return x_BND[0][at_BM]
    return x_BND.gather(1, at_BM[:, :, None].expand(-1, -1, x_BND.shape[2]))


class SelfAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Of no tokens there is nothing to attend to; the weights stay part of the graph, as other processes expect.
        out_BANV = attention(q, k, v, mask, dropout=self.dropout if self.training else 0.0) if len(x_BND[0]) else v
        return F.dropout(self.proj(out_BANV.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = Linear(width, hidden), Linear(hidden, width), dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float = 0.0, eps: float = EPS) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = SelfAttention(width, heads, dropout)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), mask)
        return x_BND + self.mlp(self.norm2(x_BND))


class CrossAttention(nn.Module):
    """Queries of the picture, keys and values of the text; `kv` holds the keys first."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_linear = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def keys_values(self, text_BLD: Tensor) -> KeysValues:
        k, v = self.kv(text_BLD).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x_BMD: Tensor, keys_values: KeysValues) -> Tensor:
        q_BAMV = self.query_linear(x_BMD).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out_BAMV = attention(q_BAMV, *keys_values, dropout=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(out_BAMV.transpose(1, 2).flatten(2)), self.dropout, self.training)


class CrossBlock(nn.Module):
    """Cross-attention and MLP, no self-attention: every position stands alone.

    The attention's residual goes onto the normalised query, as in the released code, whose weights hang on it.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float = 0.0, eps: float = EPS) -> None:
        super().__init__()
        self.normq, self.normkv, self.norm2 = (nn.LayerNorm(width, eps) for _ in range(3))
        self.attn = CrossAttention(width, heads, dropout)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def keys_values(self, text_BLD: Tensor) -> KeysValues:
        """They do not depend on the picture: made once for all iterations."""
        return self.attn.keys_values(self.normkv(text_BLD))

    def forward(self, x_BMD: Tensor, keys_values: KeysValues) -> Tensor:
        query_BMD = self.normq(x_BMD)
        x_BMD = query_BMD + self.attn(query_BMD, keys_values)
        return x_BMD + self.mlp(self.norm2(x_BMD))


class TextAligner(nn.Module):
    """States of the frozen encoder to the network's width: Linear, GELU (tanh), Linear, ViT blocks, LayerNorm."""

    def __init__(
        self,
        text_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float = 0.0,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.first, self.second = Linear(text_width, width), Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropout, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, states_BLE: Tensor) -> Tensor:
        x_BLD = self.second(F.gelu(self.first(states_BLE), approximate="tanh"))
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)


class Fluid(nn.Module):
    """Tokens, some of them known, and text to a condition z for every token (Figure 2).

    Args:
        config: sizes.
        channels: of the latent.
        text_width: of the text encoder.
        recompute: the blocks' activations in the backward pass.
        eps, offset: of the norms, and of resized positions; the released ones.
        turned: positions of pictures that are not square as the released code has them.

    Raises:
        UserError: heads that do not divide the width.
    """

    head: DiffusionHead | RegressionHead

    def __init__(
        self,
        config: NetworkConfig,
        channels: int,
        text_width: int,
        recompute: bool = False,
        eps: float = EPS,
        offset: float = OFFSET,
        turned: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.offset, self.turned = config, recompute, offset, turned
        width, token = config.width, channels * config.patch**2
        for name in ("encoder_heads", "decoder_heads", "cross_heads"):
            if width % getattr(config, name):
                raise UserError(f"--network.{name} {getattr(config, name)} does not divide --network.width {width}")
        table, common = config.grid**2, (config.mlp_ratio, config.dropout, eps)
        self.token_in, self.token_norm = Linear(token, width), nn.LayerNorm(width, EPS)
        self.encoder_positions, self.decoder_positions, self.cross_positions = (
            nn.Parameter(torch.empty(1, table, width)) for _ in range(3)
        )
        self.encoder = nn.ModuleList(Block(width, config.encoder_heads, *common) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps)
        self.decoder_in, self.mask_token = Linear(width, width), nn.Parameter(torch.empty(1, 1, width))
        self.decoder = nn.ModuleList(Block(width, config.decoder_heads, *common) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps)
        self.text = TextAligner(text_width, width, config.text_depth, config.encoder_heads, *common)
        self.null_text = nn.Parameter(torch.empty(1, 1, width))
        self.cross_in = Linear(width, width)
        self.cross = nn.ModuleList(CrossBlock(width, config.cross_heads, *common) for _ in range(config.cross_depth))
        self.cross_norm = nn.LayerNorm(width, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in self.parameters(recurse=False):  # tables, mask token and null text
            nn.init.normal_(parameter, std=0.02)
        kind = DiffusionHead if config.head == "diffusion" else RegressionHead
        self.head = kind(token, width, config.head_width, config.head_depth)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, *more: Any) -> Tensor:
        for block in blocks:
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, *more, use_reentrant=False) if again else block(x, *more)
        return x

    def _positions(self, table_1GD: Tensor, grid: Grid) -> Tensor:
        return resized_positions(table_1GD, grid, self.offset, self.turned)

    def blocks(self) -> list[nn.Module]:
        """What is worth compiling; they see any number of known tokens."""
        head = self.head.blocks if isinstance(self.head, DiffusionHead) else ()
        return [*self.text.blocks, *self.encoder, *self.decoder, *self.cross, *head]

    def encode(self, tokens_BNP: Tensor, known_BK: Tensor, grid: Grid) -> Tensor:
        """Features [B, K, D] of the known tokens alone; positions come before the norm."""
        x_BKD = self.token_in(gathered(tokens_BNP, known_BK))
        x_BKD = self.token_norm(x_BKD + gathered(self._positions(self.encoder_positions, grid), known_BK))
        if known_BK.shape[1] or torch.is_grad_enabled():
            x_BKD = self._run(self.encoder, x_BKD)
        return self.encoder_norm(x_BKD)

    def decode(self, features_BKD: Tensor, known_BK: Tensor, grid: Grid) -> Tensor:
        """Features [B, N, D] of all positions, mask tokens where nothing is known."""
        batch, tokens = len(features_BKD), grid[0] * grid[1]
        x_BKD = self.decoder_in(features_BKD)
        x_BND = self.mask_token.to(x_BKD.dtype).expand(batch, tokens, -1)
        x_BND = x_BND.scatter(1, known_BK[:, :, None].expand_as(x_BKD), x_BKD)
        x_BND = self._run(self.decoder, x_BND + self._positions(self.decoder_positions, grid))
        return self.decoder_norm(x_BND)

    def null(self, batch: int, length: int) -> Tensor:
        """The learned null text [B, L, D], which takes the place of aligned text."""
        return self.null_text.expand(batch, length, -1)

    def dropped(self, text_BLD: Tensor, drop_B: Tensor) -> Tensor:
        """Text with some samples' replaced by the null text."""
        return torch.where(drop_B[:, None, None], self.null_text.to(text_BLD.dtype), text_BLD)

    def keys_values(self, text_BLD: Tensor) -> list[KeysValues]:
        """Of aligned text, for every cross block."""
        return [block.keys_values(text_BLD) for block in self.cross]  # type: ignore[operator]

    def conditions(self, x_BMD: Tensor, at_BM: Tensor, text: Tensor | Sequence[KeysValues], grid: Grid) -> Tensor:
        """z [B, M, D] of some positions: the cross stage looks at each position alone.

        Args:
            x_BMD: decoder features of these positions.
            text: aligned text [B, L, D], or what `keys_values` made of it.
        """
        x_BMD = self.cross_in(x_BMD) + gathered(self._positions(self.cross_positions, grid), at_BM)
        made = self.keys_values(text) if isinstance(text, Tensor) else text
        for block, keys_values in zip(self.cross, made, strict=True):
            x_BMD = self._run([block], x_BMD, keys_values)
        return self.cross_norm(x_BMD)

    def masked(self, tokens_BNP: Tensor, order_BN: Tensor, count: int, text_BLD: Tensor, grid: Grid) -> Tensor:
        """z [B, count, D] of the first `count` tokens of each sample's order, from all the others."""
        known_BK = order_BN[:, count:].sort(1)[0]
        x_BND = self.decode(self.encode(tokens_BNP, known_BK, grid), known_BK, grid)
        at_BM = order_BN[:, :count]
        return self.conditions(gathered(x_BND, at_BM), at_BM, text_BLD, grid)

    def causal(self, tokens_BNP: Tensor, text: Tensor | Sequence[KeysValues], grid: Grid) -> Tensor:
        """z [B, N, D] of every token from those before it, in raster order (Equation 3)."""
        count = tokens_BNP.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool, device=tokens_BNP.device).tril()
        x_BND = self.token_norm(self.token_in(tokens_BNP) + self._positions(self.encoder_positions, grid)[:, :count])
        x_BND = self.decoder_in(self.encoder_norm(self._run(self.encoder, x_BND, mask)))
        start = self.mask_token.to(x_BND.dtype).expand(len(x_BND), 1, -1)
        x_BND = torch.cat([start, x_BND[:, :-1]], dim=1) + self._positions(self.decoder_positions, grid)[:, :count]
        x_BND = self.decoder_norm(self._run(self.decoder, x_BND, mask))
        at_BN = torch.arange(count, device=x_BND.device).expand(len(x_BND), -1)
        return self.conditions(x_BND, at_BN, text, grid)


# Presets of the released code, and how its weights are named -----------------------------------------------------


def preset(name: str) -> NetworkConfig:
    """base, large (the released model) or huge.

    Raises:
        UserError: another name.
    """
    sizes = {"base": (768, 12, 12), "large": (1024, 16, 16), "huge": (1280, 20, 16)}
    if name not in sizes:
        raise UserError(f"preset {name!r}: expected {', '.join(sizes)}")
    width, depth, heads = sizes[name]
    return NetworkConfig(
        width=width,
        encoder_depth=depth,
        decoder_depth=depth,
        cross_depth=depth,
        encoder_heads=heads,
        decoder_heads=heads,
        cross_heads=heads,
    )


@dataclass(frozen=True)
class MarConfig:
    """Sizes of MAR; encoder and decoder may differ.

    Args:
        tokens: a side of the grid; buffer: class tokens in front; token: numbers of a token; classes: of the table.
    """

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mlp_ratio: float = 4.0
    tokens: int = 16
    token: int = 16
    buffer: int = 64
    classes: int = 1000
    head_width: int = 1024
    head_depth: int = 3
    dropout: float = 0.1


def mar_preset(name: str) -> MarConfig:
    """base, large or huge of the published MAR models, with their heads.

    Raises:
        UserError: another name.
    """
    sizes = {"base": (768, 12, 12, 6, 1024), "large": (1024, 16, 16, 8, 1280), "huge": (1280, 20, 16, 12, 1536)}
    if name not in sizes:
        raise UserError(f"preset {name!r}: expected {', '.join(sizes)}")
    width, depth, heads, head_depth, head_width = sizes[name]
    return MarConfig(width, depth, heads, width, depth, heads, head_width=head_width, head_depth=head_depth)


class Mar(nn.Module):
    """The ancestor: class tokens stand before the picture's in encoder and decoder; there is no cross stage."""

    def __init__(self, config: MarConfig, eps: float = EPS) -> None:
        super().__init__()
        self.config = config
        inner, outer, count = config.encoder_width, config.decoder_width, config.tokens**2
        common = (config.mlp_ratio, config.dropout, eps)
        self.classes = nn.Embedding(config.classes, inner)
        self.null_class = nn.Parameter(torch.empty(1, inner))
        self.token_in, self.token_norm = Linear(config.token, inner), nn.LayerNorm(inner, EPS)
        self.encoder_positions = nn.Parameter(torch.empty(1, count + config.buffer, inner))
        self.encoder = nn.ModuleList(Block(inner, config.encoder_heads, *common) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(inner, eps)
        self.decoder_in, self.mask_token = Linear(inner, outer), nn.Parameter(torch.empty(1, 1, outer))
        self.decoder_positions = nn.Parameter(torch.empty(1, count + config.buffer, outer))
        self.decoder = nn.ModuleList(Block(outer, config.decoder_heads, *common) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(outer, eps)
        self.head_positions = nn.Parameter(torch.empty(1, count, outer))
        self.head = DiffusionHead(config.token, outer, config.head_width, config.head_depth)
        for parameter in self.parameters(recurse=False):  # tables, mask token and null class
            nn.init.normal_(parameter, std=0.02)

    def encode(self, tokens_BNP: Tensor, known_BK: Tensor, class_BD: Tensor) -> Tensor:
        """Features [B, buffer + K, D] of the class tokens and the known ones."""
        buffer = self.config.buffer
        front_BSD = class_BD[:, None].expand(-1, buffer, -1) + self.encoder_positions[:, :buffer]
        x_BKD = self.token_in(gathered(tokens_BNP, known_BK)) + gathered(self.encoder_positions[:, buffer:], known_BK)
        x = self.token_norm(torch.cat([front_BSD, x_BKD], dim=1))
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def forward(self, tokens_BNP: Tensor, masked_BN: Tensor, labels_B: Tensor | None) -> Tensor:
        """z [B, N, D] of all tokens; labels None: the null class."""
        batch, count = masked_BN.shape
        class_BD = self.null_class.expand(batch, -1) if labels_B is None else self.classes(labels_B)
        known_BK = known_positions(masked_BN)
        buffer = self.config.buffer
        features = self.decoder_in(self.encode(tokens_BNP, known_BK, class_BD))
        x_BKD = features[:, buffer:]
        x_BND = self.mask_token.expand(batch, count, -1)
        x_BND = x_BND.scatter(1, known_BK[:, :, None].expand_as(x_BKD), x_BKD)
        x = torch.cat([features[:, :buffer], x_BND], dim=1) + self.decoder_positions
        for block in self.decoder:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.head_positions


# (beginning of an official name, of ours); inside ViT and cross blocks the names are the same.
_SHARED = (
    ("encoder_pos_embed_learned", "encoder_positions"),
    ("decoder_pos_embed_learned", "decoder_positions"),
    ("mask_token", "mask_token"),
    ("z_proj.", "token_in."),
    ("z_proj_ln.", "token_norm."),
    ("encoder_blocks.", "encoder."),
    ("encoder_norm.", "encoder_norm."),
    ("decoder_embed.", "decoder_in."),
    ("decoder_blocks.", "decoder."),
    ("decoder_norm.", "decoder_norm."),
    ("diffloss.net.", "head."),
)
_FLUID = (
    ("last_pos_embed_learned", "cross_positions"),
    ("last_embed.", "cross_in."),
    ("fake_latent", "null_text"),
    ("text_emb.", "text."),
    ("cross_attn_blocks.", "cross."),
    ("cross_norm.", "cross_norm."),
)
_MAR = (
    ("class_emb.", "classes."),
    ("fake_latent", "null_class"),
    ("diffusion_pos_embed_learned", "head_positions"),
)
NAMES = {"fluid": (*_SHARED, *_FLUID), "mar": (*_SHARED, *_MAR)}
# Inside the head and the text aligner.
HEAD_NAMES = (
    ("time_embed.mlp.", "time."),
    ("cond_embed.", "condition."),
    ("input_proj.", "input."),
    ("res_blocks.", "blocks."),
    (".in_ln.", ".norm."),
    ("final_layer.adaLN_modulation.1.", "final_modulation."),
    ("final_layer.linear.", "output."),
    (".adaLN_modulation.1.", ".modulation."),
)
TEXT_NAMES = (
    ("text_proj.linear_1.", "first."),
    ("text_proj.linear_2.", "second."),
    ("text_aligner_norm.", "norm."),
    ("text_aligner.", "blocks."),
)


def ours(name: str, kind: str = "fluid") -> str | None:
    """Our name of an official weight; None for a name that the official code does not have."""
    return _renamed(name, kind, 0)


def official(name: str, kind: str = "fluid") -> str | None:
    """The official name of a weight of ours."""
    return _renamed(name, kind, 1)


def _renamed(name: str, kind: str, side: int) -> str | None:
    for pair in NAMES[kind]:
        start, other = pair[side], pair[1 - side]
        if not (name.startswith(start) and (start.endswith(".") or name == start)):
            continue
        rest = name[len(start) :]
        inner = HEAD_NAMES if pair[1] == "head." else TEXT_NAMES if pair[1] == "text." else ()
        for part in inner:
            if part[side] in rest and (part[side].startswith(".") or rest.startswith(part[side])):
                rest = rest.replace(part[side], part[1 - side], 1)
        return other + rest
    return None
