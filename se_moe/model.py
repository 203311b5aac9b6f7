"""A GPT-style language model whose feed-forward layers are, every so often, mixtures of experts (paper §5, table 1).

Shapes: B sequences, L tokens of one, D hidden, V vocabulary, A attention heads, C = D / A.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.products import Linear, product
from se_moe.communication import ParallelGroups, Transport, direct_transport
from se_moe.config import ModelConfig
from se_moe.embedding import Partition, PartitionedEmbedding
from se_moe.moe import MoELayer

INIT_STD = 0.02  # GPT-2


class KeyValues(NamedTuple):
    """Attention's memory of earlier tokens, [B, A, L, C] each."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(hidden, 3 * hidden)
        self.out = Linear(hidden, hidden)

    def forward(self, x_BLD: Tensor, past: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        """The tokens of x follow those of `past`; returns the result and the memory including x."""
        batch, length, hidden = x_BLD.shape
        split = self.qkv(x_BLD).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        if past is None:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            key, value = torch.cat((past.key, key), dim=2), torch.cat((past.value, value), dim=2)
            mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=x_BLD.device)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.tril(key.shape[2] - length))
        return self.out(y.transpose(1, 2).reshape(batch, length, hidden)), KeyValues(key, value)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)) that keeps x alone: GELU is computed again in the backward pass, as cheap as reading it."""

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_TF, weight_DF)
        return product(F.gelu(x_TF), weight_DF.t(), bias_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TF, weight_DF = ctx.saved_tensors
        dy_TD = grads[0]
        dx_TF = torch.ops.aten.gelu_backward(product(dy_TD, weight_DF), x_TF)
        return dx_TF, product(dy_TD.t(), F.gelu(x_TF)), dy_TD.sum(0)


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, hidden: int, dense_hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, dense_hidden)
        self.fc2 = Linear(dense_hidden, hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        hidden_BLF = self.fc1(x_BLD)
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x_BLD.device.type):
            return self.fc2(F.gelu(hidden_BLF))
        y_TD = _GeluLinear.apply(hidden_BLF.flatten(0, -2), self.fc2.weight, self.fc2.bias)
        return y_TD.view(x_BLD.shape)


class BlockOutput(NamedTuple):
    """A transformer layer's result; the gate's numbers are None in a dense layer."""

    x: Tensor
    memory: KeyValues
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    requested_E: Tensor | None = None


class Block(nn.Module):
    """Pre-norm transformer layer, dense (`mlp`) or with experts (`moe`)."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups, transport: Transport) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.hidden)
        self.attn = Attention(config.hidden, config.heads)
        self.ln2 = nn.LayerNorm(config.hidden)
        self.moe: MoELayer | None = None
        self.mlp: FeedForward | None = None
        if config.has_experts(layer):
            self.moe = MoELayer(
                config.hidden,
                config.expert_hidden,
                config.experts,
                config.gate,
                groups,
                residual=config.residual,
                transport=transport,
            )
        else:
            self.mlp = FeedForward(config.hidden, config.dense_hidden)

    def forward(self, x_BLD: Tensor, past: KeyValues | None = None) -> BlockOutput:
        attended, memory = self.attn(self.ln1(x_BLD), past)
        x_BLD = x_BLD + attended
        if self.moe is None:
            assert self.mlp is not None
            return BlockOutput(x_BLD + self.mlp(self.ln2(x_BLD)), memory)
        found = self.moe(self.ln2(x_BLD))
        return BlockOutput(x_BLD + found.y, memory, found.aux_loss, found.z_loss, found.requested_E)


class LossOutput(NamedTuple):
    """Losses of this rank's tokens; `loss` = lm_loss + aux_weight * aux_loss + z_weight * z_loss.

    `aux_loss` and `z_loss` are sums over MoE layers; `requested_ME` counts the routes of every expert in every MoE
    layer before dropping, int64.
    """

    loss: Tensor
    lm_loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    requested_ME: Tensor


