"""The encoder: a Point Transformer v3 over the voxels of Gaussians, without CUDA extensions.

Names of weights are those of the released checkpoints (`enc.enc0.block0.attn.qkv.weight`), so that `convert.py` only
takes prefixes off. What depends on places alone comes in as a `Structure`.

Shape suffixes: N voxels of a stage, M of the next one, P patches, K voxels of a patch, H heads, D width of a head, C, E
channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.attention import attention
from common.kernels.products import Linear
from scenesplat.config import NetworkConfig
from scenesplat.structure import Level, Neighbours, Structure

EPSILON = 1e-3  # of batch normalisation, in the released code


class _Gathered(torch.autograd.Function):
    """Submanifold convolution place by place: gather the neighbours there, one product, add to the voxels.

    Within a place every voxel stands once, so that sums have one order: equal to the bit on every run.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight: Tensor, neighbours: Neighbours) -> Tensor:
        ctx.save_for_backward(x_NC, weight)
        ctx.neighbours = neighbours
        x_NC = x_NC.index_select(0, neighbours.order_N)
        y_NE = x_NC @ weight[len(weight) // 2]
        for (rows, columns), weight_CE in zip(neighbours.pairs, weight):
            if len(rows):
                y_NE.index_add_(0, rows, x_NC.index_select(0, columns) @ weight_CE)
        return y_NE.index_select(0, neighbours.place_N)

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, Tensor, None]:
        neighbours, (x_NC, weight) = ctx.neighbours, ctx.saved_tensors
        middle = len(weight) // 2
        x_NC, grad_NE = (part.index_select(0, neighbours.order_N) for part in (x_NC, grad_NE))
        grad_weight = torch.zeros_like(weight)
        grad_weight[middle] = x_NC.t() @ grad_NE
        grad_x = grad_NE @ weight[middle].t() if ctx.needs_input_grad[0] else None
        for place, (rows, columns) in enumerate(neighbours.pairs):
            if len(rows):
                given_E = grad_NE.index_select(0, rows)
                grad_weight[place] = x_NC.index_select(0, columns).t() @ given_E
                if grad_x is not None:
                    grad_x.index_add_(0, columns, given_E @ weight[place].t())
        return None if grad_x is None else grad_x.index_select(0, neighbours.place_N), grad_weight, None


