"""GaussianSSL's heads and losses (section 3.4): masked Gaussians, self-distillation with a coding rate, masked patches,
language codes.

Shape suffixes: C crops, B clouds, D width of a head's output, V voxels that are masked, E width of a language code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.products import Linear
from scenesplat.gaussians import ATTRIBUTES, Gaussians, inputs
from scenesplat.losses import cosine_loss, l2_loss
from scenesplat.model import EPSILON, PointTransformer, grouped
from scenesplat.pretrain_config import TermsConfig
from scenesplat.voxels import fragments, voxels_of

VIEWS = 2  # global crops
# What the released code does; it has no language alignment.
RELEASED = TermsConfig(language=0.0, hide="after", activations=False, train_heads=False)


class Head(nn.Module):
    """Layers to a unit vector, three in GaussianSSL (DINO's head without prototypes).

    Args:
        norm: batch normalisation behind all but the last. bias: of the layers. unit: the answer has length 1.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        layers: int = 3,
        norm: bool = False,
        bias: bool = True,
        unit: bool = True,
    ) -> None:
        super().__init__()
        self.unit = unit
        widths = [inputs, *[hidden] * (layers - 1)]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [Linear(before, after, bias), *[nn.BatchNorm1d(after, EPSILON)] * norm, nn.GELU()]
        last = Linear(widths[-1], outputs, bias)
        self.mlp = nn.Sequential(*parts, last) if parts else last

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return F.normalize(y, dim=-1, eps=1e-4) if self.unit else y


def coding_rate(z_BD: Tensor, eps: float) -> Tensor:
    """How much of its space a set of unit vectors takes (Yu et al. 2020), as SimDINO scales it: (d + B) / (d B)."""
    count, width = z_BD.shape
    with torch.autocast(z_BD.device.type, enabled=False):  # a Cholesky factor needs float32
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
    comp = cosine_2C.sum() / (VIEWS * crops - min(VIEWS, crops))
    among = cosine_2C[:, :VIEWS].sum() / (VIEWS * VIEWS - VIEWS)
    views = student_CBD[:VIEWS]
    rated = (views + teacher_2BD) / 2 if together else views
    expa = torch.stack([coding_rate(view_BD, eps) for view_BD in rated]).mean()
    return {"loss": -coeff * comp - expa, "comp": comp, "expa": expa, "global_comp": among}


def patch_cosine(student_VD: Tensor, teacher_VD: Tensor, weight_V: Tensor, views: int = VIEWS) -> Tensor:
    """Minus the weighted cosine of masked voxels, over the global crops."""
    return -(weight_V * F.cosine_similarity(student_VD, teacher_VD, dim=-1)).sum() / views


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
    return nn.Sequential(Linear(inputs, 32), nn.LayerNorm(32), nn.ReLU(), Linear(32, outputs))


def activated(values_VC: Tensor, attributes: Sequence[str]) -> Tensor:
    """The masked head's answers in the ranges of what they stand for: tanh, sigmoid, unit length (section 3.4).

    Args:
        attributes: of ATTRIBUTES, as the network's input has them.
    """
    names = [name for name in ATTRIBUTES if name in attributes]
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "colour": torch.tanh,
        "opacity": torch.sigmoid,
        "scale": torch.sigmoid,
    }
    parts = values_VC.split([ATTRIBUTES[name] for name in names], 1)
    return torch.cat([ways.get(name, F.normalize)(part) for name, part in zip(names, parts, strict=True)], 1)


def make_heads(encoder: int, decoder: int, inputs: int, terms: TermsConfig, code: int) -> nn.ModuleDict:
    """The heads of the terms that count.

    Args:
        encoder, decoder: widths of the bottleneck and of the voxels' features. inputs: attributes. code: of language.
    """
    heads = nn.ModuleDict()
    if terms.masked:
        heads["mae"] = masked_head(decoder, inputs)
    if terms.distillation:
        heads["dino"] = Head(encoder, terms.hidden, terms.bottleneck)
    if terms.patches:
        heads["ibot"] = Head(decoder, terms.hidden, terms.bottleneck)
    if terms.language:
        heads["language"] = masked_head(decoder, code)
    return heads.requires_grad_(terms.train_heads)


