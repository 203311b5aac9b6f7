"""The official optimizer: Adam without bias correction, decoupled decay, clipped global norm, layer-wise rates.

Source: model/optimization.py of google-research/electra.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

# Of parameters with these words in their names, none decays (official `exclude_from_weight_decay`).
NO_DECAY = ("LayerNorm", "layer_norm", "bias")
# AdamW's bias corrections 1 - beta**step are exactly 1 from here on, and float32 cannot count further.
_STEP_WITHOUT_CORRECTION = float(1 << 27)


class OfficialAdam(torch.optim.AdamW):
    """p -= lr (m / (sqrt(v) + eps) + decay p), m and v the plain running means.

    It is torch's fused AdamW started at a step so late that its bias corrections are 1. A group's own `lr_scale`
    (layer-wise rates) multiplies the rate that `set_learning_rate` gives.

    Args:
        params: parameters, or groups as `parameter_groups` makes them.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("lr_scale", 1.0)
            group["lr"] = lr * group["lr_scale"]
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.full((), _STEP_WITHOUT_CORRECTION, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(step: int, base: float, warmup: int, total: int, power: float = 1.0) -> float:
    """base (1 - t/T)^power min(1, t/W): decay and warm-up act together; t is cut at T, and W = 0 means no warm-up."""
    decay = (1.0 - min(step, total) / total) ** power
    return base * decay * (min(1.0, step / warmup) if warmup else 1.0)


def layer_depth(name: str, n_layers: int) -> int:
    """0 for embeddings and their projection, i + 1 for block i, n_layers + 2 for everything on top.

    Names may be ours, transformers' or TensorFlow's.
    """
    if match := re.search(r"encoder[./]layer[._](\d+)[./]", name):
        return int(match.group(1)) + 1
    if re.search(r"(^|[./])(embeddings|embeddings_project|relative_positions)[./]", name):
        return 0
    return n_layers + 2


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float = 0.01,
    layer_decay: float | None = None,
    n_layers: int | None = None,
) -> list[dict[str, Any]]:
    """Groups of equal decay and rate; a parameter that appears under two names is taken once.

    Args:
        layer_decay: rates are multiplied by layer_decay^(n_layers + 2 - depth), so the top block's too by the square
            (a quirk behind all released results); None for equal rates.

    Raises:
        UserError: `layer_decay` without `n_layers`.
    """
    if layer_decay is not None and n_layers is None:
        raise UserError("layer-wise decay needs the number of layers")
    groups: dict[tuple[float, float], list[Tensor]] = {}
    seen: set[Tensor] = set()
    for name, parameter in named_parameters:
        if parameter in seen or not parameter.requires_grad:
            continue
        seen.add(parameter)
        decay = 0.0 if any(word in name for word in NO_DECAY) else weight_decay
        scale = 1.0
        if layer_decay is not None and n_layers is not None:
            scale = layer_decay ** (n_layers + 2 - layer_depth(name, n_layers))
        groups.setdefault((decay, scale), []).append(parameter)
    return [{"params": ps, "weight_decay": d, "lr_scale": s} for (d, s), ps in groups.items()]


def official_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    layer_decay: float | None = None,
    n_layers: int | None = None,
) -> OfficialAdam:
    """The optimizer of a model with the official groups."""
    return OfficialAdam(parameter_groups(model.named_parameters(), weight_decay, layer_decay, n_layers), lr)


@torch.no_grad()
def clip_global_norm(parameters: Iterable[Tensor], limit: float = 1.0) -> Tensor:
    """Scale all gradients by limit / max(norm, limit) in place, without waiting for the device; returns the norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, limit / norm.clamp_min(limit))
    return norm
