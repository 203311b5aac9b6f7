"""Checks for the recorded tokenizer cases; sizes and options come from each case itself.

Those of the generators stand in `golden_generators.py`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from instella_t2i.config import NetworkConfig
from instella_t2i.quantizers import BinaryQuantizer, lookup_free, spherical, vector_quantize
from instella_t2i.quantizers import index_of as little_endian
from instella_t2i.tokenizer import (
    Block,
    Downsample,
    Tokenizer,
    Upsample,
    image_positions,
    latent_positions,
    rotary_table,
)
from tests.golden_case import Case, Check, assert_close, kind

RELEASED = "Instella-T2I"


def unknown(case: Case, *read: str) -> None:
    """Fail by name where a case has an option that its check does not read."""
    left = sorted(set(case.config) - set(read) - {"loss", "note"})
    assert not left, f"{case.path.name}: options that are not read: {left}"


def weight_in_loss(case: Case, term: str, usual: float = 1.0) -> float:
    """What a case multiplies a term by in the loss whose gradients it records."""
    loss = case.config.get("loss", f"{usual}*{term}")
    found = re.search(rf"(?:([\d.]+)\s*\*\s*)?{term}", loss)
    assert found, f"{case.path.name}: loss {loss!r}: expected {term} in it"
    return float(found[1] or 1)


def network_of(config: dict[str, Any]) -> NetworkConfig:
    """Our options for the released code's."""
    assert config.get("in_channels", 3) == 3, f"in_channels {config['in_channels']}: pictures have 3 channels here"
    scale = config.get("set_scale")
    return NetworkConfig(
        patch=config["patch_size"],
        tokens=config["num_latent_tkns"],
        bits=config["codebook_size"],
        encoder_layers=config["encoder_layers"],
        encoder_heads=config["encoder_num_heads"],
        encoder_head_dim=config["encoder_head_dim"],
        decoder_layers=config["decoder_layers"],
        decoder_heads=config["decoder_num_heads"],
        decoder_head_dim=config["decoder_head_dim"],
        down_after=list(config["downsample_idx"]),
        up_after=list(config["upsample_idx"]),
        axes=list(config["axes_dims_rope"]),
        theta=float(config.get("theta", 10_000)),
        scale=None if scale is None else float(scale),
    )


def block(case: Case) -> None:
    unknown(case, "heads", "head_dim", "axes", "H", "W", "num_latent", "scale", "theta")
    given, wanted, config = case.group("in"), case.group("out"), case.config
    positions = torch.cat(
        [latent_positions(config["num_latent"]), image_positions(config["H"], config["W"], config["scale"])]
    )
    table = rotary_table(positions, config["axes"], float(config.get("theta", 10_000)))
    for found, name in zip(table, ("cos", "sin")):
        assert_close(found, wanted[name], name)
    width = config["heads"] * config["head_dim"]
    parts = nn.ModuleDict(
        {"block": Block(config["heads"], config["head_dim"]), "down": Downsample(width), "up": Upsample(width)}
    )
    parts.load_state_dict(case.group("param"))
    with torch.no_grad():
        x = given["x"]
        whole = parts["block"]
        assert isinstance(whole, Block)
        assert_close(whole.attn(whole.input_layernorm(x), table), wanted["attn"], "attention")
        assert_close(whole(x, table), wanted["block"], "block")
        image_BEhw = given["img_tokens"].permute(0, 3, 1, 2)
        for name in ("down", "up"):
            assert_close(parts[name](image_BEhw).flatten(2).transpose(1, 2), wanted[name], name)


