"""Few steps of a student against the teacher's 25, from captions to pictures: rows that SLAM, HiPA and InstaFlow share.

The peer is stock diffusers around the teacher's networks, eager and with U-Net and decoder compiled; what ours draws
often is recorded (`common.recorded`), so it draws as often before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.arms import in_turns, noted, where_of
from common.ledger import bench_row
from common.recorded import AFTER
from common.solvers import stock_pipeline
from common.teacher import Teacher
from common.unets import as_diffusers_has_it

SOLVERS = {"DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler"}
STEPS = 25


def against_many_steps(
    label: str,
    what: str,
    ours: Callable[[], object],
    open_teacher: Callable[[], Teacher],
    prompts: Sequence[str],
    solver: str,
    guidance: float,
    rounds: int,
    device: str,
    target: float | None,
) -> list[dict[str, Any]]:
    """Rows of pictures a second: against the peer as users run it, and on CPUs against the compiled one as well.

    Args:
        label: what ours is, "caption to image, 4 steps"; `what` ends the names, in brackets.
        ours: draws the prompts.
        solver: of SOLVERS.
    """

    def peer(compiled: bool) -> Callable[[], object]:
        pipeline = stock_pipeline(open_teacher(), SOLVERS[solver])
        as_diffusers_has_it(pipeline.unet)
        if compiled:
            pipeline.unet.compile()
            pipeline.vae.decoder.compile()
        asked = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "np"}
        return lambda: pipeline(list(prompts), **asked)

    sides = {"": False, " compiled": True} if device == "cpu" else {"": False}
    arms = {"ours": ours, **{side: peer(compiled) for side, compiled in sides.items()}}
    with torch.inference_mode():
        for _ in range(AFTER + 4 if device == "cpu" else 1):
            ours()
        for side in sides:
            arms[side]()
        found = in_turns(arms, rounds, device)
    count, rows = len(prompts), []
    for side in sides:
        name = f"{where_of(device)}{label} against {STEPS} guided {solver} steps{side}, batch {count} ({what})"
        row = bench_row(name, count / found["ours"], count / found[side], "images/s", target=target)
        rows.append(noted(row, f"{torch.get_num_threads()} threads; ours has drawn {AFTER + 4} times before"))
    return rows
