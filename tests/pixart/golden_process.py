"""Checks of the recorded diffusion process, samplers, caption cleaning and aspect buckets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pixart.buckets import assign_buckets, bucket_batches, bucket_table, nearest_bucket
from pixart.diffusion import Diffusion, Network, linear_betas
from pixart.model import PixArt
from pixart.samplers import (
    diffusers_sampler,
    diffusers_scheduler,
    dpm_solver,
    guide,
    iddpm,
    sa_solver,
    uniform_times,
)
from pixart.text import clean_caption, parse_prompt
from tests.golden_case import Case, Check, assert_close, kind, load
from tests.pixart.golden_networks import our_config

MODULE = 1e-5
TRAJECTORY = 5e-5  # reached: 4e-6; the recorded solvers compute their coefficients in float32


def check_schedule(case: Case) -> None:
    config, out = case.config, case.group("out")
    full = Diffusion(linear_betas(int(config["diffusion_steps"])))
    names = [*config["respacings"], "full"]
    for key, expected in out.items():
        name = next(name for name in names if key.startswith(f"{name}_"))
        chain = full if name == "full" else full.respaced(name)
        value = getattr(chain, key[len(name) + 1 :])
        assert_close(torch.as_tensor(value).to(expected.dtype), expected, key, MODULE)


def toy_network(abar_T: Tensor, condition_B: Tensor) -> Network:
    """eps(x, t, y) = 0.9 x sqrt(1 - abar_t) + 0.1 tanh(x.roll(1, -1)) + 0.05 y; variance logits 0.3 tanh(x)."""

    def network(x: Tensor, t_B: Tensor) -> Tensor:
        time = t_B.to(torch.float32).clamp(0, len(abar_T) - 1)
        low = time.floor().long()
        weight = time - low
        abar = abar_T[low] * (1 - weight) + abar_T[(low + 1).clamp(max=len(abar_T) - 1)] * weight
        eps = 0.9 * x * (1 - abar).sqrt().view(-1, 1, 1, 1) + 0.1 * torch.tanh(x.roll(1, -1))
        return torch.cat([eps + 0.05 * condition_B.view(-1, 1, 1, 1), 0.3 * torch.tanh(x)], dim=1)

    return network


def only(case: Case, **values: object) -> None:
    """An option of a record that has one value here is named where it has another."""
    for name, value in values.items():
        assert case.config.get(name, value) == value, f"option {name} is {case.config[name]!r}: missing here"


class Recorder:
    """Stands for a network or a source of noise, and keeps the latents that a sampler shows it before every step."""

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        self.answer, self.seen = answer, list[Tensor]()

    def __call__(self, x_BCHW: Tensor, *rest: Tensor) -> Tensor:
        self.seen.append(x_BCHW)
        return self.answer(x_BCHW, *rest)


def _recorded_noise(case: Case) -> Recorder:
    noises = iter(case.group("in")["noises"])
    return Recorder(lambda like: next(noises))


def check_iddpm(case: Case) -> None:
    inputs, out, spacing = case.group("in"), case.group("out"), case.config["respacing"]
    only(case, clip_denoised=False, noise_schedule="linear", predict_xstart=False, diffusion_steps=1000)
    noise = _recorded_noise(case)
    network = toy_network(inputs["alphas_cumprod"], inputs["y"])
    if not (case.config.get("learn_sigma", True) and case.config.get("pred_sigma", True)):
        whole = network

        def network(x: Tensor, t_B: Tensor) -> Tensor:
            return whole(x, t_B)[:, : x.shape[1]]

    x = iddpm(network, inputs["z"], spacing, small_variance=case.config.get("sigma_small", False), noise=noise)
    assert Diffusion().respaced(spacing).timestep_map == out["timestep_map"].tolist()
    assert_close(torch.stack([*noise.seen[1:], x]), out["trajectory"], "trajectory", TRAJECTORY)


def _toy_guided(case: Case) -> Network:
    inputs = case.group("in")
    both = toy_network(inputs["alphas_cumprod"], torch.cat([inputs["uncond"], inputs["cond"]]))
    return guide(both, float(case.config["cfg_scale"]))


def check_dpm_solver(case: Case) -> None:
    config, inputs, out = case.config, case.group("in"), case.group("out")
    only(case, skip_type="time_uniform", method="multistep", algorithm="dpmsolver++")
    model = Recorder(_toy_guided(case))
    x = dpm_solver(model, inputs["z"], int(config["steps"]), order=int(config["order"]))
    assert_close(torch.tensor(uniform_times(int(config["steps"]))), out["times"], "times", MODULE)
    assert_close(torch.stack([*model.seen, x]), out["trajectory"], "trajectory", TRAJECTORY)
    assert_close(x, out["x"], "x", TRAJECTORY)


def check_sa_solver(case: Case) -> None:
    config, inputs, out = case.config, case.group("in"), case.group("out")
    only(case, pc_mode="PEC", mode="few_steps")
    noise = _recorded_noise(case)
    orders = {name: int(config[name]) for name in ("predictor_order", "corrector_order")}
    model, eta = _toy_guided(case), float(config["eta"])
    x = sa_solver(model, inputs["z"], int(config["steps"]), eta=eta, noise=noise, **orders)
    # Its first draw comes before the first step.
    assert_close(torch.stack([*noise.seen[1:], x]), out["trajectory"], "trajectory", TRAJECTORY)
    assert_close(x, out["x"], "x", TRAJECTORY)


def check_diffusers_sampler(case: Case) -> None:
    inputs, out = case.group("in"), case.group("out")
    scheduler = diffusers_scheduler()
    abar = torch.tensor(Diffusion().alphas_cumprod, dtype=torch.float32)

    def network(x: Tensor, t_B: Tensor) -> Tensor:
        return 0.9 * x * (1 - abar[t_B]).sqrt().view(-1, 1, 1, 1) + 0.1 * torch.tanh(x.roll(1, -1))

    model = Recorder(network)
    x = diffusers_sampler(model, inputs["x"], int(case.config["num_inference_steps"]), scheduler=scheduler)
    assert_close(scheduler.timesteps, out["timesteps"], "timesteps")
    assert_close(scheduler.sigmas, out["sigmas"], "sigmas", MODULE)
    assert_close(torch.stack([*model.seen, x]), out["trajectory"], "trajectory", TRAJECTORY)


def check_training_loss(case: Case) -> None:
    """Per-sample losses, the gradients of their batch mean, and of vb alone (none reaches the noise estimate)."""
    inputs, out = case.group("in"), case.group("out")
    only(case, noise_schedule="linear", use_kl=False, predict_xstart=False, rescale_learned_sigmas=False)
    net = PixArt(our_config(case.config, case.group("param")))
    load(net, case).eval()
    caption_BLD, mask_BL = inputs["y"].squeeze(1), inputs["mask"].flatten(1)

    def losses() -> dict[str, Tensor]:
        return Diffusion().training_losses(
            lambda x, t_B: net(x, t_B, caption_BLD, mask_BL),
            inputs["x_start"],
            inputs["t"],
            inputs["noise"],
            snr_loss=bool(case.config["snr"]),
        )

    actual = losses()
    for name in ("loss", "mse", "vb"):
        if name in out or name != "vb" or net.config.learn_sigma:
            assert_close(actual[name], out[name], name, MODULE)
    for group, value in (("grad", actual["loss"]), ("grad_of_vb", losses()["vb"])):
        if not value.requires_grad:
            assert not any(name.startswith(f"{group}/") for name in out), "a network without variance has no bound"
            continue
        net.zero_grad()
        value.mean().backward()
        for name, parameter in net.named_parameters():
            if f"{group}/{name}" in out:
                assert parameter.grad is not None, f"{group}/{name}: no gradient"
                assert_close(parameter.grad, out[f"{group}/{name}"], f"{group}/{name}", MODULE)


def check_text(case: Case) -> None:
    for pair in case.config["clean"]:
        assert clean_caption(pair["input"]) == pair["output"], pair["input"]
    for prompt in case.config["prompt_ar"]:
        parsed = parse_prompt(prompt["input"], base=1024)
        assert parsed.text == prompt["clean"], prompt["input"]
        assert [[parsed.ratio]] == prompt["ratio"], prompt["input"]
        assert [[parsed.height, parsed.width]] == prompt["custom_hw"], prompt["input"]
        default = next(bucket for bucket in bucket_table(1024, inference=True) if bucket.ratio == parsed.ratio)
        assert [[default.height, default.width]] == prompt["default_hw"], prompt["input"]


def _table_base(name: str) -> tuple[int, bool]:
    """ASPECT_RATIO_512 -> (512, False), ASPECT_RATIO_512_TEST -> (512, True)."""
    parts = name.split("_")
    return int(parts[2]), parts[-1] == "TEST"


def check_bucket_tables(case: Case) -> None:
    sizes_N2 = case.group("in")["hw"]
    for name, expected in case.group("table").items():
        base, inference = _table_base(name)
        rows = [[bucket.ratio, bucket.height, bucket.width] for bucket in bucket_table(base, inference=inference)]
        assert_close(torch.tensor(rows), expected, name, 0.0)
    for name, expected in case.group("out").items():
        base, inference = _table_base(name)
        table = bucket_table(base, inference=inference)
        buckets = [table[position] for position in assign_buckets(table, sizes_N2)]
        rows = [[bucket.height, bucket.width, bucket.ratio] for bucket in buckets]
        assert_close(torch.tensor(rows), expected, name, 0.0)
        assert buckets == [table[nearest_bucket(table, h, w)] for h, w in sizes_N2.tolist()]


def check_bucket_batches(case: Case) -> None:
    config, sizes_N2 = case.config, case.group("in")["hw"]
    base, inference = _table_base(config["table"])
    bucket_N = assign_buckets(bucket_table(base, inference=inference), sizes_N2)
    batch_size = int(config["batch_size"])
    batches = bucket_batches(
        range(len(sizes_N2)), bucket_N, batch_size, bool(config["drop_last"]), int(config["valid_num"])
    )
    padded = [[*batch, *[-1] * (batch_size - len(batch))] for batch in batches]
    assert padded == case.group("out")["batches"].tolist()


CHECKS = [
    Check("iDDPM schedule", kind("iddpm_schedule", "iddpm"), check_schedule),
    Check("iDDPM sampling", kind("iddpm_sample", "iddpm"), check_iddpm),
    Check("training loss", kind("train_loss", "gaussian_diffusion"), check_training_loss),
    Check("DPM-Solver++", kind("dpmsolver", "dpm_solver"), check_dpm_solver),
    Check(
        "diffusers DPM-Solver++", kind("diffusers_dpmsolver", "DPMSolverMultistepScheduler"), check_diffusers_sampler
    ),
    Check("SA-Solver", kind("sasolver", "sa_solver"), check_sa_solver),
    Check("text", kind("text", "t5.py"), check_text),
    Check("bucket tables", kind("buckets", "datasets/utils.py"), check_bucket_tables),
    Check("bucket batches", kind("bucket_batches", "data_sampler.py"), check_bucket_batches),
]