class MoELanguageModel(nn.Module):
    """The model; its output layer is tied to the token embedding.

    Args:
        config: sizes.
        groups: expert and data parallelism; None: one process.
        partition: how the embedding table is split over `groups.world`; None: every rank holds it.
        transport: how AlltoAll rows travel.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ParallelGroups | None = None,
        partition: Partition | None = None,
        transport: Transport = direct_transport,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups or ParallelGroups()
        split = self.groups.world if partition is not None else None
        self.wte = PartitionedEmbedding(config.vocabulary, config.hidden, split, partition or "columns")
        self.wpe = nn.Embedding(config.sequence, config.hidden)
        self.blocks = nn.ModuleList(Block(config, i, self.groups, transport) for i in range(config.layers))
        self.ln_f = nn.LayerNorm(config.hidden)

    def moe_layers(self) -> list[MoELayer]:
        """The mixtures, first layer first."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters of this rank's experts: the sparse ones."""
        return [p for n, p in self.named_parameters() if is_expert(n)]

    def partitioned_parameters(self) -> list[nn.Parameter]:
        """This rank's slice of the embedding table where it is split over ranks, else nothing."""
        return [self.wte.weight] if self.wte.group is not None else []

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters of which every rank has a copy."""
        split = {id(p) for p in self.partitioned_parameters()}
        return [p for n, p in self.named_parameters() if not is_expert(n) and id(p) not in split]

    def embed(self, ids_BL: Tensor, start: int = 0) -> Tensor:
        """Token and position vectors [B, L, D]; the first token stands at position `start`."""
        length = ids_BL.shape[1]
        if start + length > self.config.sequence:
            raise UserError(
                f"{start + length} tokens are more than the model's sequence of {self.config.sequence}: "
                "shorten the text"
            )
        return self.wte(ids_BL) + self.wpe.weight[start : start + length]

    def forward(self, ids_BL: Tensor, targets_BL: Tensor) -> LossOutput:
        """Losses of predicting `targets_BL` (below 0: not counted) from `ids_BL`, both int64."""
        x_BLD = self.embed(ids_BL)
        aux: list[Tensor] = []
        z: list[Tensor] = []
        requested: list[Tensor] = []
        for block in self.blocks:
            found = block(x_BLD)
            x_BLD = found.x
            if found.aux_loss is not None:
                aux.append(found.aux_loss)
                z.append(found.z_loss)
                requested.append(found.requested_E)
        hidden_TD = self.ln_f(x_BLD).view(-1, self.config.hidden)
        lm_loss = self.wte.cross_entropy(hidden_TD, targets_BL.reshape(-1))
        zero = lm_loss.new_zeros(())
        aux_loss, z_loss = sum(aux, zero), sum(z, zero)
        loss = lm_loss
        if aux and self.config.aux_weight:
            loss = loss + self.config.aux_weight * aux_loss
        if z and self.config.z_weight:
            loss = loss + self.config.z_weight * z_loss
        counts = torch.stack(requested) if requested else torch.zeros((0, self.config.experts), dtype=torch.int64)
        return LossOutput(loss, lm_loss, aux_loss, z_loss, counts)

    def next_logits(self, ids_BL: Tensor, memory: list[KeyValues] | None = None) -> tuple[Tensor, list[KeyValues]]:
        """Logits [B, V] of the token after `ids_BL`, which follow those in `memory`, and the memory including them."""
        start = memory[0].key.shape[2] if memory else 0
        x_BLD = self.embed(ids_BL, start)
        kept: list[KeyValues] = []
        for i, block in enumerate(self.blocks):
            found = block(x_BLD, memory[i] if memory else None)
            x_BLD = found.x
            kept.append(found.memory)
        return self.wte.logits(self.ln_f(x_BLD[:, -1])), kept

    @torch.no_grad()
    def generate(
        self, ids_BL: Tensor, tokens: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue `ids_BL` by `tokens` tokens; temperature 0 takes the likeliest. Returns [B, L + tokens]."""
        memory: list[KeyValues] | None = None
        new_BL = ids_BL
        for _ in range(tokens):
            logits_BV, memory = self.next_logits(new_BL, memory)
            new_BL = sample_token(logits_BV, temperature, generator)
            ids_BL = torch.cat((ids_BL, new_BL), dim=1)
        return ids_BL


def sample_token(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token of every row, [B, 1]."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), 1, generator=generator)


_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")


def is_expert(name: str) -> bool:
    """Whether a parameter of that name belongs to one expert (not to the gate or the residual expert)."""
    return _EXPERT.fullmatch(name) is not None


def global_names(model: MoELanguageModel) -> dict[str, str]:
    """Parameter name on this rank -> name in which experts are numbered over all ranks of the expert group."""
    first = {
        name: module.groups.expert_rank * module.num_local
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
    }
    found = {}
    for name, _ in model.named_parameters():
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = name
            continue
        layer = match[1].removesuffix(".deepspeed_moe.experts.deepspeed_experts.")
        found[name] = f"{match[1]}{first[layer] + int(match[2])}{match[3]}"
    return found


@torch.no_grad()
def initialise(model: MoELanguageModel, seed: int) -> None:
    """GPT-2's initialisation as a function of (seed, parameter name): any number of ranks starts from the same model.

    Weights N(0, 0.02), those that write to the residual stream divided by sqrt(2 layers), biases 0, norms 1.
    """
    names = global_names(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(names[name].encode()))
            shape = (model.wte.vocabulary, model.wte.hidden) if parameter is model.wte.weight else parameter.shape
            value = torch.randn(shape, generator=generator) * INIT_STD
            if name.endswith(("attn.out.weight", "fc2.weight")):
                value /= (2 * model.config.layers) ** 0.5
            if parameter is model.wte.weight and model.wte.group is not None:
                value = model.wte.slice_of(value)
            parameter.copy_(value)
