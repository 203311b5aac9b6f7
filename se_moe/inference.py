"""From a trained model to one that serves (section 3.3.1): the six steps of the paper's graph pipeline.

    1 fuse      `merge_ranks`: the ranks' shards become one graph; parameters that exist twice are kept once
                (`share_duplicates`)
    2 compress  `prune_experts` drops experts that no token visits, `distil` trains a student with fewer experts
    3 static    `ServingBlock` has no data-dependent shapes: torch.export and torch.compile capture it whole
    4 cut       `cut` splits the blocks into sub-graphs by bytes, one per device; `Server` moves activations on
    5 kernels   the grouped expert GEMM is one operator inside the graph, torch.compile fuses what lies between
    6 deploy    `save_served`/`load_served`, `serve.py`; experts in host memory behind a ring of device sections

Expert weights are inputs of a block's graph, not part of it, so that the same graph reads them from wherever the ring
has put them.

Shapes: B sequences, L tokens of one, P earlier tokens, D hidden, F expert hidden, E experts, S experts kept, K choices,
T = B * L tokens, N = T * K rows, V vocabulary, A heads, C = D / A.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common.kernels.moe_dispatch  # noqa: F401  registers less_compute::moe_grouped_linear
from common.errors import UserError, stop_if_not_finite
from common.files import read_object, write_atomically, write_json
from common.training import load_checkpoint, save_checkpoint
from common.weights import check_weights, read_weights, save_weights
from se_moe.config import ModelConfig
from se_moe.model import Block, KeyValues, MoELanguageModel, sample_token
from se_moe.ring import RingOffload
from se_moe.storage import Charge, DeviceArena, Throttle, gigabytes

EXPERT_TENSORS = ("w1", "b1", "w2", "b2")
_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")
_HIDDEN_LOGIT = -1e30  # softmax of it is exactly zero


def merge_ranks(states: Sequence[Mapping[str, Tensor]], partition: str | None = None) -> dict[str, Tensor]:
    """One state dict out of those of all ranks of an expert group, in rank order.

    Parameters that every rank has are kept once, experts are numbered over all ranks, a split embedding is joined.

    Args:
        partition: how `wte.weight` was split: "columns", "rows" or None (not).

    Raises:
        UserError: ranks disagree about a parameter that they should share.
    """
    merged: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    for rank, state in enumerate(states):
        found: dict[str, int] = {}
        for name, tensor in state.items():
            match = _EXPERT.fullmatch(name)
            if match is not None:
                layer, local = match[1], int(match[2])
                found[layer] = max(found.get(layer, 0), local + 1)
                merged[f"{layer}{first.get(layer, 0) + local}{match[3]}"] = tensor
            elif name == "wte.weight" and partition is not None:
                continue
            elif name not in merged:
                merged[name] = tensor
            elif not torch.equal(merged[name], tensor):
                raise UserError(
                    f"rank {rank} has other values of {name} than rank 0; these files are not one checkpoint of one run"
                )
        for layer, count in found.items():
            first[layer] = first.get(layer, 0) + count
    if partition is not None:
        tables = [state["wte.weight"] for state in states]
        merged["wte.weight"] = torch.cat(tables, dim=1 if partition == "columns" else 0)
    return merged


def share_duplicates(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of which no two are equal, and for every dropped name the name of its equal."""
    unique: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    by_sum: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        sketch = (tensor.dtype, tuple(tensor.shape), float(tensor.double().sum()))
        equal = next((other for other in by_sum.get(sketch, []) if torch.equal(unique[other], tensor)), None)
        if equal is None:
            unique[name] = tensor
            by_sum.setdefault(sketch, []).append(name)
        else:
            alias[name] = equal
    return unique, alias


