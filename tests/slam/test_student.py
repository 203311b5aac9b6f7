"""The student: what it is at the start, LCM as its special case, LoRA, few-step sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.solvers import ddim_step, guided_network
from common.teacher import read_schedule
from slam.config import LossConfig, StudentConfig, SubPathConfig
from slam.losses import draw_gamma, solve_subpath, subpath_loss
from slam.model import PROJECTION, Reading, Student, averaged_copy, follow, make_student, scalar_embedding
from slam.sampler import chosen_timesteps, sample, timesteps
from slam.subpath import SubPaths
from tests.common.tiny_teacher import SCHEDULER, tiny_teacher
from tests.refusals import refused

X1, NOISE, STATES = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 6, 16)
INDEX = torch.tensor([0, 7, 19])
TINY = StudentConfig(embedding_width=8)
KINDS = ("epsilon", "v_prediction", "sample")


def plain_lcm_loss(student: Student, teacher: Any, w: float, steps: int) -> Tensor:
    """Fixed-w latent consistency distillation as its authors write it, with nothing of sub-paths in it."""
    k, schedule = 1000 // steps, teacher.schedule
    t = (INDEX + 1) * k - 1
    s = torch.where(t - k < 0, torch.zeros_like(t), t - k)
    alpha, sigma = schedule.levels(t)
    z_t = alpha * X1 + sigma * NOISE
    z_s, _ = ddim_step(guided_network(teacher.unet, STATES, teacher.null(3), w + 1), schedule, z_t, t, s)
    embedded = scalar_embedding(torch.zeros(3), 8)

    def f(z: Tensor, tau: Tensor) -> Tensor:
        output = student.unet(z, tau, STATES, timestep_cond=embedded, return_dict=False)[0]
        x1, _ = schedule.read(output, z, *schedule.levels(tau))
        scaled = 10.0 * tau.double()
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip.float().view(-1, 1, 1, 1) * z + out.float().view(-1, 1, 1, 1) * x1

    with torch.no_grad():
        target = f(z_s, s)
    difference = f(z_t, t) - target
    return ((difference.square() + 1e-6).sqrt() - 1e-3).mean()


@pytest.mark.parametrize("time", ["released", "effective"])
@pytest.mark.parametrize("kind", KINDS)
def test_gamma_1_is_fixed_w_consistency_distillation_to_the_bit(kind: str, time: str) -> None:
    teacher = tiny_teacher(kind)
    options = SubPathConfig(solver_steps=20, gamma="one", time=time)  # type: ignore[arg-type]
    student = make_student(teacher, TINY, options)
    torch.nn.init.normal_(student.unet.time_embedding.cond_proj.weight)
    path = solve_subpath(teacher, student.paths, X1, NOISE, INDEX, STATES, torch.full((3,), 2.0))
    gamma = draw_gamma(options.gamma, torch.rand(3))
    ours = subpath_loss(student, student, path, gamma, STATES, LossConfig())
    # The teacher's guided output is c + w (c - u) here and u + (w + 1)(c - u) there: equal but for rounding.
    theirs = plain_lcm_loss(student, teacher, 2.0, 20)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    with torch.no_grad():  # the network's side has no such excuse
        at_one = student(path.x_t_BCHW, path.t_B, STATES, torch.ones(3), path.s_B)
        assert torch.equal(at_one, student(path.x_t_BCHW, path.t_B, STATES))
        plain = Student(student.unet, student.paths)
        assert torch.equal(at_one, plain(path.x_t_BCHW, path.t_B, STATES))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_student_starts_as_its_teacher_whatever_gamma_is(kind: str, lora: bool) -> None:
    teacher = tiny_teacher(kind)
    student = make_student(teacher, replace(TINY, kind="lora" if lora else "full", rank=2), SubPathConfig()).eval()
    t = torch.tensor([999, 499, 99])
    with torch.no_grad():
        output = teacher.unet(NOISE, t, STATES, return_dict=False)[0]
        x1, _ = teacher.schedule.read(output, NOISE, *teacher.schedule.levels(t))
        torch.testing.assert_close(student(NOISE, t, STATES), x1, rtol=1e-4, atol=1e-4)
        if not lora:
            assert float(student.unet.get_parameter(PROJECTION).abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_at_its_effective_time_a_perfect_teacher_is_right_at_every_gamma(kind: str) -> None:
    """The mechanism: a network that knows x1 at every level reads the same x1 along the whole line."""
    teacher = tiny_teacher(kind)
    options = SubPathConfig(solver_steps=10, sigma="linear", time="effective")
    paths = make_student(teacher, TINY, options).paths
    t, s = paths.start_N[[2, 5, 9]], paths.end_N[[2, 5, 9]]

    def noised(tau: Tensor) -> Tensor:
        alpha, sigma = paths.schedule.levels(tau)
        return alpha * X1 + sigma * NOISE

    class Perfect(torch.nn.Module):
        config = type("Config", (), {"time_cond_proj_dim": None})

        def forward(self, x: Tensor, time: Tensor, states: Tensor, **_: Any) -> tuple[Tensor]:
            low = time.floor().long()

            # Levels between two training steps, by the ratio that the time stands for.
            def ratio(tau: Tensor) -> Tensor:
                alpha, sigma = paths.levels(tau)
                return (alpha / sigma).log()

            high = (low + 1).clamp(max=999)
            between = ratio(low) + (time.double() - low) * (ratio(high) - ratio(low))
            sigma = (1 / (1 + (2 * between).exp())).sqrt().float().view(-1, 1, 1, 1)
            alpha = (1 - sigma.square()).sqrt()
            eps = (x - alpha * X1) / sigma
            return ({"epsilon": eps, "sample": X1, "v_prediction": alpha * eps - sigma * X1}[kind],)

    student = Student(Perfect(), paths, effective_time=True)
    for gamma in (0.0, 0.4, 1.0):
        gamma_B = torch.full((3,), gamma)
        found = student(paths.point(noised(t), noised(s), gamma_B, t, s), t, STATES, gamma_B, s)
        torch.testing.assert_close(found, X1, rtol=1e-3, atol=2e-3)


def test_only_the_student_is_trained_and_the_projection_of_gamma_too() -> None:
    teacher = tiny_teacher("v_prediction")
    student = make_student(teacher, TINY, SubPathConfig(solver_steps=20))
    target = averaged_copy(student)
    path = solve_subpath(teacher, student.paths, X1, NOISE, INDEX, STATES, torch.ones(3))
    for kind in ("huber", "l2"):
        loss = subpath_loss(student, target, path, torch.rand(3), STATES, LossConfig(kind=kind))  # type: ignore[arg-type]
        loss.backward()
    assert float(student.unet.get_parameter(PROJECTION).grad.abs().max()) > 0
    assert all(p.grad is None for network in (teacher.unet, target) for p in network.parameters())


def test_an_averaged_copy_shares_what_is_not_trained_and_follows_the_rest() -> None:
    student = make_student(tiny_teacher(), StudentConfig(kind="lora", rank=2), SubPathConfig())
    target = averaged_copy(student)
    both = list(zip(student.parameters(), target.parameters()))
    assert all((a is b) is not a.requires_grad for a, b in both)
    trained = [(a, b, b.clone()) for a, b in both if a.requires_grad]
    with torch.no_grad():
        for a, _, _ in trained:
            a += 1
    follow(target, student, 0.75)
    for a, b, before in trained:
        torch.testing.assert_close(b, 0.75 * before + 0.25 * a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_is_that_of_the_stock_lcm_scheduler(steps: int, kind: str) -> None:
    from diffusers import LCMScheduler

    student = make_student(tiny_teacher(kind), TINY, SubPathConfig(solver_steps=25))
    config = {key: value for key, value in SCHEDULER.items() if key != "_class_name"}
    scheduler = LCMScheduler.from_config({**config, "prediction_type": kind, "original_inference_steps": 25})
    scheduler.set_timesteps(steps)
    assert timesteps(student.paths, steps) == scheduler.timesteps.tolist()
    z, generator, fresh = NOISE, torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            embedded = scalar_embedding(torch.zeros(3), 8)
            output = student.unet(z, t, STATES, timestep_cond=embedded).sample
            z, wanted = scheduler.step(output, t, z, generator=generator, return_dict=False)
    ours = sample(student, NOISE, STATES, steps, lambda _: torch.randn(NOISE.shape, generator=fresh))
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_scaling": 0.002},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        {"thresholding": True, "clip_sample": True, "sample_max_value": 0.5},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear", "num_train_timesteps": 800, "original_inference_steps": 30},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_every_option_of_an_lcm_scheduler_draws_what_stock_code_draws(options: dict[str, Any]) -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(**options)
    config = dict(scheduler.config)
    reading = Reading.of(config)
    assert Reading.of(reading.options()).options() == reading.options()
    paths = SubPaths(read_schedule(config), config["original_inference_steps"])
    student = Student(tiny_teacher().unet, paths, reading=reading)
    scheduler.set_timesteps(3)
    z, generator, fresh = NOISE, torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = student.unet(z, t, STATES).sample
            z, wanted = scheduler.step(output, t, z, generator=generator, return_dict=False)
    ours = sample(student, NOISE, STATES, 3, lambda _: torch.randn(NOISE.shape, generator=fresh))
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_at_the_end_of_a_schedule_without_signal_an_estimate_takes_nothing_of_its_input() -> None:
    for kind, sign in (("v_prediction", -1.0), ("sample", 1.0)):
        paths = SubPaths(read_schedule({**SCHEDULER, "rescale_betas_zero_snr": True, "prediction_type": kind}))
        student, t = Student(tiny_teacher().unet, paths), torch.full((3,), 999)
        with torch.no_grad():
            output = student.unet(100 * NOISE, t, STATES).sample
            torch.testing.assert_close(student(100 * NOISE, t, STATES), sign * output, atol=1e-5, rtol=1e-5)


def test_evenly_spread_times_are_rounded_as_the_stock_scheduler_rounds() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(original_inference_steps=60)
    paths = SubPaths(read_schedule(dict(scheduler.config)), 60)
    for steps, strength in ((22, 0.5), (26, 0.5), (52, 1.0), (60, 1.0), (1, 0.02)):
        scheduler.set_timesteps(steps, strength=strength)
        assert timesteps(paths, steps, strength) == scheduler.timesteps.tolist()


def test_times_of_the_users_own_are_those_of_the_stock_scheduler_and_wrong_ones_are_named() -> None:
    from diffusers import LCMScheduler

    student = make_student(tiny_teacher("sample"), TINY, SubPathConfig(solver_steps=50))
    scheduler = LCMScheduler.from_config({k: v for k, v in SCHEDULER.items() if k != "_class_name"})
    times = [999, 700, 399, 19]
    for strength in (1.0, 0.6):
        scheduler.set_timesteps(timesteps=times, strength=strength)
        assert chosen_timesteps(student.paths, times, strength) == scheduler.timesteps.tolist()
    even = timesteps(student.paths, 4)
    drawn = [sample(student, NOISE, STATES, 4, lambda _: X1, times=t) for t in (None, even, times)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for wrong in ([], [1000], [9, 9], [19, 99], [5, -1]):
        refused("expected falling training steps from 999 to 0", chosen_timesteps, student.paths, wrong)
    refused("none is left", chosen_timesteps, student.paths, [999, 499], 0.4)


def test_image_to_image_takes_the_stock_times_and_leaves_a_picture_near_at_low_strength() -> None:
    from diffusers import LCMScheduler

    student = make_student(tiny_teacher("sample"), TINY, SubPathConfig(solver_steps=50))
    scheduler = LCMScheduler.from_config({k: v for k, v in SCHEDULER.items() if k != "_class_name"})
    for strength in (0.3, 0.8):
        scheduler.set_timesteps(4, original_inference_steps=50, strength=strength)
        assert timesteps(student.paths, 4, strength) == scheduler.timesteps.tolist()
    refused("9 steps at strength 0.1: expected 1 to 5", timesteps, student.paths, 9, 0.1)


def test_the_embedding_is_that_of_the_stock_pipeline() -> None:
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 2.5, 7.0])
    wanted = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=32)
    torch.testing.assert_close(scalar_embedding(w, 32), wanted)


def test_a_v_teacher_without_final_signal_needs_the_effective_time() -> None:
    teacher = tiny_teacher("v_prediction", rescale_betas_zero_snr=True)
    refused("--subpath.time released: .* ends without signal", make_student, teacher, TINY, SubPathConfig())
    student = make_student(teacher, TINY, SubPathConfig(time="effective", solver_steps=10))
    path = solve_subpath(teacher, student.paths, X1, NOISE, torch.tensor([0, 5, 9]), STATES, torch.ones(3))
    for gamma in (0.0, 0.5, 1.0):
        loss = subpath_loss(student, student, path, torch.full((3,), gamma), STATES, LossConfig())
        assert float(loss.detach()) < 10


def test_adaptors_for_layers_that_are_not_there_are_refused() -> None:
    options = StudentConfig(kind="lora", targets=["no_such_layer"])
    refused("no_such_layer: no layer of this U-Net", make_student, tiny_teacher(), options, SubPathConfig())