def looked_at(
    network: PointTransformer,
    crop: Mapping[str, Tensor],
    mask_N: Tensor | None = None,
    before: bool = False,
    permutations: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """(mean of the bottleneck [B, C], what makes the features of the voxels [N, C]) of a crop.

    Args:
        before: masked voxels come without attributes, so that the stem cannot carry them to their neighbours.
        permutations: of the curves.
    """
    structure = network.structure(crop["grid_coord"], crop["offset"], permutations)
    feat_NC = crop["feat"]
    if before and mask_N is not None:
        feat_NC = feat_NC.masked_fill(mask_N[:, None], 0.0)
    found = network.encode(feat_NC, structure, mask_N)
    last = structure.levels[-1]
    pooled_BC = grouped(found[-1], last.batch_N, len(last.sizes), "mean")
    return pooled_BC, lambda: network.decode(found, structure)


def step_losses(
    student: PointTransformer,
    teacher: PointTransformer | None,
    heads: Mapping[str, nn.Module] | nn.ModuleDict,
    globals_: Sequence[Mapping[str, Tensor]],
    locals_: Sequence[Mapping[str, Tensor]],
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    terms: TermsConfig = RELEASED,
    attributes: Sequence[str] = (),
    permute: Callable[[], Sequence[Tensor] | None] = lambda: None,
) -> dict[str, Tensor]:
    """Each term of a step by its name, and `loss`, their weighted sum.

    Args:
        teacher: None leaves distillation and patches out.
        heads: by the names of `make_heads`; teacher and student go through the same ones.
        masks: of the voxels of each global crop that the student does not see; weights: of those voxels, which add up
            to 1 over a cloud.
        terms: what counts how much; a term without weight is not worked out.
        attributes: that crops consist of, for heads that end in their ranges. A masked head with fewer answers is asked
            for the last of them: the released one leaves coordinates out, which come first.
        permute: draws the order of the curves for a crop.
    """
    before = terms.hide == "before"
    seen = [looked_at(student, crop, mask, before, permute()) for crop, mask in zip(globals_, masks)]
    first, hidden = globals_[0], masks[0]
    features = [decode() for _, decode in seen] if terms.patches and teacher is not None else [seen[0][1]()]
    nothing = features[0].sum() * 0
    found: dict[str, Tensor] = {}
    if terms.masked:
        guess_VC = heads["mae"](features[0][hidden])
        if terms.activations:
            guess_VC = activated(guess_VC.float(), attributes)
        wanted_VC = first["feat"][hidden][:, -guess_VC.shape[1] :]
        found["mae"] = F.mse_loss(guess_VC.float(), wanted_VC) if hidden.any() else nothing
    if teacher is not None:
        with torch.no_grad():
            taught = [looked_at(teacher, crop, permutations=permute()) for crop in globals_]
        if terms.distillation:
            with torch.no_grad():
                wanted_2BD = torch.stack([heads["dino"](pooled) for pooled, _ in taught])
            pooled = [part for part, _ in seen]
            pooled += [looked_at(student, crop, permutations=permute())[0] for crop in locals_]
            student_CBD = torch.stack([heads["dino"](part) for part in pooled])
            found["dino"] = distillation_loss(student_CBD, wanted_2BD, terms.coefficient, terms.epsilon)["loss"]
        if terms.patches:
            with torch.no_grad():
                patches = [heads["ibot"](decode()[mask]) for (_, decode), mask in zip(taught, masks)]
            mine = [heads["ibot"](part[mask]) for part, mask in zip(features, masks)]
            found["ibot"] = VIEWS * sum(map(patch_cosine, mine, patches, weights), start=nothing)
    if terms.language:
        known = hidden & first["valid"]
        found["language"] = language_loss(heads["language"](features[0][known]), first["lang_feat"][known])
    names = {"mae": "masked", "dino": "distillation", "ibot": "patches"}
    total = sum((getattr(terms, names.get(name, name)) * value for name, value in found.items()), start=nothing)
    return {"loss": total, **found}


def language_loss(guess_VE: Tensor, code_VE: Tensor) -> Tensor:
    """1 - cos, and the squared distance, to the codes of hidden Gaussians; 0 where none has one."""
    if not len(guess_VE):
        return guess_VE.sum()
    return cosine_loss(guess_VE.float(), code_VE) + l2_loss(guess_VE.float(), code_VE)


def effective_rank(features_ND: Tensor) -> float:
    """Directions that features spread over: the exponential of the entropy of their covariance's eigenvalues.

    1 where all features are alike up to a factor (collapse), at most their width.
    """
    centred_ND = features_ND.double() - features_ND.double().mean(0)
    values_D = torch.linalg.eigvalsh(centred_ND.t() @ centred_ND).clamp(min=0)
    share_D = values_D / values_D.sum().clamp(min=1e-30)
    return float(torch.special.entr(share_D).sum().exp())


@torch.inference_mode()
def ranks(
    network: PointTransformer, scenes: Sequence[Gaussians], voxel: float, attributes: Sequence[str]
) -> dict[str, float]:
    """Effective ranks of what a network makes of scenes: of the decoder's features and of the bottleneck's."""
    decoder, bottleneck = [], []
    for scene in scenes:
        grid_V3, voxel_N = voxels_of(scene.means_N3, voxel)
        rows = next(fragments(voxel_N, 1))
        structure = network.structure(grid_V3[voxel_N[rows]], torch.tensor([len(rows)]))
        found = network.encode(inputs(scene.attributes(), attributes)[rows], structure)
        bottleneck.append(found[-1].float())
        decoder.append(network.decode(found, structure).float())
    return {
        "rank_decoder": effective_rank(torch.cat(decoder)),
        "rank_bottleneck": effective_rank(torch.cat(bottleneck)),
    }


@torch.inference_mode()
def hidden_error(
    network: PointTransformer,
    head: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    terms: TermsConfig,
    attributes: Sequence[str],
) -> dict[str, float]:
    """Squared error of the attributes that were hidden in first global crops, and that of answering with their mean."""
    guesses, hidden = [], []
    for batch in batches:
        crop = batch["globals"][0]
        features_NC = looked_at(network, crop, crop["mask"], terms.hide == "before")[1]()
        guess_VC = head(features_NC[crop["mask"]])
        guesses.append(activated(guess_VC, attributes) if terms.activations else guess_VC)
        hidden.append(crop["feat"][crop["mask"]])
    guess, truth = torch.cat(guesses), torch.cat(hidden)
    return {"hidden_error": float(F.mse_loss(guess, truth)), "mean_error": float(truth.var(0, unbiased=False).mean())}


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