def tokenizer(case: Case) -> None:
    unknown(
        case,
        *("in_channels", "encoder_layers", "encoder_head_dim", "encoder_num_heads", "patch_size", "axes_dims_rope"),
        *("downsample_idx", "decoder_layers", "decoder_head_dim", "decoder_num_heads", "upsample_idx", "theta"),
        *("num_latent_tkns", "codebook_size", "image", "set_scale", "decode_sizes"),
    )
    given, wanted = case.group("in"), case.group("out")
    ours = Tokenizer(network_of(case.config)).eval()
    ours.load_state_dict(case.group("param"))
    assert isinstance(ours.quantizer, BinaryQuantizer)
    image = given["image"]
    with torch.no_grad():
        states = ours.encoder(image)
        assert_close(states, wanted["encoder"], "encoder")
        logits = ours.quantizer.logits(states)
        assert_close(logits, wanted["logits"], "logits")
        found = ours(image)
        assert_codes(found.quantized.codes_BLD, wanted["code"], wanted["logits"])
        assert_codes(ours.encode(image), wanted["code"], wanted["logits"])
        assert_close(found.quantized.loss, wanted["code_loss"], "code loss")
        assert_close(ours.quantizer.values(wanted["code"]), wanted["z_q"], "values")
        assert_close(ours.decode(wanted["code"], tuple(image.shape[-2:])), wanted["recon"], "reconstruction")
        for size in case.config["decode_sizes"]:
            height, width = size if isinstance(size, list) else (size, size)
            name = "x".join(map(str, size)) if isinstance(size, list) else size
            assert_close(ours.decode(wanted["code"], (height, width)), wanted[f"decode_{name}"], f"decoded at {size}")


def assert_codes(found: Tensor, wanted: Tensor, logits: Tensor) -> None:
    """Equal but for bits whose logit is within 1e-5 of the threshold (the goldens' README)."""
    differs = (found != wanted) & (logits.abs() > 1e-5)
    assert not differs.any(), f"codes: {int(differs.sum())} bits differ"


def binary(case: Case) -> None:
    unknown(case, "emb_dim", "codebook_size", "num_latent_tokens", "train_temp")
    given, wanted, config = case.group("in"), case.group("out"), case.config
    ours = BinaryQuantizer(config["emb_dim"], config["codebook_size"])
    ours.load_state_dict(case.group("param"))
    h = given["h"].clone().requires_grad_()
    found = ours(h, given["u"], config["train_temp"])
    assert_close(found.codes_BLD, wanted["train_code"], "codes")
    assert_close(found.values_BLE, wanted["train_z_q"], "values")
    assert_close(found.loss, wanted["code_loss"], "code loss")
    weight = weight_in_loss(case, "code_loss", 0.1)
    ((found.values_BLE * given["grad_zq"]).sum() + weight * found.loss).backward()
    for parameter, name in ((h, "h"), (ours.embed, "embed"), (ours.proj[0].weight, "proj_weight")):
        assert parameter.grad is not None
        assert_close(parameter.grad, wanted[f"grad_{name}"], f"gradient of {name}")
    still = ours(given["h"])
    assert_close(still.codes_BLD, wanted["eval_code"], "codes without noise")
    assert_close(still.values_BLE, wanted["eval_z_q"], "values without noise")


def bsq(case: Case) -> None:
    unknown(
        case,
        *("embed_dim", "beta", "gamma0", "gamma", "zeta", "group_size", "l2_norm", "inv_temperature"),
        "persample_entropy",
    )
    given, wanted, config = case.group("in"), case.group("out"), case.config
    assert config["persample_entropy"] in ("group", "analytical"), f"persample_entropy {config['persample_entropy']}"
    z = given["z"].clone().requires_grad_()
    found = spherical(
        z,
        config["group_size"],
        config["inv_temperature"],
        config["beta"],
        config["gamma0"],
        config["gamma"],
        config["zeta"],
        config["l2_norm"],
        config["persample_entropy"] == "analytical",
    )
    assert_close(found.z_q, wanted["z_q"], "values")
    assert_close(found.loss, wanted["loss"], "loss")
    assert_close(found.codebook_entropy, wanted["codebook_entropy"], "codebook entropy")
    assert_close(found.group_index, wanted["group_indices"], "indices of groups")
    index = little_endian(found.codes.flip(-1))
    if index.max() >= 2**24:  # the authors add up an index in float32
        torch.testing.assert_close(index.double(), wanted["indices"].double(), rtol=2.0**-22, atol=0)
    else:
        assert_close(index, wanted["indices"], "indices")
    ((found.z_q * given["w"]).sum() + weight_in_loss(case, "quantizer.loss") * found.loss).backward()
    assert z.grad is not None
    assert_close(z.grad, wanted["grad_z"], "gradient")


