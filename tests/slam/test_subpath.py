"""Geometry of the sub-path: what must hold at its ends and between them, for every schedule."""

from __future__ import annotations

import pytest
import torch

from common.teacher import read_schedule
from slam.subpath import SubPaths, boundary_scalings
from tests.common.tiny_teacher import SCHEDULER
from tests.refusals import refused


def paths(steps: int = 50, sigma: str = "quadrature", **scheduler: object) -> SubPaths:
    return SubPaths(read_schedule({**SCHEDULER, **scheduler}), steps, sigma)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", ["quadrature", "linear"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100])
def test_at_gamma_1_a_point_is_the_noisy_end_to_the_bit(steps: int, zero_snr: bool, sigma: str) -> None:
    grid = paths(steps, sigma, rescale_betas_zero_snr=zero_snr)
    t_N, s_N, ones_N = grid.start_N, grid.end_N, torch.ones(steps)
    x_t, x_s = torch.randn(2, steps, 4, 2, 2)
    assert torch.equal(grid.point(x_t, x_s, ones_N, t_N, s_N), x_t)
    noise_N = grid.sigma_gamma(ones_N, t_N, s_N)
    assert torch.equal(noise_N.float(), grid.levels(t_N)[1].float())
    if not zero_snr:
        assert torch.equal(grid.effective_time(t_N, noise_N).float(), t_N.float())


@pytest.mark.parametrize("sigma", ["quadrature", "linear"])
def test_at_gamma_0_a_point_is_the_drifted_cleaner_end_and_as_noisy(sigma: str) -> None:
    grid = paths(sigma=sigma)
    t_N, s_N, zero_N = grid.start_N, grid.end_N, torch.zeros(50)
    x_s = torch.randn(50, 4, 2, 2)
    factor_N = grid.drift_factor(t_N, s_N)
    torch.testing.assert_close(
        grid.point(torch.randn_like(x_s), x_s, zero_N, t_N, s_N), factor_N.float().view(-1, 1, 1, 1) * x_s
    )
    torch.testing.assert_close(grid.sigma_gamma(zero_N, t_N, s_N), factor_N * grid.levels(s_N)[1])


def test_the_mean_of_a_point_is_alpha_t_at_every_gamma_only_with_the_drift_factor() -> None:
    grid = paths(10)
    t_N, s_N = grid.start_N, grid.end_N
    alpha_t, alpha_s = (grid.levels(tau)[0].float().view(-1, 1, 1, 1) for tau in (t_N, s_N))
    for gamma in (0.0, 0.3, 0.8):
        gamma_N = torch.full((10,), gamma)
        torch.testing.assert_close(grid.point(alpha_t, alpha_s, gamma_N, t_N, s_N), alpha_t)
    without = SubPaths(grid.schedule, 10, drift=False).point(alpha_t, alpha_s, torch.zeros(10), t_N, s_N)
    assert float((without - alpha_t).abs().max()) > 0.1


def test_the_linear_level_is_exact_for_an_end_that_ddim_has_reached() -> None:
    """x1 read with sigma_gamma is the same along the line, where x_s and x_t hold the same noise."""
    grid = paths(10, "linear")
    t_N, s_N = grid.start_N, grid.end_N
    x1, eps = torch.randn(2, 10, 3, 2, 2, dtype=torch.float64)

    def noised(tau: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in grid.levels(tau))
        return alpha * x1 + sigma * eps

    for gamma in (0.1, 0.5, 0.9):
        gamma_N = torch.full((10,), gamma, dtype=torch.float64)
        x = grid.point(noised(t_N), noised(s_N), gamma_N, t_N, s_N)
        sigma = grid.sigma_gamma(gamma_N, t_N, s_N).view(-1, 1, 1, 1)
        torch.testing.assert_close((x - sigma * eps) / grid.levels(t_N)[0].view(-1, 1, 1, 1), x1)


def test_the_effective_time_has_the_points_own_signal_to_noise_ratio() -> None:
    grid = paths(25, "linear")
    t_N, s_N = grid.start_N, grid.end_N
    for gamma in (0.2, 0.7):
        noise_N = grid.sigma_gamma(torch.full((25,), gamma), t_N, s_N)
        time_N = grid.effective_time(t_N, noise_N)
        below, above = (grid.levels(t) for t in (time_N.floor().long(), time_N.ceil().long()))
        ratio_N = grid.levels(t_N)[0] / noise_N
        assert bool((below[0] / below[1] >= ratio_N - 1e-12).all() and (above[0] / above[1] <= ratio_N + 1e-12).all())
        assert bool((time_N <= t_N).all() and (time_N >= s_N).all())


def test_every_coefficient_is_finite_in_every_schedule() -> None:
    for zero_snr in (False, True):
        grid = paths(50, rescale_betas_zero_snr=zero_snr)
        for gamma in (0.0, 0.5, 1.0):
            noise_N = grid.sigma_gamma(torch.full((50,), gamma), grid.start_N, grid.end_N)
            assert bool(torch.isfinite(noise_N).all() and (noise_N >= 0).all())
            assert bool(torch.isfinite(grid.effective_time(grid.start_N, noise_N.clamp(min=1e-6))).all())
        assert all(bool(torch.isfinite(c).all()) for c in boundary_scalings(grid.start_N))


def test_the_boundary_keeps_the_input_at_time_zero_and_drops_it_elsewhere() -> None:
    skip, out = boundary_scalings(torch.tensor([0, 19, 999]))
    assert skip[0] == 1 and out[0] == 0
    assert float(skip[1:].max()) < 1e-5 and float((out[1:] - 1).abs().max()) < 1e-5
    skip, out = boundary_scalings(torch.tensor([3, 40]), scaling=0.5, sigma_data=2.0)
    torch.testing.assert_close(skip, torch.tensor([4 / 6.25, 4 / 404], dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor([1.5 / 2.5, 20 / 404**0.5], dtype=torch.float64))


def test_a_grid_that_the_schedule_does_not_have_is_refused() -> None:
    for steps in (0, 1001):
        refused(rf"--subpath.solver_steps {steps}: expected a number from 1 to 1000", paths, steps)
