"""The three tasks of section 4.3: what a head is trained for, what it predicts, and how that is measured.

Shape suffixes: B batch, H W sides, K objects or classes, P priors or keypoints; boxes are fractions of the side, x0 y0
x1 y1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from eeea_net.backbones import Backbone
from eeea_net.heads import BiSeNet, SimpleBaseline, SSDLite, corners, decode, encode
from eeea_net.scenes import Scenes
from eeea_net.scores import Found, box_precision, confusion, keypoint_precision, mean_iou, right_points
from eeea_net.transfer_config import HeadOptions
from eeea_net.transfer_config import Task as TaskName

MATCH = 0.5  # IoU from which a prior stands for an object (SSD, section 2.2)
NEGATIVES = 3  # background priors in the loss for each one that stands for an object
LEAST_SCORE, OVERLAP = 0.01, 0.45  # of boxes that are kept
CANDIDATES, KEPT = 200, 100  # boxes of a picture before and behind the suppression
AUXILIARY = 1.0  # weight of BiSeNet's auxiliary outputs
TILE = 3  # pixels of a drawing for one of the picture
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#8c564b", "#bcbd22")
Batch = tuple[Tensor, dict[str, Tensor]]


def overlap(a_NK4: Tensor, b_NM4: Tensor) -> Tensor:
    """IoU of boxes, [..., K, M]."""
    low = torch.maximum(a_NK4[..., :, None, :2], b_NM4[..., None, :, :2])
    high = torch.minimum(a_NK4[..., :, None, 2:], b_NM4[..., None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = [(one[..., 2:] - one[..., :2]).clamp_min(0).prod(-1) for one in (a_NK4, b_NM4)]
    return both / (areas[0][..., :, None] + areas[1][..., None, :] - both).clamp_min(1e-12)


def match(priors_P4: Tensor, boxes_BK4: Tensor, labels_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Which object each prior stands for: (its number [B, P], its class + 1 or 0 for the background [B, P]).

    Each prior takes the object that it overlaps most, from `MATCH` on; each object is given the prior that overlaps it
    most, whatever the overlap.
    """
    there_BK = labels_BK >= 0
    iou_BPK = overlap(corners(priors_P4)[None], boxes_BK4).masked_fill(~there_BK[:, None], -1)
    best_BP, object_BP = iou_BPK.max(2)
    own_BK = iou_BPK.argmax(1)
    for place in range(boxes_BK4.shape[1]):
        given_B = there_BK[:, place].nonzero()[:, 0]
        object_BP[given_B, own_BK[given_B, place]] = place
        best_BP[given_B, own_BK[given_B, place]] = 2.0
    classes_BP = labels_BK.gather(1, object_BP) + 1
    return object_BP, torch.where(best_BP >= MATCH, classes_BP, 0)


def multibox_loss(
    scores_BPK: Tensor, offsets_BP4: Tensor, priors_P4: Tensor, boxes_BK4: Tensor, labels_BK: Tensor
) -> Tensor:
    """SSD's loss (equations 1 to 3): smooth L1 of matched priors, cross-entropy of these and of the three times as many
    background priors that are hardest, over the number of matched priors."""
    object_BP, classes_BP = match(priors_P4, boxes_BK4, labels_BK)
    positive_BP = classes_BP > 0
    wanted_BP4 = encode(boxes_BK4.gather(1, object_BP[..., None].expand(-1, -1, 4)), priors_P4)
    place = F.smooth_l1_loss(offsets_BP4[positive_BP], wanted_BP4[positive_BP], reduction="sum")
    entropy_BP = F.cross_entropy(scores_BPK.flatten(0, 1), classes_BP.flatten(), reduction="none").view_as(classes_BP)
    hardness_BP = entropy_BP.detach().masked_fill(positive_BP, -1)
    rank_BP = hardness_BP.argsort(1, descending=True).argsort(1)
    chosen_BP = positive_BP | (rank_BP < NEGATIVES * positive_BP.sum(1, keepdim=True))
    return (place + entropy_BP[chosen_BP].sum()) / positive_BP.sum().clamp_min(1)


def suppressed(boxes_BN4: Tensor, threshold: float) -> Tensor:
    """Greedy suppression of boxes in falling order of their scores: which stay, bool [B, N].

    A box stays if no earlier one that stays overlaps it; the answer is settled after as many rounds as the longest
    chain of such overlaps.
    """
    over_BNN = (overlap(boxes_BN4, boxes_BN4) > threshold).tril(-1)
    stay_BN = torch.ones(boxes_BN4.shape[:2], dtype=torch.bool, device=boxes_BN4.device)
    while True:
        after_BN = ~(over_BNN & stay_BN[:, None]).any(2)
        if torch.equal(after_BN, stay_BN):
            return stay_BN
        stay_BN = after_BN


