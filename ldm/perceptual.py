"""The perceptual distance of the first stage's loss: LPIPS form on a VGG16 of narrow width.

The paper uses VGG16 with ImageNet weights, which no package ships. The trunk here has VGG16's layers at a tenth of its
widths and was trained in this repository to tell the 9 emoji groups apart (`python -m ldm.perceptual`, about two CPU
minutes); it shares nothing with the feature networks that judge samples. Official weights load through a path.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.metrics.lpips import LPIPS, VGG16Trunk, load_official_lpips

WIDTHS = (16, 24, 32, 48, 48)
WEIGHTS = Path(__file__).parent / "pretrained" / "perceptual_trunk.safetensors"


def perceptual_distance(trunk: str) -> LPIPS:
    """The frozen distance d(x, y) [B, 1, 1, 1] for images in [-1, 1].

    Args:
        trunk: `trained` (this repository's), `random` (same layers, fixed weights), or a path to official weights.
    """
    if trunk == "trained":
        network = VGG16Trunk(WIDTHS, name="vgg16-emoji-groups")
        network.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
        return LPIPS(network)
    if trunk == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LPIPS(VGG16Trunk(WIDTHS))
    return load_official_lpips(trunk)


def train_trunk(steps: int = 700, batch: int = 64, seed: int = 0) -> tuple[VGG16Trunk, float]:
    """Train the trunk as a classifier of EmojiGroups-32; returns it and its accuracy on unseen concepts."""
    from common.data.emoji import EmojiGroups
    from common.data.sampling import step_generator

    torch.manual_seed(seed)
    data, held_out = EmojiGroups("train", size=32), EmojiGroups("test", size=32)
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2)
    labels = torch.as_tensor([data[i]["label"] for i in range(len(data))])
    trunk = VGG16Trunk(WIDTHS)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    heads = nn.ModuleList(nn.Linear(width, 9) for width in WIDTHS)
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)

    def logits(x: Tensor) -> Tensor:
        # Deep supervision: every tap has to carry information, because LPIPS reads all five.
        return torch.stack([head(tap.mean((2, 3))) for head, tap in zip(heads, trunk(x))]).mean(0)

    for step in range(steps):
        generator = step_generator(seed, step)
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
        x = torch.roll(x, shift, dims=(2, 3))
        loss = F.cross_entropy(logits(x), labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x = torch.from_numpy(held_out.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        truth = torch.as_tensor([held_out[i]["label"] for i in range(len(held_out))])
        accuracy = float((torch.cat([logits(part) for part in x.split(256)]).argmax(1) == truth).float().mean())
    return trunk, accuracy


if __name__ == "__main__":
    network, score = train_trunk()
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, WEIGHTS)
    print(f"{WEIGHTS.name}: {sum(p.numel() for p in network.parameters())} parameters, {score:.1%} on unseen concepts")
