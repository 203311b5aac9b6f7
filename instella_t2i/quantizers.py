"""Vectors to codes of 0 and 1 and back: binary (the paper's), one-hot VQ, lookup-free and binary spherical baselines.

All have one form: states [B, L, E] -> values [B, L, E] with straight-through gradients, codes [B, L, D], a loss of
their own. A one-hot code is written as the bits of its index. Shape suffixes: B batch, L tokens, E width, D bits,
N samples (B x L), G groups, g bits of a group, J codes of a group or codebook, W width of a codebook's entry.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.products import Linear

CODE_WIDTH = 16  # W of the one-hot codebook; TiTok has 12 to 16
COMMITMENT = 0.25
LFQ_TEMPERATURE, LFQ_SAMPLE, LFQ_BATCH = 0.01, 1.0, 1.2  # Open-MAGVIT2
BSQ_INVERSE_TEMPERATURE, BSQ_GROUP, BSQ_GAMMA0, BSQ_GAMMA, BSQ_ZETA = 100.0, 9, 1.0, 1.0, 0.1  # BSQ-ViT
RESTART_EVERY = 100  # steps after which entries that no token chose are replaced


class Quantized(NamedTuple):
    """What a quantizer makes of states."""

    values_BLE: Tensor  # what the decoder is given; gradients pass to the states
    codes_BLD: Tensor  # 0 or 1, float32
    loss: Tensor  # the quantizer's own term
    terms: dict[str, Tensor]  # its parts, for the log; of binary codes the mean square of the logits, with gradients


class Quantizer(nn.Module):
    """The form of all of them."""

    def forward(self, h_BLE: Tensor, uniform_BLD: Tensor | None = None, tau: float = 0.0) -> Quantized:
        raise NotImplementedError

    def values(self, codes_BLD: Tensor) -> Tensor:
        """What the decoder is given for codes [B, L, D]."""
        raise NotImplementedError

    def after_step(self, generator: torch.Generator) -> None:
        """Called after every optimiser step."""


def bernoulli_codes(logits_BLD: Tensor, uniform_BLD: Tensor, tau: float) -> Tensor:
    """b = [u < sigmoid(l / tau)]; at tau = 0 the threshold [l > 0]."""
    if tau == 0:
        return (logits_BLD > 0).to(logits_BLD.dtype)
    return (uniform_BLD < torch.sigmoid(logits_BLD / tau)).to(logits_BLD.dtype)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, exactly, with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


class BinaryQuantizer(Quantizer):
    """The paper's: z = b E, b Bernoulli bits of sigmoid(l / tau), l = Linear(h); only set bits add a vector of E.

    The straight-through gradient is that of sigmoid(l), without tau. Its loss is the mean of p (1 - p).
    """

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Linear(width, bits))
        self.embed = nn.Parameter(torch.randn(bits, width) * 0.02)

    def logits(self, h_BLE: Tensor) -> Tensor:
        """[B, L, D]; in float32, since probabilities of half precision are too coarse to draw from."""
        return self.proj(h_BLE).float()

    def forward(self, h_BLE: Tensor, uniform_BLD: Tensor | None = None, tau: float = 0.0) -> Quantized:
        logits_BLD = self.logits(h_BLE)
        p_BLD = torch.sigmoid(logits_BLD)
        with torch.no_grad():
            uniform = torch.zeros_like(p_BLD) if uniform_BLD is None else uniform_BLD
            codes_BLD = bernoulli_codes(logits_BLD, uniform, 0.0 if uniform_BLD is None else tau)
        loss = (p_BLD * (1 - p_BLD)).mean()
        uncertain = ((p_BLD.detach() - 0.5).abs() < 0.4).float().mean()
        values_BLE = self.values(straight_through(codes_BLD, p_BLD))
        terms = {"code_loss": loss.detach(), "uncertain_bits": uncertain, "logits": logits_BLD.square().mean()}
        return Quantized(values_BLE, codes_BLD, loss, terms)

    def values(self, codes_BLD: Tensor) -> Tensor:
        return codes_BLD.to(self.embed.dtype) @ self.embed


def entropy(probabilities: Tensor) -> Tensor:
    """Over the last axis, in nats; the 1e-8 keeps the gradient finite where a probability is 0."""
    return -(probabilities * (probabilities + 1e-8).log()).sum(-1)


def bits_of(index: Tensor, bits: int) -> Tensor:
    """The bits of whole numbers [...], the least first: [..., D] of 0 and 1 (float32)."""
    return ((index[..., None] >> torch.arange(bits, device=index.device)) & 1).float()


def index_of(codes_BLD: Tensor) -> Tensor:
    """The whole number whose bits, the least first, are given: [B, L]."""
    weights_D = 2 ** torch.arange(codes_BLD.shape[-1], device=codes_BLD.device)
    return (codes_BLD.long() * weights_D).sum(-1)


def _divided(bits: int, number: int, how: str) -> int:
    """`bits` over a number that divides them; `how` names it in a message."""
    if number < 1 or bits % number:
        raise UserError(f"{bits} bits in {how}: expected a number that divides {bits}")
    return bits // number


class VqResult(NamedTuple):
    z_q: Tensor  # straight-through, [..., W]
    entry: Tensor  # numbers of the entries, [...]
    loss: Tensor


def vector_quantize(
    z_NW: Tensor, codebook_JW: Tensor, commitment: float = COMMITMENT, normalise: bool = True
) -> VqResult:
    """The nearest entry of a codebook (VQ-VAE, equation 3), on the unit sphere where `normalise` (TiTok)."""
    z, entries = z_NW, codebook_JW
    if normalise:
        z, entries = F.normalize(z, dim=-1), F.normalize(entries, dim=-1)
    flat = z.flatten(0, -2)
    distance = flat.square().sum(1, keepdim=True) + entries.square().sum(1) - 2 * flat @ entries.T
    index = distance.argmin(1)
    chosen = entries[index].view_as(z)
    loss = commitment * F.mse_loss(z, chosen.detach()) + F.mse_loss(chosen, z.detach())
    return VqResult(straight_through(chosen, z), index.view(z.shape[:-1]), loss)


class VectorQuantizer(Quantizer):
    """One-hot: a token is one of 2^bits l2-normalised entries; entries that nobody chooses are replaced by states.

    Between restarts `chosen` counts each entry, and `recent` keeps the latest states to take new entries from.
    """

    chosen: Tensor
    recent: Tensor
    steps: Tensor

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.proj = nn.Sequential(Linear(width, CODE_WIDTH))
        self.codebook = nn.Parameter(torch.empty(2**bits, CODE_WIDTH).uniform_(-1, 1) / 2**bits)
        self.embed = nn.Parameter(torch.randn(CODE_WIDTH, width) * CODE_WIDTH**-0.5)
        self.register_buffer("chosen", torch.zeros(2**bits))
        self.register_buffer("recent", torch.zeros(256, CODE_WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, h_BLE: Tensor, uniform_BLD: Tensor | None = None, tau: float = 0.0) -> Quantized:
        z_BLW = self.proj(h_BLE).float()
        found = vector_quantize(z_BLW, self.codebook)
        if self.training:
            with torch.no_grad():
                self.chosen += torch.bincount(found.entry.flatten(), minlength=len(self.chosen))
                latest = z_BLW.flatten(0, 1)[-len(self.recent) :]
                self.recent = torch.cat([self.recent[len(latest) :], latest.to(self.recent.dtype)])
        return Quantized(
            found.z_q @ self.embed, bits_of(found.entry, self.bits), found.loss, {"vq_loss": found.loss.detach()}
        )

    def values(self, codes_BLD: Tensor) -> Tensor:
        return F.normalize(self.codebook, dim=-1)[index_of(codes_BLD)] @ self.embed

    @torch.no_grad()
    def after_step(self, generator: torch.Generator) -> None:
        from common.steps import mean_over_processes

        self.steps += 1
        if self.steps % RESTART_EVERY:
            return
        dead = mean_over_processes(self.chosen) == 0
        recent = mean_over_processes(self.recent)  # equal on all processes, as the codebook has to be
        rows = torch.randint(len(recent), (int(dead.sum()),), generator=generator, device=generator.device)
        self.codebook[dead] = recent[rows.to(recent.device)].to(self.codebook.dtype)
        self.chosen.zero_()


class LfqResult(NamedTuple):
    z_q: Tensor
    codes: Tensor  # 0 or 1
    sample_entropy: Tensor
    codebook_entropy: Tensor
    commit: Tensor
    aux: Tensor


def lookup_free(
    z_BLD: Tensor,
    temperature: float = LFQ_TEMPERATURE,
    sample_weight: float = LFQ_SAMPLE,
    batch_weight: float = LFQ_BATCH,
    codebooks: int = 1,
) -> LfqResult:
    """Signs of each dimension (MAGVIT-v2, equations 3 and 4); entropies over all 2^D codes, whose softmax is of their
    products with z, doubled, over the temperature. aux = sample_weight H(sample) - batch_weight H(codebook).

    Args:
        codebooks: parts that the D bits are cut into, each a code of its own; entropies are over the 2^(D / codebooks)
            codes of a part, and means over the parts.

    Raises:
        UserError: the bits cannot be cut into so many parts.
    """
    bits = _divided(z_BLD.shape[-1], codebooks, f"{codebooks} codebooks")
    hard = torch.where(z_BLD > 0, 1.0, -1.0).to(z_BLD.dtype)
    z_NJ = z_BLD.unflatten(-1, (codebooks, bits)).flatten(0, -2)
    if z_NJ.dtype != torch.float64:
        z_NJ = z_NJ.float()
    codes_JD = 2 * bits_of(torch.arange(2**bits, device=z_BLD.device), bits).to(z_NJ.dtype) - 1
    logits_NJ = 2 * z_NJ @ codes_JD.T / temperature
    p_NJ, log_NJ = logits_NJ.softmax(1), logits_NJ.log_softmax(1)
    sample = -(p_NJ * log_NJ).sum(1).mean()
    mean_J = p_NJ.mean(0)
    codebook = -(mean_J * (mean_J + 1e-5).log()).sum()
    commit = (hard.detach() - z_BLD).square().mean()
    aux = sample_weight * sample - batch_weight * codebook
    return LfqResult(straight_through(hard, z_BLD), (hard > 0).float(), sample, codebook, commit, aux)


class LookupFreeQuantizer(Quantizer):
    """z = q E with q the signs of Linear(h)."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Linear(width, bits))
        self.embed = nn.Parameter(torch.randn(bits, width) * 0.02)

    def forward(self, h_BLE: Tensor, uniform_BLD: Tensor | None = None, tau: float = 0.0) -> Quantized:
        found = lookup_free(self.proj(h_BLE).float())
        loss = found.aux + COMMITMENT * found.commit
        terms = {"sample_entropy": found.sample_entropy.detach(), "codebook_entropy": found.codebook_entropy.detach()}
        return Quantized(found.z_q @ self.embed, found.codes, loss, terms)

    def values(self, codes_BLD: Tensor) -> Tensor:
        return (2 * codes_BLD.to(self.embed.dtype) - 1) @ self.embed


