"""GaussianSSL's heads and losses (section 3.4): masked Gaussians, self-distillation with a coding rate, masked patches.

Shape suffixes: C crops, B clouds, D width of a head's output, V voxels that are masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenesplat.model import PointTransformer, grouped

VIEWS = 2  # global crops


class Head(nn.Module):
    """Three layers to a unit vector."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        layers = [
            nn.Linear(inputs, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, outputs),
        ]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=-1, eps=1e-4)


def coding_rate(z_BD: Tensor, eps: float) -> Tensor:
    """How much of its space a set of unit vectors takes (Yu et al. 2020), as SimDINO scales it: (d + B) / (d B)."""
    count, width = z_BD.shape
    z_BD = z_BD.float()
    covariance_DD = torch.eye(width, device=z_BD.device) + width / (count * eps) * z_BD.t() @ z_BD
    half = torch.linalg.cholesky_ex(covariance_DD)[0].diagonal().log().sum()
    return (width + count) / (width * count) * half


def distillation_loss(
    student_CBD: Tensor,
    teacher_2BD: Tensor,
    coeff: float = 0.1,
    eps: float = 0.05,
    together: bool = True,
    no_diagonal: bool = True,
) -> dict[str, Tensor]:
    """Crops of a cloud answer alike, clouds differently: -coeff x comp - expa.

    Args:
        student_CBD: global crops first.
        together: the rate is that of the mean of student and teacher; else of the student's global crops.
        no_diagonal: leave out a crop with itself.
    """
    crops = len(student_CBD)
    cosine_2C = torch.einsum("vbd,cbd->vc", teacher_2BD, student_CBD) / student_CBD.shape[1]
    if no_diagonal:
        cosine_2C = cosine_2C * (1 - torch.eye(VIEWS, crops, device=cosine_2C.device))
    comp = cosine_2C.sum() / (VIEWS * crops - VIEWS)
    among = cosine_2C[:, :VIEWS].sum() / (VIEWS * VIEWS - VIEWS)
    views = student_CBD[:VIEWS]
    rated = (views + teacher_2BD) / 2 if together else views
    expa = torch.stack([coding_rate(view_BD, eps) for view_BD in rated]).mean()
    return {"loss": -coeff * comp - expa, "comp": comp, "expa": expa, "global_comp": among}


def patch_cosine(student_VD: Tensor, teacher_VD: Tensor, weight_V: Tensor) -> Tensor:
    """Minus the weighted cosine of masked voxels, over the global crops."""
    return -(weight_V * F.cosine_similarity(student_VD, teacher_VD, dim=-1)).sum() / VIEWS


def per_cloud(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean over the masked places of each cloud, then over clouds; a cloud without any counts as 0."""
    mask_BN = mask_BN.to(values_BN.dtype)
    return ((values_BN * mask_BN).sum(1) / mask_BN.sum(1).clamp(min=1)).mean()


def prototype_entropy(student: Tensor, probability: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of prototypes' scores [..., P] to the teacher's probabilities (DINO, iBOT)."""
    return -(probability * F.log_softmax(student / temperature, -1)).sum(-1)


def sinkhorn(logits_NP: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Teacher's probabilities that use every prototype equally (Sinkhorn-Knopp)."""
    share_PN = torch.exp(logits_NP / temperature).t()
    share_PN = share_PN / share_PN.sum()
    for _ in range(rounds):
        share_PN = share_PN / share_PN.sum(1, keepdim=True) / len(share_PN)
        share_PN = share_PN / share_PN.sum(0, keepdim=True) / share_PN.shape[1]
    return (share_PN * share_PN.shape[1]).t()


def masked_head(inputs: int, outputs: int) -> nn.Sequential:
    """From a masked voxel's features to the attributes that were hidden."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, outputs))


def looked_at(
    network: PointTransformer, crop: Mapping[str, Tensor], mask_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mean of the bottleneck [B, C], features of the voxels [N, C]) of a crop."""
    structure = network.structure(crop["grid_coord"], crop["offset"])
    found = network.encode(crop["feat"], structure, mask_N)
    last = structure.levels[-1]
    return grouped(found[-1], last.batch_N, len(last.sizes), "mean"), network.decode(found, structure)


def step_losses(
    student: PointTransformer,
    teacher: PointTransformer | None,
    heads: Mapping[str, nn.Module],
    globals_: Sequence[Mapping[str, Tensor]],
    locals_: Sequence[Mapping[str, Tensor]],
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Each loss of a step by its name, and `loss`, their sum.

    Args:
        teacher: None leaves masked modelling alone.
        heads: `mae`, `dino` and `ibot`; teacher and student go through the same ones.
        masks: of the voxels of each global crop that the student does not see; weights: of those voxels, which add up
            to 1 over a cloud.
    """
    seen = [looked_at(student, crop, mask) for crop, mask in zip(globals_, masks)]
    hidden = globals_[0]["feat"][masks[0]]
    found = {"mae": F.mse_loss(heads["mae"](seen[0][1][masks[0]]), hidden)}
    if teacher is not None:
        with torch.no_grad():
            taught = [looked_at(teacher, crop) for crop in globals_]
            wanted_2BD = torch.stack([heads["dino"](pooled) for pooled, _ in taught])
            patches = [heads["ibot"](features[mask]) for (_, features), mask in zip(taught, masks)]
        pooled = [part for part, _ in seen] + [looked_at(student, crop)[0] for crop in locals_]
        found["dino"] = distillation_loss(torch.stack([heads["dino"](part) for part in pooled]), wanted_2BD)["loss"]
        mine = [heads["ibot"](features[mask]) for (_, features), mask in zip(seen, masks)]
        found["ibot"] = VIEWS * sum(map(patch_cosine, mine, patches, weights), start=hidden.new_zeros(()))
    return {"loss": sum(found.values(), start=hidden.new_zeros(())), **found}


@torch.no_grad()
def follow(teacher: PointTransformer, student: PointTransformer, momentum: float) -> None:
    """The teacher's weights move towards the student's; its mask token and batch statistics are its own."""
    mine = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        if name != "mask_token":
            parameter.lerp_(mine[name], 1 - momentum)


def cosine_schedule(first: float, last: float, step: int, steps: int) -> float:
    """From `first` to `last` along half a cosine: the teacher's momentum, and weight decay."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))
