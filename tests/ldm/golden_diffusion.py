"""Checks of the recorded diffusion process, samplers, schedules and whole models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ema import Ema
from ldm.diffusion import Conditioning, LatentDiffusion, NoiseSchedule, make_betas, scale_factor_from_std
from ldm.lr_schedules import warmup_cosine, warmup_cycles
from ldm.masks import signed_mask
from ldm.official import from_compvis_config
from ldm.samplers import (
    KnownRegion,
    PatchGrid,
    Trajectory,
    ddim_sample,
    ddim_tables,
    ddpm_step,
    decode_patchwise,
    make_denoiser,
    patchwise,
    plms_sample,
    recorded_noise,
)
from tests.golden_case import Case, Check, assert_close, fill_by_rule, kind

TRAJECTORY = 1e-5


def assert_each_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Every entry to 1e-5 of itself: weights of very different sizes."""
    wrong = (actual.double() - expected.double()).abs() > 1e-5 * expected.double().abs()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} entries differ by more than 1e-5 of themselves"


def check_schedules(case: Case) -> None:
    config, out = case.config, case.group("out")
    for name, (start, end) in config["schedules"].items():
        for key, expected in out.items():
            if key.startswith(f"{name}/posterior_variance_v"):
                v = float(key.rsplit("_v", 1)[1])
                actual = NoiseSchedule("linear", len(expected), start, end, v_posterior=v).posterior_variance
            elif key.startswith(f"{name}/"):
                table, prediction = key.split("/")[1], "eps"
                for ending in ("_eps", "_x0"):
                    if table.startswith("lvlb_weights") and table.endswith(ending):
                        table, prediction = "lvlb_weights", ending.removeprefix("_")
                schedule = NoiseSchedule("linear", len(expected), start, end, prediction=prediction)  # type: ignore[arg-type]
                actual = getattr(schedule, table)
            else:
                continue
            assert_close(actual, expected, key)
            if "lvlb_weights" in key:
                assert_each_close(actual, expected, key)
    for law in config["kinds"]:
        expected = out[f"kind_{law}/betas"]
        assert_close(torch.tensor(make_betas(law, len(expected))).float(), expected, f"betas of {law}")
    schedule = NoiseSchedule("linear", 1000, *config["schedules"][config["ddim_tables_use"]])
    for key, expected in out.items():
        if not key.startswith("ddim_"):
            continue
        _, method, rest = key.split("_", 2)
        steps, table = rest.split("/")
        eta = float(table.split("_eta")[1]) if "_eta" in table else 0.0
        values = getattr(ddim_tables(schedule, int(steps), eta, method), table.split("_eta")[0])  # type: ignore[arg-type]
        assert_close(torch.tensor(values, dtype=expected.dtype), expected, key)


def _toy_network(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    """eps(x, t, c) = 0.9 x sqrt(1 - abar_t) + 0.1 tanh(x.roll(1, -1)) + 0.05 c, as the recorded cases say."""

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        eps = 0.9 * x * schedule.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1) + 0.1 * torch.tanh(x.roll(1, -1))
        return eps if cond is None else eps + 0.05 * cond.view(-1, 1, 1, 1)  # type: ignore[union-attr]

    return network


