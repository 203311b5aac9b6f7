"""Inception-v3 as ported from TensorFlow for FID, in pytorch-fid's key layout: for users who have those weights.

Szegedy et al. 2016, "Rethinking the Inception Architecture", Table 1, without the auxiliary head. The FID graph
differs from torchvision's in its pools: averages leave padding out, and the last block pools by maximum.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 2048
CLASSES = 1008  # the TensorFlow graph's classifier, with 8 unused classes
SIZE = 299


class ConvBN(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(c_in, c_out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


class Branches(nn.Module):
    """Parallel chains of `ConvBN` concatenated over channels; attribute names are the weight file's."""

    def chain(self, x_BCHW: Tensor, *names: str) -> Tensor:
        for name in names:
            x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW


def _average(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 3, 1, 1, count_include_pad=False)


class InceptionA(Branches):
    """35 x 35, Figure 5."""

    def __init__(self, c_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBN(c_in, 64)
        self.branch5x5_1, self.branch5x5_2 = ConvBN(c_in, 48), ConvBN(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvBN(c_in, 64), ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(c_in, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        five = self.chain(x, "branch5x5_1", "branch5x5_2")
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class InceptionB(Branches):
    """35 x 35 to 17 x 17."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3 = ConvBN(c_in, 384, 3, 2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvBN(c_in, 64), ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class InceptionC(Branches):
    """17 x 17, Figure 6 with n = 7."""

    def __init__(self, c_in: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvBN(c_in, 192)
        self.branch7x7_1, self.branch7x7_2 = ConvBN(c_in, width), ConvBN(width, width, row)
        self.branch7x7_3 = ConvBN(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = ConvBN(c_in, width), ConvBN(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = ConvBN(width, width, row), ConvBN(width, width, column)
        self.branch7x7dbl_5 = ConvBN(width, 192, row)
        self.branch_pool = ConvBN(c_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.chain(x, "branch7x7_1", "branch7x7_2", "branch7x7_3")
        double = self.chain(x, *(f"branch7x7dbl_{i}" for i in range(1, 6)))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class InceptionD(Branches):
    """17 x 17 to 8 x 8."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = ConvBN(c_in, 192), ConvBN(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = ConvBN(c_in, 192), ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = ConvBN(192, 192, (7, 1)), ConvBN(192, 192, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.chain(x, "branch3x3_1", "branch3x3_2")
        seven = self.chain(x, *(f"branch7x7x3_{i}" for i in range(1, 5)))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class InceptionE(Branches):
    """8 x 8, Figure 7; the FID graph pools by maximum in its last block."""

    def __init__(self, c_in: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBN(c_in, 320)
        self.branch3x3_1 = ConvBN(c_in, 384)
        self.branch3x3_2a, self.branch3x3_2b = ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvBN(c_in, 448), ConvBN(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1))
        self.branch_pool = ConvBN(c_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else _average(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """forward([B,3,299,299] in [-1,1]) -> average-pooled features [B,2048]; 23,850,960 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, max_pool=False), InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BCHW)))
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(h, 3, 2)))
        h = F.max_pool2d(h, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            h = getattr(self, f"Mixed_{name}")(h)
        return h.mean(dim=(2, 3))

    def logits(self, features_BC: Tensor) -> Tensor:
        """Class scores [B,1008] without the classifier's bias, the convention of the published Inception Scores."""
        return features_BC @ self.fc.weight.T