class BsqResult(NamedTuple):
    z_q: Tensor
    codes: Tensor  # 0 or 1
    sample_entropy: Tensor
    codebook_entropy: Tensor
    loss: Tensor
    group_index: Tensor  # the first bit of a group counts most


def spherical(
    z_BLD: Tensor,
    group: int = BSQ_GROUP,
    inverse_temperature: float = BSQ_INVERSE_TEMPERATURE,
    beta: float = COMMITMENT,
    gamma0: float = BSQ_GAMMA0,
    gamma: float = BSQ_GAMMA,
    zeta: float = BSQ_ZETA,
    normalise: bool = True,
    analytical: bool = False,
) -> BsqResult:
    """Signs on the unit sphere, +-1 / sqrt(D) (BSQ-ViT, equations 5 to 12).

    loss = beta commitment + zeta (gamma0 H(sample) - gamma H(codebook)) / inverse temperature.

    Args:
        group: bits whose 2^group codes the soft entropies are taken over; divides D.
        normalise: z is on the unit sphere and codes are 1 / sqrt(D) long in each dimension; else they are 1.
        analytical: both entropies bit by bit, from their independent probabilities, in place of group by group.

    Raises:
        UserError: the bits cannot be cut into such groups.
    """
    bits = z_BLD.shape[-1]
    _divided(bits, group, f"groups of {group}")
    length = bits**-0.5 if normalise else 1.0
    signs = torch.where(z_BLD > 0, 1.0, -1.0).to(z_BLD.dtype)
    commit = beta * (signs * length - z_BLD).square().sum(-1).mean()
    z_BLGg = z_BLD.unflatten(-1, (-1, group))
    index_J = torch.arange(2**group, device=z_BLD.device)
    codes_Jg = (2 * bits_of(index_J, group).flip(-1) - 1).to(z_BLD.dtype) * length
    if analytical:
        p_BLD = torch.sigmoid(4 * inverse_temperature * length * z_BLD)
        p_BLGJ = torch.stack([p_BLD, 1 - p_BLD], -1)  # every bit is a group
    else:
        p_BLGJ = (2 * inverse_temperature * (z_BLGg @ codes_Jg.T)).softmax(-1)
    sample = entropy(p_BLGJ).sum(-1).mean()
    codebook = entropy(p_BLGJ.flatten(0, -3).mean(0)).sum()
    loss = commit + zeta * (gamma0 * sample - gamma * codebook) / inverse_temperature
    codes = (signs > 0).float()
    group_index = index_of(codes.unflatten(-1, (-1, group)).flip(-1))
    z_q = straight_through(signs, z_BLD) * length  # the authors scale behind the straight-through gradient
    return BsqResult(z_q, codes, sample, codebook, loss, group_index)


