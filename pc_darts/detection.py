"""Detection with a searched cell as backbone (section 4.5, table 5): SSDLite heads on Shapes scenes with exact boxes.

    python pc_darts/detection.py --genotype PC_DARTS_image --steps 600
    python pc_darts/detection.py --genotype runs/pc_darts-small/pc_darts/genotype.json --init runs/.../retrain/model

The paper puts its ImageNet cell into SSD for MS-COCO; here the same kind of detector learns eight classes of shapes at
64 pixels. Heads, boxes and losses follow SSD (Liu et al. 2016, section 2) with the separable heads of SSDLite (Sandler
et al. 2018, section 6.2).

Shape suffixes: B batch, C channels, H W sides, A default boxes, N objects of a picture, K classes, D detections.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cli import Parser
from common.data.sampling import step_generator
from common.data.shapes import MAX_OBJECTS, SHAPES, Shapes
from common.errors import UserError, run_main, stop_if_not_finite
from common.files import write_json
from common.options import Count, Seed
from pc_darts.config import FinalConfig
from pc_darts.counting import multiply_adds
from pc_darts.genotypes import Genotype
from pc_darts.model import FinalNetwork
from pc_darts.operations import BatchNorm

VARIANCE_CENTRE, VARIANCE_SIZE = 0.1, 0.2  # scales of the box targets (SSD's released code)
MATCH_IOU, NEGATIVES = 0.5, 3  # section 2.2 of SSD: matching; hard negatives per positive
RATIOS = (1.0, 0.75, 4 / 3)
# Sides of the default boxes of each level, as fractions of the picture; objects of Shapes are 0.2 to 0.7 wide.
SCALES = ((0.2, 0.28), (0.36, 0.46), (0.56, 0.68))
NMS_IOU, MIN_SCORE, TOP = 0.45, 0.02, 50
LR, MOMENTUM, WEIGHT_DECAY, CLIP = 0.05, 0.9, 5e-4, 5.0


def default_boxes(sides: Sequence[int], scales: Sequence[Sequence[float]] = SCALES) -> Tensor:
    """Default boxes of every level: float32 [A, 4] (centre x, centre y, width, height), fractions of the picture.

    Level by level, row by row, pixel by pixel, then scale by scale, ratio by ratio: the order of `Heads`' output.
    """
    boxes = []
    for side, sizes in zip(sides, scales, strict=True):
        centre = (torch.arange(side) + 0.5) / side
        y_HW, x_HW = torch.meshgrid(centre, centre, indexing="ij")
        shapes = torch.tensor([[s * r**0.5, s / r**0.5] for s in sizes for r in RATIOS])
        centres = torch.stack([x_HW, y_HW], -1).reshape(-1, 1, 2).expand(-1, len(shapes), -1)
        boxes.append(torch.cat([centres, shapes.expand(len(centres), -1, -1)], -1).reshape(-1, 4))
    return torch.cat(boxes)


def corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) to (x0, y0, x1, y1), last dimension."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def iou(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """Intersection over union [N, M] of corner boxes; 0 for empty ones."""
    low = torch.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high = torch.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    area_N, area_M = ((box[:, 2:] - box[:, :2]).clamp(min=0).prod(-1) for box in (a_N4, b_M4))
    return overlap / (area_N[:, None] + area_M[None] - overlap).clamp(min=1e-12)


def match(boxes_N4: Tensor, classes_N: Tensor, defaults_A4: Tensor) -> tuple[Tensor, Tensor]:
    """Targets of one picture: class [A] (0 is background, else 1 + class) and offsets [A, 4] of the default boxes.

    Every object takes its best default box, and every default box an object that it overlaps by MATCH_IOU.

    Args:
        boxes_N4: corners; classes_N: 0..K-1; defaults_A4: centre form.
    """
    labels_A = torch.zeros(len(defaults_A4), dtype=torch.long)
    if not len(boxes_N4):
        return labels_A, torch.zeros_like(defaults_A4)
    overlap_NA = iou(boxes_N4, corners(defaults_A4))
    best_A, object_A = overlap_NA.max(0)
    favourite_N = overlap_NA.argmax(1)
    object_A[favourite_N] = torch.arange(len(boxes_N4))
    best_A[favourite_N] = 1.0
    labels_A = torch.where(best_A >= MATCH_IOU, classes_N[object_A] + 1, labels_A)
    return labels_A, encode(boxes_N4[object_A], defaults_A4)


def encode(boxes_A4: Tensor, defaults_A4: Tensor) -> Tensor:
    """Corner boxes as offsets from default boxes."""
    centre, size = (boxes_A4[:, :2] + boxes_A4[:, 2:]) / 2, (boxes_A4[:, 2:] - boxes_A4[:, :2]).clamp(min=1e-4)
    shift = (centre - defaults_A4[:, :2]) / defaults_A4[:, 2:] / VARIANCE_CENTRE
    return torch.cat([shift, (size / defaults_A4[:, 2:]).log() / VARIANCE_SIZE], 1)


def decode(offsets_A4: Tensor, defaults_A4: Tensor) -> Tensor:
    """Inverse of `encode`: corner boxes."""
    centre = offsets_A4[..., :2] * VARIANCE_CENTRE * defaults_A4[:, 2:] + defaults_A4[:, :2]
    size = (offsets_A4[..., 2:] * VARIANCE_SIZE).clamp(max=4).exp() * defaults_A4[:, 2:]
    return corners(torch.cat([centre, size], -1))


def detection_loss(logits_BAK: Tensor, offsets_BA4: Tensor, labels_BA: Tensor, targets_BA4: Tensor) -> Tensor:
    """Cross entropy of matched boxes and of three times as many hardest backgrounds, plus smooth L1 of matched boxes.

    Divided by the number of matched boxes of the batch.
    """
    positive_BA = labels_BA > 0
    count = positive_BA.sum().clamp(min=1)
    classify_BA = F.cross_entropy(logits_BAK.transpose(1, 2), labels_BA, reduction="none")
    with torch.no_grad():
        hardness_BA = classify_BA.masked_fill(positive_BA, -1.0)
        rank_BA = hardness_BA.argsort(1, descending=True).argsort(1)
        wanted_B1 = (NEGATIVES * positive_BA.sum(1, keepdim=True)).clamp(min=NEGATIVES)
        kept_BA = positive_BA | ((rank_BA < wanted_B1) & ~positive_BA)
    locate = F.smooth_l1_loss(offsets_BA4[positive_BA], targets_BA4[positive_BA], reduction="sum")
    return (classify_BA[kept_BA].sum() + locate) / count


def suppress(boxes_N4: Tensor, scores_N: Tensor, limit: float = NMS_IOU) -> Tensor:
    """Non-maximum suppression: indices of the boxes kept, best first."""
    order = scores_N.argsort(descending=True)
    overlap = iou(boxes_N4[order], boxes_N4[order])
    kept: list[int] = []
    for place in range(len(order)):
        if all(overlap[place, other] <= limit for other in kept):
            kept.append(place)
    return order[torch.tensor(kept, dtype=torch.long)]


class SeparableHead(nn.Sequential):
    """SSDLite's predictor: depthwise 3x3, batch norm, ReLU6, 1x1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            BatchNorm(inputs),
            nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1),
        )