def lfq(case: Case) -> None:
    unknown(
        case,
        *("bits", "sample_minimization_weight", "batch_maximization_weight", "temperature"),
        *("num_codebooks", "token_factorization", "factorized_bits"),
    )
    given, wanted, config = case.group("in"), case.group("out"), case.config
    books = config.get("num_codebooks", 1)
    assert given["x"].shape[1] in (config["bits"], books * config["bits"])
    x = given["x"].clone().requires_grad_()
    found = lookup_free(
        x.movedim(1, -1),
        config["temperature"],
        config["sample_minimization_weight"],
        config["batch_maximization_weight"],
        books,
    )
    z_q = found.z_q.movedim(-1, 1)
    assert_close(z_q, wanted["z_q"], "values")
    codes = found.codes.unflatten(-1, (books, -1))
    if config.get("token_factorization"):  # a code is told by two numbers
        for name, part in zip(("pre", "post"), codes.split(config["factorized_bits"], -1)):
            assert_close(little_endian(part).flatten(), wanted[f"indices_{name}"], f"indices {name}")
    else:
        assert_close(little_endian(codes).flatten(), wanted["indices"], "indices")
    for name, value in (
        ("per_sample_entropy", found.sample_entropy),
        ("codebook_entropy", found.codebook_entropy),
        ("commit", found.commit),
        ("entropy_aux_loss", found.aux),
    ):
        assert_close(value, wanted[name], name)
    aux, commit = weight_in_loss(case, "entropy_aux"), weight_in_loss(case, "commit", 0.25)
    ((z_q * given["w"]).sum() + aux * found.aux + commit * found.commit).backward()
    assert x.grad is not None
    assert_close(x.grad, wanted["grad_x"], "gradient")


def vq(case: Case) -> None:
    unknown(case, "codebook_size", "token_size", "commitment_cost", "use_l2_norm")
    given, wanted, config = case.group("in"), case.group("out"), case.config
    codebook = case.group("param")["embedding.weight"].clone().requires_grad_()
    assert tuple(codebook.shape) == (config["codebook_size"], config["token_size"])
    z = given["z"].clone().requires_grad_()
    found = vector_quantize(z.movedim(1, -1), codebook, config["commitment_cost"], config["use_l2_norm"])
    z_q = found.z_q.movedim(-1, 1)
    assert_close(z_q, wanted["z_q"], "values")
    assert_close(found.entry, wanted["indices"], "indices")
    assert_close(found.loss, wanted["quantizer_loss"], "loss")
    ((z_q * given["w"]).sum() + weight_in_loss(case, "quantizer.loss") * found.loss).backward()
    assert z.grad is not None and codebook.grad is not None
    assert_close(z.grad, wanted["grad_z"], "gradient of z")
    assert_close(codebook.grad, wanted["grad_embedding"], "gradient of the codebook")


CHECKS = [
    Check("block and resizing", kind("ae_block", RELEASED), block),
    Check("tokenizer", kind("bae", RELEASED), tokenizer),
    Check("binary quantizer", kind("binary_quantizer", RELEASED), binary),
    Check("binary spherical quantizer", kind("bsq", "bsq-vit"), bsq),
    Check("lookup-free quantizer", kind("lfq", "Open-MAGVIT2"), lfq),
    Check("vector quantizer", kind("vq", "1d-tokenizer"), vq),
]