class SphericalQuantizer(Quantizer):
    """z = q E with q the signs of Linear(h), all on the unit sphere."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.group = max(size for size in range(1, BSQ_GROUP + 1) if bits % size == 0)
        self.proj = nn.Sequential(Linear(width, bits))
        self.embed = nn.Parameter(torch.randn(bits, width) * 0.02 * bits**0.5)

    def forward(self, h_BLE: Tensor, uniform_BLD: Tensor | None = None, tau: float = 0.0) -> Quantized:
        found = spherical(F.normalize(self.proj(h_BLE).float(), dim=-1), self.group)
        terms = {"sample_entropy": found.sample_entropy.detach(), "codebook_entropy": found.codebook_entropy.detach()}
        return Quantized(found.z_q @ self.embed, found.codes, found.loss, terms)

    def values(self, codes_BLD: Tensor) -> Tensor:
        return (2 * codes_BLD.to(self.embed.dtype) - 1) * self.bits**-0.5 @ self.embed


def make_quantizer(kind: Literal["binary", "vq", "lfq", "bsq"], width: int, bits: int) -> Quantizer:
    """An untrained one for states of this width."""
    kinds: dict[str, type[Quantizer]] = {
        "binary": BinaryQuantizer,
        "vq": VectorQuantizer,
        "lfq": LookupFreeQuantizer,
        "bsq": SphericalQuantizer,
    }
    return kinds[kind](width, bits)  # type: ignore[call-arg]