class SparseConv(nn.Module):
    """y_i = b + sum over d of W[:, d + r] x(c_i + d), over the neighbours that exist (spconv's SubMConv3d).

    Args:
        size: of the kernel's side, odd.
        backend: gather (ours) or spconv (its library, for comparison; no backward pass on CPUs).
    """

    def __init__(self, inputs: int, outputs: int, size: int, bias: bool, backend: str = "gather") -> None:
        super().__init__()
        self.size, self.backend = size, backend
        self.weight = nn.Parameter(torch.empty(outputs, size, size, size, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(inputs * size**3), 1 / math.sqrt(inputs * size**3))

    def forward(self, x_NC: Tensor, level: Level) -> Tensor:
        if self.backend == "spconv":
            return self._by_library(x_NC, level)
        weight = self.weight.flatten(1, 3).permute(1, 2, 0)  # [places, C, E]
        if torch.is_autocast_enabled(x_NC.device.type):  # as a product of torch's own would be
            dtype = torch.get_autocast_dtype(x_NC.device.type)
            x_NC, weight = x_NC.to(dtype), weight.to(dtype)
        y_NE = _Gathered.apply(x_NC, weight, level.neighbours(self.size))
        return y_NE if self.bias is None else y_NE + self.bias.to(y_NE.dtype)

    def _by_library(self, x_NC: Tensor, level: Level) -> Tensor:
        import spconv.pytorch as spconv

        outputs, inputs = self.weight.shape[0], self.weight.shape[-1]
        module = spconv.SubMConv3d(inputs, outputs, self.size, bias=False).to(x_NC.device)
        module.weight = self.weight
        places = torch.cat([level.batch_N[:, None], level.grid_N3], 1).int().contiguous()
        shape = (level.grid_N3.max(0).values + 96).tolist()
        y_NE = module(spconv.SparseConvTensor(x_NC, places, shape, len(level.sizes))).features
        return y_NE if self.bias is None else y_NE + self.bias


class RelativePositions(nn.Module):
    """A learned score for each axis' distance in voxels, added up (shrinking patches only)."""

    def __init__(self, patch: int, heads: int) -> None:
        super().__init__()
        self.furthest = int((4 * patch) ** (1 / 3) * 2)
        self.rpe_table = nn.Parameter(torch.zeros(3 * (2 * self.furthest + 1), heads))
        nn.init.trunc_normal_(self.rpe_table, std=0.02)

    def forward(self, grid_PK3: Tensor) -> Tensor:
        """[P, H, K, K]."""
        distance = grid_PK3[:, :, None] - grid_PK3[:, None]
        index = distance.clamp(-self.furthest, self.furthest) + self.furthest
        index = index + torch.arange(3, device=index.device) * (2 * self.furthest + 1)
        return self.rpe_table[index].sum(3).permute(0, 3, 1, 2)


class SerializedAttention(nn.Module):
    """Attention among consecutive voxels of a curve."""

    def __init__(self, channels: int, heads: int, patch: int, row: int, options: NetworkConfig) -> None:
        super().__init__()
        self.heads, self.patch, self.row = heads, patch, row
        self.flash, self.scale = options.patches == "variable", options.qk_scale
        self.attn_drop, self.proj_drop = options.attn_drop, options.proj_drop
        self.qkv = Linear(channels, 3 * channels, bias=options.qkv_bias)
        self.proj = Linear(channels, channels)
        self.rpe = RelativePositions(patch, heads) if options.rpe else None

    def forward(self, x_NC: Tensor, level: Level) -> Tensor:
        index_PK, mask_PK, place_N = level.patches(self.row, self.patch, self.flash)
        qkv_PKC = self.qkv(x_NC).index_select(0, index_PK.flatten()).unflatten(0, index_PK.shape)
        qkv = qkv_PKC.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = None if mask_PK is None else mask_PK[:, None, None]
        if self.rpe is not None:
            scores = self.rpe(level.grid_N3[index_PK])  # patches are all full here
        q_PHKD, k_PHKD, v_PHKD = qkv.unbind(0)
        y_PHKD = attention(q_PHKD, k_PHKD, v_PHKD, scores, self.scale, self.attn_drop if self.training else 0.0)
        y_NC = self.proj(y_PHKD.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, place_N))
        return F.dropout(y_NC, self.proj_drop, self.training)


class Mlp(nn.Module):
    def __init__(self, channels: int, ratio: float, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.fc1 = Linear(channels, int(channels * ratio))
        self.fc2 = Linear(int(channels * ratio), channels)

    def forward(self, x_NC: Tensor) -> Tensor:
        hidden_NC = F.dropout(F.gelu(self.fc1(x_NC)), self.drop, self.training)
        return F.dropout(self.fc2(hidden_NC), self.drop, self.training)


class Block(nn.Module):
    """xCPE, attention, MLP, each added to what came in (figure 6, Point Transformer v3).

    Args:
        row: which of the curves, as they now stand, it follows.
        drop: share of the voxels whose attention, and whose MLP, is left out in training.
    """

    def __init__(self, channels: int, heads: int, patch: int, row: int, drop: float, options: NetworkConfig) -> None:
        super().__init__()
        self.drop, self.pre_norm = drop, options.pre_norm
        convolution = SparseConv(channels, channels, 3, True, options.convolution)
        self.cpe = nn.ModuleList([convolution, Linear(channels, channels), nn.LayerNorm(channels)])
        self.norm1 = nn.Sequential(nn.LayerNorm(channels))
        self.attn = SerializedAttention(channels, heads, patch, row, options)
        self.norm2 = nn.Sequential(nn.LayerNorm(channels))
        self.mlp = nn.Sequential(Mlp(channels, options.mlp_ratio, options.proj_drop))

    def forward(self, x_NC: Tensor, level: Level, seen_NC: Tensor | None = None) -> Tensor:
        """`seen_NC`: what the convolution looks at in place of `x_NC` (`Unpooling`)."""
        convolution, linear, norm = self.cpe
        x_NC = x_NC + norm(linear(convolution(x_NC if seen_NC is None else seen_NC, level)))
        before, after = (self.norm1, nn.Identity()) if self.pre_norm else (nn.Identity(), self.norm1)
        x_NC = after(x_NC + self._kept(self.attn(before(x_NC), level)))
        before, after = (self.norm2, nn.Identity()) if self.pre_norm else (nn.Identity(), self.norm2)
        return after(x_NC + self._kept(self.mlp(before(x_NC))))

    def _kept(self, x_NC: Tensor) -> Tensor:
        """Stochastic depth, voxel by voxel as in the released code."""
        if not self.training or self.drop == 0:
            return x_NC
        keep = 1 - self.drop
        return x_NC * x_NC.new_empty(len(x_NC), 1).bernoulli_(keep).div_(keep)


def _batch_norm(channels: int, options: NetworkConfig) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, EPSILON, options.norm_momentum)