def boxes_of(scores_BPK: Tensor, offsets_BP4: Tensor, priors_P4: Tensor, side: int) -> list[Found]:
    """The boxes of each picture, in pixels, the surest first; suppression looks at each class alone."""
    found = []
    chances_BPK = scores_BPK.softmax(-1)[..., 1:]
    classes = chances_BPK.shape[2]
    top_BN, index_BN = chances_BPK.flatten(1).topk(min(CANDIDATES, chances_BPK[0].numel()), 1)
    boxes_BP4 = decode(offsets_BP4, priors_P4).clamp(0, 1)
    boxes_BN4 = boxes_BP4.gather(1, (index_BN // classes)[..., None].expand(-1, -1, 4))
    labels_BN = index_BN % classes
    stay_BN = suppressed(boxes_BN4 + 2.0 * labels_BN[..., None], OVERLAP) & (top_BN >= LEAST_SCORE)
    for boxes_N4, labels_N, top_N, stay_N in zip(boxes_BN4, labels_BN, top_BN, stay_BN):
        kept = stay_N.nonzero()[:KEPT, 0]
        found.append(Found(side * boxes_N4[kept], labels_N[kept], top_N[kept]))
    return found


def heat_maps(points_BP3: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Gaussians of height 1 around keypoints (fractions of the sides), [B, P, H, W]."""
    x = torch.arange(width, device=points_BP3.device) + 0.5
    y = torch.arange(height, device=points_BP3.device) + 0.5
    across = (x - width * points_BP3[..., :1]).square()
    down = (y - height * points_BP3[..., 1:2]).square()
    return (-(down[..., :, None] + across[..., None, :]) / (2 * sigma**2)).exp()


def peaks(heat_BPHW: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) of the highest pixels as fractions [B, P, 2], moved a quarter pixel towards the higher neighbour, and
    their heights [B, P]."""
    height, width = heat_BPHW.shape[2:]
    top_BP, index_BP = heat_BPHW.flatten(2).max(2)
    row_BP, column_BP = index_BP // width, index_BP % width

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        place = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
        return heat_BPHW.flatten(2).gather(2, place[..., None])[..., 0]

    right = (at(row_BP, column_BP + 1) - at(row_BP, column_BP - 1)).sign() / 4
    down = (at(row_BP + 1, column_BP) - at(row_BP - 1, column_BP)).sign() / 4
    x_BP, y_BP = (column_BP + 0.5 + right) / width, (row_BP + 0.5 + down) / height
    return torch.stack([x_BP, y_BP], -1), top_BP


class Task(ABC):
    """A task on scenes. `metric` is what networks are compared by, of those that `measure` gives."""

    metric: str

    def __init__(self, scenes: Scenes, options: HeadOptions, side: int) -> None:
        self.scenes, self.options, self.side = scenes, options, side

    @abstractmethod
    def network(self, backbone: Backbone) -> nn.Module:
        """The backbone with the task's head."""

    @abstractmethod
    def loss(self, output: Any, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, share of right answers) of a batch."""

    @abstractmethod
    def measure(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Scores in 0..1 over all batches; NaN where an answer is not finite."""

    @abstractmethod
    def draw(self, network: nn.Module | None, batch: Batch, pictures_BHWC: list[Image.Image]) -> None:
        """Draw predictions into the pictures of a batch, or the truth where there is no network."""


class Detection(Task):
    """SSDLite; the share of right answers is that of matched priors whose class is right."""

    metric = "ap50"

    def network(self, backbone: Backbone) -> nn.Module:
        return SSDLite(backbone, len(self.scenes.classes), self.options.extras)

    def loss(self, output: Any, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        scores_BPK, offsets_BP4, priors_P4 = output
        classes_BP = match(priors_P4, target["boxes"], target["labels"])[1]
        right = (scores_BPK.detach().argmax(2) == classes_BP)[classes_BP > 0].float()
        share = right.sum() / max(1, len(right))  # pictures may hold nothing
        return multibox_loss(scores_BPK, offsets_BP4, priors_P4, target["boxes"], target["labels"]), share

    def measure(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        found: list[Found] = []
        truth: list[Found] = []
        for x_BCHW, target in batches:
            scores_BPK, offsets_BP4, priors_P4 = network(x_BCHW)
            if not (torch.isfinite(scores_BPK).all() and torch.isfinite(offsets_BP4).all()):
                return dict.fromkeys(("ap", "ap50", "ap75", "ar"), float("nan"))
            found += boxes_of(scores_BPK, offsets_BP4, priors_P4, self.side)
            truth += self._truth(target)
        return box_precision(found, truth, self.scenes.classes)

    def _truth(self, target: dict[str, Tensor]) -> list[Found]:
        return [
            Found(self.side * boxes_K4[labels_K >= 0], labels_K[labels_K >= 0])
            for boxes_K4, labels_K in zip(target["boxes"], target["labels"])
        ]

    def draw(self, network: nn.Module | None, batch: Batch, pictures_BHWC: list[Image.Image]) -> None:
        if network is None:
            found = self._truth(batch[1])
        else:
            scores_BPK, offsets_BP4, priors_P4 = network(batch[0])
            found = boxes_of(scores_BPK, offsets_BP4, priors_P4, self.side)
        for one, picture in zip(found, pictures_BHWC):
            pen = ImageDraw.Draw(picture)
            chances = one.scores_N if one.scores_N is not None else torch.ones(len(one.labels_N))
            for box, label, chance in zip(one.boxes_N4.tolist(), one.labels_N.tolist(), chances.tolist()):
                if chance < 0.5:
                    continue
                places = [TILE * value for value in box]
                pen.rectangle(places, outline=COLOURS[label % len(COLOURS)], width=2)
                pen.text((places[0] + 3, places[1] + 1), self.scenes.classes[label], COLOURS[label % len(COLOURS)])


class Segmentation(Task):
    """BiSeNet; the share of right answers is that of pixels."""

    metric = "miou"

    def network(self, backbone: Backbone) -> nn.Module:
        channels = self.scenes.images_NCHW.shape[1]
        return BiSeNet(backbone, 1 + len(self.scenes.classes), self.options.width, channels)

    def loss(self, output: Any, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses = [F.cross_entropy(logits_BKHW, target["map"]) for logits_BKHW in output]
        right = (output[0].detach().argmax(1) == target["map"]).float().mean()
        return losses[0] + AUXILIARY * torch.stack(losses[1:]).sum(), right

    def measure(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        classes = 1 + len(self.scenes.classes)
        counts_KK = torch.zeros(classes, classes, dtype=torch.long)
        for x_BCHW, target in batches:
            logits_BKHW = network(x_BCHW)[0]
            if not torch.isfinite(logits_BKHW).all():
                return {"miou": float("nan"), "pixel_accuracy": float("nan")}
            counts_KK += confusion(logits_BKHW.argmax(1), target["map"], classes).cpu()
        right = float(counts_KK.diagonal().sum() / counts_KK.sum())
        return {"miou": mean_iou(counts_KK)[0], "pixel_accuracy": right}

    def draw(self, network: nn.Module | None, batch: Batch, pictures_BHWC: list[Image.Image]) -> None:
        maps_BHW = batch[1]["map"] if network is None else network(batch[0])[0].argmax(1)
        palette = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS]
        for map_HW, picture in zip(maps_BHW.cpu().numpy(), pictures_BHWC):
            layer = np.array([(0, 0, 0), *palette], np.uint8)[np.where(map_HW, (map_HW - 1) % len(palette) + 1, 0)]
            shade = Image.fromarray((160 * (map_HW > 0)).astype(np.uint8)).resize(
                picture.size, Image.Resampling.NEAREST
            )
            picture.paste(Image.fromarray(layer).resize(picture.size, Image.Resampling.NEAREST), (0, 0), shade)


class Pose(Task):
    """SimpleBaseline; the share of right answers is PCK."""

    metric = "ap"

    def network(self, backbone: Backbone) -> nn.Module:
        return SimpleBaseline(backbone, self.scenes.points, self.options.deconvolutions)

    def loss(self, output: Any, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        wanted_BPHW = heat_maps(target["points"], output.shape[2], output.shape[3], self.options.sigma)
        there_BP = target["points"][..., 2]
        error_BP = (output - wanted_BPHW).square().mean((2, 3))
        right = right_points(peaks(output.detach())[0], target["points"], target["extent"])
        return (error_BP * there_BP).sum() / there_BP.sum().clamp_min(1), torch.tensor(right)

    def measure(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        found, sure, truth, extents = [], [], [], []
        for x_BCHW, target in batches:
            heat_BPHW = network(x_BCHW)
            if not torch.isfinite(heat_BPHW).all():
                return dict.fromkeys(("ap", "ap50", "ap75", "ar", "pck"), float("nan"))
            points_BP2, top_BP = peaks(heat_BPHW)
            there_BP = target["points"][..., 2]
            found.append(points_BP2.cpu())
            sure.append(((top_BP * there_BP).sum(1) / there_BP.sum(1).clamp_min(1)).cpu())
            truth.append(target["points"].cpu())
            extents.append(target["extent"].cpu())
        points_NP2, scores_N, truth_NP3, extents_N2 = (torch.cat(parts) for parts in (found, sure, truth, extents))
        right = right_points(points_NP2, truth_NP3, extents_N2)
        pixels = torch.tensor([self.side, self.side, 1.0])
        scored = keypoint_precision(points_NP2 * self.side, scores_N, truth_NP3 * pixels, extents_N2 * self.side)
        return {**scored, "pck": right}

    def draw(self, network: nn.Module | None, batch: Batch, pictures_BHWC: list[Image.Image]) -> None:
        points_BP2 = batch[1]["points"][..., :2] if network is None else peaks(network(batch[0]))[0]
        for points_P2, there_P, picture in zip(points_BP2, batch[1]["points"][..., 2], pictures_BHWC):
            pen = ImageDraw.Draw(picture)
            for number, ((x, y), there) in enumerate(zip(points_P2.tolist(), there_P.tolist())):
                if there:
                    x, y = x * picture.width, y * picture.height
                    pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=COLOURS[number], outline="white")


KINDS: dict[TaskName, type[Task]] = {"detection": Detection, "segmentation": Segmentation, "pose": Pose}
