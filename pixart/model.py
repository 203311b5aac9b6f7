"""The networks of PixArt-alpha: the text-conditional transformer, its multi-scale form, and the class-conditional DiT.

Source: arXiv 2310.00426, sections 2.2 and 2.3 and figure 4; PixArt-alpha/PixArt-alpha, diffusion/model/nets;
facebookresearch/DiT, models.py (stage 1).

Module and parameter names are those of the authors' code, so their checkpoints load without renaming.

Shape suffixes: B batch, C channels (of latents; caption channels after L), H W latent grid, N image tokens (row-major),
L caption tokens, P kept caption tokens of the whole batch, D width, A heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.cpu import few_sizes
from common.kernels.adaln_modulate import adaln_modulate, gated_residual
from common.kernels.attention import Form, attention
from common.kernels.products import Linear, linear
from pixart.config import PixArtConfig

FREQUENCIES = 256  # width of the sinusoidal features of times and sizes
NORM_EPS = 1e-6


def sinusoids(value_B: Tensor, dim: int = FREQUENCIES) -> Tensor:
    """[B] -> [B, dim]: cosines, then sines of value * 10000^(-i / (dim / 2)); values may be fractional."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=value_B.device))
    angles = value_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(dim: int, height: int, width: int, base: float, scale: float = 1.0) -> Tensor:
    """Fixed 2-d positions [height * width, dim] of a grid of tokens (row-major), float32.

    Row i of `height` rows has the coordinate i / (height / base) / scale, columns alike. The first half of the channels
    encodes the COLUMN, the second the row, each as sines, then cosines (the authors' get_2d_sincos_pos_embed).
    """
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(count: int) -> Tensor:
        # The coordinates are rounded to float32 as the authors' are; the rest is float64.
        coordinate = (torch.arange(count, dtype=torch.float32) / (count / base) / scale).double()
        angles = coordinate[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns = encode(width)[None].expand(height, width, -1)
    rows = encode(height)[:, None].expand(height, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, dim).float()


def attend(q_BNAK: Tensor, k_BLAK: Tensor, v_BLAK: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, heads joined: [B, N, D]; bias is 0 for kept keys and -inf for the others.

    float16 is computed in float32: products of q and k leave its range (the authors' `fp32_attention`).
    """
    form: Form | None = "fused_float32" if q_BNAK.dtype is torch.float16 else None
    q_BANK, k_BALK, v_BALK = (x.transpose(1, 2) for x in (q_BNAK, k_BLAK, v_BLAK))
    return attention(q_BANK, k_BALK, v_BALK, bias_B11L, form=form).transpose(1, 2).flatten(2)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens; a convolution in the checkpoint, computed as the linear layer it is."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        p = self.patch_size
        x = x_BCHW.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, (height // p) * (width // p), channels * p * p)
        return linear(x.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Scalar to vector: sinusoids, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(sinusoids(t_B).to(next(self.parameters()).dtype))


class SizeEmbedder(TimestepEmbedder):
    """Several scalars a sample, [B, n] -> [B, n * width]: heights and widths in pixels, or aspect ratios."""

    def forward(self, size_Bn: Tensor) -> Tensor:
        return super().forward(size_Bn.flatten()).reshape(len(size_Bn), -1)


MLP_ROWS = 512  # tokens whose hidden layer exists at a time where no gradient is needed


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.shape[:-1].numel() <= MLP_ROWS:
            return self._rows(x)
        # Nothing is kept for a backward pass: of the wide hidden layer a part at a time is enough.
        return torch.cat([self._rows(part) for part in x.flatten(0, -2).split(MLP_ROWS)]).view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Caption features to the width of the network; `y_embedding` stands for "no caption".

    `y_embedding` is saved and never optimised: the authors register it as a buffer.
    """

    y_embedding: Tensor

    def __init__(self, caption_channels: int, width: int, caption_tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, width, width)
        self.register_buffer("y_embedding", torch.randn(caption_tokens, caption_channels) / caption_channels**0.5)

    def drop(self, caption_BLC: Tensor, drop_B: Tensor) -> Tensor:
        """Replace the captions of the samples marked True by "no caption", token by token."""
        tokens = caption_BLC.shape[1]
        if tokens > len(self.y_embedding):
            raise ValueError(f"captions have {tokens} tokens, the null caption only {len(self.y_embedding)}")
        null_LC = self.y_embedding[:tokens].to(caption_BLC.dtype)
        return torch.where(drop_B.to(device=caption_BLC.device, dtype=torch.bool)[:, None, None], null_LC, caption_BLC)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption.to(self.y_proj.fc1.weight.dtype))


class SelfAttention(nn.Module):
    """Multi-head attention among the image tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BNAK, k_BNAK, v_BNAK = self.qkv(x_BND).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self.proj(attend(q_BNAK, k_BNAK, v_BNAK))


@dataclass
class CaptionContext:
    """Captions of a batch as the blocks need them: projected, without padding; made by `PixArt.encode_caption`.

    With `keys_values` (made when no gradient is needed) a sampler reuses the keys and values of every block in each of
    its steps.
    """

    tokens_PD: Tensor  # kept tokens of all samples, one after the other (some unused rows may follow)
    batch: int
    rows_BL: Tensor | None  # where a sample's tokens stand in tokens_PD, L >= the longest; None: all are equal
    bias_B11L: Tensor | None  # -inf where rows_BL is filled up, else 0
    pooled_BD: Tensor | None  # mean over the kept tokens, for adaLN a block
    keys_values: list[tuple[Tensor, Tensor]] | None = None  # a block: [B, L, A, K] each


def padded_rows(lengths: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(rows_BL, bias_B11L) of samples with so many tokens each; filled up with the sample's last token."""
    length_B1 = torch.tensor(lengths, device=device)[:, None]
    position_L = torch.arange(-(-max(lengths) // 8) * 8, device=device)
    rows_BL = length_B1.cumsum(0) - length_B1 + torch.minimum(position_L, length_B1 - 1)
    bias_BL = torch.zeros(rows_BL.shape, device=device).masked_fill_(position_L >= length_B1, -torch.inf)
    return rows_BL, bias_BL[:, None, None]


class CrossAttention(nn.Module):
    """Image tokens attend to the kept tokens of their own caption."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = Linear(width, width)
        self.kv_linear = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def keys_values(self, context: CaptionContext) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, A, K]; only kept tokens are multiplied."""
        kv_PE = self.kv_linear(context.tokens_PD)
        if context.rows_BL is None:
            kv_BLE = kv_PE.unflatten(0, (context.batch, -1))
        else:
            kv_BLE = F.embedding(context.rows_BL, kv_PE)
        k_BLAK, v_BLAK = kv_BLE.unflatten(2, (2, self.heads, -1)).unbind(2)
        return k_BLAK, v_BLAK

    def forward(self, x_BND: Tensor, context: CaptionContext, keys_values: tuple[Tensor, Tensor] | None) -> Tensor:
        q_BNAK = self.q_linear(x_BND).unflatten(2, (self.heads, -1))
        k_BLAK, v_BLAK = keys_values or self.keys_values(context)
        return self.proj(attend(q_BNAK, k_BLAK, v_BLAK, context.bias_B11L))


class PixArtBlock(nn.Module):
    """Self-attention and MLP under adaLN, cross-attention between them without norm, modulation or gate (figure 4)."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        if config.adaln == "single":
            self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)  # E_i
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> Sequence[Tensor]:
        """(shift, scale, gate) of the attention, then of the MLP, [B, D] each.

        condition: S [B, 6D] with adaLN-single (section 2.3: S^(i) = E_i + S), else time and text [B, D].
        """
        if hasattr(self, "adaLN_modulation"):
            return self.adaLN_modulation(condition).chunk(6, dim=1)
        return (self.scale_shift_table + condition.unflatten(1, (6, -1))).unbind(1)

    def forward(
        self,
        x_BND: Tensor,
        condition: Tensor,
        context: CaptionContext,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        x_BND = gated_residual(x_BND, self.attn(adaln_modulate(x_BND, shift1, scale1, NORM_EPS)), gate1)
        x_BND = x_BND + self.cross_attn(x_BND, context, keys_values)
        return gated_residual(x_BND, self.mlp(adaln_modulate(x_BND, shift2, scale2, NORM_EPS)), gate2)


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches. Its table is added to the embedded time itself, without SiLU."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width = config.width
        self.linear = Linear(width, config.patch_size**2 * config.out_channels)
        if config.adaln == "single" and not config.classes:
            self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)  # E_f
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        if hasattr(self, "adaLN_modulation"):
            shift, scale = self.adaLN_modulation(condition_BD).chunk(2, dim=1)
        else:
            shift, scale = (self.scale_shift_table + condition_BD[:, None]).unbind(1)
        return self.linear(adaln_modulate(x_BND, shift, scale, NORM_EPS))


def unpatchify(x_BNE: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Tokens of layout (p, p, C) back to a picture [B, C, rows * p, columns * p]."""
    batch, p = len(x_BNE), patch_size
    x = x_BNE.reshape(batch, rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, rows * p, columns * p)


def token_grid(x_BCHW: Tensor, config: PixArtConfig) -> tuple[int, int]:
    """Rows and columns of tokens that latents are cut into.

    Raises:
        ValueError: the latents have other channels than the network, or sides that are no multiples of the patch.
    """
    channels, height, width = x_BCHW.shape[1:]
    p = config.patch_size
    if channels != config.in_channels or height % p or width % p:
        raise ValueError(
            f"latents of shape {tuple(x_BCHW.shape)} given to a network for {config.in_channels} channels and sides "
            f"that are multiples of {p}"
        )
    return height // p, width // p


class Positions:
    """Position embeddings of the grids that were asked for last; the training grid's is the module's buffer."""

    def __init__(self, config: PixArtConfig) -> None:
        self.config = config
        self.kept: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """[1, rows * columns, D] on the device and in the dtype of `like`."""
        key = (rows, columns, like.device, like.dtype)
        if key not in self.kept:
            if len(self.kept) >= 64:  # more than the 40 buckets of one base size
                self.kept.clear()
            config = self.config
            made = position_embedding(config.width, rows, columns, config.base, config.interpolation_scale)
            self.kept[key] = made[None].to(like.device, like.dtype)
        return self.kept[key]


# Names (ends of names) of the linear layers that do not start Xavier-uniform (section 2.2 of DiT; PixArt.initialize).
NORMAL_LAYERS: tuple[str, ...] = ("t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "y_proj.fc1", "y_proj.fc2")
NORMAL_LAYERS += ("csize_embedder.mlp.0", "csize_embedder.mlp.2", "ar_embedder.mlp.0", "ar_embedder.mlp.2")
# Start of the embedders with embedder_init "unit": N(0, gain / sqrt(inputs)). N(0, 0.02) leaves a narrow network with
# caption tokens of size 0.02, so that a short run hears the text only after thousands of steps. The shared t_block
# keeps its own start: stage 2 begins with tables that were made for one time.
UNIT_GAINS = {"y_embedder.y_proj.fc1": 3.0}  # caption features have size 0.3
UNIT_GAIN = 1.5  # makes up for what a SiLU or GELU takes away
ZERO_LAYERS = ("cross_attn.proj", "final_layer.linear", "adaLN_modulation.1")


def initialise(net: nn.Module, embedders: Literal["official", "unit"] = "official") -> None:
    """The authors' initialisation of both networks: biases zero, embedders N(0, 0.02), branches that start at zero.

    `embedders="unit"` is ours, for narrow networks and short runs (`UNIT_GAINS`).

    DiT's adaLN MLPs start at zero (adaLN-zero); PixArt's tables do not, they keep randn / sqrt(D).
    """
    for name, part in net.named_modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, (nn.Linear, nn.Conv2d)):
            if name.endswith(ZERO_LAYERS):
                nn.init.zeros_(part.weight)
            elif name.endswith(NORMAL_LAYERS):
                std = 0.02
                if embedders == "unit" and not name.endswith("t_block.1"):
                    std = UNIT_GAINS.get(name, UNIT_GAIN) / math.sqrt(part.weight.shape[1])
                nn.init.normal_(part.weight, std=std)
            else:
                nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            assert part.bias is not None
            nn.init.zeros_(part.bias)


class LatentTransformer(nn.Module):
    """What both networks share: patches of latents of any grid as tokens with positions, blocks that may be recomputed.

    Positions of a grid other than the training one are computed by the same rule. `gradient_checkpointing = True`
    recomputes each block in the backward pass.
    """

    pos_embed: Tensor

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.positions = Positions(config)
        side = config.input_size // config.patch_size
        positions = position_embedding(config.width, side, side, config.base, config.interpolation_scale)[None]
        # Multi-scale checkpoints hold zeros under this name: their positions are made for the grid of each call.
        self.register_buffer("pos_embed", positions, persistent=not config.multi_scale)

    def embed_latents(self, x_BCHW: Tensor) -> Tensor:
        """Tokens with positions, [B, N, D]; residuals stay in float32 under autocast."""
        rows, columns = token_grid(x_BCHW, self.config)
        side = self.config.input_size // self.config.patch_size
        tokens_BND = self.x_embedder(x_BCHW)
        if rows == columns == side and not self.config.multi_scale:
            return tokens_BND + self.pos_embed
        return tokens_BND + self.positions(rows, columns, self.pos_embed)

    def recomputable(self, block: nn.Module, *given: Any) -> Tensor:
        """A block's tokens; its activations are not kept with `gradient_checkpointing`."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)
        return block(*given)


class PixArt(LatentTransformer):
    """The text-conditional transformer (section 2.3), also multi-scale and with the ablation's adaLN."""

    def __init__(self, config: PixArtConfig) -> None:
        if config.classes:
            raise ValueError(f"PixArt is conditioned on text: classes must be 0, got {config.classes} (use DiT)")
        super().__init__(config)
        self.has_null_caption = True  # False: `y_embedding` is not the one that these weights were trained with
        width = config.width
        if config.adaln == "single":
            self.t_block = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.caption_channels, width, config.caption_tokens)
        if config.multi_scale:
            self.csize_embedder = SizeEmbedder(width // 3)
            self.ar_embedder = SizeEmbedder(width // 3)
        self.blocks = nn.ModuleList(PixArtBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_load_state_dict_pre_hook(_forget_multi_scale_positions)
        initialise(self, config.embedder_init)

    def encode_caption(
        self, caption_BLC: Tensor, mask_BL: Tensor | None = None, drop_B: Tensor | None = None
    ) -> CaptionContext:
        """Captions as the blocks need them, to be reused in every step of a sampler.

        Args:
            caption_BLC: features of the text encoder.
            mask_BL: nonzero for tokens to keep, at least one a sample; None keeps all.
            drop_B: True for samples whose caption is replaced by the null caption; their mask stays.

        Without gradients the keys and values of all blocks are computed here; with gradients each block computes its
        own, so that gradient checkpointing does not keep them.
        """
        context = self.project_caption(caption_BLC, mask_BL, drop_B)
        if not torch.is_grad_enabled():
            layers = (part for part in self.blocks.modules() if isinstance(part, CrossAttention))
            context.keys_values = [layer.keys_values(context) for layer in layers]
        return context

    def project_caption(self, caption_BLC: Tensor, mask_BL: Tensor | None, drop_B: Tensor | None) -> CaptionContext:
        """`encode_caption` without the keys and values."""
        batch, tokens = caption_BLC.shape[:2]
        if drop_B is not None:
            if not self.has_null_caption:
                raise ValueError(
                    "these weights come without a null caption (diffusers files have none): give the features of the "
                    "empty prompt instead of drop_B"
                )
            caption_BLC = self.y_embedder.drop(caption_BLC, drop_B)
        lengths, rows_BL, bias_B11L = [tokens] * batch, None, None
        caption_PC = caption_BLC.flatten(0, 1)
        if mask_BL is not None:
            if tuple(mask_BL.shape) != (batch, tokens):
                raise ValueError(f"mask of shape {tuple(mask_BL.shape)} for captions {tuple(caption_BLC.shape)}")
            mask_BL = mask_BL.to(caption_BLC.device) != 0
            lengths = mask_BL.sum(1).tolist()
            if min(lengths) == 0:
                raise ValueError(f"caption {lengths.index(0)} of the batch has no token that its mask keeps")
            if min(lengths) < tokens:
                caption_PC = caption_BLC[mask_BL]
            if min(lengths) < max(lengths):
                rows_BL, bias_B11L = padded_rows(lengths, caption_BLC.device)
                kept = sum(lengths)
                caption_PC = F.pad(caption_PC, (0, 0, 0, few_sizes(kept) - kept))
        tokens_PD = self.y_embedder(caption_PC)
        pooled_BD = None
        if self.config.adaln == "block":
            pooled_BD = torch.stack([part.mean(0) for part in tokens_PD[: sum(lengths)].split(lengths)])
        return CaptionContext(tokens_PD, batch, rows_BL, bias_B11L, pooled_BD)

    def embed_condition(
        self, t_B: Tensor, context: CaptionContext, size_B2: Tensor | None, ratio_B1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what the blocks get, what the final layer gets): (S [B, 6D], time [B, D]) with adaLN-single.

        The ablation's adaLN gives time + pooled text [B, D] to both.
        """
        time_BD = self.t_embedder(t_B)
        if self.config.multi_scale:
            if size_B2 is None or ratio_B1 is None:
                raise ValueError("a multi-scale network needs size_B2 (pixels) and ratio_B1 (height / width)")
            time_BD = time_BD + torch.cat([self.csize_embedder(size_B2), self.ar_embedder(ratio_B1)], dim=1)
        if self.config.adaln == "single":
            return self.t_block(time_BD), time_BD
        assert context.pooled_BD is not None
        return time_BD + context.pooled_BD, time_BD + context.pooled_BD

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        caption: CaptionContext | Tensor,
        mask_BL: Tensor | None = None,
        *,
        size_B2: Tensor | None = None,
        ratio_B1: Tensor | None = None,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """Noise and, with `learn_sigma`, variance logits [B, 2C, H, W].

        Args:
            x_BCHW: noisy latents, already scaled by the codec's factor.
            t_B: model time in 0..999, may be fractional.
            caption: `encode_caption`'s result, or features [B, L, C] to encode with `mask_BL` and `drop_B`.
            size_B2: height and width of the original image in pixels (multi-scale networks).
            ratio_B1: height / width of the bucket (multi-scale networks).
        """
        if isinstance(caption, Tensor):
            caption = self.project_caption(caption, mask_BL, drop_B)
        elif mask_BL is not None or drop_B is not None:
            raise ValueError("mask_BL and drop_B belong to encode_caption when the caption is encoded already")
        if caption.batch != len(x_BCHW):
            raise ValueError(f"{len(x_BCHW)} latents were given with {caption.batch} captions")
        rows, columns = token_grid(x_BCHW, self.config)
        x_BND = self.embed_latents(x_BCHW)
        condition, final_condition_BD = self.embed_condition(t_B, caption, size_B2, ratio_B1)
        for i, block in enumerate(self.blocks):
            x_BND = self.run_block(block, x_BND, condition, caption, i)
        return unpatchify(self.final_layer(x_BND, final_condition_BD), rows, columns, self.config.patch_size)

    def run_block(
        self, block: nn.Module, x_BND: Tensor, condition: Tensor, context: CaptionContext, index: int | None
    ) -> Tensor:
        """One block, recomputed in the backward pass if asked; index: whose stored keys and values fit (None: none)."""
        stored = context.keys_values[index] if context.keys_values and index is not None else None
        return self.recomputable(block, x_BND, condition, context, stored)


def _forget_multi_scale_positions(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
    if isinstance(module, PixArt) and module.config.multi_scale:
        state.pop(f"{prefix}pos_embed", None)


class ClassEmbedder(nn.Module):
    """A table with one row a class, and a last one for "no class"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, class_B: Tensor) -> Tensor:
        return self.embedding_table(class_B)


class DiTBlock(nn.Module):
    """Self-attention and MLP under adaLN with an MLP of its own."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        x_BND = gated_residual(x_BND, self.attn(adaln_modulate(x_BND, shift1, scale1, NORM_EPS)), gate1)
        return gated_residual(x_BND, self.mlp(adaln_modulate(x_BND, shift2, scale2, NORM_EPS)), gate2)


class DiT(LatentTransformer):
    """The class-conditional transformer of stage 1 (section 2.2; Peebles and Xie, arXiv 2212.09748)."""

    def __init__(self, config: PixArtConfig) -> None:
        if config.classes < 1:
            raise ValueError(f"DiT is conditioned on classes: classes must be at least 1, got {config.classes}")
        super().__init__(config)
        self.y_embedder = ClassEmbedder(config.classes, config.width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        initialise(self, config.embedder_init)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, class_B: Tensor | None = None) -> Tensor:
        """Noise and, with `learn_sigma`, variance logits [B, 2C, H, W].

        class_B: indices; `config.classes` means "no class" as trained with dropout, None leaves the class term out.
        """
        rows, columns = token_grid(x_BCHW, self.config)
        x_BND = self.embed_latents(x_BCHW)
        condition_BD = self.t_embedder(t_B)
        if class_B is not None:
            condition_BD = condition_BD + self.y_embedder(class_B)
        for block in self.blocks:
            x_BND = self.recomputable(block, x_BND, condition_BD)
        return unpatchify(self.final_layer(x_BND, condition_BD), rows, columns, self.config.patch_size)
