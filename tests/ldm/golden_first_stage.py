"""Recorded cases of the official first stage: autoencoders, quantiser, discriminator, LPIPS and the two losses."""

from __future__ import annotations

import re
from functools import partial

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.metrics.lpips import LPIPS, lpips_from_state_dict
from ldm.autoencoder import AutoencoderKL, DiagonalGaussian, Quantized, VectorQuantizer, VQModel
from ldm.losses import KLPerceptualLoss, PatchDiscriminator, VQPerceptualLoss
from ldm.official import autoencoder_of
from ldm.plan import FIRST_STAGES
from tests.golden_case import Case, Check, assert_close, kind, load

GRADIENT_TOLERANCE = 1e-5
PUBLISHED = yaml.safe_load(FIRST_STAGES.read_text())


def assert_outputs(case: Case, actual: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every recorded output is compared; one that the check does not produce fails by name."""
    for name, expected in case.group("out").items():
        assert name in actual, f"{case.stem}: output {name} is not reproduced"
        assert_close(actual[name], expected, f"{case.stem} {name}", tolerance)


@torch.no_grad()
def check_kl(case: Case) -> None:
    model = autoencoder_of(case.config["ddconfig"], case.config["embed_dim"]).eval()
    assert isinstance(model, AutoencoderKL)
    load(model, case)
    x, noise = case.tensors["in/x"], case.tensors["in/noise"]
    posterior = model.encode(x)
    sample = posterior.sample(noise)
    assert torch.equal(model.encode_latent(x, noise), sample)
    actual = {
        "moments": model.moments(x),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "kl": posterior.kl(),
        "sample": sample,
        "nll_of_sample": posterior.nll(sample),
        "decode_mode": model.decode(posterior.mode()),
        "decode_sample": model.decode_latent(sample),
    }
    assert_outputs(case, actual)


@torch.no_grad()
def check_vq(case: Case) -> None:
    config = case.config
    sizes = config["ddconfig"], config["embed_dim"], config["n_embed"]
    model = autoencoder_of(*sizes, legacy=config.get("legacy", True)).eval()
    assert isinstance(model, VQModel)
    model.quantize.beta = config.get("beta", model.quantize.beta)
    load(model, case)
    x = case.tensors["in/x"]
    z = model.encode_latent(x)
    rec, quantized = model(x)
    actual = {
        "prequant": z,
        "quant": quantized.z,
        "indices": quantized.indices.flatten(),
        "codebook_loss": quantized.loss,
        "rec": rec,
        "interface_decode_of_1p3_prequant": model.decode_latent(1.3 * z),
        "interface_decode_not_quantized": model.decode(1.3 * z),
    }
    assert_outputs(case, actual)


def check_quantizer(case: Case) -> None:
    actual: dict[str, Tensor] = {}
    for form in ("legacy", "fixed"):
        quantizer = VectorQuantizer(
            case.config["n_e"], case.config["e_dim"], case.config["beta"], legacy=form == "legacy"
        )
        load(quantizer, case)
        z = case.tensors["in/z"].clone().requires_grad_()
        quantized = quantizer(z)
        (quantized.loss + (quantized.z * case.tensors["in/grad_out"]).sum()).backward()
        assert z.grad is not None and quantizer.embedding.weight.grad is not None
        actual |= {
            f"{form}_loss": quantized.loss,
            f"{form}_grad_z": z.grad,
            f"{form}_grad_codebook": quantizer.embedding.weight.grad,
            "quant": quantized.z,
            "indices": quantized.indices,
            "entry_of_indices": quantizer.lookup(quantized.indices),
        }
    assert_outputs(case, actual)


@torch.no_grad()
def check_patchgan(case: Case) -> None:
    """`out/eval` was recorded before the train-mode pass, the stored running statistics after it: undo that update."""
    config = case.config
    discriminator = PatchDiscriminator(config.get("input_nc", 3), config.get("ndf", 64), config.get("n_layers", 3))
    load(discriminator, case)
    x = case.tensors["in/x"]
    norms = [module for module in discriminator.main if isinstance(module, nn.BatchNorm2d)]
    updated = all(int(norm.num_batches_tracked or 0) == 1 for norm in norms)
    if updated:
        # With momentum 1 the running statistics become the batch's own.
        after = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        discriminator.train()(x)
        for norm, (mean, var) in zip(norms, after, strict=True):
            norm.momentum = 0.1
            norm.running_mean.copy_((mean - 0.1 * norm.running_mean) / 0.9)
            norm.running_var.copy_((var - 0.1 * norm.running_var) / 0.9)
    actual = {"eval": discriminator.eval()(x), "train_mode": discriminator.train()(x)}
    assert_outputs(case, actual)
    if updated:
        for norm, (mean, var) in zip(norms, after, strict=True):
            assert_close(norm.running_mean, mean, f"{case.stem} running mean")
            assert_close(norm.running_var, var, f"{case.stem} running variance")


@torch.no_grad()
def check_lpips(case: Case) -> None:
    lpips = lpips_from_state_dict(case.group("param"), case.path.name)
    assert lpips.net.channels == case.config["vgg_widths"]
    a, b = case.tensors["in/a"], case.tensors["in/b"]
    actual = {"d": lpips(a, b).view(-1, 1, 1, 1), "d_self": lpips(a, a).view(-1, 1, 1, 1)}
    assert_outputs(case, actual)


def loss_parts(case: Case) -> tuple[LPIPS | None, PatchDiscriminator, dict]:
    """LPIPS, discriminator and the options that the KL and the VQ loss share."""
    config = case.config
    perceptual = case.group("param", "perceptual_loss.")
    lpips = lpips_from_state_dict(perceptual, case.path.name) if perceptual else None
    weights = case.group("param", "discriminator.")
    first = weights["main.0.weight"]
    discriminator = PatchDiscriminator(first.shape[1], first.shape[0], config.get("disc_num_layers", 3))
    discriminator.load_state_dict(weights)
    discriminator.train("train" in config.get("mode", "eval"))
    options = {
        "disc_start": config["disc_start"],
        "disc_weight": config.get("disc_weight", 1.0),
        "disc_factor": config.get("disc_factor", 1.0),
        "disc_loss": config.get("disc_loss", "hinge"),
        "perceptual_weight": config.get("perceptual_weight", 1.0),
        "log_inactive_gan": True,
    }
    return lpips, discriminator, options


def recorded_steps(case: Case) -> list[int]:
    steps = {int(match[1]) for key in case.tensors if (match := re.match(r"out/step(\d+)/", key))}
    assert steps, f"{case.stem}: no out/stepN/ tensors"
    return sorted(steps)


def check_loss(case: Case, is_kl: bool) -> None:
    """Every log, the loss and its gradient at W, the weight of the convolution that ends the stand-in decoder."""
    lpips, discriminator, options = loss_parts(case)
    inputs = case.group("in")
    actual: dict[str, Tensor] = {}
    for step in recorded_steps(case):
        w = inputs["W"].clone().requires_grad_()
        rec = F.conv2d(inputs["h"], w, padding=1)
        if is_kl:
            loss_kl = KLPerceptualLoss(lpips, kl_weight=case.config.get("kl_weight", 1.0), **options)
            if "param/logvar" in case.tensors:
                loss_kl.logvar.data.copy_(case.tensors["param/logvar"])
            posterior = DiagonalGaussian(inputs["moments"])
            weights = inputs.get("weights")
            loss, logs = loss_kl.autoencoder(inputs["x"], rec, posterior, discriminator, w, step, weights)
            disc_loss, disc_logs = loss_kl.discriminator(inputs["x"], rec, discriminator, step)
        else:
            loss_vq = VQPerceptualLoss(
                lpips,
                n_embed=case.config["n_embed"],
                codebook_weight=case.config.get("codebook_weight", 1.0),
                pixel_loss=case.config.get("pixel_loss", "l1"),
                **options,
            )
            quantized = Quantized(inputs["h"], inputs["codebook_loss"], inputs["indices"])
            loss, logs = loss_vq.autoencoder(inputs["x"], rec, quantized, discriminator, w, step)
            disc_loss, disc_logs = loss_vq.discriminator(inputs["x"], rec, discriminator, step)
        (gradient,) = torch.autograd.grad(loss, w)
        values = {**logs, **disc_logs, "loss": loss, "disc_loss": disc_loss, "grad_W": gradient}
        actual |= {f"step{step}/{name}": value for name, value in values.items()}
    assert_outputs(case, actual, GRADIENT_TOLERANCE)


def check_first_stage_counts(case: Case) -> None:
    """Parameters and forward FLOP at 256 px of every published first stage, built without memory on the meta device."""
    for entry in case.config.get("first_stage", []):
        name, ddconfig = entry["name"], entry["ddconfig"]
        if name in PUBLISHED:
            published = {key: PUBLISHED[name].get(key) for key in ("ddconfig", "embed_dim", "n_embed")}
            assert published == {"ddconfig": ddconfig, "embed_dim": entry["embed_dim"], "n_embed": entry["n_embed"]}
        side = 256 // 2 ** (len(ddconfig["ch_mult"]) - 1)
        with torch.device("meta"):
            whole = autoencoder_of(ddconfig, entry["embed_dim"], entry["n_embed"])
            networks = {
                "encoder": (whole.encoder, torch.empty(1, ddconfig["in_channels"], 256, 256)),
                "decoder": (whole.decoder, torch.empty(1, ddconfig["z_channels"], side, side)),
            }
        for part, (network, sample) in networks.items():
            with FlopCounterMode(display=False) as counter:
                network(sample)
            parameters = sum(p.numel() for p in network.parameters())
            assert parameters == entry[f"{part}_params"], f"{name} {part}: {parameters} parameters"
            assert counter.get_total_flops() == entry[f"{part}_flop_256"], f"{name} {part}: FLOP differ"
    if "patchgan_3layers_ndf64_params" in case.config:
        with torch.device("meta"):
            discriminator = PatchDiscriminator(n_layers=3, ndf=64)
        parameters = sum(p.numel() for p in discriminator.parameters())
        assert parameters == case.config["patchgan_3layers_ndf64_params"]


CHECKS = [
    Check("kl", kind("kl_", "autoencoder.py:AutoencoderKL"), check_kl),
    Check("vq", kind("vq_", "autoencoder.py:VQModel"), check_vq),
    Check("quantizer", kind("quantizer_", "VectorQuantizer"), check_quantizer),
    Check("patchgan", kind("patchgan_", "NLayerDiscriminator"), check_patchgan),
    Check("lpips", kind("lpips_", "LPIPS"), check_lpips),
    Check("loss_kl", kind("loss_kl_", "LPIPSWithDiscriminator"), partial(check_loss, is_kl=True)),
    Check("loss_vq", kind("loss_vq_", "VQLPIPSWithDiscriminator"), partial(check_loss, is_kl=False)),
]
