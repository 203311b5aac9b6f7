"""Checks for the recorded InstaFlow cases; sizes, seeds and hyper-parameters come from each case itself."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ema import Ema
from common.metrics.lpips import LPIPS
from common.progressive import progressive_target
from common.solvers import solve
from common.teacher import read_schedule
from instaflow.flow import (
    TimeMatching,
    UNetFlow,
    euler,
    interpolate,
    rk45,
    straightness,
)
from instaflow.losses import rectified_flow_loss, sample_times
from instaflow.pipeline import sample_latents
from tests.golden_case import Case, Check, assert_close, assert_timed_close

CIFAR_TIME = 999.0  # what the toy network of the rf_* cases receives is 999 t


def golden_unet(case: Case) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**case.config["unet"])
    unet.load_state_dict(case.group("param"))
    return unet.eval().requires_grad_(False)


class ToyVelocity(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        state = case.group("param")
        self.conv = nn.Conv2d(state["conv.weight"].shape[1], state["conv.weight"].shape[0], 3, padding=1)
        self.t = nn.Linear(1, state["t.weight"].shape[0])
        self.load_state_dict(state)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        label = CIFAR_TIME * t
        return self.conv(x) + torch.tanh(self.t(label[:, None] / CIFAR_TIME))[:, :, None, None]


def pipeline_case(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    flow = UNetFlow(golden_unet(case))
    times: list[Tensor] = []
    flow.unet.register_forward_pre_hook(lambda module, args: times.append(args[1]))
    with torch.no_grad():
        path = list(
            sample_latents(
                flow,
                given["latents"],
                given["prompt_embeds"],
                steps=config["num_inference_steps"],
                guidance=config["guidance_scale"],
                null_BLD=given["negative_prompt_embeds"],
            )
        )
    assert_close(torch.stack([time.flatten()[0] for time in times]), wanted["timesteps"], "timesteps", 1e-6)
    assert_close(torch.stack(path), wanted["trajectory"], "trajectory", 1e-5)
    assert_close(path[-1], wanted["latents"], "latents", 1e-5)


def loss_case(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    toy = ToyVelocity(case)
    t = given["t"]
    law, law_of_loss = str(config["t_schedule"]), config.get("loss", "l2")
    assert law_of_loss == "l2", f"loss {law_of_loss!r}: only l2 is checked here"
    drawn = sample_times(64, law, eps=config["eps"], generator=torch.Generator().manual_seed(0))
    if law == "uniform":
        assert config["eps"] <= float(drawn.min()) < float(drawn.max()) <= 1
    else:  # the recorded times must be among those that the schedule can draw
        assert bool((t[:, None] - drawn.unique()[None]).abs().amin(1).lt(1e-6).all())
    assert_close(interpolate(given["z0"], given["z1"], t), wanted["x_t"], "x_t", 1e-6)
    assert_close(CIFAR_TIME * t, wanted["labels"], "labels", 1e-6)
    reduction = "mean" if config["reduce_mean"] else "halfsum"
    loss = rectified_flow_loss(toy, given["z0"], given["z1"], t, reduction)
    loss.backward()
    assert_close(loss, wanted["loss"], "loss", 1e-5)
    for name, parameter in toy.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, wanted[f"grad/{name}"], f"grad {name}", 1e-5)


def ode_case(case: Case) -> None:
    z0, wanted, eps = case.group("in")["z0"], case.group("out"), case.config["eps"]
    toy = ToyVelocity(case).requires_grad_(False)
    for steps in case.config["N"]:
        assert_close(euler(toy, z0, steps, eps=eps), wanted[f"euler_{steps}"], f"euler {steps}", 1e-5)
    forward, _ = rk45(toy, z0, eps=eps)
    assert_close(forward, wanted["rk45"], "rk45", 1e-5)
    back, _ = rk45(toy, wanted["rk45"], eps=eps, reverse=True)
    assert_close(back, wanted["rk45_reverse"], "rk45 reverse", 1e-5)
    assert_close(euler(toy, z0, 200), wanted["z1_euler200_t0"], "euler 200", 1e-5)
    assert_close(straightness(toy, z0, 200), wanted["straightness_euler200"], "straightness", 1e-5)


def ema_case(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    module = nn.Module()
    module.weight = nn.Parameter(given["init"].clone())
    ema = Ema(module, case.config["decay"])
    for value, shadow in zip(given["values"], wanted["shadow"], strict=True):
        with torch.no_grad():
            module.weight.copy_(value)
        ema.update(module)
        with ema.swapped_into(module):
            assert_close(module.weight, shadow, "shadow", 1e-6)


def pairs_case(case: Case) -> None:
    import diffusers

    given, wanted, config = case.group("in"), case.group("out"), case.config
    scheduler = getattr(diffusers, config["scheduler"])(**config["scheduler_kwargs"])
    negative = given["negative_prompt_embeds"]
    args = (config["steps"], given["x0"], given["prompt_embeds"], negative, config["guidance_scale"])
    with torch.no_grad():
        path = list(solve(golden_unet(case), scheduler, *args))
    assert_close(scheduler.timesteps, wanted["timesteps"], "timesteps")
    assert_close(torch.stack(path), wanted["trajectory"], "trajectory", 1e-5)
    assert_close(path[-1], wanted["x1"], "x1", 1e-5)


def velocity_case(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    schedule = read_schedule({key: value for key, value in case.config.items() if key != "unet"})
    flow = UNetFlow(golden_unet(case), schedule)
    with torch.no_grad():
        estimate = flow.estimate(given["x_t"], given["t"], given["prompt_embeds"])
    assert abs(TimeMatching(schedule).t_min - float(wanted["t_min"])) < 1e-6
    assert_close(estimate.tau_B, wanted["tau"], "tau", 1e-5)
    assert_close(estimate.eps_hat, wanted["eps"], "eps", 1e-5)
    assert_close(estimate.x1_hat, wanted["x1_hat"], "x1_hat", 1e-5)
    assert_close(estimate.velocity, wanted["velocity"], "velocity", 1e-5)


class TinyTrunk(nn.Module):
    """relu(conv3x3) stages with the input scaling of LPIPS; strides 1, 2, 2, ..; every stage is a feature."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.shift, self.scale = state["scaling_layer.shift"], state["scaling_layer.scale"]
        self.state, self.name = state, "tiny"

    def forward(self, x: Tensor) -> list[Tensor]:
        h, taps = (x - self.shift) / self.scale, []
        for i in range(sum(key.startswith("net.c.") and key.endswith("weight") for key in self.state)):
            h = F.conv2d(h, self.state[f"net.c.{i}.weight"], self.state[f"net.c.{i}.bias"], 1 + (i > 0), 1).relu()
            taps.append(h)
        return taps


