"""First stages of latent diffusion (paper section 3.1, appendix G): KL and VQ autoencoders, and pixels themselves.

Parameter names are those of the authors' code, so their state dicts load as they are. Every first stage offers the
second stage the same things: `downsampling` (f), `embed_dim` (channels of z), `moments`, `latent_from_moments`,
`encode_latent` and `decode_latent`.

Shape suffixes: B batch, C channels, H W height and width (of the image or of the latent, as the docstring says),
N = H*W positions, K codebook entries, D dimension of one codebook entry.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.attention import attention
from common.kernels.group_norm_silu import group_norm_silu
from ldm.config import AutoencoderOptions
from ldm.model import normalise
from ldm.norm import group_count, limit_groups

GROUP_NORM_EPS = 1e-6  # the first stage's; the UNet's is 1e-5


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(group_count(channels), channels, eps=GROUP_NORM_EPS)


def norm_swish(norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
    """swish(norm(x)) in one fused kernel where there is one."""
    return group_norm_silu(x_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)


class ResnetBlock(nn.Module):
    """GroupNorm, swish, conv3x3, twice, around a residual; a 1x1 `nin_shortcut` where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(norm_swish(self.norm1, x_BCHW))
        h_BCHW = self.conv2(self.dropout(norm_swish(self.norm2, h_BCHW)))
        return (self.nin_shortcut(x_BCHW) if self.changes_width else x_BCHW) + h_BCHW


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, scale C^-0.5, 1x1 projections, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = normalise(x_BCHW, self.norm)
        q_B1NC, k_B1NC, v_B1NC = (
            project(h_BCHW).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v)
        )
        h_B1NC = attention(q_B1NC, k_B1NC, v_B1NC)  # one head: its scale is C^-0.5
        return x_BCHW + self.proj_out(h_B1NC.squeeze(1).transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Half the resolution: one row and column of zeros on the bottom and right only, then conv3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then conv3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution of the encoder or decoder: `block`s, each followed by its `attn`; then the resolution changes."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        attends: bool,
        dropout: float,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if j == 0 else channels, channels, dropout) for j in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in range(blocks if attends else 0))
        self.downsample = Downsample(channels) if downsample else None
        self.upsample = Upsample(channels) if upsample else None

    def forward(self, h_BCHW: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            h_BCHW = block(h_BCHW)
            if len(self.attn) > 0:
                h_BCHW = self.attn[j](h_BCHW)
        if self.downsample is not None:
            return self.downsample(h_BCHW)
        return h_BCHW if self.upsample is None else self.upsample(h_BCHW)


class Middle(nn.Module):
    """Res, attention (in the attention-free first stage nothing at all), Res at the lowest resolution."""

    def __init__(self, channels: int, attends: bool, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels) if attends else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h_BCHW)))


