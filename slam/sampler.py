"""Few steps from noise to picture: jump to the data, add fresh noise of the next level, jump again (algorithm of LCM).

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from common.errors import UserError
from slam.model import Student
from slam.subpath import SubPaths


def timesteps(paths: SubPaths, steps: int, strength: float = 1.0) -> list[int]:
    """Training steps of an N-step sampling, from the noisy end on: N of the grid's, evenly spread (LCMScheduler).

    Args:
        strength: image-to-image: only the cleaner part of the grid, as large as this.

    Raises:
        UserError: more steps than that part of the grid has.
    """
    grid = paths.start_N[: int(paths.steps * strength)].flip(0).tolist()
    if not 1 <= steps <= len(grid):
        raise UserError(
            f"{steps} steps at strength {strength:g}: expected 1 to {len(grid)}, of the {paths.steps} the student knows"
        )
    # Rounded as LCMScheduler rounds: i (n / N), not (i n) / N, which differ where the quotient is whole.
    return [grid[math.floor(i * (len(grid) / steps))] for i in range(steps)]


def chosen_timesteps(paths: SubPaths, times: Sequence[int], strength: float = 1.0) -> list[int]:
    """Training steps that the user names, of which `strength` takes the cleaner part.

    Raises:
        UserError: they do not fall, or leave the schedule.
    """
    falling = all(after < before for before, after in pairwise(times))
    if not times or not falling or times[0] >= paths.schedule.steps or times[-1] < 0:
        raise UserError(
            f"times {', '.join(map(str, times)) or 'none'}: expected falling training steps from "
            f"{paths.schedule.steps - 1} to 0"
        )
    kept = int(len(times) * strength)
    if kept < 1:
        raise UserError(f"{len(times)} times at strength {strength:g}: none is left; expected more strength or times")
    return list(times[len(times) - kept :])


@torch.no_grad()
def sample(
    student: Student,
    x_BCHW: Tensor,
    states_BLD: Tensor,
    steps: int,
    fresh: Callable[[int], Tensor] | None = None,
    *,
    start_BCHW: Tensor | None = None,
    strength: float = 1.0,
    w: float | None = None,
    times: Sequence[int] | None = None,
) -> Tensor:
    """Clean latents [B, C, H, W] after so many evaluations of the student at gamma = 1.

    Args:
        x_BCHW: unit normal.
        fresh: number of the step, from 1 on -> unit normal [B, C, H, W] to go on with; None: torch's global generator.
        start_BCHW: latents to begin from instead of pure noise (image-to-image), noised to the first time.
        w: guidance of a student that was trained with LCM's random one.
        times: training steps to jump from, instead of `steps` evenly spread ones.
    """
    paths = student.paths
    times = timesteps(paths, steps, strength) if times is None else chosen_timesteps(paths, times, strength)
    w_B = None if w is None else x_BCHW.new_full((len(x_BCHW),), w)

    def at(tau: int) -> Tensor:
        return torch.full((len(x_BCHW),), tau, device=x_BCHW.device)

    def noised(clean_BCHW: Tensor, noise_BCHW: Tensor, tau: int) -> Tensor:
        alpha, sigma = paths.schedule.levels(at(tau))
        return alpha * clean_BCHW + sigma * noise_BCHW

    z_BCHW = x_BCHW if start_BCHW is None else noised(start_BCHW, x_BCHW, times[0])
    for number, tau in enumerate(times, 1):
        x1_BCHW = student(z_BCHW, at(tau), states_BLD, w_B=w_B)
        if number < len(times):
            noise_BCHW = torch.randn_like(z_BCHW) if fresh is None else fresh(number).to(z_BCHW)
            z_BCHW = noised(x1_BCHW, noise_BCHW, times[number])
    return x1_BCHW
