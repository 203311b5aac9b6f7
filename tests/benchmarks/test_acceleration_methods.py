"""Progressive and consistency distillation against stock diffusers' arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.acceleration.methods.lcm import (
    ConsistencyModel,
    consistency_grid,
    consistency_loss,
    consistency_sample,
    consistency_student,
    guidance_embedding,
)
from benchmarks.acceleration.methods.progressive_distillation import (
    progressive_grid,
    progressive_loss,
    progressive_sample,
    progressive_target,
)
from common.solvers import ddim_step, guided_network
from tests.common.tiny_teacher import SCHEDULER, tiny_teacher
from tests.refusals import refused

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


def test_the_guidance_embedding_is_that_of_stock_lcm() -> None:
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 2.5, 7.0])
    wanted = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=32)
    torch.testing.assert_close(guidance_embedding(w, 32), wanted)


@pytest.mark.parametrize("width", [None, 8])
def test_the_consistency_student_starts_as_the_teacher_whatever_the_guidance(width: int | None) -> None:
    teacher = tiny_teacher()
    student = consistency_student(teacher, width)
    tau = torch.tensor([500, 900])
    with torch.no_grad():
        first, second = student(Z, tau, STATES, torch.zeros(2)), student(Z, tau, STATES, torch.full((2,), 6.0))
        plain = ConsistencyModel(teacher.unet, teacher.schedule)(Z, tau, STATES, torch.zeros(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain)


def test_the_boundary_condition_holds_at_time_zero() -> None:
    student = consistency_student(tiny_teacher())
    with torch.no_grad():
        assert torch.equal(student(Z, torch.zeros(2, dtype=torch.long), STATES, torch.ones(2)), Z)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampling_is_that_of_the_stock_lcm_scheduler(steps: int) -> None:
    from diffusers import LCMScheduler

    teacher = tiny_teacher()
    student = consistency_student(teacher)
    config = {key: value for key, value in SCHEDULER.items() if key != "_class_name"}
    scheduler = LCMScheduler.from_config({**config, "set_alpha_to_one": True})
    scheduler.set_timesteps(steps, original_inference_steps=50)
    embedding = guidance_embedding(torch.full((2,), 3.0), 256)
    z, generator = Z, torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = student.unet(z, t, STATES, timestep_cond=embedding).sample
            z, wanted = scheduler.step(output, t, z, generator=generator, return_dict=False)
        ours = consistency_sample(student, Z, STATES, steps, 4.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)


def test_consistency_distillation_trains_the_student_alone_and_the_guidance_projection_too() -> None:
    teacher = tiny_teacher("v_prediction")
    student, target = consistency_student(teacher, 8), consistency_student(teacher, 8).requires_grad_(False)
    index, w = torch.tensor([0, 49]), torch.tensor([1.0, 4.0])
    for huber in (0.0, 1e-3):
        loss = consistency_loss(student, target, teacher, torch.randn(2, 4, 8, 8), Z, index, STATES, w, huber=huber)
        loss.backward()
    projection = student.unet.time_embedding.cond_proj.weight
    assert projection.grad is not None
    assert float(projection.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())
    assert consistency_grid(teacher.schedule, 50)[[0, -1]].tolist() == [19, 999]
    refused("1 to 50", consistency_sample, student, Z, STATES, 51, 1.0)
