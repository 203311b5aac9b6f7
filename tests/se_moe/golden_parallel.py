"""Recorded runs over several ranks: DeepSpeed's MoE layer, AlltoAll, the embedding of replicated data parallelism."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from se_moe.communication import RowPlan, all_to_all_rows, hierarchical_exchange, make_groups, make_topology
from se_moe.config import GateConfig
from se_moe.embedding import PartitionedEmbedding
from se_moe.gating import gshard_routing, switch_routing, topk_routing
from se_moe.moe import MoELayer
from tests.golden_case import Case, Check, assert_close
from tests.se_moe.ranks import run_ranks


def _of_rank(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    start = f"rank{rank}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


# What a record of DeepSpeed's layer says; of the last ones a single value is read.
LAYER_OPTIONS = {"world", "d", "h", "E", "T", "k", "cf", "minc", "aux", "seed", "drop_tokens", "drop_policy"}
RESIDUAL = ("residual", "use_residual")
LAYER_ONLY: dict[str, Any] = {"noisy_gate_policy": None, "use_tutel": False, "enable_expert_tensor_parallelism": False}


def _layer_on_rank(rank: int, case: Case) -> dict[str, Tensor]:
    config, param = case.config, case.group("param")
    unknown = config.keys() - LAYER_OPTIONS - set(RESIDUAL) - LAYER_ONLY.keys()
    assert not unknown, f"options {sorted(unknown)} of DeepSpeed's layer are not known here"
    for name, value in LAYER_ONLY.items():
        assert config.get(name, value) == value, f"option {name} is {config[name]!r}: missing here"
    given = _of_rank(case.group("in"), rank)
    dense = {name: value for name, value in param.items() if name.startswith(("mlp.", "coefficient."))}
    residual = any(config.get(name, False) for name in RESIDUAL)
    assert residual == bool(dense), "a residual layer has a dense expert and its coefficient, and no other has"
    layer = MoELayer(config["d"], config["h"], config["E"], GateConfig(config["k"]), make_groups(), residual)
    first = rank * layer.num_local
    state = {"deepspeed_moe.gate.wg.weight": param["gate.weight"], **dense}
    for name, value in param.items():
        if (match := re.fullmatch(r"experts\.(\d+)\.(.*)", name)) and 0 <= int(match[1]) - first < layer.num_local:
            state[f"deepspeed_moe.experts.deepspeed_experts.{int(match[1]) - first}.{match[2]}"] = value
    layer.load_state_dict(state, strict=True)
    x = given["x"].clone().requires_grad_()
    logits = F.linear(x, layer.gate.wg.weight)
    limits = (config["cf"], config["minc"], config.get("drop_tokens", True))
    noise, used = given.get("gumbel_noise"), given.get("used_token")
    if config["k"] == 1:
        routing = switch_routing(logits, *limits, used_token_T=used, rts_TE=given.get("uniform_rts"), noise_TE=noise)
    elif config["k"] == 2:
        routing = gshard_routing(logits, *limits, used_token_T=used, noise_TE=noise)
    else:
        routing = topk_routing(logits, config["k"], *limits, config.get("drop_policy", "probs"), used)
    y = layer.with_dense_expert(layer.dispatch(x, routing), x)
    ((y * given["upstream"]).sum() + config["aux"] * routing.aux_loss).backward()
    assert x.grad is not None and layer.gate.wg.weight.grad is not None
    found = {
        f"rank{rank}.y": y.detach(),
        f"rank{rank}.l_aux": routing.aux_loss.detach().reshape(1),
        f"rank{rank}.exp_counts": routing.requested_E.float(),
        f"rank{rank}.grad_x": x.grad,
        f"rank{rank}.grad.gate.weight": layer.gate.wg.weight.grad,
    }
    for name in dense:
        gradient = layer.get_parameter(name).grad
        assert gradient is not None
        found[f"rank{rank}.grad.{name}"] = found[f"grad.{name}"] = gradient
    for i, expert in enumerate(layer.local_experts):
        for name, parameter in expert.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[f"grad.experts.{first + i}.{name}"] = grad
    return found


def _compare_everything(case: Case, found: dict[str, Tensor]) -> None:
    for name, expected in case.group("out").items():
        assert name in found, f"{name} is not reproduced"
        assert_close(found[name], expected, name)


def check_deepspeed_layer(case: Case) -> None:
    _compare_everything(case, _merged(run_ranks(case.config["world"], _layer_on_rank, case)))


def _merged(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for result in results for name, value in result.items()}


def _exchange_on_rank(rank: int, case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.group("in")
    splits = given["split_sizes"].long()
    plan = RowPlan(splits[rank].tolist(), splits[:, rank].tolist())
    topology = make_topology(config["per_node"])
    x = given[f"rank{rank}.x"].clone().requires_grad_()
    y, middle = hierarchical_exchange(x.detach(), plan, topology)
    flat = all_to_all_rows(x, plan, dist.group.WORLD)
    phased = all_to_all_rows(x, plan, dist.group.WORLD, topology)
    assert torch.equal(y, flat) and torch.equal(phased, flat), "two phases are not bit-equal to one"
    home = all_to_all_rows(phased, plan.reverse(), dist.group.WORLD, topology)
    assert torch.equal(home, x), "rows do not come back"
    for result in (flat, phased, home):
        upstream = torch.arange(1.0, result.numel() + 1).view_as(result)
        (grad,) = torch.autograd.grad(result, x, upstream, retain_graph=True)
        expected = upstream if result is home else all_to_all_rows(upstream, plan.reverse(), dist.group.WORLD)
        assert torch.equal(grad, expected), "the gradient does not travel back"
    return {f"rank{rank}.y": y, f"rank{rank}.after_intra_node": middle}


def check_all_to_all(case: Case) -> None:
    found = _merged(run_ranks(case.config["world"], _exchange_on_rank, case))
    _compare_everything(case, found)
    assert all(torch.equal(found[name], value) for name, value in case.group("out").items()), "copies must be exact"


def _embedding_on_rank(rank: int, case: Case, partition: Any) -> dict[str, Any]:
    config, table = case.config, case.group("param")["weight"]
    given = _of_rank(case.group("in"), rank)
    vocabulary, hidden = table.shape
    embedding = PartitionedEmbedding(vocabulary, hidden, make_groups().world, partition)
    embedding.load_full(table)
    y = embedding(given["ids"].long())
    (y * given["upstream"]).sum().backward()
    assert embedding.weight.grad is not None
    grad = embedding.weight.grad.clone()
    after = {}
    for name in case.group("out"):
        if match := re.fullmatch(r"weight_after_adam_lr([0-9.e-]+)_mean_grad", name):
            optimizer = torch.optim.Adam([embedding.weight], lr=float(match[1]))
            embedding.weight.grad /= config["world"]
            optimizer.step()
            after[name] = embedding.full()
    return {"y": y.detach(), "grad": grad, "first": embedding.first, "last": embedding.last, **after}


def check_embedding(case: Case) -> None:
    out = case.group("out")
    for partition in ("columns", "rows"):
        results = run_ranks(case.config["world"], _embedding_on_rank, case, partition)
        for rank, found in enumerate(results):
            assert_close(found["y"], out[f"rank{rank}.y"], f"{partition}: y of rank {rank}")
            whole = out["grad_sum_over_ranks"]
            span = slice(found["first"], found["last"])
            part = whole[:, span] if partition == "columns" else whole[span]
            assert_close(found["grad"], part, f"{partition}: gradient of rank {rank}")
            for name, expected in out.items():
                if name.startswith("weight_after_adam"):
                    assert_close(found[name], expected, f"{partition}: {name}")
    local = [out[f"rank{rank}.local_grad"] for rank in range(case.config["world"])]
    assert_close(sum(local, torch.zeros_like(local[0])), out["grad_sum_over_ranks"], "the recording itself")


CHECKS = [
    Check("DeepSpeed MoE layer", lambda c: "moe/layer.py:MoE" in c.source, check_deepspeed_layer),
    Check("AlltoAll", lambda c: "all_to_all_single" in c.source, check_all_to_all),
    Check("embedding", lambda c: "functional.embedding" in c.source, check_embedding),
]
