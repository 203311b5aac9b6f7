"""torch's own forms of what `common/kernels` has other ones for, for the peers that a benchmark is against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def torchs_convolutions(*modules: ModuleType) -> Iterator[None]:
    """Cells of these modules that run meanwhile take torch's depthwise convolutions, reductions and concatenations."""
    from common.kernels.depthwise import DepthwiseConv2d

    own: dict[str, Any] = {"factorized_reduce": two_convolutions, "concatenate": partial(torch.cat, dim=1)}
    changes = [patch.object(DepthwiseConv2d, "forward", nn.Conv2d.forward)]
    changes += [
        patch.object(module, name, form) for module in modules for name, form in own.items() if hasattr(module, name)
    ]
    for change in changes:
        change.start()
    try:
        yield
    finally:
        for change in changes:
            change.stop()


def two_convolutions(x_BCHW: Tensor, even_KC11: Tensor, odd_KC11: Tensor) -> Tensor:
    """Half the sides as DARTS' program halves even ones."""
    odd_BCHW = F.conv2d(x_BCHW[:, :, 1:, 1:], odd_KC11, stride=2)
    return torch.cat([F.conv2d(x_BCHW, even_KC11, stride=2), odd_BCHW], dim=1)
