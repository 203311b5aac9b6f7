"""Progressive distillation against stock diffusers' arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from common.progressive import progressive_grid, progressive_loss, progressive_sample, progressive_target
from common.solvers import ddim_step, guided_network
from tests.common.tiny_teacher import SCHEDULER, tiny_teacher

Z, STATES = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)


def network(prediction_type: str = "v_prediction"):  # type: ignore[no-untyped-def]
    teacher = tiny_teacher(prediction_type)
    return guided_network(teacher.unet, STATES), teacher.schedule


def test_a_student_that_points_to_the_target_repeats_two_teacher_steps_in_one() -> None:
    teacher, schedule = network()
    index = torch.tensor([4, 2])
    target = progressive_target(teacher, schedule, Z, index, 4)

    def student(z: Tensor, tau: Tensor) -> Tensor:  # v-prediction of the target
        return target.alpha * target.eps_target - target.sigma * target.x_target

    one, _ = ddim_step(student, schedule, Z, target.t_B, target.t_end_B)
    torch.testing.assert_close(one, target.z_end, atol=2e-5, rtol=1e-4)
    assert float(progressive_loss(student, target, schedule, Z)) < 1e-8
    assert float(progressive_loss(teacher, target, schedule, Z)) > 1e-6


def test_progressive_sampling_is_stock_ddim_with_trailing_steps() -> None:
    from diffusers import DDIMScheduler

    teacher, schedule = network()
    scheduler = DDIMScheduler.from_config(
        {**SCHEDULER, "prediction_type": "v_prediction", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [int(progressive_grid(schedule, 4, torch.tensor(i))) for i in (4, 3, 2, 1)]
    z = Z
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(teacher(z, t.expand(2)), t, z).prev_sample
        torch.testing.assert_close(progressive_sample(teacher, schedule, Z, 4), z, atol=1e-4, rtol=1e-4)
