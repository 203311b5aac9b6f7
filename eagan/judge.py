"""The network that judges pictures where no Inception weights are at hand: a small classifier of the set's own classes.

IS and FID have the paper's form on its probabilities and its 64 features; the numbers compare with each other only, at
equal counts. It is trained once for a set (about a minute) and kept in the cache and in every run's folder.

Shape suffixes: N pictures, C channels, S side, D features, K classes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cpu import cpu_kind
from common.data.augmentation import Augmentation, Batches, evaluation_batches
from common.data.cache import fingerprint_strings
from common.data.classes import ImageSet
from common.errors import UserError, stop_if_not_finite
from common.files import locked
from common.images import as_uint8, resize_clean
from common.metrics.features import Extractor, load_extractor
from common.paths import cache_dir
from common.weights import read_weights, save_weights

WIDTHS = (24, 48, 64, 64)
FEATURES = 64
BATCH, LR = 100, 2e-3
SEED = 2111  # of its training, the same for every run
NOISE = 0.05  # of 1, the most that is added: samples are noisier than pictures


class Classifier(nn.Module):
    """Four convolutions, a linear layer to the features, and one from these to the classes; any side of 16 or more."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        sides = zip((3, *WIDTHS), WIDTHS)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1 if i == 0 else 2, 1) for i, (a, b) in enumerate(sides))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in WIDTHS)
        self.features = nn.Linear(4 * WIDTHS[-1], FEATURES)
        self.classes = nn.Linear(FEATURES, classes)

    def forward(self, x_NCSS: Tensor) -> Tensor:
        """Pictures in [-1, 1] to features [N, D]."""
        for conv, norm in zip(self.convs, self.norms):
            x_NCSS = F.silu(norm(conv(x_NCSS)))
        return self.features(F.adaptive_avg_pool2d(x_NCSS, 2).flatten(1))


class ClassJudge:
    """An extractor in the sense of `common.metrics.features`, with class probabilities.

    Args:
        path: of its weights, whose notes say its classes and the side that it looks at.
    """

    dim = FEATURES

    def __init__(self, path: Path, device: str = "cpu", batch_size: int = 250) -> None:
        tensors, notes = read_weights(path)
        if not {"classes", "side", "accuracy"} <= notes.keys():
            raise UserError(f"{path} holds no classifier that judges; delete it to have it made again")
        self.names, self.side = json.loads(notes["classes"]), int(notes["side"])
        self.accuracy, self.batch_size = float(notes["accuracy"]), batch_size
        self.name, self.resize = f"classes{FEATURES}", f"anti-aliased bicubic in float to {self.side} (clean-fid rule)"
        self.device = torch.device(device)
        self.net = Classifier(len(self.names))
        self.net.load_state_dict(tensors)
        self.net.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to features [N, D]."""
        parts = as_uint8(images).split(self.batch_size)
        found = [self.net(resize_clean(part.to(self.device), self.side) / 127.5 - 1).cpu() for part in parts]
        return torch.cat(found) if found else torch.zeros(0, self.dim)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """[N, K]."""
        return self.net.classes(features.to(self.device)).cpu()


def train_judge(data: ImageSet, path: Path, steps: int) -> None:
    """Train the classifier on the training pictures of all classes and write its weights."""
    augment = Augmentation(padding=2)
    batches = Batches(data, data.train, min(BATCH, len(data.train)), SEED, augment)
    random_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    net = Classifier(len(data.classes))
    optimiser = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=steps + 1)
    for step in range(steps):
        x_BCHW, y_B = batches.batch(step)
        x_BCHW = _unit(x_BCHW, data) + NOISE * torch.rand(()) * torch.randn_like(x_BCHW)
        loss = F.cross_entropy(net.classes(net(x_BCHW.expand(-1, 3, -1, -1))), y_B)
        stop_if_not_finite(float(loss.detach()), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    torch.set_rng_state(random_state)
    net.eval()
    with torch.no_grad():
        right = [
            (net.classes(net(_unit(x_BCHW, data).expand(-1, 3, -1, -1))).argmax(1) == y_B).sum()
            for x_BCHW, y_B in evaluation_batches(data, data.test, 250)
        ]
    accuracy = float(sum(map(int, right)) / len(data.test))
    notes = {
        "classes": json.dumps(data.classes),
        "side": str(data.size),
        "accuracy": str(accuracy),
        "steps": str(steps),
    }
    save_weights(path, net.state_dict(), notes)


def _unit(x_BCHW: Tensor, data: ImageSet) -> Tensor:
    """Normalised pictures back in [-1, 1]."""
    return 2 * (x_BCHW * data.std_C[:, None, None] + data.mean_C[:, None, None]) - 1


def judge_file(data: ImageSet, steps: int) -> Path:
    """The weights of a set's classifier in the cache; it is trained where they are missing.

    Machines round differently: every kind of CPU has its own.
    """
    known = fingerprint_strings([data.contents, str(data.size), str(steps), str(WIDTHS), cpu_kind()])[:16]
    path = cache_dir("judges") / f"{known}.safetensors"
    if not path.is_file():
        with locked(path):
            if not path.is_file():
                train_judge(data, path, steps)
    return path


def open_judge(name: str, device: str = "cpu") -> Extractor:
    """`classes:FILE`, or what `common.metrics.features` knows: lite0, inception:FILE.

    Raises:
        UserError: no such judge or file.
    """
    kind, _, path = name.partition(":")
    return ClassJudge(Path(path), device) if kind == "classes" and path else load_extractor(name, device)
