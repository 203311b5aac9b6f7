"""The feature network that judges Shapes samples: 64 features of a small attribute classifier.

The head-to-head benchmark measures Frechet distances on features that know what a Shapes image is made of: which
shapes, colours and textures it shows, how many objects, where, on which background. The network shares neither data
seed, width nor layers with the perceptual trunk that serves as a loss, so that nothing trained with it is flattered.

`python -m common.metrics.judge` trains it again (about one CPU minute) and writes `judge.safetensors` beside this file.

Shape suffixes: B batch, C channels, H W height and width, D features.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.data.sampling import step_generator
from common.data.shapes import BACKGROUNDS, COLOURS, MAX_OBJECTS, SHAPES, TEXTURES, Shapes
from common.errors import UserError, stop_if_not_finite
from common.images import as_uint8, resize_clean
from common.metrics.features import Extractor, load_extractor
from common.weights import save_weights

WEIGHTS = Path(__file__).with_name("judge.safetensors")
SIDE = 32
# What is predicted, in the order of the outputs: presence of each shape, colour and texture; background; count; centre.
HEADS = {
    "shapes": len(SHAPES),
    "colours": len(COLOURS),
    "textures": len(TEXTURES),
    "background": len(BACKGROUNDS),
    "count": MAX_OBJECTS,
    "centre": 2,
}


class AttributeNet(nn.Module):
    """Four convolutions and a linear layer to the features; the heads read only the features."""

    def __init__(self, width: int = 40, features: int = 64) -> None:
        super().__init__()
        widths = (3, width // 2, width, width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1:])
        self.features = nn.Linear(width * (SIDE // 8) ** 2, features)
        self.heads = nn.Linear(features, sum(HEADS.values()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] with sides of 32 to features [B, D]."""
        for conv, norm in zip(self.convs, self.norms):
            x_BCHW = F.silu(norm(conv(x_BCHW)))
        return self.features(x_BCHW.flatten(1))


class ShapesJudge:
    """An extractor in the sense of `common.metrics.features`: uint8 images to 64 features."""

    name = "shapes64"
    dim = 64
    resize = "anti-aliased bicubic in float to 32 (clean-fid rule)"

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 256) -> None:
        self.device, self.batch_size = torch.device(device), batch_size
        self.net = _load().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] of any size to float32 features [N, 64] on the CPU."""
        parts = as_uint8(images).split(self.batch_size) if len(images) else []
        found = [self.net(resize_clean(part.to(self.device), SIDE) / 127.5 - 1).float().cpu() for part in parts]
        return torch.cat(found) if found else torch.zeros(0, self.dim)


def judge_of(kind: str | None, data: str = "") -> Extractor:
    """The network that judges: shapes64, lite0 or inception:FILE; None: shapes64 for the data `shapes`, else lite0."""
    kind = kind or ("shapes64" if data == "shapes" else "lite0")
    return ShapesJudge() if kind == "shapes64" else load_extractor(kind)


@cache
def _load() -> AttributeNet:
    if not WEIGHTS.is_file():
        raise UserError(f"{WEIGHTS.name} is missing beside judge.py: train it with python -m common.metrics.judge")
    net = AttributeNet()
    net.load_state_dict({key: value.float() for key, value in load_file(WEIGHTS).items()})
    return net.eval().requires_grad_(False)


def _targets(data: Shapes) -> dict[str, Tensor]:
    """What HEADS predict, for every image of a data set."""
    items = [data[i] for i in range(len(data))]
    stacked = {
        name: torch.stack([item[name] for item in items]) for name in ("classes", "colours", "textures", "boxes")
    }

    def presence(indices_NK: Tensor, classes: int) -> Tensor:
        return F.one_hot(indices_NK + 1, classes + 1).amax(1)[:, 1:].float()

    boxes_NK4 = stacked["boxes"]
    return {
        "shapes": presence(stacked["classes"], len(SHAPES)),
        "colours": presence(stacked["colours"], len(COLOURS)),
        "textures": presence(stacked["textures"], len(TEXTURES)),
        "background": torch.tensor([item["background"] for item in items]),
        "count": (stacked["classes"] >= 0).sum(1) - 1,
        "centre": torch.stack([boxes_NK4[:, 0, 0::2].mean(1), boxes_NK4[:, 0, 1::2].mean(1)], 1) * 2 - 1,
    }


def _loss(logits_BD: Tensor, target: dict[str, Tensor]) -> Tensor:
    parts = dict(zip(HEADS, logits_BD.split(list(HEADS.values()), dim=1)))
    loss = F.mse_loss(parts["centre"], target["centre"])
    for name in ("shapes", "colours", "textures"):
        loss = loss + F.binary_cross_entropy_with_logits(parts[name], target[name])
    for name in ("background", "count"):
        loss = loss + F.cross_entropy(parts[name], target[name])
    return loss


def train(images: int = 16_000, steps: int = 1_500, batch: int = 64, seed: int = 2024) -> dict[str, float]:
    """Train on Shapes, write WEIGHTS, and return accuracies on 1,000 unseen images."""
    torch.manual_seed(seed)
    data, held_out = Shapes("train", images, SIDE, seed=seed), Shapes("test", 1_000, SIDE, seed=seed)
    pixels, target = torch.from_numpy(np.ascontiguousarray(data.images)), _targets(data)
    net = AttributeNet()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        generator = step_generator(seed, step)
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        x_BCHW = pixels[rows].float() / 127.5 - 1
        # Samples of a generator are noisier than renders: the features must not be blind to half of them.
        x_BCHW = x_BCHW + 0.08 * torch.rand((), generator=generator) * torch.randn(x_BCHW.shape, generator=generator)
        loss = _loss(net.heads(net(x_BCHW)), {name: column[rows] for name, column in target.items()})
        stop_if_not_finite(float(loss.detach()), step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    save_weights(WEIGHTS, net.state_dict(), dtype=torch.float16)
    _load.cache_clear()
    truth = _targets(held_out)
    judge = ShapesJudge()
    with torch.inference_mode():
        logits = judge.net.heads(judge(torch.from_numpy(np.ascontiguousarray(held_out.images))))
    parts = dict(zip(HEADS, logits.split(list(HEADS.values()), dim=1)))
    accuracies = {
        n: float(((parts[n] > 0) == (truth[n] > 0.5)).float().mean()) for n in ("shapes", "colours", "textures")
    }
    accuracies |= {n: float((parts[n].argmax(1) == truth[n]).float().mean()) for n in ("background", "count")}
    return accuracies


if __name__ == "__main__":
    print(", ".join(f"{name} {value:.3f}" for name, value in train().items()))
