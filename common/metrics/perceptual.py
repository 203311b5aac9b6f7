"""LPIPS on images, with a trunk of choice: a loss on decoded images and a measure between two samplers' pictures.

The papers use LPIPS with ImageNet's AlexNet or VGG16, which no package ships: those load by path. The default trunk has
VGG16's layers at a tenth of its widths and was trained here to tell the 9 emoji groups apart
(`python -m common.metrics.perceptual`, about two CPU minutes); it shares nothing with the networks that judge samples.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError, stop_if_not_finite
from common.metrics.lpips import (
    INPUT_SCALE,
    INPUT_SHIFT,
    LPIPS,
    VGG16Trunk,
    lpips_from_state_dict,
    official_parts,
    read_tensors,
)

WEIGHTS = Path(__file__).with_name("perceptual_trunk.safetensors")
WIDTHS = (16, 24, 32, 48, 48)  # a tenth of VGG16's
# Index in torchvision's `features`, output channels, kernel, stride, padding; a max-pooling stands before the 2nd, 3rd.
ALEXNET = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))


class AlexNetTrunk(nn.Module):
    """AlexNet's five convolutions, tapped after each ReLU; parameter names `features.N.*` as in torchvision.

    Images [B, 3, H, W] in [-1, 1], sides of at least 64 (below that the second pooling has nothing left).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.name = "alexnet"
        self.features = nn.ModuleDict()
        in_channels = 3
        for index, channels, kernel, stride, padding in ALEXNET:
            self.features[str(index)] = nn.Conv2d(in_channels, channels, kernel, stride, padding)
            in_channels = channels
        self.register_buffer("shift", torch.tensor(INPUT_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(INPUT_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        if min(x_BCHW.shape[-2:]) < 64:
            raise UserError(f"LPIPS with AlexNet needs images of at least 64x64, got {tuple(x_BCHW.shape[-2:])}")
        h_BCHW = (x_BCHW - self.shift) / self.scale
        taps = []
        for number, (index, *_) in enumerate(ALEXNET):
            if number in (1, 2):
                h_BCHW = F.max_pool2d(h_BCHW, 3, 2)
            h_BCHW = F.relu(self.features[str(index)](h_BCHW))
            taps.append(h_BCHW)
        return taps


def perceptual_distance(trunk: str = "trained") -> LPIPS:
    """The frozen distance d(x, y) [B] for images in [-1, 1].

    Args:
        trunk: `trained` (this repository's), `random` (same layers, fixed weights), or official weights: one file, or
            the network's and the LPIPS heads' joined by a comma (`alexnet.pth,lpips_alex.pth`); AlexNet or VGG16, .pth
            or .safetensors.

    Raises:
        UserError: a missing, unreadable or incomplete weights file.
    """
    if trunk == "trained":
        if not WEIGHTS.is_file():
            raise UserError(f"{WEIGHTS} is missing: restore it, or name a file of LPIPS weights instead")
        state = load_file(WEIGHTS)
        network = VGG16Trunk(WIDTHS, name="vgg16-emoji-groups")
        network.load_state_dict({key: value.float() for key, value in state.items()})
        return LPIPS(network)
    if trunk == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LPIPS(VGG16Trunk(WIDTHS))
    return official_lpips(*(part.strip() for part in trunk.split(",")))


def official_lpips(*paths: str | Path) -> LPIPS:
    """The official LPIPS from the user's files (.pth or .safetensors), together: trunk and LPIPS heads."""
    state = {key: value for path in paths for key, value in read_tensors(Path(path)).items()}
    source = " + ".join(str(path) for path in paths)
    first = state.get("features.0.weight", state.get("net.slice1.0.weight"))
    if first is not None and tuple(first.shape[-2:]) == (11, 11):
        return alexnet_lpips(state, source)
    return lpips_from_state_dict(state, source)


def alexnet_lpips(state: Mapping[str, Tensor], source: str = "state dict") -> LPIPS:
    """LPIPS on AlexNet from official tensors: torchvision's `features.N.*` or the LPIPS code's `net.sliceK.N.*`, heads
    `linK.model.1.weight` (without them the channels weigh the same).

    Raises:
        UserError: a weight is missing, or the heads do not fit the taps.
    """
    weights, heads = official_parts(state)
    trunk = AlexNetTrunk()
    missing = [key for key in trunk.state_dict() if key not in weights]
    if missing:
        raise UserError(f'{source}: "{missing[0]}" is missing; expected the AlexNet weights of torchvision or of LPIPS')
    trunk.load_state_dict({key: weights[key] for key in trunk.state_dict()})
    widths = [layer[1] for layer in ALEXNET]
    if heads and [heads[i].numel() if i in heads else 0 for i in range(len(widths))] != widths:
        raise UserError(f"{source}: LPIPS heads {sorted(heads)} do not fit AlexNet's taps of {widths} channels")
    lins: Sequence[Tensor] | None = [heads[i] for i in range(len(widths))] if heads else None
    return LPIPS(trunk, lins)


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
        stop_if_not_finite(float(loss.detach()), step)
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
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, WEIGHTS)
    print(f"{WEIGHTS.name}: {sum(p.numel() for p in network.parameters())} parameters, {score:.1%} on unseen concepts")