def _snap(codebook_ND: Tensor) -> Callable[[Tensor], Tensor]:
    def snap(z_BCHW: Tensor) -> Tensor:
        flat = z_BCHW.permute(0, 2, 3, 1)
        nearest = torch.cdist(flat.flatten(0, 2), codebook_ND, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        return codebook_ND[nearest].view(flat.shape).permute(0, 3, 1, 2)

    return snap


def check_trajectory(case: Case) -> None:
    config, given, out = case.config, case.group("in"), case.group("out")
    schedule = NoiseSchedule("linear", 1000, config["linear_start"], config["linear_end"])
    cond = given.get("cond")
    denoise = make_denoiser(
        _toy_network(schedule),
        schedule,
        cond,
        guidance=config["guidance"],
        uncond=None if cond is None else torch.zeros_like(cond),
    )
    known = KnownRegion(given["x0"], given["mask"]) if config["masked"] else None
    snap = _snap(given["codebook"]) if config["quantize_x0"] else None
    noise = recorded_noise(given["noises"])
    trajectory = Trajectory()
    common = {"steps": config["S"], "known": known, "snap": snap, "trajectory": trajectory}
    if case.stem.startswith("plms"):
        z = plms_sample(denoise, schedule, given["x_T"], noise, **common)
    else:
        z = ddim_sample(
            denoise, schedule, given["x_T"], noise, eta=config["eta"], temperature=config["temperature"], **common
        )
    assert_close(z, out["x"], "final latent", TRAJECTORY)
    assert_close(torch.stack(trajectory.z), out["trajectory"], "trajectory", TRAJECTORY)
    assert_close(torch.stack(trajectory.x0), out["pred_x0"], "z_0 estimates", TRAJECTORY)


def check_diffusers_ddim(case: Case) -> None:
    """The stock scheduler with the recorded settings and our sampler walk the same way."""
    from diffusers import DDIMScheduler

    config, given, out = case.config, case.group("in"), case.group("out")
    schedule = NoiseSchedule("linear", 1000, config["beta_start"], config["beta_end"])
    network = _toy_network(schedule)
    trajectory = Trajectory()
    z = ddim_sample(
        make_denoiser(network, schedule),
        schedule,
        given["x_T"],
        recorded_noise(given["noises"]),
        steps=config["S"],
        eta=config["eta"],
        trajectory=trajectory,
    )
    assert_close(z, out["official_x"], "final latent", TRAJECTORY)
    assert_close(torch.stack(trajectory.z), out["trajectory"], "trajectory", TRAJECTORY)

    names = ("beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one", "clip_sample")
    scheduler = DDIMScheduler(num_train_timesteps=1000, **{name: config[name] for name in names})
    scheduler.set_timesteps(config["S"])
    assert_close(scheduler.timesteps, out["timesteps"], "timesteps")
    assert_close(torch.tensor(ddim_tables(schedule, config["S"]).timesteps[::-1]), out["timesteps"], "our timesteps")
    z = given["x_T"]
    for t, noise in zip(scheduler.timesteps, given["noises"]):
        t_B = t.expand(len(z))
        z = scheduler.step(network(z, t_B, None), t, z, eta=config["eta"], variance_noise=noise).prev_sample
    assert_close(z, out["official_x"], "diffusers' final latent", TRAJECTORY)


def check_loss_options(case: Case) -> None:
    config, given, out = case.config, case.group("in"), case.group("out")
    ldm = from_compvis_config(config).eval()
    ldm.model.load_state_dict(fill_by_rule(dict(ldm.model.named_parameters())))
    if config.get("learn_logvar"):
        ldm.logvar.data.copy_(torch.linspace(-0.5, 0.5, ldm.schedule.timesteps))
    loss, logs = ldm.loss(given["z"], given["t"], given["noise"])
    assert_close(loss, out["loss"], "loss", TRAJECTORY)
    for name, value in logs.items():
        assert_close(value, out[name], name, TRAJECTORY)
    expected = {name for name in out if name == "logvar" or name.startswith("loss")}
    assert set(logs) == expected, f"logs {sorted(logs)}, recorded {sorted(expected)}"

    denoise = make_denoiser(ldm.apply_model, ldm.schedule)
    z = out["p_sample_chain"][0]
    with torch.no_grad():
        for i, (step, noise) in enumerate(zip(config["p_sample_t"], given["p_sample_noises"])):
            z = ddpm_step(ldm.schedule, denoise(z, step)[0], z, step, noise)
            assert_close(z, out["p_sample_chain"][i + 1], f"ancestral step at {step}", TRAJECTORY)


def check_ema(case: Case) -> None:
    weights = case.group("in")["weights"]
    module = torch.nn.Linear(weights.shape[-1], weights.shape[-2], bias=False)
    module.weight.data.copy_(weights[0])
    ema = Ema(module, case.config["decay"], case.config["use_num_updates"])
    for weight, shadow in zip(weights[1:], case.group("out")["shadow"]):
        module.weight.data.copy_(weight)
        ema.update(module)
        assert_close(ema.get_buffer("weight"), shadow, "average")


def check_lr_schedules(case: Case) -> None:
    config, out, steps = case.config, case.group("out"), case.group("in")["step"].tolist()
    cosine2 = dict(config["cosine2"])
    first = cosine2.pop("first_entries", len(steps))
    cosine2 = {name: value if isinstance(value, list) else [value] for name, value in cosine2.items()}
    multipliers = {
        "inpainting_warmup_cosine": warmup_cosine(**config["inpainting"]),
        "churches_linear": warmup_cycles(**config["churches"], decay="linear"),
        "cosine2": warmup_cycles(**cosine2, decay="cosine"),
    }
    for name, expected in out.items():
        used = steps[:first] if name == "cosine2" else steps
        actual = torch.tensor([multipliers[name](step) for step in used], dtype=expected.dtype)
        assert_close(actual, expected, name, 1e-6)


def check_scale_by_std(case: Case) -> None:
    z, out = case.group("in")["z"], case.group("out")
    factor = scale_factor_from_std(z)
    assert_close(factor, out["scale_factor"], "scale_factor")
    assert_close(factor * z, out["scaled"], "scaled latent")


def check_patchwise(case: Case) -> None:
    config, out = case.config, case.group("out")
    pos, x = case.group("in")["pos"], case.group("in")["x"]
    up = config["vqf"]
    grid = PatchGrid(
        tuple(config["ks"]),
        tuple(config["stride"]),
        config["clip_min_weight"],
        config["clip_max_weight"],
        config["tie_braker"],
        config["clip_min_tie_weight"],
        config["clip_max_tie_weight"],
    )
    height, width = x.shape[-2:]
    assert_close(grid.weights(height, width).permute(1, 2, 0)[None, None], out["weighting"], "weighting")
    assert_each_close(grid.weights(height, width).permute(1, 2, 0)[None, None], out["weighting"], "weighting")
    assert_close(grid.normalisation(height, width)[None, None], out["normalization"], "normalisation")

    def network(patch: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return 0.5 * patch + pos * patch.mean(dim=(1, 2, 3), keepdim=True)

    def decoder(z: Tensor) -> Tensor:
        return F.interpolate(z / config["scale_factor"] + 0.1 * pos, scale_factor=up, mode="nearest")

    applied = patchwise(network, grid)(x, torch.zeros(len(x), dtype=torch.long), None)
    assert_close(applied, out["apply_model"], "patch-wise network")
    assert_close(decode_patchwise(decoder, x, grid, up), out["decoded"], "patch-wise decoder")


def _as_maps(tensor: Tensor) -> Tensor:
    """The recorded batches are [B, H, W, C]."""
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.dim() == 4 else tensor


def _build_by_rule(case: Case) -> LatentDiffusion:
    ldm = from_compvis_config(case.config, logits_head=True).eval()
    values = fill_by_rule(dict(ldm.named_parameters()))
    with torch.no_grad():
        for name, parameter in ldm.named_parameters():
            parameter.copy_(values[name])
    return ldm


def check_task(case: Case) -> None:
    config, given, out = case.config, case.group("in"), case.group("out")
    ldm = _build_by_rule(case)
    batch = {name: _as_maps(tensor) for name, tensor in case.group("in/batch").items()}
    if "mask" in batch:
        batch["mask"] = signed_mask(batch["mask"])
    z = ldm.encode(batch[ldm.first_stage_key], given.get("posterior_noise"))
    assert_close(z, out["z"], "latent")
    with torch.no_grad():
        cond = ldm.conditioning(batch)
        if "cond" in out:
            assert isinstance(cond, Tensor)
            assert_close(cond, out["cond"], "condition")
        zt = ldm.schedule.q_sample(z, given["t"], given["noise"])
        assert_close(ldm.apply_model(zt, given["t"], cond), out["eps"], "network output")
        loss, logs = ldm.loss(z, given["t"], given["noise"], cond)
        assert_close(loss, out["loss"], "loss")
        for name in ("loss_simple", "loss_vlb"):
            assert_close(logs[name], out[name], name)
        latent = ddim_sample(
            make_denoiser(ldm.apply_model, ldm.schedule, cond),
            ldm.schedule,
            given["x_T"],
            recorded_noise(given["ddim_noises"]),
            steps=config["ddim_S"],
            eta=config["ddim_eta"],
        )
        assert_close(latent, out["ddim_z"], "DDIM latent", TRAJECTORY)
        # Decoded from the recorded latent: a code at a tie would otherwise turn rounding into another image.
        assert_close(ldm.decode(out["ddim_z"]), out["ddim_image"], "decoded image", TRAJECTORY)


CHECKS = [
    Check("schedules", kind("schedules", "register_schedule"), check_schedules),
    Check("DDIM trajectory", kind("ddim", "DDIMSampler"), check_trajectory),
    Check("PLMS trajectory", kind("plms", "PLMSSampler"), check_trajectory),
    Check("diffusers DDIM", kind("diffusers_ddim", "DDIMScheduler"), check_diffusers_ddim),
    Check("loss options", kind("loss_options", "p_losses"), check_loss_options),
    Check("EMA", kind("ema", "LitEma"), check_ema),
    Check("learning-rate schedules", kind("lr_schedules", "lr_scheduler"), check_lr_schedules),
    Check("scale by std", kind("scale_by_std", "on_train_batch_start"), check_scale_by_std),
    Check("patch-wise", kind("patchwise", "get_fold_unfold"), check_patchwise),
    Check("whole model", kind("task_", "LatentDiffusion"), check_task),
]
