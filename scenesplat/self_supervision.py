"""GaussianSSL's heads and losses (section 3.4): masked Gaussians, self-distillation with a coding rate, masked patches.

Shape suffixes: C crops, B clouds, D width of a head's output, V voxels that are masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
