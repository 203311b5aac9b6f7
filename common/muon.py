"""Muon for networks with convolutions: orthogonalised momentum for weight matrices, Adam for everything else.

Of none of the papers, which use Adam: small models are trained with it because a CPU sees few images.
`torch.optim.Muon` takes 2-D parameters only, and would be a second optimiser; this one takes a whole network.
Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); scale of the step after
J. Liu et al., "Muon is scalable for LLM training" (2025), equation 4, so that one learning rate serves both rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_STEPS = 5
ADAM_EPSILON = 1e-8


def orthogonalise(matrices_KMN: Tensor) -> Tensor:
    """About U V^T of the singular value decompositions U S V^T [K, M, N], by five quintic Newton-Schulz steps.

    The singular values come out between 0.6 and 1.3, not at 1: the coefficients are chosen for steep growth near zero.
    The products are taken in bfloat16, which that spread does not notice, unless a CPU would have to emulate it.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    emulated = matrices_KMN.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    x = (matrices_KMN.mT if tall else matrices_KMN).to(torch.float32 if emulated else torch.bfloat16)
    x = x / torch.linalg.matrix_norm(x.float(), keepdim=True).clamp(min=1e-7).to(x.dtype)
    for _ in range(NEWTON_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_KMN.dtype)


class MuonAdam(torch.optim.Optimizer):
    """Weights with two or more dimensions, as [out, rest], take Muon's step; vectors and embeddings take Adam's.

    Args:
        module: its trainable parameters are optimised.
        lr: learning rate of both rules (Muon's step is scaled to the root mean square of Adam's, 0.2).
        weight_decay: decoupled, on matrices only.
        momentum: of Muon (Nesterov); betas: of Adam.
        choose: by name, which of the weights with two or more dimensions take Muon's step; None: all but embeddings.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        choose: Callable[[str, Tensor], bool] | None = None,
    ) -> None:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        chosen = [
            p.dim() >= 2 and id(p) not in embeddings and (choose is None or choose(name, p)) for name, p in trainable
        ]
        matrices = [p for (_, p), muon in zip(trainable, chosen) if muon]
        others = [p for (_, p), muon in zip(trainable, chosen) if not muon]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": True, "weight_decay": weight_decay},
            {"params": others, "muon": False, "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "momentum": momentum, "betas": betas})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adam)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update_MN = p.grad.lerp(state["momentum"], group["momentum"]).reshape(len(p), -1)
            by_shape.setdefault((update_MN.shape[0], update_MN.shape[1]), []).append((p, update_MN))
        for shape, pairs in by_shape.items():  # equal shapes in one product: fewer, larger ones
            steps_KMN = orthogonalise(torch.stack([update for _, update in pairs]))
            scale = 0.2 * max(shape) ** 0.5
            for (p, _), step_MN in zip(pairs, steps_KMN, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(step_MN.reshape(p.shape), alpha=-group["lr"] * scale)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=torch.tensor(0.0), mean=torch.zeros_like(p), square=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        adam(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["mean"] for s in states],
            [s["square"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=ADAM_EPSILON,
            maximize=False,
        )