class Stem(nn.Module):
    """A convolution of 5^3 over the Gaussians' attributes, batch normalisation, GELU."""

    def __init__(self, options: NetworkConfig) -> None:
        super().__init__()
        width = options.enc_channels[0]
        self.stem = nn.ModuleDict(
            {
                "conv": SparseConv(options.in_channels, width, 5, False, options.convolution),
                "norm": _batch_norm(width, options),
            }
        )

    def forward(self, x_NC: Tensor, level: Level) -> Tensor:
        return F.gelu(self.stem["norm"](self.stem["conv"](x_NC, level)))


class Pooling(nn.Module):
    """Project, then the mean (or another reduction) of each group of voxels, batch normalisation, GELU."""

    def __init__(self, inputs: int, outputs: int, options: NetworkConfig) -> None:
        super().__init__()
        self.reduce = options.pooling
        self.proj = Linear(inputs, outputs)
        self.norm = nn.Sequential(_batch_norm(outputs, options))

    def forward(self, x_NC: Tensor, cluster_N: Tensor, count: int) -> Tensor:
        return F.gelu(self.norm(grouped(self.proj(x_NC), cluster_N, count, self.reduce)))


def grouped(x_NC: Tensor, cluster_N: Tensor, count: int, reduce: str) -> Tensor:
    """Mean, max, min or sum [M, C] over the voxels of each group."""
    if reduce in ("max", "min"):
        index = cluster_N[:, None].expand_as(x_NC)
        return x_NC.new_zeros(count, x_NC.shape[1]).scatter_reduce(0, index, x_NC, f"a{reduce}", include_self=False)
    total = x_NC.new_zeros(count, x_NC.shape[1]).index_add(0, cluster_N, x_NC)
    if reduce == "sum":
        return total
    return total / torch.bincount(cluster_N, minlength=count)[:, None].to(x_NC.dtype)


