"""The denoising network of latent diffusion models: ADM's U-Net with cross-attention.

Source: arXiv 2112.10752, sections 3.2 and 3.3; CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py.

Module and parameter names are those of the authors' code, so their checkpoints load without renaming.

Shape suffixes: B batch, C channels, H height, W width, L tokens (H*W or context length), D token width,
E width of the time embedding (4 x model_channels), K heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.kernels.attention import attention
from common.kernels.geglu import geglu
from common.kernels.group_norm_silu import group_norm_silu
from common.kernels.products import Linear, linear
from ldm.config import ClassifierNetwork, UNetOptions
from ldm.context_memory import ContextMemory
from ldm.norm import group_count, limit_groups

M = TypeVar("M", bound=nn.Module)
ConditioningKey = Literal["concat", "crossattn", "hybrid", "adm"]


def timestep_embedding(t_B: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features [B, dim] of (possibly fractional) timesteps: cosines, then sines; an odd `dim` ends in 0."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t_B.device))
    angles = t_B.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(group_count(channels), channels, eps=eps)


def _norm_silu(x_BCHW: Tensor, norm: nn.Module) -> Tensor:
    assert isinstance(norm, nn.GroupNorm)
    return group_norm_silu(x_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)


def normalise(x_BCHW: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm alone; float32 on CPUs under autocast, whose bfloat16 kernel is several times slower."""
    if x_BCHW.device.type == "cpu" and norm.weight.dtype == torch.float32:
        x_BCHW = x_BCHW.float()
    return norm(x_BCHW)


def _zero(module: M) -> M:
    """The last layer of each residual branch starts at zero, so the branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _tokens(x_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, L, C], row-major over the grid; free of copies for channels-last input."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _pointwise(x_BLD: Tensor, conv: nn.Conv1d | nn.Conv2d) -> Tensor:
    """A 1x1 convolution applied to tokens, where it is a linear layer and needs no transposition."""
    return linear(x_BLD, conv.weight.flatten(1), conv.bias)


def _grid(x_BLD: Tensor, like_BCHW: Tensor) -> Tensor:
    """[B, L, D] -> [B, D, H, W] on the grid of `like`, in the memory format of `like`."""
    batch, _, height, width = like_BCHW.shape
    return x_BLD.transpose(1, 2).reshape(batch, -1, height, width)


def _attend(q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, heads: int) -> Tensor:
    """Multi-head softmax attention with scale (head width)^-1/2; inputs and output [B, L, D]."""
    q_BKLD, k_BKLD, v_BKLD = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q_BLD, k_BLD, v_BLD))
    return attention(q_BKLD, k_BKLD, v_BKLD).transpose(1, 2).flatten(2)


class Downsample(nn.Module):
    """Halve the grid: 3x3 convolution with stride 2 (parameters `op.*`), or the mean of 2x2 cells."""

    def __init__(self, channels: int, conv: bool = True) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class Upsample(nn.Module):
    """Double the grid: nearest neighbour, then 3x3 convolution (or nothing)."""

    def __init__(self, channels: int, conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block with time conditioning, optionally resampling (`resblock_updown`) and with scale-shift norm."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        resample: Literal["up", "down"] | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = resample
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor, silu_emb_BE: Tensor) -> Tensor:
        """`silu_emb_BE` is SiLU(time embedding): the U-Net applies it once for all blocks."""
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BCHW, silu_emb_BE, use_reentrant=False)
        return self._forward(x_BCHW, silu_emb_BE)

    def _resample(self, x_BCHW: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x_BCHW, 2)
        if self.resample == "up":
            return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        return x_BCHW

    def _forward(self, x_BCHW: Tensor, silu_emb_BE: Tensor) -> Tensor:
        h_BCHW = self.in_layers[2](self._resample(_norm_silu(x_BCHW, self.in_layers[0])))
        emb_BC11 = self.emb_layers[1](silu_emb_BE)[:, :, None, None]
        norm = self.out_layers[0]
        if self.use_scale_shift_norm:
            scale_BC11, shift_BC11 = emb_BC11.chunk(2, dim=1)
            h_BCHW = F.silu(norm(h_BCHW) * (1 + scale_BC11) + shift_BC11)
        else:
            h_BCHW = _norm_silu(h_BCHW + emb_BC11, norm)
        h_BCHW = self.out_layers[3](self.out_layers[2](h_BCHW))
        return self.skip_connection(self._resample(x_BCHW)) + h_BCHW


class AttentionBlock(nn.Module):
    """Self-attention of the unconditional U-Net. The rows of `qkv` go head by head, (q, k, v) inside each head; with
    `q_k_v` all of q comes first, then k, then v (the authors' `use_new_attention_order`)."""

    def __init__(self, channels: int, num_heads: int, use_checkpoint: bool = False, q_k_v: bool = False) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"attention width {channels} is not divisible by {num_heads} heads")
        self.num_heads, self.q_k_v = num_heads, q_k_v
        self.use_checkpoint = use_checkpoint
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BCHW, use_reentrant=False)
        return self._forward(x_BCHW)

    def _forward(self, x_BCHW: Tensor) -> Tensor:
        qkv_BLD = _pointwise(_tokens(normalise(x_BCHW, self.norm)), self.qkv)
        if self.q_k_v:
            qkv_3BKLD = qkv_BLD.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            qkv_3BKLD = qkv_BLD.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        q_BKLD, k_BKLD, v_BKLD = qkv_3BKLD.unbind(0)
        h_BLD = attention(q_BKLD, k_BKLD, v_BKLD).transpose(1, 2).flatten(2)
        return x_BCHW + _grid(_pointwise(h_BLD, self.proj_out), x_BCHW)


