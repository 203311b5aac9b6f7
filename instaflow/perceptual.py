"""The distance D of perceptual distillation (section 2, item 4): LPIPS on decoded images, with a trunk of choice.

The paper's LPIPS has an AlexNet trunk with ImageNet weights, which no package ships; it loads by path. The default is
the narrow VGG16 that this repository trains on emoji groups; it shares nothing with the networks that judge samples.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError
from common.metrics.lpips import INPUT_SCALE, INPUT_SHIFT, LPIPS, VGG16Trunk, load_official_lpips
from common.paths import REPOSITORY
from common.training import load_checkpoint

TRAINED_TRUNK = REPOSITORY / "ldm" / "pretrained" / "perceptual_trunk.safetensors"
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
        if not TRAINED_TRUNK.is_file():
            raise UserError(
                f"the perceptual trunk {TRAINED_TRUNK} is missing: restore it, or name a file of LPIPS weights instead"
            )
        state = load_file(TRAINED_TRUNK)
        firsts = [state[f"features.{i}.weight"].shape[0] for i in (0, 5, 10, 17, 24)]
        network = VGG16Trunk(firsts, name="vgg16-emoji-groups")
        network.load_state_dict({key: value.float() for key, value in state.items()})
        return LPIPS(network)
    if trunk == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LPIPS(VGG16Trunk((16, 24, 32, 48, 48)))
    paths = [Path(part.strip()) for part in trunk.split(",")]
    state = {key: value for path in paths for key, value in _read_weights(path).items()}
    if _is_alexnet(state):
        return alexnet_lpips(state, trunk)
    return load_official_lpips(*paths)


def alexnet_lpips(state: Mapping[str, Tensor], source: str = "state dict") -> LPIPS:
    """LPIPS on AlexNet from official tensors: torchvision's `features.N.*` or the LPIPS code's `net.sliceK.N.*`, heads
    `linK.model.1.weight` (without them the channels weigh the same).

    Raises:
        UserError: a weight is missing, or the heads do not fit the taps.
    """
    weights: dict[str, Tensor] = {}
    heads: dict[int, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "features" and len(parts) == 3:
            weights[key] = value
        elif parts[0] == "net" and len(parts) == 4:
            weights[f"features.{parts[2]}.{parts[3]}"] = value
        elif parts[0].startswith("lin") and parts[-1] == "weight" and parts[0][3:].isdigit():
            heads[int(parts[0][3:])] = value
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


def _is_alexnet(state: Mapping[str, Tensor]) -> bool:
    first = state.get("features.0.weight", state.get("net.slice1.0.weight"))
    return first is not None and tuple(first.shape[-2:]) == (11, 11)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return load_checkpoint(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected AlexNet, VGG16 or LPIPS weights (.pth or .safetensors)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable weights file ({error}); download it again") from None