class Unpooling(nn.Module):
    """What was pooled goes back to its voxels, beside what they had before.

    Returns (features, what the convolution of the next block looks at): in the released code, and so in its weights,
    that one sees what the voxels had before alone.
    """

    def __init__(self, inputs: int, skip: int, outputs: int, options: NetworkConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(Linear(inputs, outputs), _batch_norm(outputs, options), nn.GELU())
        self.proj_skip = nn.Sequential(Linear(skip, outputs), _batch_norm(outputs, options), nn.GELU())

    def forward(self, x_MC: Tensor, skip_NC: Tensor, cluster_N: Tensor) -> tuple[Tensor, Tensor]:
        skip_NC = self.proj_skip(skip_NC)
        return skip_NC + self.proj(x_MC).index_select(0, cluster_N), skip_NC


class PointTransformer(nn.Module):
    """Features of voxels: encoder of `len(enc_depths)` stages and a decoder back to the first one.

    The decoder's width at the first stage is the output's: of the text features for the language model, which has no
    head. Without `dec_depths` there is no decoder: the answer is the last stage's (the released code's classifiers).
    """

    def __init__(self, options: NetworkConfig) -> None:
        super().__init__()
        self.options = options
        stages = len(options.enc_depths)
        self.embedding = Stem(options)
        if options.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, options.enc_channels[0]))
            nn.init.trunc_normal_(self.mask_token, mean=0.0, std=0.02)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        drops = _drops(options.drop_path, options.enc_depths)
        for s in range(stages):
            stage = nn.ModuleDict()
            if s:
                stage["down"] = Pooling(options.enc_channels[s - 1], options.enc_channels[s], options)
            heads, patch = options.enc_heads[s], options.enc_patch[s]
            for i, drop in enumerate(drops[s]):
                row = i % len(options.orders)
                stage[f"block{i}"] = Block(options.enc_channels[s], heads, patch, row, drop, options)
            self.enc[f"enc{s}"] = stage
        widths = [*options.dec_channels, options.enc_channels[-1]]
        drops = _drops(options.drop_path, options.dec_depths)
        for s in reversed(range(len(options.dec_depths))):
            stage = nn.ModuleDict({"up": Unpooling(widths[s + 1], options.enc_channels[s], widths[s], options)})
            heads, patch = options.dec_heads[s], options.dec_patch[s]
            for i, drop in enumerate(reversed(drops[s])):
                stage[f"block{i}"] = Block(widths[s], heads, patch, i % len(options.orders), drop, options)
            self.dec[f"dec{s}"] = stage

    def forward(self, feat_NC: Tensor, structure: Structure, mask_N: Tensor | None = None) -> Tensor:
        """Features [N, dec_channels[0]] of the first stage's voxels; of the last stage's where there is no decoder."""
        return self.decode(self.encode(feat_NC, structure, mask_N), structure)

    def encode(self, feat_NC: Tensor, structure: Structure, mask_N: Tensor | None = None) -> list[Tensor]:
        """Features of every stage, fine to coarse.

        Args:
            mask_N: where the stem's output is replaced by the mask token.
        """
        x = self.embedding(feat_NC, structure.levels[0])
        if mask_N is not None:
            x = torch.where(mask_N[:, None], self.mask_token.to(x.dtype), x)
        found = []
        for s, level in enumerate(structure.levels):
            stage: Any = self.enc[f"enc{s}"]
            if s:
                x = stage["down"](x, structure.clusters[s - 1], len(level.batch_N))
            x = _blocks(stage, x, level)
            found.append(x)
        return found

    def decode(self, found: Sequence[Tensor], structure: Structure) -> Tensor:
        """Back to the first stage, from what `encode` found."""
        x = found[-1]
        for s in reversed(range(len(self.dec))):
            stage: Any = self.dec[f"dec{s}"]
            x, skip = stage["up"](x, found[s], structure.clusters[s])
            x = _blocks(stage, x, structure.levels[s], skip)
        return x

    def structure(
        self, grid_N3: Tensor, offset_B: Tensor, permutations: Sequence[Tensor] | None = None, depth: int | None = None
    ) -> Structure:
        """What `forward` needs beside features; with permutations of the curves, for each stage one, in training."""
        made = Structure.of(grid_N3, offset_B, self.options.orders, self.options.strides, depth)
        return made if permutations is None else made.shuffled(permutations)


def _blocks(stage: Any, x: Tensor, level: Level, seen: Tensor | None = None) -> Tensor:
    for name, block in stage.items():
        if name.startswith("block"):
            x, seen = block(x, level, seen), None
    return x


def _drops(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block: from 0 up to `last` over all of them."""
    values = [last * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
    return [values[sum(depths[:s]) : sum(depths[: s + 1])] for s in range(len(depths))]


def unit(x_NC: Tensor) -> Tensor:
    """Rows of length 1, in float32; rows of zeros stay."""
    return F.normalize(x_NC.float(), dim=1)
