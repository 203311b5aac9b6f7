"""The one-dimensional binary tokenizer (1D-BIT): pictures to k tokens of bits and back, at any size.

Parameters bear the names of the released weights. Shape suffixes: B batch, C channels, H height, W width of pictures in
pixels; h, w of the grid of image tokens; L tokens, K latent tokens, D bits, E width of a network, A heads, N their
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.files import read_object, write_json
from common.kernels.attention import attention
from common.kernels.products import Linear
from common.weights import load_weights, save_weights
from instella_t2i.config import NetworkConfig
from instella_t2i.quantizers import Quantized, Quantizer, make_quantizer

EPS = 1e-6  # of every RMS norm
WEIGHTS, ABOUT = "model.safetensors", "config.json"
FORMAT = "instella_t2i tokenizer"

Table = tuple[Tensor, Tensor]  # cosines and sines [L, N]


def image_positions(rows: int, columns: int, scale: float | None) -> Tensor:
    """(0, y, x) of image tokens [rows * columns, 3], row by row, float32.

    Args:
        scale: with it y = row / (rows - 1) (scale - 1), so that every size covers the same range; None: y = row.

    Raises:
        UserError: one row or column has no such coordinate.
    """
    if scale is not None and min(rows, columns) < 2:
        raise UserError(
            f"{rows} x {columns} image tokens: stretched coordinates (network.scale) need at least 2 x 2; take a "
            "larger picture"
        )

    def axis(count: int) -> Tensor:
        steps = torch.arange(count, dtype=torch.float32)
        return steps if scale is None else steps / (count - 1) * (scale - 1)

    y, x = torch.meshgrid(axis(rows), axis(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)


def latent_positions(tokens: int) -> Tensor:
    """(i, 0, 0) of latent tokens [tokens, 3]."""
    return F.pad(torch.arange(tokens, dtype=torch.float32)[:, None], (0, 2))


def grid_positions(side: int, rows: int, columns: int, scale: float | None) -> Tensor:
    """(0, y, x) of the baseline's side x side tokens, over the range of rows x columns image tokens."""

    def axis(count: int) -> Tensor:
        return torch.linspace(0, (count if scale is None else scale) - 1, side)

    y, x = torch.meshgrid(axis(rows), axis(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)


def rotary_table(positions_L3: Tensor, axes: Sequence[int], theta: float) -> Table:
    """Cosines and sines [L, N]; of each axis every frequency stands twice in a row (the interleaved layout)."""
    angles = []
    for number, width in enumerate(axes):
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = positions_L3[:, number].double()[:, None] * frequencies
        angles.append(angle.repeat_interleave(2, 1))
    angle_LN = torch.cat(angles, 1)
    return angle_LN.cos().float(), angle_LN.sin().float()


def rotate(x_BALN: Tensor, table: Table, pairs: bool) -> Tensor:
    """x cos + turn(x) sin, in float32.

    The released turn, (-second half, first half), belongs to another layout than the table's: the result is no
    rotation, and released weights depend on it. `pairs` turns neighbours (2i, 2i + 1), which is one.
    """
    cos_LN, sin_LN = table
    x = x_BALN.float()
    if pairs and not torch.compiler.is_compiling():  # the same products and sums in one pass, three times as fast
        turn_LM = torch.complex(cos_LN[:, ::2], sin_LN[:, ::2])
        z_BALM = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(z_BALM * turn_LM).flatten(-2).to(x_BALN.dtype)
    if pairs:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return (x * cos_LN + turned * sin_LN).to(x_BALN.dtype)


class RmsNorm(nn.RMSNorm):
    """In float32 at least: half precision sums squares too coarsely, and has no fused kernel here."""

    def __init__(self, width: int) -> None:
        super().__init__(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x if x.dtype == torch.float64 else x.float(), self.normalized_shape, self.weight, self.eps)


class Attention(nn.Module):
    """Full attention with an RMS norm of every head's queries and keys before the rotation; no biases."""

    def __init__(self, heads: int, head_dim: int, pairs: bool = False) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.pairs = heads, pairs
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(width, width, bias=False) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(head_dim), RmsNorm(head_dim)

    def forward(self, x_BLE: Tensor, table: Table) -> Tensor:
        def heads(projected_BLE: Tensor) -> Tensor:
            return projected_BLE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = (heads(project(x_BLE)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.norm_q(q), table, self.pairs), rotate(self.norm_k(k), table, self.pairs)
        return self.o_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), 4 times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, 4 * width, bias=False), Linear(width, 4 * width, bias=False)
        self.down_proj = Linear(4 * width, width, bias=False)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLE)) * self.up_proj(x_BLE))


