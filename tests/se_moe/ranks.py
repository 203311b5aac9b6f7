"""Run a test's function on several ranks of one machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from se_moe.experiments import on_ranks


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on each of `ranks` gloo processes; the results by rank."""

    def work() -> Any:
        torch.manual_seed(0)
        return function(torch.distributed.get_rank(), *arguments)

    return on_ranks(ranks, work)
