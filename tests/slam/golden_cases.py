"""Checks for the recorded SLAM cases; sizes, schedules and hyper-parameters come from each case itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from common.solvers import ddim_step
from common.teacher import NoiseSchedule, read_schedule
from slam.config import LossConfig
from slam.losses import SubPath, distance, solve_subpath, subpath_loss
from slam.model import Reading, Student, follow, scalar_embedding
from slam.sampler import chosen_timesteps, sample, timesteps
from slam.subpath import SubPaths, boundary_scalings
from tests.golden_case import Case, Check, assert_close, assert_sinusoids_close, assert_timed_close, kind

TRAINER = "MCG-NJU/SPLAM"


LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
READING = (
    *("timestep_scaling", "clip_sample", "clip_sample_range"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
)
UNREAD = ("set_alpha_to_one", "steps_offset", "timestep_spacing")  # an LCM scheduler takes them and does not use them


def known(config: dict[str, Any], *options: str) -> dict[str, Any]:
    """The config, of which nothing is passed over: an option that the check does not read is named."""
    surplus = set(config) - {*options, *LEVELS, "prediction_type"}
    assert not surplus, f"no check for the options {', '.join(sorted(surplus))}"
    return config


def schedule_of(config: dict[str, Any], prediction_type: str = "epsilon") -> NoiseSchedule:
    given = {key: config[key] for key in LEVELS if key in config}
    return read_schedule({**given, "prediction_type": config.get("prediction_type", prediction_type)})


def unet_of(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**config)
    unet.load_state_dict(weights)
    return unet.eval()


def tables(case: Case) -> None:
    config = known(case.config, "ddim_timesteps", "sigma_data", "timestep_scaling")
    wanted, schedule = case.group("out"), schedule_of(config)
    paths = SubPaths(schedule, config["ddim_timesteps"])
    scalings = config.get("timestep_scaling", 10.0), config.get("sigma_data", 0.5)
    assert_close(paths.start_N, wanted["ddim_timesteps"], "start")
    assert_close(paths.end_N, wanted["end_timesteps"], "end")
    assert_close(schedule.alphas_cumprod_T.float(), wanted["alphas_cumprod"], "abar")
    for end, name in ((paths.start_N, "ddim_alpha_cumprods"), (paths.end_N, "ddim_alpha_cumprods_prev")):
        assert_close(paths.levels(end)[0].square().float(), wanted[name], name)
    for end, name in ((paths.start_N, "start"), (paths.end_N, "end")):
        for found, part in zip(boundary_scalings(end, *scalings), ("c_skip", "c_out")):
            assert_close(found.float(), wanted[f"{part}_{name}"], f"{part} at the {name}")


def embedding(case: Case) -> None:
    value_B = case.group("in")["w"]
    for width in known(case.config, "dims")["dims"]:
        half = width // 2
        frequency_E = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(half) / (half - 1))
        angle_BE = 1000 * value_B[:, None] * frequency_E[None]
        both_BE = nn.functional.pad(torch.cat([angle_BE, angle_BE], 1), (0, width % 2))
        found_BE = scalar_embedding(value_B, width)
        assert_sinusoids_close(found_BE, case.group("out")[f"emb_{width}"], both_BE, f"width {width}")


def subpath_origin(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    schedule = schedule_of(known(case.config, "ddim_timesteps"))
    paths = SubPaths(schedule, case.config["ddim_timesteps"])
    t_B, s_B = paths.start_N[given["index"]], paths.end_N[given["index"]]
    assert_close(t_B, wanted["start_timesteps"], "start")
    assert_close(s_B, wanted["end_timesteps"], "end")
    gamma_B, output_BCHW = given["gamma"], given["model_output"]
    x_gamma_BCHW = paths.point(given["x_start"], given["x_end"], gamma_B, t_B, s_B)
    assert_close(x_gamma_BCHW, wanted["x_gamma"], "x_gamma")
    assert_close(paths.sigma_gamma(gamma_B, t_B, s_B).float(), wanted["sigma_gamma"], "sigma_gamma")

    def read(x_BCHW: Tensor, kind: str, gamma_B: Tensor | None = None) -> Tensor:
        unet = constant_network(output_BCHW)
        own = SubPaths(schedule_of(case.config, kind), case.config["ddim_timesteps"])
        found = Student(unet, own)(x_BCHW, t_B, torch.zeros(len(t_B), 1, 1), gamma_B, s_B)
        skip_B, out_B = boundary_scalings(t_B)  # undone: the record holds the estimate before the boundary condition
        return ((found.double() - skip_B.view(-1, 1, 1, 1) * x_BCHW) / out_B.view(-1, 1, 1, 1)).float()[later_B]

    later_B = t_B > 0  # at time 0 a student returns its input and no estimate is left to undo
    assert_close(read(x_gamma_BCHW, "epsilon", gamma_B), wanted["pred_x0_gamma"][later_B], "x0 on the line")
    assert_close(read(given["x_start"], "epsilon"), wanted["pred_x0_eps"][later_B], "x0 of epsilon")
    assert_close(read(given["x_start"], "v_prediction"), wanted["pred_x0_v"][later_B], "x0 of v")
    # The recorded solver step takes x0 and epsilon as given: those of an epsilon network with this very output.
    alpha, sigma = schedule.levels(t_B)
    z_BCHW = alpha * given["x_end"] + sigma * output_BCHW
    stepped_BCHW, _ = ddim_step(lambda z, tau: output_BCHW, schedule, z_BCHW, t_B, s_B)
    # z was rounded: x0 comes back to 2^-24 of z / alpha
    assert_close(stepped_BCHW, wanted["ddim_step"], "solver step", 1e-5 + float((z_BCHW.abs() / alpha).max()) * 2**-22)


def constant_network(output_BCHW: Tensor) -> Any:
    class Constant(nn.Module):
        config = SimpleNamespace(time_cond_proj_dim=None)

        def forward(self, *_: Any, **__: Any) -> tuple[Tensor]:
            return (output_BCHW,)

    return Constant()


def train_step(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    options = ("teacher", "student", "method", "loss_type", "huber_c", "num_ddim_timesteps", "schedule")
    config = known(case.config, *options)
    schedule = schedule_of(known(config["schedule"]))
    paths = SubPaths(schedule, config["num_ddim_timesteps"])
    weights = {name: case.group("param", f"{name}.") for name in ("teacher", "student", "target")}
    unet = unet_of(config["teacher"], weights["teacher"]).requires_grad_(False)
    teacher: Any = SimpleNamespace(unet=unet, schedule=schedule)
    student = Student(unet_of(config["student"], weights["student"]), paths)
    target = Student(unet_of(config["student"], weights["target"] or weights["student"]), paths)
    states_BLD, w_B = given["prompt_embeds"], given["w"]
    path = solve_subpath(
        teacher,
        paths,
        given["latents"],
        given["noise"],
        given["index"],
        states_BLD,
        w_B,
        given["uncond_prompt_embeds"],
    )
    assert_close(path.t_B, wanted["start_timesteps"], "start")
    assert_close(path.s_B, wanted["end_timesteps"], "end")
    assert_close(path.x_t_BCHW, wanted["noisy_model_input"], "x_t")

    def solved() -> Tensor:
        inputs = (given["latents"], given["noise"], given["index"], states_BLD, w_B, given["uncond_prompt_embeds"])
        return solve_subpath(teacher, paths, *inputs).x_s_BCHW

    assert_timed_close(solved, wanted["x_prev"], "x_s")
    lcm = config["method"] == "lcm"
    gamma_B = given.get("gamma", torch.ones(len(path.t_B)))
    own_w_B = w_B if lcm else None
    exact = SubPath(path.t_B, path.s_B, path.x_t_BCHW, wanted["x_prev"])
    x_BCHW = paths.point(exact.x_t_BCHW, exact.x_s_BCHW, gamma_B, exact.t_B, exact.s_B)
    if "inter_input" in wanted:
        assert_close(x_BCHW, wanted["inter_input"], "x_gamma")

    @torch.no_grad()
    def wanted_target() -> Tensor:
        return target(exact.x_s_BCHW, exact.s_B, states_BLD, w_B=own_w_B)

    @torch.no_grad()
    def predicted() -> Tensor:
        return student(x_BCHW, exact.t_B, states_BLD, gamma_B, exact.s_B, own_w_B)

    assert_timed_close(wanted_target, wanted["target"], "target")
    assert_timed_close(predicted, wanted["model_pred"], "prediction")
    for name in ("huber", "l2"):
        found = distance(wanted["model_pred"], wanted["target"], name, config["huber_c"])
        assert_close(found, wanted[f"loss_{name}"], f"{name} loss")
    options = LossConfig(kind=config["loss_type"], huber_c=config["huber_c"])

    def loss() -> Tensor:
        return subpath_loss(student, target, exact, gamma_B, states_BLD, options, own_w_B)

    assert_timed_close(loss, wanted["loss"], "loss")
    parameters = {f"student.{name}": p for name, p in student.unet.named_parameters()}
    names = list(case.group("out", "grad/"))

    def gradient_of(name: str) -> Tensor:
        return torch.autograd.grad(loss(), parameters[name])[0]

    for name in names:
        assert_timed_close(lambda name=name: gradient_of(name), wanted[f"grad/{name}"], f"gradient of {name}")


def sampling(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    options = ("unet", "steps", "original_inference_steps", "strength", "guidance_scale")
    config = known(case.config, *options, *READING, *UNREAD)
    paths = SubPaths(schedule_of(config), config["original_inference_steps"])
    student = Student(unet_of(config["unet"], case.group("param")), paths, reading=Reading.of(config))
    strength, guidance = config.get("strength", 1.0), config.get("guidance_scale", 1.0)
    w = None if guidance == 1 else guidance - 1
    for steps in config["steps"]:
        found = torch.tensor(timesteps(paths, steps, strength))
        assert_close(found, wanted[f"timesteps_{steps}"], f"times of {steps}")

        def drawn(steps: int = steps) -> Tensor:
            noises = given.get(f"noise_{steps}")
            inputs = (given["latents"], given["prompt_embeds"], steps, lambda n: noises[n - 1])
            return sample(student, *inputs, strength=strength, w=w)

        assert_timed_close(drawn, wanted[f"latents_{steps}"], f"{steps} steps")


def few_steps(case: Case) -> None:
    config = known(case.config, "n", "orig", "strength", "timesteps", *UNREAD)
    schedule = schedule_of({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **config})
    for grid in config["orig"]:
        for steps in config["n"]:
            paths, strength = SubPaths(schedule, grid), config.get("strength", 1.0)
            times = timesteps(paths, steps, strength)
            if "timesteps" in config:
                times = chosen_timesteps(paths, config["timesteps"], strength)
            found = torch.tensor(times)
            assert_close(found, case.group("out")[f"timesteps_n{steps}_orig{grid}"], f"{steps} of {grid}")


def ema(case: Case) -> None:
    given = case.group("in")
    known(case.config, "rate")
    target, source = (nn.ParameterList([nn.Parameter(given[name].clone())]) for name in ("target", "source"))
    follow(target, source, case.config["rate"])
    assert_close(target[0], case.group("out")["target"], "target")


CHECKS = [
    Check("tables", kind("tables", TRAINER), tables),
    Check("embedding", kind("gamma_embedding", TRAINER), embedding),
    Check("sub-path", kind("subpath_origin", TRAINER), subpath_origin),
    Check("ema", kind("ema_update", TRAINER), ema),
    Check("step", kind("train_step_splam", TRAINER), train_step),
    Check("LCM step", kind("train_step_lcm", "latent-consistency-model"), train_step),
    Check("sampling", kind("lcm_sampling", "LCMScheduler"), sampling),
    Check("few-step schedule", kind("lcm_timesteps", "LCMScheduler"), few_steps),
]
