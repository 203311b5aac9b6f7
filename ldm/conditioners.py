"""What turns a condition into tokens or maps for the U-Net: the tau_theta of section 3.3, one per kind of condition.

Parameter names are those of the authors' code.

Shape suffixes: B batch, L tokens, D token width, C channels, H height, W width, N database entries, J neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.attention import attention
from common.kernels.products import Linear


class ClassEmbedder(nn.Module):
    """One learned token per class, [B] -> [B, 1, D]. With guidance the last is the null class (1000 for ImageNet)."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        """`key` is the batch column in the authors' configurations; kept so that those build, not used here."""
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, classes_B: Tensor) -> Tensor:
        return self.embedding(classes_B)[:, None]


class _Attention(nn.Module):
    """Unmasked multi-head self-attention; q, k, v without bias."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, heads * dim_head, bias=False)
        self.to_k = Linear(dim, heads * dim_head, bias=False)
        self.to_v = Linear(dim, heads * dim_head, bias=False)
        self.to_out = Linear(heads * dim_head, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BLD).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    """Linear x4, GELU, linear; `net.1` is the authors' (zero) dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(Linear(dim, 4 * dim), nn.GELU()), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.net(x_BLD)


class _Positions(nn.Module):
    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, dim)


class _Layers(nn.Module):
    """Pre-LN residual layers, attention and MLP in turn: `layers.i.0` is the LayerNorm, `layers.i.1` the layer."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(depth):
            blocks.append(nn.ModuleList([nn.LayerNorm(dim), _Attention(dim, heads, dim_head)]))
            blocks.append(nn.ModuleList([nn.LayerNorm(dim), _Mlp(dim)]))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x_BLD: Tensor) -> Tensor:
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            x_BLD = x_BLD + pair[1](pair[0](x_BLD))
        return x_BLD


class _TransformerWrapper(nn.Module):
    def __init__(
        self, dim: int, depth: int, vocab_size: int, length: int, heads: int, dim_head: int, logits_head: bool
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, dim)
        self.pos_emb = _Positions(length, dim)
        self.attn_layers = _Layers(dim, depth, heads, dim_head)
        self.norm = nn.LayerNorm(dim)
        if logits_head:
            self.to_logits = Linear(dim, vocab_size)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        nn.init.normal_(self.pos_emb.emb.weight, std=0.02)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.token_emb(tokens_BL) + self.pos_emb.emb.weight[: tokens_BL.shape[1]]
        return self.norm(self.attn_layers(x_BLD))


class TransformerEmbedder(nn.Module):
    """tau_theta for text and layout (appendix E.2.1): token ids [B, L] -> context tokens [B, L, D].

    The authors' module carries a logits head that nothing reads (39M parameters at width 1280). It is left out unless
    `logits_head` is set, and the head in their checkpoints is skipped on loading.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        heads: int = 8,
        dim_head: int = 64,
        logits_head: bool = False,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.transformer = _TransformerWrapper(n_embed, n_layer, vocab_size, max_seq_len, heads, dim_head, logits_head)
        self.register_load_state_dict_pre_hook(self._drop_unused_head)

    @staticmethod
    def _drop_unused_head(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        assert isinstance(module, TransformerEmbedder)
        if not hasattr(module.transformer, "to_logits"):
            for name in ("weight", "bias"):
                state.pop(f"{prefix}transformer.to_logits.{name}", None)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        if tokens_BL.shape[1] > self.max_seq_len:
            raise ValueError(f"{tokens_BL.shape[1]} tokens, but the embedder has positions for {self.max_seq_len}")
        return self.transformer(tokens_BL)


class SpatialRescaler(nn.Module):
    """Shrink a map `n_stages` times by `multiplier`, one step at a time, then mix its channels by a 1x1 convolution.

    [B, in_channels, H, W] -> [B, out_channels, H * multiplier^n, W * multiplier^n]; no anti-aliasing, as in the
    authors' code (halving twice is not the same as quartering once). Without out_channels there is no convolution.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x_BCHW = F.interpolate(x_BCHW, scale_factor=self.multiplier, mode=self.method)
        return x_BCHW if self.channel_mapper is None else self.channel_mapper(x_BCHW)


Box = tuple[float, float, float, float]
WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class LayoutObject:
    """One annotated object: its class and its box (left, top, width, height) as fractions of the image."""

    category: int
    box: Box
    is_group_of: bool = False
    is_occluded: bool = False
    is_depiction: bool = False
    is_inside: bool = False


def _mirror(box: Box) -> Box:
    return (1 - (box[0] + box[2]), box[1], box[2], box[3])


def _overlaps(box: Box, crop: Box) -> bool:
    width = min(box[0] + box[2], crop[0] + crop[2]) - max(box[0], crop[0])
    height = min(box[1] + box[3], crop[1] + crop[3]) - max(box[1], crop[1])
    return width > 0 and height > 0


def _inside(box: Box, crop: Box) -> Box:
    """The part of `box` in `crop`, in fractions of `crop`."""
    left = min(max((box[0] - crop[0]) / crop[2], 0.0), 1.0)
    top = min(max((box[1] - crop[1]) / crop[3], 0.0), 1.0)
    return (left, top, min(box[2] / crop[2], 1 - left), min(box[3] / crop[3], 1 - top))


@dataclass(frozen=True)
class LayoutTokenizer:
    """Bounding boxes as tokens (section 4.3.1; taming-transformers' ObjectsBoundingBoxConditionalBuilder).

    Every object is a triple: class, top-left cell, bottom-right cell, on a grid of floor(sqrt(no_tokens)) cells a side.
    The class token adds n_categories times a bit mask of attributes: 1 group, and with `use_additional_parameters`
    2 occluded, 4 depiction, 8 inside. Missing objects are triples of no_tokens - 1. With `encode_crop` boxes stay
    relative to the whole image, and two more tokens tell the crop.

    The published models have no_tokens 8192 (90 x 90 cells), 30 objects and the crop: 92 tokens.
    """

    n_categories: int
    max_objects: int = 30
    no_tokens: int = 8192
    encode_crop: bool = True
    use_group_parameter: bool = True
    use_additional_parameters: bool = False

    def __post_init__(self) -> None:
        bits = 16 if self.use_additional_parameters else 2 if self.use_group_parameter else 1
        if self.n_categories * bits >= self.no_tokens:
            raise UserError(
                f"layout tokens: {self.n_categories} categories with {bits} attribute combinations do not fit into "
                f"no_tokens={self.no_tokens} (one of them pads); raise no_tokens"
            )

    @property
    def length(self) -> int:
        """Number of tokens of every layout."""
        return 3 * self.max_objects + (2 if self.encode_crop else 0)

    @property
    def padding(self) -> int:
        return self.no_tokens - 1

    @property
    def cells(self) -> int:
        """Cells per side of the coordinate grid."""
        return math.isqrt(self.no_tokens)

    def _cell(self, x: float, y: float) -> int:
        return round(y * (self.cells - 1)) * self.cells + round(x * (self.cells - 1))

    def _corners(self, box: Box) -> tuple[int, int]:
        return self._cell(box[0], box[1]), self._cell(box[0] + box[2], box[1] + box[3])

    def _box(self, first: int, second: int) -> Box:
        side = self.cells - 1
        (top, left), (bottom, right) = divmod(first, self.cells), divmod(second, self.cells)
        return (left / side, top / side, (right - left) / side, (bottom - top) / side)

    def _class(self, item: LayoutObject) -> int:
        if not 0 <= item.category < self.n_categories:
            raise UserError(f"layout: class {item.category} is outside 0..{self.n_categories - 1}")
        bits = int(item.is_group_of) if self.use_group_parameter else 0
        if self.use_additional_parameters:
            bits |= 2 * item.is_occluded | 4 * item.is_depiction | 8 * item.is_inside
        return item.category + self.n_categories * bits

    def encode_objects(
        self,
        objects: Sequence[LayoutObject],
        crop: Box | None = None,
        flip: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Tokens of a layout; objects beyond max_objects and those outside the crop are dropped.

        Args:
            crop: part of the image that is shown (left, top, width, height); None is all of it.
            flip: the image is mirrored left to right.
            generator: shuffles the objects, as the authors do in training; None keeps their order.
        """
        crop = crop or WHOLE_IMAGE
        objects = list(objects[: self.max_objects])
        if generator is not None:
            objects = [objects[i] for i in torch.randperm(len(objects), generator=generator).tolist()]
        frame = WHOLE_IMAGE if self.encode_crop else crop
        tokens: list[int] = []
        for item in objects:
            if _overlaps(item.box, crop):
                box = _inside(item.box, frame)
                tokens += [self._class(item), *self._corners(_mirror(box) if flip else box)]
        tokens += [self.padding] * (3 * self.max_objects - len(tokens))
        if self.encode_crop:
            tokens += self._corners(_mirror(crop) if flip else crop)
        return tokens

    def encode(self, classes: Sequence[int], boxes: Sequence[Sequence[float]], **options: Any) -> list[int]:
        """Tokens of plain objects: `classes` and their boxes (left, top, width, height) in fractions of the image."""
        objects = [
            LayoutObject(int(c), (box[0], box[1], box[2], box[3])) for c, box in zip(classes, boxes, strict=True)
        ]
        return self.encode_objects(objects, **options)

    def decode(self, tokens: Sequence[int]) -> tuple[list[LayoutObject], Box | None]:
        """Objects of a token sequence, with boxes on the cell grid, and the crop (None without `encode_crop`)."""
        if len(tokens) != self.length:
            raise UserError(f"layout: {len(tokens)} tokens, expected {self.length}")
        tokens = [int(token) for token in tokens]
        objects = []
        for i in range(0, 3 * self.max_objects, 3):
            token, first, second = tokens[i : i + 3]
            if token != self.padding:
                bits, category = divmod(token, self.n_categories)
                flags = [bool(bits & bit) for bit in (1, 2, 4, 8)]
                objects.append(LayoutObject(category, self._box(first, second), *flags))
        return objects, self._box(tokens[-2], tokens[-1]) if self.encode_crop else None


def layout_tokens(
    annotations: Sequence[Mapping[str, Any]], tokenizer: LayoutTokenizer, crop: Box | None = None, flip: bool = False
) -> list[int]:
    """Library. Tokens of annotations in the authors' form: dicts with `category_no`, `bbox` and attribute flags."""
    attributes = ("is_group_of", "is_occluded", "is_depiction", "is_inside")
    objects = [
        LayoutObject(int(a["category_no"]), tuple(a["bbox"]), *(a.get(name) is True for name in attributes))
        for a in annotations
    ]
    return tokenizer.encode_objects(objects, crop, flip)


@dataclass(frozen=True)
class Retrieved:
    """Row numbers [B, J], unit-norm neighbours [B, J, D], and the two contexts [B, L + J, D] of a retrieval."""

    neighbours: Tensor
    embeddings: Tensor
    context: Tensor
    uncond_context: Tensor


def retrieve(query_BLD: Tensor, database_ND: Tensor, k: int, chunk: int = 262_144) -> Retrieved:
    """Library. Exact search of the `k` nearest database entries by cosine (retrieval-augmented, arXiv 2204.11824).

    The context is the query's tokens, as given, followed by the neighbours at unit norm; the unconditional context is
    zeros. The database is read in chunks of `chunk` rows, so it may live on disk (memory-mapped).

    Args:
        query_BLD: image or text embeddings; the first token of each is searched for.
    """
    if k > len(database_ND):
        raise UserError(f"retrieval: {k} neighbours asked of a database of {len(database_ND)} entries")
    query_BD = F.normalize(query_BLD[:, 0].float(), dim=-1)
    best_BJ = query_BD.new_empty(len(query_BD), 0)
    rows_BJ = torch.empty(len(query_BD), 0, dtype=torch.long, device=query_BD.device)
    for start in range(0, len(database_ND), chunk):
        part_ND = F.normalize(database_ND[start : start + chunk].to(query_BD), dim=-1)
        similarity_BN, index_BN = (query_BD @ part_ND.T).topk(min(k, len(part_ND)), dim=1)
        best_BJ, order_BJ = torch.cat([best_BJ, similarity_BN], 1).topk(
            min(k, best_BJ.shape[1] + similarity_BN.shape[1])
        )
        rows_BJ = torch.cat([rows_BJ, index_BN + start], 1).gather(1, order_BJ)
    embeddings_BJD = F.normalize(database_ND[rows_BJ.to(database_ND.device)].to(query_BD), dim=-1)
    context_BLD = torch.cat([query_BLD, embeddings_BJD.to(query_BLD)], dim=1)
    return Retrieved(rows_BJ, embeddings_BJD, context_BLD, torch.zeros_like(context_BLD))