class CrossAttention(nn.Module):
    """Attention of tokens to a context (equation below 3 of the paper); to themselves when there is no context."""

    memory: ContextMemory | None = None  # set for the duration of one sampling call only

    def __init__(self, query_dim: int, context_dim: int | None, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = Linear(query_dim, inner, bias=False)
        self.to_k = Linear(context_dim, inner, bias=False)
        self.to_v = Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, query_dim))

    def forward(self, x_BLD: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        if context_BLD is None:
            k_BLD, v_BLD = self._keys_values(x_BLD)
        # Keys with a gradient belong to one backward pass; compiled and recorded code has no place for a memory.
        elif self.memory is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            k_BLD, v_BLD = self._keys_values(context_BLD)
        else:
            k_BLD, v_BLD = self.memory.recall(context_BLD, self._keys_values)
        return self.to_out(_attend(self.to_q(x_BLD), k_BLD, v_BLD, self.heads))

    def _keys_values(self, source_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k(source_BLD), self.to_v(source_BLD)


class GEGLU(nn.Module):
    """x * GELU(gate), both halves of one linear layer."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = Linear(dim_in, 2 * dim_out)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return geglu(self.proj(x_BLD))


class FeedForward(nn.Module):
    """GEGLU MLP with expansion 4; index 1 of `net` is the authors' (zero) dropout, kept for the parameter names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.net(x_BLD)


class BasicTransformerBlock(nn.Module):
    """Pre-LN: self-attention, cross-attention, MLP (the code's order; table 16 of the paper swaps the last two)."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, context_dim: int | None, use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.attn1 = CrossAttention(dim, None, heads, dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x_BLD: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BLD, context_BLD, use_reentrant=False)
        return self._forward(x_BLD, context_BLD)

    def _forward(self, x_BLD: Tensor, context_BLD: Tensor | None) -> Tensor:
        x_BLD = self.attn1(self.norm1(x_BLD)) + x_BLD
        x_BLD = self.attn2(self.norm2(x_BLD), context_BLD) + x_BLD
        return self.ff(self.norm3(x_BLD)) + x_BLD


class SpatialTransformer(nn.Module):
    """Transformer blocks on the grid's cells as tokens, between two 1x1 convolutions, inside one residual."""

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        self.norm = group_norm(in_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, context_dim, use_checkpoint) for _ in range(depth)
        )
        self.proj_out = _zero(nn.Conv2d(inner, in_channels, 1))

    def forward(self, x_BCHW: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        h_BLD = _pointwise(_tokens(normalise(x_BCHW, self.norm)), self.proj_in)
        for block in self.transformer_blocks:
            h_BLD = block(h_BLD, context_BLD)
        return _grid(_pointwise(h_BLD, self.proj_out), x_BCHW) + x_BCHW


class Stage(nn.Sequential):
    """One entry of `input_blocks`, `middle_block` or `output_blocks`: hands each layer the inputs that it takes."""

    def forward(self, x_BCHW: Tensor, silu_emb_BE: Tensor, context_BLD: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x_BCHW = layer(x_BCHW, silu_emb_BE)
            elif isinstance(layer, SpatialTransformer):
                x_BCHW = layer(x_BCHW, context_BLD)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


def _time_embed(model_channels: int) -> nn.Sequential:
    width = 4 * model_channels
    return nn.Sequential(Linear(model_channels, width), nn.SiLU(), Linear(width, width))


def _down_path(
    options: UNetOptions | ClassifierNetwork,
    in_channels: int,
    resblock_updown: bool,
    res_block: Callable[..., ResBlock],
    attention: Callable[[int], nn.Module],
    conv_resample: bool = True,
) -> tuple[nn.ModuleList, list[int], int]:
    """The contracting path: its stages, the width after each, and the final down-sampling factor."""
    width, factor = options.model_channels, 1
    stages = [Stage(nn.Conv2d(in_channels, width, 3, padding=1))]
    widths = [width]
    for level, multiplier in enumerate(options.channel_mult):
        for _ in range(options.num_res_blocks):
            wide = multiplier * options.model_channels
            layers: list[nn.Module] = [res_block(width, wide)]
            width = wide
            if factor in options.attention_resolutions:
                layers.append(attention(width))
            stages.append(Stage(*layers))
            widths.append(width)
        if level != len(options.channel_mult) - 1:
            down = res_block(width, width, resample="down") if resblock_updown else Downsample(width, conv_resample)
            stages.append(Stage(down))
            widths.append(width)
            factor *= 2
    return nn.ModuleList(stages), widths, factor


class UNet(nn.Module):
    """The epsilon- (or x0-, v-) predicting U-Net of tables 12-15.

    Args:
        in_channels, out_channels: of the latent; in_channels is larger when the condition is concatenated.
        use_spatial_transformer: transformer blocks with cross-attention to `context` instead of plain self-attention.
        context_dim: width of the context tokens (None: no context).
        num_classes: adds a label embedding to the time embedding ("adm" conditioning).
        legacy: head width channels // number of heads even when num_head_channels is given.
        image_size: nominal latent side; recorded only, the network runs on any size.
        conv_resample: False resamples without convolutions (where resblock_updown is off).
        use_new_attention_order: of the rows of plain attention's `qkv`, see `AttentionBlock`.
        num_heads_upsample: heads of the up path's plain attention, where num_heads gives them (-1: num_heads).
        n_embed: predict logits of so many codebook entries instead of a latent (the head `id_predictor`).
        use_checkpoint: recompute activations of blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        options: UNetOptions,
        in_channels: int,
        out_channels: int,
        *,
        use_spatial_transformer: bool = False,
        context_dim: int | None = None,
        num_classes: int | None = None,
        legacy: bool = True,
        image_size: int | None = None,
        conv_resample: bool = True,
        use_new_attention_order: bool = False,
        num_heads_upsample: int = -1,
        n_embed: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if options.num_heads == -1 and options.num_head_channels == -1:
            raise ValueError("give either num_heads or num_head_channels")
        if context_dim is not None and not use_spatial_transformer:
            raise ValueError("context_dim is given, but cross-attention needs use_spatial_transformer=True")
        self.model_channels, self.num_classes = options.model_channels, num_classes
        # In the authors' names, for convert.py: the head layout, for one, cannot be read off the weights.
        self.config: dict[str, Any] = {
            **asdict(options),
            "in_channels": in_channels,
            "out_channels": out_channels,
            "use_spatial_transformer": use_spatial_transformer,
            "context_dim": context_dim,
            "num_classes": num_classes,
            "legacy": legacy,
            "image_size": image_size,
        }
        unusual = {
            "conv_resample": (conv_resample, True),
            "use_new_attention_order": (use_new_attention_order, False),
            "num_heads_upsample": (num_heads_upsample, -1),
            "n_embed": (n_embed, None),
        }
        self.config |= {name: value for name, (value, usual) in unusual.items() if value != usual}
        res_block = partial(
            ResBlock,
            emb_channels=4 * options.model_channels,
            dropout=options.dropout,
            use_scale_shift_norm=options.use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )

        def attention(width: int, up: bool = False) -> nn.Module:
            given = options.num_head_channels
            heads = options.num_heads if given == -1 else width // given
            if not heads:
                raise ValueError(f"num_head_channels {given}: a level has {width} channels only")
            if not use_spatial_transformer:
                if up and legacy and given == -1 and num_heads_upsample != -1:
                    heads = num_heads_upsample
                return AttentionBlock(width, heads, use_checkpoint, use_new_attention_order)
            dim_head = width // heads if legacy or given == -1 else given
            return SpatialTransformer(width, heads, dim_head, options.transformer_depth, context_dim, use_checkpoint)

        self.time_embed = _time_embed(options.model_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 4 * options.model_channels)
        self.input_blocks, widths, factor = _down_path(
            options, in_channels, options.resblock_updown, res_block, attention, conv_resample
        )
        width = widths[-1]
        self.middle_block = Stage(res_block(width, width), attention(width), res_block(width, width))
        output_blocks = []
        for level, multiplier in reversed(list(enumerate(options.channel_mult))):
            for i in range(options.num_res_blocks + 1):
                skip, wide = widths.pop(), multiplier * options.model_channels
                layers: list[nn.Module] = [res_block(width + skip, wide)]
                width = wide
                if factor in options.attention_resolutions:
                    layers.append(attention(width, up=True))
                if level and i == options.num_res_blocks:
                    updown = options.resblock_updown
                    layers.append(res_block(width, width, resample="up") if updown else Upsample(width, conv_resample))
                    factor //= 2
                output_blocks.append(Stage(*layers))
        self.output_blocks = nn.ModuleList(output_blocks)
        self.out = nn.Sequential(group_norm(width), nn.SiLU(), _zero(nn.Conv2d(width, out_channels, 3, padding=1)))
        self.id_predictor = None
        if n_embed is not None:
            self.id_predictor = nn.Sequential(group_norm(width), nn.Conv2d(options.model_channels, n_embed, 1))
        limit_groups(self, options.norm_groups)

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, context_BLD: Tensor | None = None, y_B: Tensor | None = None
    ) -> Tensor:
        """Prediction [B, out_channels, H, W] for noisy latents, timesteps 0..T-1, context tokens and class labels."""
        if (y_B is None) != (self.num_classes is None):
            raise ValueError("class labels y must be given if and only if the network has num_classes")
        dtype = next(self.time_embed.parameters()).dtype
        emb_BE = self.time_embed(timestep_embedding(t_B, self.model_channels).to(dtype))
        if y_B is not None:
            emb_BE = emb_BE + self.label_emb(y_B)
        silu_emb_BE = F.silu(emb_BE)
        skips = []
        h_BCHW = x_BCHW
        for stage in self.input_blocks:
            h_BCHW = stage(h_BCHW, silu_emb_BE, context_BLD)
            skips.append(h_BCHW)
        h_BCHW = self.middle_block(h_BCHW, silu_emb_BE, context_BLD)
        for stage in self.output_blocks:
            h_BCHW = stage(torch.cat([h_BCHW, skips.pop()], dim=1), silu_emb_BE, context_BLD)
        if self.id_predictor is not None:
            return self.id_predictor(h_BCHW)
        return self.out[2](_norm_silu(h_BCHW, self.out[0]))


class ConditionedUNet(nn.Module):
    """Routes conditions into the U-Net: channels are concatenated to z_t, tokens go to cross-attention (section 3.3).

    The U-Net sits under `diffusion_model`, as in the authors' checkpoints.
    """

    def __init__(self, unet: UNet, conditioning_key: ConditioningKey | str | None) -> None:
        super().__init__()
        if conditioning_key not in (None, "concat", "crossattn", "hybrid", "adm"):
            raise ValueError(f"conditioning_key {conditioning_key!r}: expected None, concat, crossattn, hybrid or adm")
        self.diffusion_model = unet
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`c_concat`: maps [B, c_i, H, W]; `c_crossattn`: tokens [B, L_i, D], or for "adm" one [B] of labels."""
        key = self.conditioning_key
        if key in ("concat", "hybrid") and not c_concat:
            raise ValueError(f"{key} conditioning needs c_concat")
        if key in ("crossattn", "hybrid", "adm") and not c_crossattn:
            raise ValueError(f"{key} conditioning needs c_crossattn")
        if key in ("concat", "hybrid"):
            x_BCHW = torch.cat([x_BCHW, *(c_concat or ())], dim=1)
        if key == "adm":
            return self.diffusion_model(x_BCHW, t_B, y_B=(c_crossattn or ())[0])
        context_BLD = None
        if key in ("crossattn", "hybrid"):
            tokens = list(c_crossattn or ())
            # One tensor is handed on as it is, so that attention knows it again at the next sampling step.
            context_BLD = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        return self.diffusion_model(x_BCHW, t_B, context_BLD)


class AttentionPool2d(nn.Module):
    """CLIP's pooling: the mean token attends to all cells. Rows of `qkv_proj`: q of all heads, then k, then v."""

    def __init__(self, side: int, channels: int, num_head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // num_head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, side * side + 1) / math.sqrt(channels))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BLD = _tokens(x_BCHW)
        x_BLD = torch.cat([x_BLD.mean(dim=1, keepdim=True), x_BLD], dim=1) + self.positional_embedding.T.to(x_BLD.dtype)
        weight_q, weight_k, weight_v = self.qkv_proj.weight[:, :, 0].chunk(3)
        assert self.qkv_proj.bias is not None
        bias_q, bias_k, bias_v = self.qkv_proj.bias.chunk(3)
        pooled_BLD = _attend(
            linear(x_BLD[:, :1], weight_q, bias_q),  # only the mean token is read out
            linear(x_BLD, weight_k, bias_k),
            linear(x_BLD, weight_v, bias_v),
            self.num_heads,
        )
        return _pointwise(pooled_BLD, self.c_proj)[:, 0]


class EncoderUNet(nn.Module):
    """Classifier p(y | z_t) on noisy latents for classifier guidance (LDM-8-G, appendix D.4): the U-Net's down path.

    `options.pool` turns the last features into logits: "attention" (needs latents of exactly image_size), "adaptive"
    (average), "spatial" or "spatial_v2" (averages after every stage, then an MLP).

    Args:
        in_channels: of the latent; out_channels: classes.
        num_heads: where options.num_head_channels is -1.
    """

    def __init__(
        self,
        options: ClassifierNetwork,
        image_size: int,
        in_channels: int,
        out_channels: int,
        *,
        num_heads: int = 1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        use_new_attention_order: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels, self.pool, pool = options.model_channels, options.pool, options.pool
        res_block = partial(
            ResBlock,
            emb_channels=4 * options.model_channels,
            dropout=options.dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )

        def attention(width: int) -> AttentionBlock:
            heads = num_heads if options.num_head_channels == -1 else width // options.num_head_channels
            return AttentionBlock(width, heads, use_checkpoint, use_new_attention_order)

        self.time_embed = _time_embed(options.model_channels)
        self.input_blocks, widths, factor = _down_path(
            options, in_channels, resblock_updown, res_block, attention, conv_resample
        )
        width = widths[-1]
        self.middle_block = Stage(res_block(width, width), attention(width), res_block(width, width))
        features = sum(widths) + width
        if pool == "attention":
            if options.num_head_channels == -1:
                raise ValueError("pool: attention needs num_head_channels")
            head = AttentionPool2d(image_size // factor, width, options.num_head_channels, out_channels)
            self.out = nn.Sequential(group_norm(width), nn.SiLU(), head)
        elif pool == "adaptive":
            last = _zero(nn.Conv2d(width, out_channels, 1))
            self.out = nn.Sequential(group_norm(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), last, nn.Flatten())
        elif pool == "spatial":
            self.out = nn.Sequential(Linear(features, 2048), nn.ReLU(), Linear(2048, out_channels))
        elif pool == "spatial_v2":
            self.out = nn.Sequential(Linear(features, 2048), group_norm(2048), nn.SiLU(), Linear(2048, out_channels))
        else:
            raise ValueError(f"pool {pool!r}: expected attention, adaptive, spatial or spatial_v2")
        limit_groups(self, options.norm_groups)

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Class logits [B, out_channels] of noisy latents [B, C, H, W] at timesteps [B]."""
        dtype = next(self.time_embed.parameters()).dtype
        silu_emb_BE = F.silu(self.time_embed(timestep_embedding(t_B, self.model_channels).to(dtype)))
        means = []
        h_BCHW = x_BCHW
        for stage in [*self.input_blocks, self.middle_block]:
            h_BCHW = stage(h_BCHW, silu_emb_BE)
            if self.pool.startswith("spatial"):
                means.append(h_BCHW.mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=1) if means else h_BCHW)
