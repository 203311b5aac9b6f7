"""Run a function on several ranks of one machine: each a process with gloo, joined through a file (no ports)."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.drills import PATIENCE


def _work(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A failed rank leaves its traceback and exits; gloo then ends the others' waits with an error of their own.
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=PATIENCE,
        )
        result = function(rank, *arguments)
        torch.save(result, f"{folder}/result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on each of `ranks` gloo processes; the results by rank.

    Arguments and function must be picklable; results are tensors and plain containers of them. An error on any rank
    fails the caller with that rank's traceback.
    """
    import torch._dynamo  # an optimizer imports it: once here, not on every rank

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(rank, ranks, folder, function, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = [path for rank in range(ranks) if (path := Path(folder, f"error{rank}")).exists()]
        if errors:
            raise AssertionError("\n".join(f"{path.name}:\n{path.read_text()}" for path in errors))
        codes = [process.exitcode for process in processes]
        assert not any(codes), f"exit codes of the ranks: {codes}"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=True) for rank in range(ranks)]