class Detector(nn.Module):
    """A final network's cells as backbone, one extra stage, and a class and a box head on each of three levels.

    The levels are the last cell of each of the two smallest grids (1/2 and 1/4 of the stem's), and a separable
    convolution of stride 2 on the last one.
    """

    def __init__(self, backbone: FinalNetwork, classes: int, size: int) -> None:
        super().__init__()
        self.backbone, self.classes = backbone, classes
        backbone.auxiliary_head = None
        probe = self._probe(size)
        self.levels = self._levels([shape[-1] for shape in probe])
        widths = [probe[level][1] for level in self.levels]
        self.extra = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(widths[-1], widths[-1], 3, stride=2, padding=1, groups=widths[-1], bias=False),
            nn.Conv2d(widths[-1], widths[-1], 1, bias=False),
            BatchNorm(widths[-1]),
        )
        widths.append(widths[-1])
        sides = [probe[level][-1] for level in self.levels]
        self.sides = [*sides, -(-sides[-1] // 2)]
        per_place = [len(scales) * len(RATIOS) for scales in SCALES]
        self.classify = nn.ModuleList(SeparableHead(w, n * (classes + 1)) for w, n in zip(widths, per_place))
        self.locate = nn.ModuleList(SeparableHead(w, n * 4) for w, n in zip(widths, per_place))
        self.defaults_A4: Tensor
        self.register_buffer("defaults_A4", default_boxes(self.sides), persistent=False)

    @torch.no_grad()
    def _probe(self, size: int) -> list[torch.Size]:
        training = self.backbone.training
        outputs = self.backbone.eval().cell_outputs(torch.zeros(1, self.backbone.config.in_channels, size, size))
        self.backbone.train(training)
        return [output.shape for output in outputs]

    @staticmethod
    def _levels(sides: list[int]) -> list[int]:
        """The last cell of the two smallest grids."""
        smallest = sorted(set(sides))[:2]
        if len(smallest) < 2:
            raise UserError("the detector needs a backbone with at least one reduction cell; give it 3 layers or more")
        return [max(i for i, side in enumerate(sides) if side == wanted) for wanted in reversed(smallest)]

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(class logits [B, A, K + 1], box offsets [B, A, 4]); class 0 is background."""
        outputs = self.backbone.cell_outputs(x_BCHW)
        features = [outputs[level] for level in self.levels]
        features.append(self.extra(features[-1]))

        def flat(y_BCHW: Tensor, width: int) -> Tensor:
            return y_BCHW.permute(0, 2, 3, 1).reshape(len(y_BCHW), -1, width)

        logits = [flat(head(f), self.classes + 1) for head, f in zip(self.classify, features)]
        offsets = [flat(head(f), 4) for head, f in zip(self.locate, features)]
        return torch.cat(logits, 1), torch.cat(offsets, 1)

    @torch.no_grad()
    def detect(self, x_BCHW: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A picture's detections, best first: corner boxes [D, 4], scores [D], classes [D]."""
        logits_BAK, offsets_BA4 = self(x_BCHW)
        scores_BAK = logits_BAK.softmax(-1)[..., 1:]
        boxes_BA4 = decode(offsets_BA4, self.defaults_A4).clamp(0, 1)
        found = []
        for scores_AK, boxes_A4 in zip(scores_BAK, boxes_BA4):
            parts = []
            for label in range(self.classes):
                chosen = torch.nonzero(scores_AK[:, label] > MIN_SCORE).squeeze(1)
                chosen = chosen[scores_AK[chosen, label].argsort(descending=True)[: 4 * TOP]]
                kept = chosen[suppress(boxes_A4[chosen], scores_AK[chosen, label])] if len(chosen) else chosen
                parts.append((boxes_A4[kept], scores_AK[kept, label], torch.full((len(kept),), label)))
            boxes, scores, labels = (torch.cat(values) for values in zip(*parts))
            order = scores.argsort(descending=True)[:TOP]
            found.append((boxes[order], scores[order], labels[order]))
        return found


def average_precision(
    found: Sequence[tuple[Tensor, Tensor, Tensor]],
    truth: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    threshold: float = 0.5,
) -> float:
    """Mean over classes of the area under the interpolated precision-recall curve, at one IoU threshold.

    Args:
        found: (boxes, scores, classes) a picture; truth: (boxes, classes) a picture. Classes without objects are left
            out; 0 when there is no object at all.
    """
    values = []
    for label in range(classes):
        total = sum(int((labels == label).sum()) for _, labels in truth)
        if not total:
            continue
        hits: list[tuple[float, bool]] = []
        for (boxes, scores, labels), (true_boxes, true_labels) in zip(found, truth, strict=True):
            mine = labels == label
            theirs = true_boxes[true_labels == label]
            taken = torch.zeros(len(theirs), dtype=torch.bool)
            for box, score in zip(boxes[mine], scores[mine].tolist()):
                overlap = iou(box[None], theirs)[0] if len(theirs) else torch.zeros(0)
                best = int(overlap.argmax()) if len(theirs) else -1
                right = best >= 0 and float(overlap[best]) >= threshold and not bool(taken[best])
                if right:
                    taken[best] = True
                hits.append((score, right))
        hits.sort(key=lambda hit: -hit[0])
        if not hits:
            values.append(0.0)
            continue
        right_D = torch.tensor([hit[1] for hit in hits]).double().cumsum(0)
        precision_D = right_D / torch.arange(1, len(hits) + 1)
        # Highest precision at this recall or beyond.
        envelope_D = precision_D.flip(0).cummax(0).values.flip(0)
        step_D = torch.diff(right_D, prepend=torch.zeros(1, dtype=torch.double)) / total
        values.append(float((envelope_D * step_D).sum()))
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class Scenes:
    """Pictures with boxes: x float32 [n, 3, S, S] in [-1, 1]; boxes (corners) and classes a picture."""

    x_NCHW: Tensor
    boxes: list[Tensor]
    classes: list[Tensor]

    @classmethod
    def draw(cls, split: str, count: int, size: int, seed: int = 0) -> Scenes:
        """`count` scenes of the Shapes world."""
        data = Shapes(split, count, size, seed=seed)  # type: ignore[arg-type]
        items = [data[i] for i in range(count)]
        x_NCHW = torch.stack([item["image"] for item in items]).float() / 127.5 - 1
        boxes, classes = [], []
        for item in items:
            there = item["classes"][:MAX_OBJECTS] >= 0
            boxes.append(item["boxes"][there])
            classes.append(item["classes"][there])
        return cls(x_NCHW, boxes, classes)


def train_detector(detector: Detector, scenes: Scenes, steps: int, batch_size: int, seed: int) -> list[float]:
    """SGD with a cosine; the losses by step. Raises UserError when a loss is not finite."""
    targets = [match(b, c, detector.defaults_A4) for b, c in zip(scenes.boxes, scenes.classes)]
    labels_NA, offsets_NA4 = (torch.stack(values) for values in zip(*targets))
    optimiser = torch.optim.SGD(detector.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    detector.train()
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(labels_NA), (batch_size,), generator=step_generator(seed, step))
        logits_BAK, offsets_BA4 = detector(scenes.x_NCHW[chosen])
        loss = detection_loss(logits_BAK, offsets_BA4, labels_NA[chosen], offsets_NA4[chosen])
        stop_if_not_finite(float(loss.detach()), step, what="detection loss")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def evaluate_detector(detector: Detector, scenes: Scenes, batch_size: int = 64) -> dict[str, float]:
    """AP at IoU 0.5 and 0.75, and COCO's mean over 0.5, 0.55, ..., 0.95."""
    detector.eval()
    found = [one for part in scenes.x_NCHW.split(batch_size) for one in detector.detect(part)]
    truth = list(zip(scenes.boxes, scenes.classes))
    at = {t: average_precision(found, truth, detector.classes, t / 100) for t in range(50, 100, 5)}
    return {"ap": sum(at.values()) / len(at), "ap50": at[50], "ap75": at[75]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--genotype", default="PC_DARTS_image", help="a published name or a JSON file")
    parser.add_argument("--init", type=Path, help="folder of a trained network (.../retrain/model) to start from")
    parser.add_argument("--channels", type=Count, default=8, help="width of the first cell")
    parser.add_argument("--layers", type=Count, default=6, help="number of cells")
    parser.add_argument("--size", type=Count, default=64, help="side of the pictures in pixels")
    parser.add_argument("--images", type=Count, default=3000, help="training pictures")
    parser.add_argument("--test_images", type=Count, default=300, help="pictures that it is judged on")
    parser.add_argument("--steps", type=Count, default=600, help="of the optimiser")
    parser.add_argument("--batch_size", type=Count, default=32, help="pictures of a step")
    parser.add_argument("--seed", type=Seed, default=0, help="of the weights' start and the pictures")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/pc_darts-detection/metrics.json"),
        help="JSON file that the metrics go to",
    )
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    if options.init is not None:
        from pc_darts.retraining import load_model

        backbone, _ = load_model(options.init)
        if backbone.config.in_channels != 3:
            raise UserError(f"--init {options.init}: a backbone for grey pictures; scenes have three channels")
    else:
        backbone = FinalNetwork(
            Genotype.load(options.genotype), FinalConfig(options.channels, options.layers, classes=len(SHAPES))
        )
    detector = Detector(backbone, len(SHAPES), options.size)
    scenes = Scenes.draw("train", options.images, options.size)
    losses = train_detector(detector, scenes, options.steps, options.batch_size, options.seed)
    result: dict[str, Any] = evaluate_detector(detector, Scenes.draw("test", options.test_images, options.size))
    result |= {
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "parameters": sum(p.numel() for p in detector.parameters()),
        "macs": multiply_adds(detector, torch.zeros(1, 3, options.size, options.size))[0],
        "steps": options.steps,
        "genotype": json.loads(backbone.genotype.to_json()),
    }
    write_json(options.output, result)
    print(f"AP {result['ap']:.3f}, AP50 {result['ap50']:.3f}, AP75 {result['ap75']:.3f}; written to {options.output}")
    return result


if __name__ == "__main__":
    run_main(main)
