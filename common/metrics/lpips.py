"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): a perceptual distance on the features of any frozen trunk.

A trunk maps an image in [-1, 1] to a list of feature maps and has a `name`, which every reported number carries. The
official distance is `common.metrics.perceptual.official_lpips(vgg, lin)`, from the user's two files.

Shape suffixes: B batch, C channels, H W height and width.
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

VGG16_WIDTHS = (64, 128, 256, 512, 512)
CONVS_PER_STAGE = (2, 2, 3, 3, 3)
# ImageNet mean and standard deviation, restated for images in [-1, 1].
INPUT_SHIFT = (-0.030, -0.088, -0.188)
INPUT_SCALE = (0.458, 0.448, 0.450)


class VGG16Trunk(nn.Module):
    """VGG16's convolutions with taps relu1_2, 2_2, 3_3, 4_3, 5_3; parameter names `features.N.*` as in torchvision.

    `widths` narrows the five stages. Images [B, 3, H, W] in [-1, 1], sides of at least 16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int] = VGG16_WIDTHS, name: str | None = None) -> None:
        super().__init__()
        self.name = name or "vgg16-" + "-".join(str(width) for width in widths)
        self.channels = list(widths)
        self.features = nn.ModuleDict()
        self.stages: list[list[str]] = []
        index, in_channels = 0, 3
        for width, convs in zip(widths, CONVS_PER_STAGE, strict=True):
            self.stages.append([])
            for _ in range(convs):
                self.features[str(index)] = nn.Conv2d(in_channels, width, 3, padding=1)
                self.stages[-1].append(str(index))
                in_channels = width
                index += 2  # convolution, ReLU
            index += 1  # max-pooling
        self.register_buffer("shift", torch.tensor(INPUT_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(INPUT_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        if min(x_BCHW.shape[-2:]) < 16:
            raise UserError(f"LPIPS with VGG16 needs images of at least 16x16, got {tuple(x_BCHW.shape[-2:])}")
        h_BCHW = (x_BCHW - self.shift) / self.scale
        taps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                h_BCHW = F.max_pool2d(h_BCHW, 2)
            for index in stage:
                h_BCHW = F.relu(self.features[index](h_BCHW))
            taps.append(h_BCHW)
        return taps


class LPIPS(nn.Module):
    """sum over taps of the spatial mean of sum_c w_c (f_c - g_c)^2, f and g unit vectors along the channels (eq. 1).

    `lin_weights`: one non-negative [C_l] tensor per tap; without them w = 1, that is twice the cosine distance.
    The trunk is frozen and stays in eval mode. `name` says which trunk and weights a number comes from.
    """

    def __init__(self, trunk: nn.Module, lin_weights: Sequence[Tensor] | None = None, name: str | None = None) -> None:
        super().__init__()
        self.net = trunk
        self.taps = None if lin_weights is None else len(lin_weights)
        for i, weight in enumerate(lin_weights or []):
            self.register_buffer(f"lin{i}", weight.detach().flatten().view(1, -1, 1, 1).clone())
        trunk_name = str(getattr(trunk, "name", type(trunk).__name__))
        self.name = name or f"lpips-{trunk_name}" + ("" if lin_weights else "-uniform")
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance [B] between images in [-1, 1]; differentiable in both, no graph for one without grad."""
        features_a, features_b = self.net(a_BCHW), self.net(b_BCHW)
        if self.taps is not None and self.taps != len(features_a):
            raise UserError(f"{self.name}: {self.taps} channel-weight tensors for a trunk with {len(features_a)} taps")
        distance = a_BCHW.new_zeros(a_BCHW.shape[0], dtype=torch.float32)
        for i, (f_BCHW, g_BCHW) in enumerate(zip(features_a, features_b, strict=True)):
            difference_BCHW = (unit_normalise(f_BCHW.float()) - unit_normalise(g_BCHW.float())).square()
            if self.taps is not None:
                difference_BCHW = difference_BCHW * self.get_buffer(f"lin{i}")
            distance = distance + difference_BCHW.sum(dim=1).mean(dim=(1, 2))
        return distance


def unit_normalise(x_BCHW: Tensor, eps: float = 1e-10) -> Tensor:
    """Each position's channel vector divided by its length (eps added to the length, as in the official code)."""
    # Where every feature is off, sqrt has no gradient (the official code gets NaN): 0 / 1 there instead of 0 / eps.
    square_B1HW = x_BCHW.square().sum(dim=1, keepdim=True)
    length_B1HW = torch.where(square_B1HW == 0, 1.0, square_B1HW).sqrt()
    return x_BCHW * (1 / (length_B1HW + eps))  # a division of every value would have a backward pass of four more


def official_parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """(trunk weights as torchvision's `features.N.*`, LPIPS heads by tap) of official tensors.

    Understands torchvision's names, the `net.sliceK.N.*` of the LPIPS code and `linK.model.1.weight`; other keys
    (classifier, scaling layer) are ignored.
    """
    trunk_state: dict[str, Tensor] = {}
    lins: dict[int, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "features" and len(parts) == 3:
            trunk_state[key] = value
        elif parts[0] == "net" and len(parts) == 4 and parts[1].startswith("slice"):
            trunk_state[f"features.{parts[2]}.{parts[3]}"] = value
        elif parts[0].startswith("lin") and parts[-1] == "weight" and parts[0][3:].isdigit():
            lins[int(parts[0][3:])] = value
    return trunk_state, lins


def lpips_from_state_dict(state: Mapping[str, Tensor], source: str = "state dict") -> LPIPS:
    """LPIPS on VGG16 from official tensors; stage widths are read off the shapes. Without heads weights are uniform."""
    trunk_state, lins = official_parts(state)
    expected = VGG16Trunk((1, 1, 1, 1, 1))
    missing = [key for key in expected.state_dict() if key not in trunk_state]
    if missing:
        raise UserError(f'{source}: "{missing[0]}" is missing; expected the VGG16 weights of torchvision or of LPIPS')
    widths = [trunk_state[f"features.{stage[0]}.weight"].shape[0] for stage in expected.stages]
    if lins and sorted(lins) != list(range(len(widths))):
        raise UserError(f"{source}: LPIPS heads {sorted(lins)} found; expected lin0 to lin{len(widths) - 1}")
    heads = [lins[i] for i in range(len(widths))] if lins else None
    for i, (head, width) in enumerate(zip(heads or [], widths, strict=False)):
        if head.numel() != width:
            raise UserError(f"{source}: lin{i} has {head.numel()} channel weights; tap {i} has {width} channels")
    trunk = VGG16Trunk(widths, name="vgg16")
    trunk.load_state_dict({key: trunk_state[key] for key in expected.state_dict()})
    return LPIPS(trunk, heads)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a user's .pth or .safetensors file; never anything pickled beside them."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected AlexNet, VGG16 or LPIPS weights (.pth or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable weights file ({type(error).__name__}); download it again") from None
    except Exception as error:  # torch's unpickler raises its own class for anything but tensors
        raise UserError(f"{path}: refused, holds more than plain tensors ({type(error).__name__})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return content
