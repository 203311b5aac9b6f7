"""What is left to learn along a sub-path, and how far a student's jumps end from the teacher's paths (section 3.2).

Along the line the error E|f(x_gamma, gamma, t) - target| should grow from dist_0 (of the drifted cleaner end) at
gamma = 0 to the whole consistency error at gamma = 1, which adds dist_Delta: what the sub-step itself is worth.

Shape suffixes: N noises, C channels, H height, W width, G gammas, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.solvers import ddim_step, guided_network
from common.teacher import Teacher
from slam.losses import solve_subpath
from slam.model import Student

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors, one row a sub-path: `along` [n, G] over `GAMMAS`.

    dist_0 is the error at gamma = 0, dist_delta what the noisy end adds to it.
    """

    times: list[int]
    along: Tensor

    @property
    def dist_0(self) -> Tensor:
        return self.along[:, 0]

    @property
    def dist_delta(self) -> Tensor:
        return self.along[:, -1] - self.along[:, 0]

    @property
    def rising(self) -> float:
        """Share of neighbouring gammas, over all sub-paths, between which the error rises."""
        return float((self.along.diff(dim=1) > 0).float().mean())


@torch.no_grad()
def errors_along(
    student: Student,
    teacher: Teacher,
    x1_NCHW: Tensor,
    noise_NCHW: Tensor,
    states_NLD: Tensor,
    w: float,
    indices: Sequence[int],
    gammas: Sequence[float] = GAMMAS,
    batch_size: int = 64,
) -> Errors:
    """E|f(x_gamma, gamma, t) - f(x_s, 1, s)| on real latents, for some of the grid's sub-paths."""
    paths, rows = student.paths, []
    for index in indices:
        totals = torch.zeros(len(gammas), dtype=torch.float64)
        for x1, noise, states in zip(*(t.split(batch_size) for t in (x1_NCHW, noise_NCHW, states_NLD))):
            index_B = torch.full((len(x1),), index, device=x1.device)
            path = solve_subpath(teacher, paths, x1, noise, index_B, states, x1.new_full((len(x1),), w))
            target = student(path.x_s_BCHW, path.s_B, states)
            for number, gamma in enumerate(gammas):
                gamma_B = x1.new_full((len(x1),), gamma)
                x_gamma = paths.point(path.x_t_BCHW, path.x_s_BCHW, gamma_B, path.t_B, path.s_B)
                found = student(x_gamma, path.t_B, states, gamma_B, path.s_B)
                totals[number] += float((found - target).abs().mean((1, 2, 3)).sum())
        rows.append(totals / len(x1_NCHW))
    return Errors([int(paths.start_N[i]) for i in indices], torch.stack(rows))


@torch.no_grad()
def end_to_end(
    student: Student,
    teacher: Teacher,
    noise_NCHW: Tensor,
    states_NLD: Tensor,
    guidance: float,
    times: Sequence[int],
    batch_size: int = 64,
) -> dict[int, float]:
    """E|f(x_t, 1, t) - x_0| on the guided teacher's own paths from noise (DDIM on the student's grid).

    Args:
        guidance: usual scale, w + 1.
        times: training steps; each is taken at the grid's nearest one.

    Returns:
        by the asked time.
    """
    starts = student.paths.start_N
    wanted = {time: int(starts[(starts - time).abs().argmin()]) for time in times}
    totals = dict.fromkeys(times, 0.0)
    for noise, states in zip(noise_NCHW.split(batch_size), states_NLD.split(batch_size)):
        network = guided_network(teacher.unet, states, teacher.null(len(noise)), guidance)
        z, seen = noise, {}
        for start, end in zip(starts.flip(0).tolist(), student.paths.end_N.flip(0).tolist()):
            seen[start] = z
            t_B, s_B = (torch.full((len(z),), tau, device=z.device) for tau in (start, end))
            z, _ = ddim_step(network, teacher.schedule, z, t_B, s_B)
        for time, start in wanted.items():
            jump = student(seen[start], torch.full((len(z),), start, device=z.device), states)
            totals[time] += float((jump - z).abs().mean((1, 2, 3)).sum())
    return {time: total / len(noise_NCHW) for time, total in totals.items()}