class Encoder(nn.Module):
    """Image [B, in_channels, H, W] to features [B, out_channels, H/f, W/f], f = 2^(levels-1).

    Attention is placed where the NOMINAL running resolution (from `resolution`) is in `attn_resolutions`: the network
    stays the same on other image sizes.
    """

    def __init__(
        self, options: AutoencoderOptions, resolution: int, in_channels: int, out_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, options.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, last = options.ch, len(options.ch_mult) - 1
        for i, mult in enumerate(options.ch_mult):
            attends = options.attention and resolution // 2**i in options.attn_resolutions
            blocks = options.num_res_blocks
            self.down.append(Level(width, options.ch * mult, blocks, attends, dropout, downsample=i < last))
            width = options.ch * mult
        self.mid = Middle(width, options.attention, dropout)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            h_BCHW = level(h_BCHW)
        return self.conv_out(norm_swish(self.norm_out, self.mid(h_BCHW)))


class Decoder(nn.Module):
    """Features [B, z_channels, H/f, W/f] to image [B, out_channels, H, W]: the mirror with one more block a level."""

    def __init__(self, options: AutoencoderOptions, resolution: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        width = options.ch * options.ch_mult[-1]
        self.conv_in = nn.Conv2d(options.z_channels, width, 3, padding=1)
        self.mid = Middle(width, options.attention, dropout)
        levels: list[Level] = []
        for i, mult in reversed(list(enumerate(options.ch_mult))):
            attends = options.attention and resolution // 2**i in options.attn_resolutions
            blocks = options.num_res_blocks + 1
            levels.append(Level(width, options.ch * mult, blocks, attends, dropout, upsample=i > 0))
            width = options.ch * mult
        self.up = nn.ModuleList(reversed(levels))  # up.i is level i, the highest i runs first
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h_BCHW = level(h_BCHW)
        return self.conv_out(norm_swish(self.norm_out, h_BCHW))


class DiagonalGaussian:
    """The KL autoencoder's posterior q(z|x) = N(mean, exp(logvar)), logvar clamped to [-30, 20]; computed in float32.

    `moments_BCHW` is [B, 2e, h, w]: mean, then log variance.
    """

    def __init__(self, moments_BCHW: Tensor) -> None:
        self.mean, logvar = moments_BCHW.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.var = self.logvar.exp()
        self.std = (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, [B, e, h, w]; standard normal noise is drawn (from `generator`) when none is given."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(q || other) per image [B] in nats, summed over all dimensions; `other` defaults to N(0, 1)."""
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() / other.var
            terms = distance + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample_BCHW: Tensor) -> Tensor:
        """-log q(sample) per image [B] in nats."""
        terms = math.log(2.0 * math.pi) + self.logvar + (sample_BCHW - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=(1, 2, 3))


class Quantized(NamedTuple):
    """`z` [B, D, h, w] with the gradient passed straight through, `loss` scalar, `indices` [B, h, w] (int64)."""

    z: Tensor
    loss: Tensor
    indices: Tensor


class VectorQuantizer(nn.Module):
    """Nearest codebook entry, straight-through gradient (appendix G; van den Oord et al. 2017).

    With e the entry and sg the stop-gradient: `legacy` (the published models) puts beta on the CODEBOOK term,
    |sg(e) - z|^2 + beta |e - sg(z)|^2; otherwise it is on the commitment term, as the VQ-VAE paper writes it.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def forward(self, z_BCHW: Tensor) -> Quantized:
        z_BCHW = z_BCHW.float()
        indices_BHW = self.nearest(z_BCHW)
        e_BCHW = self.lookup(indices_BHW)
        commitment = F.mse_loss(z_BCHW, e_BCHW.detach())
        codebook = F.mse_loss(e_BCHW, z_BCHW.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return Quantized(z_BCHW + (e_BCHW - z_BCHW).detach(), loss, indices_BHW)

    @torch.no_grad()
    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """Index [B, h, w] of the entry at the smallest squared distance (float32 also under autocast)."""
        batch, _, height, width = z_BCHW.shape
        z_ND = z_BCHW.permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        book_KD = self.embedding.weight.float()
        device = z_BCHW.device.type
        autocasts = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if autocasts else nullcontext():
            # |e|^2 - 2 z.e: |z|^2 is the same for every entry.
            distance_NK = torch.addmm(book_KD.square().sum(1), z_ND.float(), book_KD.t(), alpha=-2.0)
        return distance_NK.argmin(dim=1).reshape(batch, height, width)

    def lookup(self, indices_BHW: Tensor) -> Tensor:
        """Entries [B, D, h, w] of the given indices."""
        return self.embedding(indices_BHW).permute(0, 3, 1, 2)

    @torch.no_grad()
    def usage(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(perplexity in 1..n_e, number of entries used at least once) of these indices; any shape."""
        return codebook_usage(indices, self.n_e)


@torch.no_grad()
def codebook_usage(indices: Tensor, n_e: int) -> tuple[Tensor, Tensor]:
    """Perplexity exp(entropy) of the codes' frequencies, and how many of the n_e codes occur, as float scalars."""
    frequency_K = torch.bincount(indices.flatten(), minlength=n_e).float() / indices.numel()
    perplexity = torch.exp(-(frequency_K * torch.log(frequency_K + 1e-10)).sum())
    return perplexity, (frequency_K > 0).sum().float()


class Autoencoder(nn.Module):
    """What the two regularised first stages share.

    Args:
        resolution: nominal side of the images, which decides where attention is placed.
        embed_dim: channels of z; None for options.z_channels.
    """

    moments_per_channel = 1

    def __init__(
        self,
        options: AutoencoderOptions,
        resolution: int,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        embed_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        each, z_channels = self.moments_per_channel, options.z_channels
        self.embed_dim = z_channels if embed_dim is None else embed_dim
        self.encoder = Encoder(options, resolution, in_channels, each * z_channels, dropout)
        self.decoder = Decoder(options, resolution, out_channels, dropout)
        self.norm_groups = options.norm_groups
        limit_groups(self, options.norm_groups)
        self.downsampling = 2 ** (len(options.ch_mult) - 1)
        self.add_regulariser(options)
        self.quant_conv = nn.Conv2d(each * z_channels, each * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, z_channels, 1)

    def add_regulariser(self, options: AutoencoderOptions) -> None:
        """What regularises the latent, where it has parameters."""

    @property
    def last_layer(self) -> Tensor:
        """W of the adaptive weight: the last decoder convolution's weight."""
        return self.decoder.conv_out.weight

    def moments(self, x_BCHW: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to what is known of z [B, moments_per_channel * e, H/f, W/f]."""
        f, (height, width) = self.downsampling, x_BCHW.shape[-2:]
        if height % f or width % f:
            raise UserError(
                f"image size {height}x{width} is not a multiple of the autoencoder's downsampling factor {f}; "
                f"crop or resize to, for example, {max(f, height // f * f)}x{max(f, width // f * f)}"
            )
        return self.quant_conv(self.encoder(x_BCHW))

    def latent_from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def encode_latent(self, x_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Image to the z that diffusion sees, before its scale factor [B, e, H/f, W/f]."""
        return self.latent_from_moments(self.moments(x_BCHW), noise)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Latent [B, e, h, w] (of a VQ model: codebook vectors) to image [B, out_channels, h*f, w*f], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z_BCHW.to(self.post_quant_conv.weight.dtype)))


class AutoencoderKL(Autoencoder):
    """The KL-regularised first stage; its moments are mean, then unclamped log variance."""

    moments_per_channel = 2

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.moments(x_BCHW))

    def latent_from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """One posterior sample, not the mode (the paper trains the second stage on samples)."""
        return DiagonalGaussian(moments_BCHW).sample(noise)

    def decode_latent(self, z_BCHW: Tensor) -> Tensor:
        return self.decode(z_BCHW)

    def forward(self, x_BCHW: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction of a posterior sample, and the posterior."""
        posterior = self.encode(x_BCHW)
        return self.decode(posterior.sample(noise)), posterior


class VQModel(Autoencoder):
    """The VQ-regularised first stage. Diffusion sees z BEFORE the quantiser, which is the first layer of decoding; its
    moments are that z (nothing random in it)."""

    def add_regulariser(self, options: AutoencoderOptions) -> None:
        self.quantize = VectorQuantizer(options.n_embed, self.embed_dim, legacy=options.legacy_beta)

    def encode(self, x_BCHW: Tensor) -> Quantized:
        return self.quantize(self.moments(x_BCHW))

    def latent_from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """The pre-quantisation vector itself; `noise` is for the common interface and unused."""
        return moments_BCHW.float()

    def decode_latent(self, z_BCHW: Tensor) -> Tensor:
        """Quantise, then decode."""
        return self.decode(self.quantize(z_BCHW).z)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruction, and the quantiser's result (its `loss` is the codebook loss)."""
        quantized = self.encode(x_BCHW)
        return self.decode(quantized.z), quantized


class IdentityFirstStage(nn.Module):
    """f = 1: diffusion on pixels, the LDM-1 baseline of figure 6."""

    downsampling = 1

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.embed_dim = channels

    def moments(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW

    def latent_from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments_BCHW

    def encode_latent(self, x_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        return x_BCHW

    def decode_latent(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW


FirstStage = AutoencoderKL | VQModel | IdentityFirstStage
