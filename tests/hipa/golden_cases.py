"""Checks for the recorded HiPA cases; sizes, radii and ranks come from each case itself."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from common.adaptors import adaptor_state, add_adaptors, merge_adaptors
from common.solvers import ddim_step, guided_network
from common.stable_diffusion import stable_diffusion_unet
from common.teacher import read_schedule
from hipa.config import ATTENTION, LossConfig
from hipa.dists import Dists, L2Pool
from hipa.export import one_step_scheduler, scheduler_of
from hipa.frequency import (
    edges,
    exchanged,
    high_frequency_share,
    high_pass,
    low_pass,
    radial_power,
    radii,
    sobel,
)
from hipa.losses import AdaptationLoss, edge_loss, fourier_loss
from hipa.model import OneStep
from tests.golden_case import Case, Check, assert_close, assert_timed_close


def known(case: Case, *options: str) -> dict[str, Any]:
    """The case's config, of which nothing is passed over: an option that the check does not read is named."""
    surplus = set(case.config) - set(options)
    assert not surplus, f"{case.stem}: no check for the options {', '.join(sorted(surplus))}"
    return case.config


def tiny_dists(weights: dict[str, Tensor]) -> Dists:
    stages, channels = [], []
    count = len({key.partition(".")[0] for key in weights if key.startswith("stage")})
    for number in range(1, count + 1):
        weight = weights[f"stage{number}.conv.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], padding=weight.shape[-1] // 2)
        pool = weights.get(f"stage{number}.pool.filter")
        layers: list[nn.Module] = [] if pool is None else [L2Pool(weight.shape[1], pool.shape[-1] + 2)]
        stages.append(nn.Sequential(*layers, conv, nn.ReLU()))
        channels.append(weight.shape[0])
    found = Dists(stages, channels)
    names = {"pool.filter": "0.filter", "conv.weight": "1.weight", "conv.bias": "1.bias"}
    state = {name: weights[name] for name in ("alpha", "beta", "mean", "std")}
    for key, value in weights.items():
        if key.startswith("stage"):
            stage, _, rest = key.partition(".")
            place = int(stage[5:]) - 1
            pooled = f"{stage}.pool.filter" in weights
            name = names[rest] if pooled else names[rest].replace("1.", "0.")
            state[f"stages.{place}.{name}"] = value
    found.load_state_dict(state)
    return found


def frequency(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), known(case, "H", "W", "radii")
    x, y = given["x"], given["y"]
    assert_close(radii(*x.shape[-2:]).float(), wanted["distance_grid_fftorder"], "radii")
    for name, found in (("sobel_x", sobel(x)[0]), ("sobel_y", sobel(x)[1]), ("sobel_mag", edges(x))):
        assert_close(found, wanted[name], name)
    assert_close(radial_power(x), wanted["radial_power"], "radial power")
    assert x.shape[-2:] == (config["H"], config["W"])
    for r in config["radii"]:
        assert_close(low_pass(x, r), wanted[f"low_r{r}"], f"low {r}")
        assert_close(high_pass(x, r), wanted[f"high_r{r}"], f"high {r}")
        assert_close(exchanged(x, y, r), wanted[f"swap_lowx_highy_r{r}"], f"exchange {r}")
        assert_close(high_frequency_share(x, r), wanted[f"hf_energy_ratio_r{r}"], f"share {r}")
        for kind in ("mse", "l1_complex", "l1_amplitude"):
            assert_close(fourier_loss(x, y, r, kind), wanted[f"fourier_hf_{kind}_r{r}"], f"{kind} {r}")


def dists_case(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), known(case, "chns", "batch_average")
    network, x = tiny_dists(case.group("param")), given["pred"].clone().requires_grad_()
    assert network.channels == config["chns"]
    distance_B = network(x, given["target"])

    def recorded(distance_B: Tensor, wanted: Tensor, what: str) -> None:
        """The package squeezes a batch of one away, and takes the mean where it is told to."""
        found = distance_B.mean() if config.get("batch_average") else distance_B
        assert_close(found.reshape(wanted.shape), wanted, what)

    recorded(distance_B, wanted["dists"], "distance")
    recorded(network(x, x), wanted["self_dists"], "of itself")
    (gradient,) = torch.autograd.grad(distance_B.mean(), x)
    assert_close(gradient, wanted["grad_pred_of_mean"], "gradient")


def adaptation(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), known(case, "lam", "radius")
    x, y = given["pred"].clone().requires_grad_(), given["target"]
    options = LossConfig(weight=config["lam"], radius=config["radius"] / x.shape[-2])
    loss = AdaptationLoss(options, lambda z: z, torch.device("cpu"))
    loss.perceptual = tiny_dists(case.group("param", "dists."))
    parts = loss.of_pictures(x, y)
    for name in ("spatial", "fourier", "edge"):
        if name in parts:  # what weighs nothing is not computed
            assert_close(parts[name], wanted[f"l_{name}"], name)
    assert_close(fourier_loss(given["pred"], y, config["radius"]), wanted["l_fourier"], "Fourier loss")
    assert_close(parts["loss"], wanted["loss"], "loss")
    assert_close(high_pass(given["pred"], config["radius"]), wanted["high_pass_pred"], "high pass")
    assert_close(edges(given["pred"]), wanted["edge_pred"], "edges")
    assert_close(edge_loss(given["pred"], y), wanted["l_edge"], "edge loss")
    assert_close(torch.autograd.grad(parts["loss"], x)[0], wanted["grad_pred"], "gradient")


def unet_of(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**config)
    unet.load_state_dict(weights)
    return unet.eval()


def lora(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    options = ("unet", "r", "lora_alpha", "target_modules", "timestep", "rank_pattern", "alpha_pattern", "use_rslora")
    config = known(case, *options, "lora_dropout", "init_lora_weights")  # the last two: of training, and of its start
    base = case.group("param", "base.")
    unet = unet_of(config["unet"], base)
    t = torch.tensor(config["timestep"])

    @torch.no_grad()
    def output(network: Any) -> Tensor:
        return network(given["sample"], t, given["prompt_embeds"], return_dict=False)[0]

    assert_timed_close(lambda: output(unet), wanted["base"], "base")
    targets = config["target_modules"]
    if isinstance(targets, str):  # peft's: an expression for whole names
        targets = [name for name, _ in unet.named_modules() if re.fullmatch(targets, name)]
    add_adaptors(
        unet,
        targets,
        config["r"],
        config["lora_alpha"],
        config.get("rank_pattern"),
        alphas=config.get("alpha_pattern"),
        stabilised=config.get("use_rslora", False),
    )
    state = case.group("param", "lora.")
    ours = {name.replace(".default", ""): p for name, p in unet.named_parameters() if "lora_" in name}
    assert ours.keys() == {key.removeprefix("unet.").removeprefix("base_model.model.") for key in state}
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == int(wanted["trainable_params"])
    with torch.no_grad():
        for key, value in state.items():
            ours[key.removeprefix("unet.").removeprefix("base_model.model.")].copy_(value)
    assert_timed_close(lambda: output(unet), wanted["with_lora"], "adapted")
    merged = unet_of(config["unet"], base)
    merge_adaptors(merged, adaptor_state(unet))
    assert_timed_close(lambda: output(merged), wanted["with_lora"], "fused")


def counts(case: Case) -> None:
    wanted, config = case.group("out"), known(case, "columns", "target_modules")
    sd21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    with torch.device("meta"):
        for column, more in enumerate(({}, sd21)):
            for rank, *numbers in wanted["rank_sd15_sd21"].tolist():
                unet = stable_diffusion_unet(**more)
                assert sum(p.numel() for p in unet.parameters()) == int(wanted["unet_params"][column])
                add_adaptors(unet, config.get("target_modules", ATTENTION), rank)
                assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == numbers[column]


def one_step(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    levels = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    config = known(case, "unet", *levels, "clip_sample", "set_alpha_to_one", "steps_offset")
    assert not config.get("clip_sample"), "clip_sample: one step is never clipped"
    unet = unet_of(config["unet"], case.group("param"))
    x, states = given["x_T"], given["prompt_embeds"]
    for kind in (key.removeprefix("x0_") for key in wanted if key.startswith("x0_")):
        schedule = read_schedule({**{k: config[k] for k in levels if k in config}, "prediction_type": kind})
        last = torch.full((len(x),), schedule.steps - 1)

        @torch.no_grad()
        def drawn(schedule: Any = schedule) -> Tensor:
            return OneStep(unet, schedule)(x, states)

        @torch.no_grad()
        def stepped(schedule: Any = schedule, last: Tensor = last) -> Tensor:
            """A stock scheduler ends at the first noise level, unless its config says that it is clean."""
            z, x1 = ddim_step(guided_network(unet, states), schedule, x, last, torch.zeros_like(last))
            return x1 if config.get("set_alpha_to_one", True) else z

        assert_timed_close(drawn, wanted[f"x0_{kind}"], kind)
        if f"ddim1_trailing_{kind}" in wanted:
            assert_timed_close(stepped, wanted[f"ddim1_trailing_{kind}"], f"{kind}, stock scheduler")
    (abar,) = (value for key, value in wanted.items() if key.startswith("alpha_cumprod_"))
    assert_close(schedule.alphas_cumprod_T[-1].float(), abar, "abar")
    assert OneStep(unet, schedule).time == int(wanted["timesteps1_trailing"])
    exported = scheduler_of(one_step_scheduler(schedule))
    for steps in (1, 4):
        exported.set_timesteps(steps)
        assert exported.timesteps.tolist() == wanted[f"timesteps{steps}_trailing"].flatten().tolist()


def kind_of(*stems: str) -> Any:
    """The sources name no repository of the paper's: there is none; the file's stem says the kind."""
    return lambda case: any(case.stem.startswith(stem) for stem in stems)


CHECKS = [
    Check("frequency", kind_of("frequency_ops"), frequency),
    Check("DISTS", kind_of("dists"), dists_case),
    Check("loss", kind_of("adaptation_loss"), adaptation),
    Check("adaptors", kind_of("lora_unet"), lora),
    Check("counts", kind_of("lora_param_counts"), counts),
    Check("one step", kind_of("one_step"), one_step),
]
