"""Time, the reading of diffusion networks as flows, losses, solvers and measures of straightness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.data.pairs import generate_pairs
from common.errors import UserError
from common.paths import REPOSITORY
from common.teacher import PREDICTION_TYPES, NoiseSchedule, read_schedule
from instaflow.flow import (
    FlowSource,
    TimeMatching,
    UNetFlow,
    conditioned,
    euler,
    euler_path,
    guided_velocity,
    network_time,
    one_step,
    rk45,
    straightness,
    transport_cost,
)
from instaflow.losses import rectified_flow_loss, sample_times
from tests.common.tiny_teacher import SCHEDULER, tiny_teacher
from tests.golden_case import Case, load_case
from tests.instaflow.gaussian_flow import gaussian_flow
from tests.instaflow.golden_cases import ToyVelocity, loss_case

STATES = torch.zeros(4, 6, 16)


def curved(z: Tensor, t: Tensor) -> Tensor:
    return torch.cos(3 * t).view(-1, 1, 1, 1) - 0.7 * z


def test_the_network_sees_1000_at_the_noise_end_and_0_at_the_data_end() -> None:
    assert network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1000.0, 750.0, 0.0]


def test_training_at_t0_and_one_step_sampling_give_the_network_the_same_time() -> None:
    seen: list[float] = []
    flow = UNetFlow(tiny_teacher().unet)
    hook = flow.unet.register_forward_pre_hook(lambda module, args: seen.extend(args[1].flatten().tolist()))
    z = torch.randn(2, 4, 8, 8)
    velocity = conditioned(flow, STATES[:2])
    rectified_flow_loss(velocity, z, z, sample_times(2, "t0"))
    one_step(velocity, z)
    euler(velocity, z, 1)
    hook.remove()
    assert seen == [1000.0] * 6


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_kind_of_teacher_carries_gaussian_noise_along_its_true_flow(prediction_type: str) -> None:
    # For data N(0, s^2) the probability flow sends z to s z: this fixes sign, time direction and scale at once.
    flow = gaussian_flow(prediction_type, spread=0.5)
    z0 = torch.randn(4, 4, 2, 2)
    with torch.no_grad():
        z1 = euler(conditioned(flow, STATES), z0, 60)
    torch.testing.assert_close(z1, 0.5 * z0, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_velocity_is_finite_at_both_ends_and_continuous_where_the_schedule_begins(prediction_type: str) -> None:
    flow = gaussian_flow(prediction_type, spread=1.0)
    assert flow.matching is not None
    edge = flow.matching.t_min
    x = torch.randn(1, 4, 2, 2).expand(4, -1, -1, -1)
    with torch.no_grad():
        v = flow(x, torch.tensor([0.0, edge - 1e-5, edge + 1e-5, 1.0]), STATES)
    assert torch.isfinite(v).all()
    torch.testing.assert_close(v[1], v[2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_of_the_wrapped_flow_is_one_ddim_step_of_the_teacher(prediction_type: str) -> None:
    from diffusers import DDIMScheduler

    teacher = tiny_teacher(prediction_type)
    scheduler = DDIMScheduler.from_config(
        {**SCHEDULER, "prediction_type": prediction_type, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    )
    scheduler.set_timesteps(1)
    z0 = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        output = teacher.unet(z0, scheduler.timesteps[0], STATES[:2]).sample
        wanted = scheduler.step(output, scheduler.timesteps[0], z0).prev_sample
        flow = UNetFlow(teacher.unet, teacher.schedule)
        torch.testing.assert_close(one_step(conditioned(flow, STATES[:2]), z0), wanted, atol=2e-4, rtol=1e-4)


def test_euler_at_the_matched_times_is_ddim_at_those_times() -> None:
    # x_t = t x1_hat + (1-t) eps_hat makes an Euler step of the flow a DDIM step between the matched noise levels.
    flow = UNetFlow(tiny_teacher("v_prediction").unet, tiny_teacher("v_prediction").schedule)
    t, later = torch.full((2,), 0.3), 0.55
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        estimate = flow.estimate(x, t, STATES[:2])
    stepped = x + (later - 0.3) * estimate.velocity
    torch.testing.assert_close(stepped, later * estimate.x1_hat + (1 - later) * estimate.eps_hat, atol=1e-5, rtol=0)


def test_matched_time_has_the_flows_signal_to_noise_ratio() -> None:
    schedule = read_schedule(SCHEDULER)
    matching = TimeMatching(schedule)
    on_grid = torch.tensor([17, 400, 901])
    alpha2 = schedule.alphas_cumprod_T[on_grid]
    t = torch.sigmoid(0.5 * (alpha2 / (1 - alpha2)).log())
    torch.testing.assert_close(matching.tau(t), on_grid.float(), atol=1e-3, rtol=0)
    assert matching.tau(torch.tensor([0.0, 1.0])).tolist() == [999.0, 0.0]


def test_a_schedule_with_zero_terminal_snr_is_read() -> None:
    schedule = read_schedule({**SCHEDULER, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    matching = TimeMatching(schedule)
    assert 0 < matching.t_min < 1e-3
    assert torch.isfinite(matching.tau(torch.linspace(0, 1, 7))).all()


def test_the_number_of_training_steps_is_read_from_the_schedule() -> None:
    schedule = read_schedule({**SCHEDULER, "num_train_timesteps": 250})
    assert schedule.steps == 250
    assert float(TimeMatching(schedule).tau(torch.tensor([0.0]))) == 249.0


def test_unknown_prediction_type_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="flow_prediction"):
        NoiseSchedule(torch.linspace(0.9, 0.1, 5), "flow_prediction")


def test_guided_velocity_evaluates_both_branches_in_one_call() -> None:
    calls = []

    def flow(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        calls.append(len(x))
        return x * states.mean((1, 2)).view(-1, 1, 1, 1)

    x, t = torch.randn(3, 4, 2, 2), torch.zeros(3)
    text, null = torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 0.5)
    guided = guided_velocity(flow, x, t, text, null, 1.5)
    assert calls == [6]
    torch.testing.assert_close(guided, 1.5 * 2.0 * x + (1 - 1.5) * 0.5 * x)
    torch.testing.assert_close(guided_velocity(flow, x, t, text, null, 1.0), 2.0 * x)
    assert calls == [6, 3]


def test_straightness_is_zero_for_straight_paths_and_the_mean_squared_deviation_otherwise() -> None:
    z0 = torch.randn(3, 2, 4, 4)
    assert float(straightness(lambda z, t: torch.ones_like(z), z0, 20)) == 0
    path = list(euler_path(curved, z0, 25))
    velocities = torch.stack([v for _, v in path])
    wanted = ((path[-1][0] - z0) - velocities).square().flatten(2).sum(2).mean()
    torch.testing.assert_close(straightness(curved, z0, 25), wanted, rtol=1e-4, atol=1e-5)


def test_rk45_agrees_with_many_euler_steps_and_goes_back_to_the_noise() -> None:
    z0 = torch.randn(2, 2, 4, 4)
    z1, evaluations = rk45(curved, z0, eps=0.0)
    torch.testing.assert_close(z1, euler(curved, z0, 1000), atol=4e-3, rtol=0)
    assert 0 < evaluations < 200
    back, _ = rk45(curved, z1, eps=0.0, reverse=True)
    torch.testing.assert_close(back, z0, atol=1e-4, rtol=0)


def test_transport_cost_is_that_of_the_pairs_and_convex_only() -> None:
    x0, x1 = torch.zeros(2, 1, 1, 2), torch.tensor([1.0, 3.0, -1.0, 1.0]).view(2, 1, 1, 2)
    assert float(transport_cost(x0, x1)) == 3.0
    assert float(transport_cost(x0, x1, power=1)) == 1.5
    with pytest.raises(UserError, match="convex"):
        transport_cost(x0, x1, power=0.5)


def test_the_optimal_coupling_is_recovered_by_the_reflow_target() -> None:
    x0, x1 = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    assert float(rectified_flow_loss(lambda x, t: x1 - x0, x0, x1, torch.rand(4))) == 0
    mean = rectified_flow_loss(lambda x, t: torch.zeros_like(x), x0, x1, torch.rand(4))
    half = rectified_flow_loss(lambda x, t: torch.zeros_like(x), x0, x1, torch.rand(4), "halfsum")
    torch.testing.assert_close(half, 0.5 * 4 * mean)
    with pytest.raises(UserError, match="mean or halfsum"):
        rectified_flow_loss(lambda x, t: x, x0, x1, torch.rand(4), "sum")


def test_k_step_times_are_the_starts_of_k_equal_steps() -> None:
    drawn = sample_times(200, "4", generator=torch.Generator().manual_seed(0))
    assert sorted(set(drawn.tolist())) == [0.0, 0.25, 0.5, 0.75]
    assert sample_times(3, "t1", eps=0.25).tolist() == sample_times(3, "t1").tolist() == [1.0, 1.0, 1.0]
    for wrong in ("0", "some", "-1"):
        with pytest.raises(UserError, match="time schedule"):
            sample_times(2, wrong)


def test_a_flow_makes_pairs_by_euler_with_guided_velocity(tmp_path: Path) -> None:
    teacher, prompts = tiny_teacher(), ["a red star", "a blue ring", "two red ring"]
    made = FlowSource(UNetFlow(teacher.unet), teacher, steps=3, guidance=1.5)
    data = generate_pairs(made, prompts, tmp_path, 3, batch_size=3, shard_size=4)
    assert data is not None
    rows = data.__getitems__(range(3))
    states = teacher.encode([prompts[k] for k in rows["prompt"].tolist()])
    wanted = euler(conditioned(made.flow, states, teacher.null(3), 1.5), rows["x0"], 3)
    torch.testing.assert_close(rows["x1"], wanted, atol=2e-3, rtol=2e-3)
    assert made.evaluations == 6
    assert made.describe()["flow"] != FlowSource(UNetFlow(teacher.vae), teacher).describe()["flow"]


def test_the_time_law_t1_teaches_the_velocity_at_the_picture() -> None:
    """A recorded step at t0, turned to t = 1: value and gradients of the loss in float64, by the formula."""
    case = load_case(REPOSITORY / "tests" / "golden" / "instaflow" / "rf_loss_distill_t0.safetensors")
    z0, z1 = case.tensors["in/z0"], case.tensors["in/z1"]
    toy = ToyVelocity(case).double()
    t = torch.ones(len(z0))
    # At t = 1 the network reads the picture itself, and its label is 999.
    shift = torch.tanh(toy.t(torch.ones(len(z0), 1, dtype=torch.float64)))[:, :, None, None]
    loss = (toy.conv(z1.double()) + shift - (z1 - z0).double()).square().mean()
    loss.backward()
    out = {"x_t": z1, "labels": 999.0 * t, "loss": loss.detach().float()}
    out |= {f"grad/{name}": p.grad.float() for name, p in toy.named_parameters() if p.grad is not None}
    tensors = {f"param/{name}": value for name, value in case.group("param").items()}
    tensors |= {"in/z0": z0, "in/z1": z1, "in/t": t} | {f"out/{name}": value for name, value in out.items()}
    loss_case(Case(case.path, "rf_loss_t1", case.source, config={**case.config, "t_schedule": "t1"}, tensors=tensors))