class Block(nn.Module):
    """x += Attention(norm x); x += GatedMlp(norm x)."""

    def __init__(self, heads: int, head_dim: int, pairs: bool = False) -> None:
        super().__init__()
        width = heads * head_dim
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width), RmsNorm(width)
        self.attn, self.mlp = Attention(heads, head_dim, pairs), GatedMlp(width)

    def forward(self, x_BLE: Tensor, table: Table) -> Tensor:
        x_BLE = x_BLE + self.attn(self.input_layernorm(x_BLE), table)
        return x_BLE + self.mlp(self.post_attention_layernorm(x_BLE))


class Downsample(nn.Module):
    """Half the grid: a strided convolution beside 2 x 2 places laid into channels, averaged in groups of 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x_BEhw: Tensor) -> Tensor:
        shortcut = F.pixel_unshuffle(x_BEhw, 2).unflatten(1, (x_BEhw.shape[1], 4)).mean(2)
        return self.conv(x_BEhw) + shortcut


class Upsample(nn.Module):
    """Twice the grid: a convolution to 4 times the channels, shuffled to pixels, beside each pixel repeated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x_BEhw: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x_BEhw) + x_BEhw.repeat_interleave(4, 1), 2)


class _Trunk(nn.Module):
    """What encoder and decoder share: blocks over [latent tokens, image tokens], resizing of the image tokens."""

    def __init__(self, config: NetworkConfig, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.width = config, heads * head_dim
        pairs = config.rotary == "pairs"
        self.transformer_blocks = nn.ModuleList(Block(heads, head_dim, pairs) for _ in range(layers))
        self.norm_out = RmsNorm(self.width)

    def table(self, latents: int, rows: int, columns: int, scale: float | None, like: Tensor) -> Table:
        config = self.config
        return _table(latents, rows, columns, scale, config.layout, tuple(config.axes), config.theta, str(like.device))

    def resized(self, x_BLE: Tensor, latents: int, rows: int, columns: int, layer: nn.Module) -> Tensor:
        """The tokens with the image part through `layer`."""
        image_BEhw = x_BLE[:, latents:].transpose(1, 2).unflatten(2, (rows, columns))
        return torch.cat([x_BLE[:, :latents], layer(image_BEhw).flatten(2).transpose(1, 2)], 1)


@lru_cache(maxsize=64)
def _table(
    latents: int,
    rows: int,
    columns: int,
    scale: float | None,
    layout: str,
    axes: tuple[int, ...],
    theta: float,
    device: str,
) -> Table:
    image_L3 = image_positions(rows, columns, scale)
    if layout == "line":
        latent_L3 = latent_positions(latents)
    else:
        latent_L3 = grid_positions(int(latents**0.5), rows, columns, scale)
    cos_LN, sin_LN = rotary_table(torch.cat([latent_L3, image_L3]), axes, theta)
    return cos_LN.to(device), sin_LN.to(device)


class Encoder(_Trunk):
    """Pictures [B, 3, H, W] to K states [B, K, E]; image tokens are dropped at the end."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, config.encoder_layers, config.encoder_heads, config.encoder_head_dim)
        if config.layout == "line":
            # As large as embedded patches: smaller ones differ in their rotation alone, and are told apart late.
            self.latent_tokens = nn.Parameter(torch.randn(1, config.tokens, self.width) * 0.5)
        self.patch_embedder = nn.Conv2d(3, self.width, config.patch, stride=config.patch)
        self.down_layers = nn.ModuleList(Downsample(self.width) for _ in config.down_after)
        self.proj_out = Linear(self.width, self.width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        config = self.config
        image_BEhw = self.patch_embedder(x_BCHW)
        rows, columns = image_BEhw.shape[-2:]
        scale = None if config.scale is None else config.scale / config.patch
        latents = config.tokens if config.layout == "line" else 0
        x_BLE = image_BEhw.flatten(2).transpose(1, 2)
        if latents:
            x_BLE = torch.cat([self.latent_tokens.expand(len(x_BLE), -1, -1).to(x_BLE.dtype), x_BLE], 1)
        table, down = self.table(latents, rows, columns, scale, x_BLE), iter(self.down_layers)
        for number, block in enumerate(self.transformer_blocks):
            x_BLE = block(x_BLE, table)
            if number in config.down_after:
                x_BLE = self.resized(x_BLE, latents, rows, columns, next(down))
                rows, columns, scale = rows // 2, columns // 2, None if scale is None else scale // 2
                table = self.table(latents, rows, columns, scale, x_BLE)
        if not latents:  # the baseline: a picture's grid becomes side x side tokens
            side = int(config.tokens**0.5)
            image_BEhw = x_BLE.transpose(1, 2).unflatten(2, (rows, columns))
            x_BLE = F.adaptive_avg_pool2d(image_BEhw, side).flatten(2).transpose(1, 2)
            latents = config.tokens
        return self.proj_out(self.norm_out(x_BLE[:, :latents]))


class Decoder(_Trunk):
    """Values of the codes [B, K, E of the encoder] to image tokens [B, h w, E] of the size that is asked for."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, config.decoder_layers, config.decoder_heads, config.decoder_head_dim)
        inner = config.encoder_heads * config.encoder_head_dim
        self.mask_tokens = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.input_layer = nn.Sequential(RmsNorm(inner), Linear(inner, self.width))
        self.up_layers = nn.ModuleList(Upsample(self.width) for _ in config.up_after)

    def forward(self, z_BKE: Tensor, size: tuple[int, int]) -> Tensor:
        config, latents = self.config, z_BKE.shape[1]
        scale = None if config.scale is None else config.scale / config.patch
        rows, columns = (side // config.patch for side in size)
        for _ in self.up_layers:
            rows, columns, scale = rows // 2, columns // 2, None if scale is None else scale // 2
        x_BKE = self.input_layer(z_BKE)
        masks = self.mask_tokens.expand(len(z_BKE), rows * columns, -1).to(x_BKE.dtype)
        x_BLE = torch.cat([x_BKE, masks], 1)
        table, up = self.table(latents, rows, columns, scale, x_BLE), iter(self.up_layers)
        for number, block in enumerate(self.transformer_blocks):
            x_BLE = block(x_BLE, table)
            if number in config.up_after:
                x_BLE = self.resized(x_BLE, latents, rows, columns, next(up))
                rows, columns, scale = rows * 2, columns * 2, None if scale is None else scale * 2
                table = self.table(latents, rows, columns, scale, x_BLE)
        return self.norm_out(x_BLE[:, latents:])


class Reconstruction(NamedTuple):
    """Pictures [B, 3, H, W] and what the quantizer made on the way."""

    pixels_BCHW: Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """Encoder, quantizer, decoder; pictures are in [-1, 1], codes are 0 or 1.

    Args:
        size: side of the pictures that it was trained on, kept with its weights.

    Raises:
        UserError: options that do not fit each other.
    """

    quantizer: Quantizer

    def __init__(self, config: NetworkConfig, size: int = 0) -> None:
        super().__init__()
        check_network(config)
        self.config, self.size = config, size
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = make_quantizer(config.quantizer, self.encoder.width, config.bits)
        self.to_pixel = Linear(self.decoder.width, 3 * config.patch**2)

    @property
    def multiple(self) -> int:
        """That the sides of pictures have to be multiples of to come back, in pixels; see `multiple_of`."""
        return multiple_of(self.config)

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Codes [B, K, D] of 0 and 1 (float32), without noise."""
        self._check_pictures(x_BCHW, len(self.config.down_after))
        return self.quantizer(self.encoder(x_BCHW)).codes_BLD

    @torch.no_grad()
    def decode(self, codes_BLD: Tensor, size: int | tuple[int, int]) -> Tensor:
        """Pictures [B, 3, H, W] of any size from codes [B, K, D]; not clamped.

        Args:
            size: side, or (height, width), in multiples of `multiple`.
        """
        expected = (self.config.tokens, self.config.bits)
        if codes_BLD.dim() != 3 or tuple(codes_BLD.shape[1:]) != expected:
            raise UserError(f"codes of the shape {list(codes_BLD.shape)}: expected [pictures, {expected[0]} tokens, "
                            f"{expected[1]} bits]")  # fmt: skip
        return self.paint(self.quantizer.values(codes_BLD), size)

    def paint(self, z_BKE: Tensor, size: int | tuple[int, int]) -> Tensor:
        """Pictures from the values of codes, with gradients."""
        height, width = (size, size) if isinstance(size, int) else size
        self._check((height, width), len(self.config.up_after))
        patch = self.config.patch
        flat_BLP = self.to_pixel(self.decoder(z_BKE, (height, width)))
        grid = flat_BLP.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, 3))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, height, width)  # from (h, w, a, b, c)

    def forward(self, x_BCHW: Tensor, uniform_BLD: Tensor | None = None, tau: float = 0.0) -> Reconstruction:
        """A picture and back.

        Args:
            uniform_BLD: numbers in [0, 1) that draw the bits while training; None thresholds them.
            tau: temperature of those draws.
        """
        self._check_pictures(x_BCHW, max(len(self.config.down_after), len(self.config.up_after)))
        quantized = self.quantizer(self.encoder(x_BCHW), uniform_BLD, tau)
        height, width = x_BCHW.shape[-2:]
        return Reconstruction(self.paint(quantized.values_BLE, (height, width)), quantized)

    def _check_pictures(self, x_BCHW: Tensor, halvings: int) -> None:
        if x_BCHW.dim() != 4 or x_BCHW.shape[1] != 3:
            raise UserError(f"pictures of the shape {list(x_BCHW.shape)}: expected [pictures, 3, height, width]")
        self._check(tuple(x_BCHW.shape[-2:]), halvings)

    def _check(self, size: tuple[int, ...], halvings: int) -> None:
        multiple = self.config.patch * 2**halvings
        if any(side < 1 or side % multiple for side in size):
            height, width = size
            raise UserError(f"a picture of {height} x {width} pixels: expected multiples of {multiple}")


def multiple_of(config: NetworkConfig) -> int:
    """That the sides of pictures have to be multiples of, in pixels: a patch at the coarsest grid of both ways. The
    encoder's or the decoder's alone may be finer."""
    return config.patch * 2 ** max(len(config.down_after), len(config.up_after))


def check_network(config: NetworkConfig) -> None:
    """Refuse options of the network that do not fit each other.

    Raises:
        UserError: naming them.
    """
    for side in ("encoder", "decoder"):
        width, layers = getattr(config, f"{side}_head_dim"), getattr(config, f"{side}_layers")
        if len(config.axes) != 3 or sum(config.axes) != width or any(axis % 2 for axis in config.axes):
            raise UserError(
                f"--network.axes {config.axes}: expected three even numbers that add up to --network.{side}_head_dim "
                f"{width}"
            )
        name = "down_after" if side == "encoder" else "up_after"
        after = getattr(config, name)
        if sorted(set(after)) != after or any(number >= layers for number in after):
            raise UserError(f"--network.{name} {after}: expected rising numbers below --network.{side}_layers {layers}")
    if config.layout == "grid" and int(config.tokens**0.5) ** 2 != config.tokens:
        raise UserError(f"--network.tokens {config.tokens}: --network.layout grid needs a square number")
    most = {"vq": 16, "lfq": 14}.get(config.quantizer)
    if most is not None and config.bits > most:
        raise UserError(
            f"--network.bits {config.bits}: --network.quantizer {config.quantizer} looks at all 2^bits codes; expected "
            f"at most {most}"
        )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, about: dict[str, Any] | None = None) -> Path:
    """Write a folder with `config.json` and `model.safetensors`.

    Args:
        about: further facts for config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, tokenizer.state_dict())
    content = {"format": FORMAT, "size": tokenizer.size, "network": asdict(tokenizer.config), **(about or {})}
    write_json(folder / ABOUT, content)  # last: a folder with it is whole
    return folder


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu", option: str = "") -> Tokenizer:
    """A tokenizer that `save_tokenizer` wrote, frozen, in float32.

    Args:
        option: that named the folder, for messages.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.options import check_ranges

    folder = Path(folder)
    label = f"{option} {folder}".strip()
    if not (folder / ABOUT).is_file():
        raise UserError(f"{label}: no {ABOUT} there; expected the folder of a tokenizer (or convert released weights)")
    content = read_object(folder / ABOUT)
    if content.get("format") != FORMAT or not isinstance(content.get("network"), dict):
        raise UserError(f"{label}: its {ABOUT} is not that of a tokenizer of this program")
    try:
        config = NetworkConfig(**content["network"])
        check_ranges(config, "network.")
    except TypeError as error:
        raise UserError(f"{label}: its {ABOUT} has other options than expected ({error})") from None
    with torch.device("meta"):
        tokenizer = Tokenizer(config, int(content.get("size") or 0))
    tokenizer = tokenizer.to_empty(device="cpu")
    load_weights(tokenizer, folder / WEIGHTS, against=f"its {ABOUT}", option=option)
    return tokenizer.to(device).eval().requires_grad_(False)
