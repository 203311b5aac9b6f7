"""How many groups the GroupNorms of both stages have."""

from __future__ import annotations

from torch import nn


def group_count(channels: int, most: int = 32) -> int:
    """`most` (32 in every published network) where it divides the width, else the largest divisor below it."""
    return next(groups for groups in range(min(most, channels), 0, -1) if channels % groups == 0)


def limit_groups(network: nn.Module, most: int) -> None:
    """Give every GroupNorm at most `most` groups.

    Narrow networks need fewer than 32: with one channel a group the norm removes each channel's mean, and flat areas
    can hardly be told apart.
    """
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = group_count(module.num_channels, most)