class ServingBlock(nn.Module):
    """A transformer layer as a graph with static structure: dense parameters inside, expert weights as inputs.

    Args:
        block: of the trained model (dropless gate).
        kept: experts of the trained layer that are served; None: all. The gate still scores all of them: a token whose
            choices are all kept gets exactly the weights it had, any other chooses among the kept.
    """

    slot_E: Tensor

    def __init__(self, block: Block, top_k: int, kept: Sequence[int] | None = None) -> None:
        super().__init__()
        self.ln1, self.attn, self.ln2 = block.ln1, block.attn, block.ln2
        self.mlp = block.mlp
        self.top_k = top_k
        self.has_experts = block.moe is not None
        if block.moe is None:
            return
        self.wg = block.moe.gate.wg
        self.residual, self.coefficient = block.moe.mlp, block.moe.coefficient
        experts = self.wg.weight.shape[0]
        self.kept = list(range(experts)) if kept is None else sorted(kept)
        if not self.top_k <= len(self.kept):
            raise UserError(f"{len(self.kept)} experts would be left, a token chooses {self.top_k}: keep more")
        slot_E = torch.full((experts,), -1, dtype=torch.int64)
        slot_E[self.kept] = torch.arange(len(self.kept))
        self.register_buffer("slot_E", slot_E, persistent=False)

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(experts of a token, the likeliest first, [T, K]; probabilities of all experts [T, E])."""
        probs_TE = torch.softmax(logits_TE, dim=1)
        if self.top_k > 2:
            return probs_TE.topk(self.top_k, dim=1).indices, probs_TE
        first_T = probs_TE.argmax(1)
        if self.top_k == 1:
            return first_T[:, None], probs_TE
        second_T = logits_TE.scatter(1, first_T[:, None], float("-inf")).argmax(1)
        return torch.stack((first_T, second_T), dim=1), probs_TE

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(slot of the expert, weight) of every choice, [T, K] each; the rules of `gating`, without capacity."""
        logits_TE = F.linear(x_TD.float(), self.wg.weight.float())
        expert_TK, probs_TE = self._choose(logits_TE)
        if len(self.kept) < self.slot_E.numel():
            pruned_E = self.slot_E < 0
            lost_T = pruned_E[expert_TK].any(1)
            expert_TK, probs_TE = self._choose(torch.where(lost_T[:, None] & pruned_E, _HIDDEN_LOGIT, logits_TE))
        weight_TK = probs_TE.gather(1, expert_TK)
        if self.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        return self.slot_E[expert_TK], weight_TK

    def _experts(self, x_TD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        slot_TK, weight_TK = self._route(x_TD)
        sorted_N, order_N = torch.sort(slot_TK.reshape(-1), stable=True)
        edges = torch.arange(len(self.kept) + 1, device=x_TD.device)
        starts_S1 = torch.searchsorted(sorted_N, edges)
        rows_ND = x_TD.index_select(0, torch.div(order_N, self.top_k, rounding_mode="floor"))
        linear = torch.ops.less_compute.moe_grouped_linear
        rows_ND = linear(F.gelu(linear(rows_ND, w1, b1, starts_S1)), w2, b2, starts_S1)
        row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0], device=x_TD.device))
        parts_TKD = rows_ND.index_select(0, row_N).view(-1, self.top_k, x_TD.shape[1])
        y_TD = parts_TKD[:, 0] * weight_TK[:, :1].to(x_TD.dtype)
        for k in range(1, self.top_k):
            y_TD = y_TD + parts_TKD[:, k] * weight_TK[:, k : k + 1].to(x_TD.dtype)
        return y_TD

    def forward(
        self, x_BLD: Tensor, key_BAPC: Tensor, value_BAPC: Tensor, *experts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of x follow the P remembered ones (P may be 0).

        Args:
            experts: w1 [S, F, D], b1 [S, F], w2 [S, D, F], b2 [S, D]; nothing for a dense layer.

        Returns:
            The result and the memory with x's keys and values appended.
        """
        attended, memory = self.attn(self.ln1(x_BLD), KeyValues(key_BAPC, value_BAPC))
        x_BLD = x_BLD + attended
        normed_BLD = self.ln2(x_BLD)
        if not self.has_experts:
            assert self.mlp is not None
            return x_BLD + self.mlp(normed_BLD), memory.key, memory.value
        h_TD = normed_BLD.reshape(-1, normed_BLD.shape[-1])
        y_TD = self._experts(h_TD, *experts)
        if self.residual is not None and self.coefficient is not None:
            share_T2 = torch.softmax(self.coefficient(h_TD), dim=-1)
            y_TD = y_TD * share_T2[:, :1] + self.residual(h_TD) * share_T2[:, 1:]
        return x_BLD + y_TD.reshape(x_BLD.shape), memory.key, memory.value


@dataclass
class ServedModel:
    """A model taken apart for serving.

    `experts[i]` are the stacked expert weights of layer i (EXPERT_TENSORS) in host memory, empty for a dense layer;
    `kept[i]` the trained layer's experts among them.
    """

    config: ModelConfig
    embed: nn.Embedding
    positions: nn.Embedding
    blocks: list[ServingBlock]
    norm: nn.LayerNorm
    experts: list[dict[str, Tensor]]
    kept: list[list[int]]

    @property
    def expert_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.experts for tensor in layer.values())

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The dense modules under the trained model's names."""
        named: list[tuple[str, nn.Module]] = [("wte", self.embed), ("wpe", self.positions), ("ln_f", self.norm)]
        return named + [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]

    @property
    def dense_bytes(self) -> int:
        return sum(p.nbytes for _, part in self.parts() for p in part.parameters())


def _stack(block: Block, kept: Sequence[int]) -> dict[str, Tensor]:
    assert block.moe is not None
    experts = [block.moe.local_experts[e] for e in kept]
    return {
        "w1": torch.stack([e.fc1.weight.detach() for e in experts]),
        "b1": torch.stack([e.fc1.bias.detach() for e in experts]),
        "w2": torch.stack([e.fc2.weight.detach() for e in experts]),
        "b2": torch.stack([e.fc2.bias.detach() for e in experts]),
    }


def serving_form(model: MoELanguageModel, kept: Sequence[Sequence[int]] | None = None) -> ServedModel:
    """Take a whole model (one rank, experts in it) apart.

    Args:
        kept: per transformer layer the experts to serve (empty for a dense layer); None: all.

    Raises:
        UserError: the gate drops tokens over a capacity (a served token must not depend on its neighbours), or the
            model is one rank's share.
    """
    if model.config.gate.drop_tokens:
        raise UserError("the model drops tokens over a capacity; serve it with gate.drop_tokens false (no capacity)")
    if model.groups.expert_size > 1 or model.wte.group is not None:
        raise UserError("the model is one rank's share: merge the ranks' checkpoints first (inference.merge_ranks)")
    config = model.config
    embed = nn.Embedding(config.vocabulary, config.hidden, _weight=model.wte.weight.detach())
    blocks: list[ServingBlock] = []
    experts: list[dict[str, Tensor]] = []
    chosen: list[list[int]] = []
    for index, block in enumerate(cast(list[Block], list(model.blocks))):
        layer_kept = None if kept is None else kept[index]
        serving = ServingBlock(block, config.gate.top_k, layer_kept if block.moe is not None else None)
        blocks.append(serving.eval().requires_grad_(False))
        chosen.append(serving.kept if serving.has_experts else [])
        experts.append(_stack(block, serving.kept) if serving.has_experts else {})
    return ServedModel(config, embed, model.wpe, blocks, model.ln_f, experts, chosen)


@torch.no_grad()
def expert_usage(model: MoELanguageModel, batches: Iterable[Tensor]) -> Tensor:
    """Routes of every expert in every MoE layer over some text, int64 [M, E]; `batches` are ids [B, L]."""
    was_training = model.training
    model.eval()
    total: Tensor | None = None
    for ids_BL in batches:
        counts_ME = model(ids_BL, ids_BL).requested_ME
        total = counts_ME if total is None else total + counts_ME
    model.train(was_training)
    if total is None:
        raise UserError("no text to count expert usage on")
    return total


def prune_experts(model: MoELanguageModel, usage_ME: Tensor, least: int = 1) -> list[list[int]]:
    """Per transformer layer the experts with at least `least` routes, for `serving_form(model, kept)`.

    With `least` 1 the outputs on the counted text stay what they were. A layer keeps at least top_k experts, the most
    used ones.
    """
    kept: list[list[int]] = []
    row = 0
    for block in model.blocks:
        if block.moe is None:
            kept.append([])
            continue
        counts_E = usage_ME[row]
        by_use = counts_E.argsort(descending=True, stable=True).tolist()
        count = max(int((counts_E >= least).sum()), model.config.gate.top_k)
        kept.append(sorted(by_use[:count]))
        row += 1
    return kept


def student_of(teacher: MoELanguageModel, experts: int, usage_ME: Tensor | None = None) -> MoELanguageModel:
    """A model with fewer experts that starts from the teacher: its dense part, its most used experts, their gate rows.

    Args:
        usage_ME: from `expert_usage`; None takes the first experts.
    """
    if not teacher.config.gate.top_k <= experts <= teacher.config.experts:
        raise UserError(
            f"a student of {experts} experts: expected {teacher.config.gate.top_k} (top_k) to {teacher.config.experts}"
        )
    student = MoELanguageModel(dataclasses.replace(teacher.config, experts=experts))
    source = teacher.state_dict()
    chosen: dict[str, list[int]] = {}
    row = 0
    for name, _ in teacher.named_modules():
        if name.endswith(".moe"):
            ranked = (
                range(experts) if usage_ME is None else usage_ME[row].argsort(descending=True, stable=True)[:experts]
            )
            chosen[name] = sorted(int(e) for e in ranked)
            row += 1
    state = {}
    for name in student.state_dict():
        layer = name.split(".deepspeed_moe.")[0]
        match = _EXPERT.fullmatch(name)
        if match is not None:
            state[name] = source[f"{match[1]}{chosen[layer][int(match[2])]}{match[3]}"]
        elif name.endswith("gate.wg.weight"):
            state[name] = source[name][chosen[layer]]
        else:
            state[name] = source[name]
    student.load_state_dict(state)
    return student


def token_logits(model: MoELanguageModel, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [B, L, V] of every token's successor, sum of the auxiliary losses); one rank."""
    x_BLD = model.embed(ids_BL)
    aux = x_BLD.new_zeros(())
    for block in model.blocks:
        found = block(x_BLD)
        x_BLD = found.x
        if found.aux_loss is not None:
            aux = aux + found.aux_loss
    return model.ln_f(x_BLD) @ model.wte.weight.T, aux


def distillation_loss(
    student_BLV: Tensor, teacher_BLV: Tensor, targets_BL: Tensor, temperature: float = 2.0, weight: float = 0.5
) -> Tensor:
    """weight * T^2 * KL(teacher / T || student / T) + (1 - weight) * cross-entropy; targets below 0 do not count."""
    valid = targets_BL >= 0
    student, teacher = student_BLV[valid], teacher_BLV[valid]
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return weight * temperature**2 * soft + (1 - weight) * F.cross_entropy(student, targets_BL[valid])


def distil(
    teacher: MoELanguageModel,
    student: MoELanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float = 1e-3,
    temperature: float = 2.0,
    weight: float = 0.5,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
) -> MoELanguageModel:
    """Train `student` on `batches` of (ids, targets) [B, L] with the teacher's soft labels; returns it.

    `weight` 0 is ordinary training: the arm to compare with. With a `checkpoint` file it goes on from there.
    """
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    first = 0
    if checkpoint is not None and checkpoint.is_file():
        state = load_checkpoint(checkpoint)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        first = state["step"]
    for step, (ids_BL, targets_BL) in enumerate(batches):
        if step < first:
            continue
        with torch.no_grad():
            teacher_BLV = token_logits(teacher, ids_BL)[0] if weight else torch.zeros(())
        student_BLV, aux = token_logits(student, ids_BL)
        if weight:
            loss = distillation_loss(student_BLV, teacher_BLV, targets_BL, temperature, weight)
        else:
            loss = F.cross_entropy(student_BLV.flatten(0, 1), targets_BL.flatten(), ignore_index=-1)
        stop_if_not_finite(float(loss.detach()), step, advice="a lower lr", what="distillation loss")
        (loss + student.config.aux_weight * aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step, float(loss.detach()))
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            weights = student.state_dict()
            random = torch.get_rng_state()
            state = {"student": weights, "optimizer": optimizer.state_dict(), "random": random, "step": step + 1}
            save_checkpoint(checkpoint, state, weights, step + 1)
    return student


Graph = Callable[..., tuple[Tensor, Tensor, Tensor]]
MODES = ("eager", "export", "compile")


def to_graph(block: ServingBlock, config: ModelConfig, experts: Mapping[str, Tensor], mode: str) -> Graph:
    """The block as a static graph: "export" captures it with torch.export (any L and P), "compile" lets inductor fuse.

    Args:
        experts: of this layer; only their shapes matter.
    """
    if mode == "eager":
        return block
    if mode == "compile":
        return torch.compile(block, dynamic=True)
    weight = block.ln1.weight
    head = config.hidden // config.heads
    x_BLD = weight.new_zeros(1, 3, config.hidden)
    memory = weight.new_zeros(1, config.heads, 4, head)
    stacked = tuple(torch.empty_like(experts[name], device=weight.device) for name in EXPERT_TENSORS if name in experts)
    tokens = torch.export.Dim("tokens", min=1, max=config.sequence)
    past = torch.export.Dim("past", min=0, max=config.sequence)
    shapes = ({1: tokens}, {2: past}, {2: past}, *([tuple(None for _ in stacked)] if stacked else []))
    program = torch.export.export(block, (x_BLD, memory, memory.clone(), *stacked), dynamic_shapes=shapes, strict=False)
    return program.module()


def cut(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Consecutive layers for each of `parts` devices so that the largest sum of `sizes` is as small as possible."""
    if not 1 <= parts <= len(sizes):
        raise UserError(f"{len(sizes)} layers cannot be cut into {parts} sub-graphs; use 1 to {len(sizes)}")
    best: dict[tuple[int, int], tuple[int, int]] = {(0, 0): (0, 0)}
    for part in range(1, parts + 1):
        for end in range(part, len(sizes) + 1):
            options = [
                (max(best[part - 1, start][0], sum(sizes[start:end])), start)
                for start in range(part - 1, end)
                if (part - 1, start) in best
            ]
            best[part, end] = min(options)
    bounds = [len(sizes)]
    for part in range(parts, 0, -1):
        bounds.append(best[part, bounds[-1]][1])
    bounds.reverse()
    return [list(range(a, b)) for a, b in pairwise(bounds)]


class _SubGraph:
    """Consecutive blocks on one device, their experts resident or behind a ring."""

    def __init__(
        self,
        served: ServedModel,
        layers: Sequence[int],
        arena: DeviceArena,
        sections: int | None,
        mode: str,
        overlap: bool,
        throttle: Throttle | None,
    ) -> None:
        self.layers, self.arena = list(layers), arena
        self._charges: list[Charge] = []
        self.ring: RingOffload | None = None
        self.resident: dict[int, dict[str, Tensor]] = {}
        self.ring_index = {i: n for n, i in enumerate(i for i in layers if served.experts[i])}
        blocks = [served.blocks[i] for i in layers]
        try:
            dense = sum(p.nbytes for block in blocks for p in block.parameters())
            self._charges.append(arena.charge(dense, "dense parameters"))
            self._place_experts(served, sections, overlap, throttle)
            self.graphs = {
                i: to_graph(block.to(arena.device), served.config, served.experts[i], mode)
                for i, block in zip(self.layers, blocks)
            }
        except BaseException:
            self.close()
            raise

    def _place_experts(
        self, served: ServedModel, sections: int | None, overlap: bool, throttle: Throttle | None
    ) -> None:
        host = [served.experts[i] for i in self.ring_index]
        if not host:
            return
        if sections is None:
            size = sum(tensor.nbytes for layer in host for tensor in layer.values())
            self._charges.append(self.arena.charge(size, "resident experts"))
            for i, layer in zip(self.ring_index, host):
                self.resident[i] = {name: tensor.to(self.arena.device) for name, tensor in layer.items()}
            return
        if self.arena.device.type == "cuda":
            host = [{name: tensor.pin_memory() for name, tensor in layer.items()} for layer in host]
        self.ring = RingOffload(host, sections, self.arena, overlap, throttle)

    def run(self, x_BLD: Tensor, memory: list[KeyValues]) -> Tensor:
        x_BLD = x_BLD.to(self.arena.device)  # the communication between sub-graphs
        for i in self.layers:
            if self.ring is not None and i in self.ring_index:
                with self.ring.layer(self.ring_index[i]) as views:
                    found = self.graphs[i](x_BLD, *memory[i], *(views[name] for name in EXPERT_TENSORS))
            else:
                weights = [self.resident[i][name] for name in EXPERT_TENSORS] if i in self.resident else []
                found = self.graphs[i](x_BLD, *memory[i], *weights)
            x_BLD, memory[i] = found[0], KeyValues(found[1], found[2])
        return x_BLD

    def close(self) -> None:
        if self.ring is not None:
            self.ring.close()
        for charge in self._charges:
            charge.free()


class Server:
    """Generates text within the memory budgets of its devices.

    The budgets count parameters: the dense part, ring sections or resident experts. Activations and the key/value
    memory of the running text come on top.

    Args:
        served: the model; its expert weights stay in host memory unless `sections` is None.
        arenas: one per device; the blocks are cut into as many sub-graphs.
        sections: ring sections per device; None: all experts resident.
        mode: "eager", "export" or "compile".
        overlap, throttle: see `RingOffload`.

    Raises:
        UserError: a budget is too small (names what would not fit), the mode is unknown, or there are more devices than
            layers.
    """

    def __init__(
        self,
        served: ServedModel,
        arenas: Sequence[DeviceArena],
        sections: int | None = None,
        mode: str = "eager",
        overlap: bool = True,
        throttle: Throttle | None = None,
    ) -> None:
        self.served, self.arenas = served, list(arenas)
        sizes = [
            sum(p.nbytes for p in block.parameters()) + sum(t.nbytes for t in layer.values())
            for block, layer in zip(served.blocks, served.experts)
        ]
        first, last = self.arenas[0], self.arenas[-1]
        self.embed, self.positions = served.embed.to(first.device), served.positions.to(first.device)
        self.norm = served.norm.to(last.device)
        table = served.embed.weight.nbytes + served.positions.weight.nbytes
        if mode not in MODES:
            raise UserError(f"graph mode {mode!r} is unknown; expected one of {', '.join(MODES)}")
        parts = cut(sizes, len(self.arenas))
        self._charges: list[Charge] = []
        self.parts: list[_SubGraph] = []
        try:
            self._charges.append(first.charge(table, "embedding"))
            self._charges.append(last.charge(sum(p.nbytes for p in self.norm.parameters()), "norm"))
            for layers, arena in zip(parts, self.arenas):
                self.parts.append(_SubGraph(served, layers, arena, sections, mode, overlap, throttle))
        except UserError as error:
            self.close()
            need = f"dense part {gigabytes(served.dense_bytes)}, experts {gigabytes(served.expert_bytes)}"
            raise UserError(f"the model does not fit ({need}): {error}") from None
        except BaseException:
            self.close()
            raise

    def empty_memory(self, batch: int) -> list[KeyValues]:
        """No earlier tokens."""
        config = self.served.config
        shape = (batch, config.heads, 0, config.hidden // config.heads)
        place = {i: part.arena.device for part in self.parts for i in part.layers}
        dtype = self.embed.weight.dtype
        return [
            KeyValues(*(torch.zeros(shape, dtype=dtype, device=place[i]) for _ in range(2)))
            for i in range(config.layers)
        ]

    @torch.no_grad()
    def next_logits(self, ids_BL: Tensor, memory: list[KeyValues]) -> Tensor:
        """Logits [B, V] of the token after `ids_BL`; `memory` gets their keys and values."""
        start, length = memory[0].key.shape[2], ids_BL.shape[1]
        if start + length > self.served.config.sequence:
            raise UserError(
                f"{start + length} tokens are longer than the model's sequence of {self.served.config.sequence}; "
                f"shorten the prompt or ask for fewer tokens"
            )
        x_BLD = self.embed(ids_BL.to(self.embed.weight.device)) + self.positions.weight[start : start + length]
        try:
            for part in self.parts:
                x_BLD = part.run(x_BLD, memory)
        except BaseException:
            for part in self.parts:
                if part.ring is not None:
                    part.ring.restart()
            raise
        hidden_BD = self.norm(x_BLD[:, -1])
        return (hidden_BD.to(self.embed.weight.device) @ self.embed.weight.T).cpu()

    def generate(
        self, ids_BL: Tensor, tokens: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue `ids_BL` by `tokens` tokens; temperature 0 takes the likeliest. Returns [B, L + tokens].

        When the model's sequence is full, the latest half of it is read again and generation goes on from there.
        """
        memory, new_BL = self.empty_memory(ids_BL.shape[0]), ids_BL
        for _ in range(tokens):
            if memory[0].key.shape[2] + new_BL.shape[1] > self.served.config.sequence:
                new_BL = ids_BL[:, -(self.served.config.sequence // 2) :]
                memory = self.empty_memory(ids_BL.shape[0])
            new_BL = sample_token(self.next_logits(new_BL, memory), temperature, generator)
            ids_BL = torch.cat((ids_BL, new_BL), dim=1)
        return ids_BL

    @property
    def device_peak_bytes(self) -> list[int]:
        return [arena.peak_bytes for arena in self.arenas]

    def close(self) -> None:
        for part in self.parts:
            part.close()
        for charge in self._charges:
            charge.free()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dense_state(served: ServedModel) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": p for prefix, part in served.parts() for name, p in part.state_dict().items()}


def save_served(served: ServedModel, folder: Path, tokenizer: str | None = None) -> None:
    """Write a model that `serve.py` reads: model.json, weights.safetensors (equal tensors once), tokenizer.json.

    Args:
        tokenizer: JSON text of the tokenizers library.
    """
    tensors = _dense_state(served)
    tensors |= {f"experts.{i}.{name}": t for i, layer in enumerate(served.experts) for name, t in layer.items()}
    unique, alias = share_duplicates({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    folder = Path(folder)
    # The description goes last: a folder that has one is complete.
    save_weights(folder / "weights.safetensors", unique)
    if tokenizer is not None:
        write_atomically(folder / "tokenizer.json", lambda path: path.write_text(tokenizer, encoding="utf-8"))
    write_json(folder / "model.json", {"model": served.config.plain(), "kept": served.kept, "alias": alias})


def load_served(folder: Path) -> ServedModel:
    """Read what `save_served` wrote.

    Raises:
        UserError: the folder holds no such model, or its files do not belong together.
    """
    folder = Path(folder)
    path = folder / "model.json"
    if not path.exists():
        raise UserError(f"{folder}: no model.json there; expected a folder that `make se_moe-train` wrote for serving")
    tensors = read_weights(folder / "weights.safetensors")[0]
    try:
        content = read_object(path)
        config = ModelConfig.parse(content["model"])
        kept: list[list[int]] = content["kept"]
        tensors |= {name: tensors[equal] for name, equal in content["alias"].items()}
        experts = [
            {name: tensors.pop(f"experts.{i}.{name}") for name in EXPERT_TENSORS} if kept[i] else {}
            for i in range(config.layers)
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder}: not a served model ({error}); write it again with train.py") from None
    with torch.device("meta"):
        full = MoELanguageModel(config)
        embed = nn.Embedding(config.vocabulary, config.hidden)
    blocks = [ServingBlock(block, config.gate.top_k, kept[i] or None) for i, block in enumerate(full.blocks)]  # type: ignore[arg-type]
    served = ServedModel(config, embed, full.wpe, blocks, full.ln_f, experts, kept)
    check_weights(tensors, _dense_state(served), str(folder / "weights.safetensors"), "model.json")
    for prefix, part in served.parts():
        own = {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
        part.load_state_dict(own, assign=True)
        part.eval().requires_grad_(False)
    for block, layer_kept in zip(served.blocks, kept):
        if layer_kept:
            slot_E = torch.full((config.experts,), -1, dtype=torch.int64)
            slot_E[layer_kept] = torch.arange(len(layer_kept))
            block.slot_E = slot_E
    return served