def lpips_case(case: Case) -> None:
    given, wanted, state = case.group("in"), case.group("out"), case.group("param")
    trunk = TinyTrunk(state)
    lins = [state[f"lins.{i}.model.1.weight"] for i in range(len(case.config["chns"]))]
    b = given["b"].clone().requires_grad_(True)
    value = LPIPS(trunk, lins)(given["a"], b)
    value.mean().backward()
    assert_close(value, wanted["lpips"], "lpips", 1e-5)
    assert b.grad is not None
    assert_close(b.grad, wanted["grad_b_of_mean"], "gradient", 1e-5)


def progressive_case(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    unet, schedule = golden_unet(case), read_schedule(config["schedule"])

    def network(z: Tensor, tau: Tensor) -> Tensor:
        return unet(z, tau, given["prompt_embeds"]).sample

    make = partial(progressive_target, network, schedule, given["z_t"], given["i"], config["student_steps"])
    target = make()
    for name in ("t", "t_mid", "t_end"):
        assert_close(getattr(target, f"{name}_B"), wanted[name], name)
    for name in ("z_mid", "z_end", "x_target", "eps_target"):
        assert_timed_close(lambda name=name: getattr(make(), name), wanted[name], name)  # type: ignore[misc]
    assert_close(target.weight("truncated_snr"), wanted["weight_truncated_snr"], "truncated SNR", 1e-5)
    assert_close(target.weight("snr_plus_1"), wanted["weight_snr_plus_1"], "SNR + 1", 1e-5)


def _stem(*starts: str):  # type: ignore[no-untyped-def]
    return lambda case: case.stem.startswith(starts)


CHECKS = [
    Check("rf_pipeline", lambda c: "pipeline_rf.py" in c.source or c.stem.startswith("rf_pipeline"), pipeline_case),
    Check("rf_loss", lambda c: "losses.py" in c.source or c.stem.startswith("rf_loss"), loss_case),
    Check("rf_ode", lambda c: "sde_lib.py" in c.source or c.stem.startswith("rf_ode"), ode_case),
    Check("rf_ema", lambda c: "models/ema.py" in c.source or c.stem.startswith("rf_ema"), ema_case),
    Check("teacher_pairs", _stem("teacher_pairs"), pairs_case),
    Check("eps_to_velocity", _stem("eps_to_velocity"), velocity_case),
    Check("lpips_tiny_trunk", lambda c: "lpips" in c.source or c.stem.startswith("lpips"), lpips_case),
    Check("baseline_progdist_target", _stem("baseline_progdist"), progressive_case),
]
