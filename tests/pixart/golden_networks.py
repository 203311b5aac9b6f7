"""Checks of the recorded cases that concern the networks, their key maps and their sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pixart.config import PixArtConfig
from pixart.controlnet import ControlPixArt
from pixart.convert import from_diffusers, load_weights, reparameterise, to_diffusers
from pixart.model import (
    CaptionContext,
    CaptionEmbedder,
    DiT,
    FinalLayer,
    PixArt,
    PixArtBlock,
    SizeEmbedder,
    TimestepEmbedder,
    padded_rows,
    position_embedding,
    sinusoids,
)
from tests.golden_case import (
    Case,
    Check,
    assert_close,
    assert_sinusoids_close,
    assert_timed_close,
    kind,
    load,
)

TOLERANCE = 1e-5


# How the recorded configurations call what ours calls otherwise.
NAMES = {
    "hidden_size": "width",
    "num_heads": "heads",
    "model_max_length": "caption_tokens",
    "lewei_scale": "interpolation_scale",
    "pred_sigma": "learn_sigma",
}
SHARED = {"input_size", "patch_size", "in_channels", "depth", "mlp_ratio", "caption_channels"}


# Options of the authors' networks of which one value is read, and what a record may say beside a network's options.
ONLY = {
    "window_size": 0,
    "window_block_indexes": [],
    "use_rel_pos": False,
    "drop_path": 0.0,
    "qk_norm": False,
    "kv_compress_config": None,
    "micro_condition": None,
}
BESIDE = {
    *("params", "cls", "ms", "latent_hw", "copy_blocks_num", "t_selected", "snr", "learn_sigma", "class_dropout_prob"),
    *("config", "source", "note"),
}


def our_config(recorded: dict[str, Any], params: dict[str, Tensor] | None = None, **more: Any) -> PixArtConfig:
    """What a record's options are here; those that it is silent of and weights tell are read from `params`."""
    for name, value in ONLY.items():
        assert recorded.get(name, value) in (value, None), f"option {name} is {recorded[name]!r}: missing here"
    unknown = recorded.keys() - NAMES.keys() - SHARED - ONLY.keys() - BESIDE
    assert not unknown, f"options {sorted(unknown)} are not known here"
    known = {NAMES.get(k, k): v for k, v in recorded.items() if k in NAMES or k in SHARED}
    last = (params or {}).get("final_layer.linear.weight", (params or {}).get("base_model.final_layer.linear.weight"))
    if last is not None:
        patch, channels = known.get("patch_size", 2), known.get("in_channels", 4)
        known["learn_sigma"] = len(last) == 2 * channels * patch**2
        assert recorded.get("pred_sigma", known["learn_sigma"]) == known["learn_sigma"], "pred_sigma against weights"
    return PixArtConfig(**{**known, **more})


def _solver_output(prediction: Tensor, expected: Tensor) -> Tensor:
    """What `forward_with_dpmsolver` makes of a prediction: the first half of its channels."""
    return prediction if prediction.shape == expected.shape else prediction.chunk(2, dim=1)[0]


def _sizes(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The micro-conditions of a multi-scale network, with or without the group's name before them."""
    found = {name.rpartition("/")[2]: value for name, value in given.items()}
    if "img_hw" not in found:
        return {}
    return {"size_B2": found["img_hw"], "ratio_B1": found["aspect_ratio"]}


@torch.no_grad()
def check_block(case: Case) -> None:
    block = PixArtBlock(our_config(case.config, depth=1))
    load(block, case).eval()
    given, expected = case.group("in"), case.group("out")
    lengths = given["text_lens"].tolist()
    context = CaptionContext(given["y_packed"][0], len(lengths), *padded_rows(lengths), None)
    assert_close(block(given["x"], given["t6"], context), expected["x"], "x", TOLERANCE)
    normal = torch.nn.functional.layer_norm(given["x"], given["x"].shape[-1:], eps=1e-6)
    assert_close(block.get_submodule("attn")(normal), expected["self_attn_of_norm1"], "self-attention", TOLERANCE)
    assert_close(
        block.get_submodule("cross_attn")(given["x"], context, None),
        expected["cross_attn"],
        "cross-attention",
        TOLERANCE,
    )


@torch.no_grad()
def check_embedders(case: Case) -> None:
    recorded, given, expected = case.config, case.group("in"), case.group("out")
    width, channels = recorded["hidden"], recorded["caption_channels"]
    parts = nn.ModuleDict(
        {
            "t_embedder": TimestepEmbedder(width),
            "size_embedder": SizeEmbedder(len(case.tensors["param/size_embedder.mlp.0.bias"])),
            "y_embedder": CaptionEmbedder(channels, width, recorded["token_num"]),
            "final_layer": FinalLayer(
                PixArtConfig(
                    width=width,
                    heads=1,
                    patch_size=recorded["patch"],
                    in_channels=recorded["out_channels"],
                    learn_sigma=False,
                )
            ),
        }
    )
    load(parts, case).eval()
    half = expected["t_freq"].shape[1] // 2
    argument_BE = given["timesteps"].double()[:, None] * 10000.0 ** (-torch.arange(2 * half) % half / half)
    assert_sinusoids_close(sinusoids(given["timesteps"]), expected["t_freq"], argument_BE, "t_freq")
    for part, argument, name in (
        ("t_embedder", "timesteps", "t_emb"),
        ("size_embedder", "size_hw", "csize_emb"),
        ("size_embedder", "ar", "ar_emb"),
    ):
        assert_timed_close(partial(parts[part], given[argument]), expected[name], name, TOLERANCE)
    assert_close(parts["final_layer"](given["x"], given["t"]), expected["final"], "final", TOLERANCE)
    embedder, caption_BLC = parts["y_embedder"], given["caption"][:, 0]
    assert isinstance(embedder, CaptionEmbedder)
    for name, drop_B in (
        ("keep", torch.zeros(len(caption_BLC), dtype=torch.bool)),
        ("drop", given["drop_ids"] == 1),
        ("null", torch.ones(len(caption_BLC), dtype=torch.bool)),
    ):
        projected = embedder(embedder.drop(caption_BLC, drop_B))
        assert_close(projected[:, None], expected[f"caption_{name}"], f"caption_{name}", TOLERANCE)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, captions [B, L, C] and mask [B, L]."""
    given = case.group("in")
    return given["x"], given["timestep"], given["y"][:, 0], given["mask"][:, 0, 0]


@torch.no_grad()
def check_net(case: Case) -> None:
    net = PixArt(our_config(case.config, case.group("param")))
    load(net, case).eval()
    recorded = case.group("param").get("pos_embed")
    if recorded is not None:
        assert_close(PixArt(net.config).pos_embed, recorded, "pos_embed", TOLERANCE)
    x, t, y, mask = _inputs(case)
    expected = case.group("out")
    assert_timed_close(lambda: net(x, t, y, mask), expected["pred"], "pred", TOLERANCE)
    if "pred_no_mask" in expected:
        assert_timed_close(lambda: net(x, t, y), expected["pred_no_mask"], "pred_no_mask", TOLERANCE)
    caption = net.encode_caption(y, mask)
    assert_timed_close(lambda: net(x, t, caption), expected["pred"], "pred of an encoded caption", TOLERANCE)
    if (solver := expected.get("dpmsolver")) is not None:
        assert_timed_close(lambda: _solver_output(net(x, t, caption), solver), solver, "dpmsolver", TOLERANCE)
    with torch.enable_grad():  # the path of training computes keys and values block by block
        assert_timed_close(lambda: net(x, t, y, mask), expected["pred"], "pred with gradients", TOLERANCE)


@torch.no_grad()
def check_net_ms(case: Case) -> None:
    net = PixArt(our_config(case.config, case.group("param"), multi_scale=True))
    load(net, case).eval()
    x, t, y, mask = _inputs(case)
    expected, size = case.group("out"), _sizes(case.group("in"))
    assert_timed_close(lambda: net(x, t, y, mask, **size), expected["pred"], "pred", TOLERANCE)
    if (solver := expected.get("dpmsolver")) is not None:
        assert_timed_close(lambda: _solver_output(net(x, t, y, mask, **size), solver), solver, "dpmsolver", TOLERANCE)


def check_positions(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    for name, fields in given.items():
        rows, columns, base, scale = fields.tolist()
        made = position_embedding(case.config["embed_dim"], int(rows), int(columns), base, scale)
        assert_close(made, expected[name], name, TOLERANCE)


@torch.no_grad()
def check_controlnet(case: Case) -> None:
    config = our_config(case.config, case.group("param"), multi_scale=case.config.get("ms", False))
    net = ControlPixArt(PixArt(config), case.config["copy_blocks_num"])
    load(net, case).eval()
    x, t, y, mask = _inputs(case)
    given, expected = case.group("in"), case.group("out")
    size = _sizes(given)
    context = net.encode_caption(y, mask)
    for caption in (context, net.base_model.project_caption(y, mask, None)):
        for name, hint in (("pred", {"control_BCHW": given["hint_latent"]}), ("pred_without_hint", {})):
            if name in expected:
                assert_timed_close(partial(net, x, t, caption, **hint, **size), expected[name], name, TOLERANCE)
    assert net.config.multi_scale == bool(size), "sizes are given to multi-scale networks, and to no other"


@torch.no_grad()
def check_reparameterisation(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    dit = DiT(our_config(case.config, classes=1))
    problems = dit.load_state_dict(case.group("param"), strict=False)
    # The recorded case drops the class term and leaves the fixed positions out.
    assert set(problems.missing_keys) == {"pos_embed", "y_embedder.embedding_table.weight"}
    assert not problems.unexpected_keys
    x, selected = given["x"], case.config["t_selected"]
    t_selected, t_others = torch.full((len(x),), selected), torch.tensor([100.0, 900.0])
    at_others = "dit_without_class_t100_t900"
    assert_timed_close(lambda: dit(x, t_selected), expected["dit_without_class_t500"], "DiT", TOLERANCE)
    assert_timed_close(lambda: dit(x, t_others), expected[at_others], "DiT at other times", TOLERANCE)
    net = PixArt(our_config(case.config))
    net.t_block.load_state_dict({key: given[f"t_block.{key}"] for key in ("1.weight", "1.bias")})
    caption, mask = given["y"][:, 0], given["mask"][:, 0, 0]

    def reparameterised() -> PixArt:
        reparameterise(dit, net, selected)  # the tables hang on the sinusoids of t_selected
        return net

    def tables() -> Tensor:
        filled = reparameterised()
        return torch.stack([filled.get_parameter(f"blocks.{i}.scale_shift_table") for i in range(len(net.blocks))])

    for what, compute, recorded in (
        ("tables of the blocks", tables, "table_blocks"),
        ("table of the final layer", lambda: reparameterised().final_layer.scale_shift_table.clone(), "table_final"),
        ("at t_selected", lambda: reparameterised()(x, t_selected, caption, mask), "dit_without_class_t500"),
        ("at other times", lambda: reparameterised()(x, t_others, caption, mask), "pixart_t100_t900"),
    ):
        assert_timed_close(compute, expected[recorded], what, TOLERANCE)


@torch.no_grad()
def check_diffusers(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    state, config = from_diffusers(case.group("param"), case.config)
    net = PixArt(config)
    load_weights(net, state, case.stem)
    size = {}
    if config.multi_scale:
        size = {"size_B2": given["resolution"], "ratio_B1": given["aspect_ratio"]}
    inputs = given["hidden_states"], given["timestep"], given["encoder_hidden_states"], given["encoder_attention_mask"]
    for name in ("sample", "official"):
        assert_timed_close(lambda: net(*inputs, **size), expected[name], name, TOLERANCE)
    back, back_config = to_diffusers(net.state_dict(), config)
    assert back.keys() == case.group("param").keys()
    for key, value in case.group("param").items():
        assert torch.equal(back[key], value), f"{key} does not survive the way to diffusers"
    for key, value in back_config.items():
        assert key.startswith("_") or case.config[key] == value, f"config.json: {key}"


def _count(module: nn.Module | nn.Parameter) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else module.numel()


def _forward_flop(net: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """(FLOP of a forward pass, the same without the products of queries, keys and values)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    total = counter.get_total_flops()
    return total, total - counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


def check_full_scale_counts(case: Case) -> None:
    """Parameters and FLOP of the published sizes, on the meta device."""
    recorded = case.config
    with torch.device("meta"):
        nets = {
            "PixArt_XL_2": PixArt(PixArtConfig()),
            "PixArtMS_XL_2": PixArt(PixArtConfig(input_size=128, interpolation_scale=2.0, multi_scale=True)),
            "DiT_XL_2": DiT(PixArtConfig(classes=1000)),
            "adaLN_variant_rebuilt": PixArt(PixArtConfig(adaln="block")),
        }
        for name, net in nets.items():
            for part, count in recorded.get(name, {}).items():
                if part in ("total", "meaning"):
                    assert part == "meaning" or _count(net) == count, name
                elif part == "total_incl_pos_embed_parameter":
                    assert _count(net) + net.get_buffer("pos_embed").numel() == count, name
                elif part == "pos_embed":
                    assert net.get_buffer("pos_embed").numel() == count, name
                elif part == "per_block":
                    assert {_count(block) for block in net.get_submodule("blocks").children()} == {count}, name
                elif part == "adaLN_linears_in_blocks":
                    names = (n for n, _ in net.named_modules() if n.startswith("blocks") and n.endswith("modulation"))
                    assert sum(_count(net.get_submodule(n)) for n in names) == count, name
                else:
                    assert _count(net.get_submodule(part)) == count, f"{name}.{part}"
        for size, flop in recorded.get("forward_flop", {}).items():
            side = int(size.rpartition("_")[2]) // 8
            x_BCHW, t_B = torch.empty(1, 4, side, side), torch.zeros(1)
            if size.startswith("DiT"):
                # Recorded where DiT's fused attention was not among the counted operators.
                assert flop in _forward_flop(nets["DiT_XL_2"], x_BCHW, t_B, torch.zeros(1, dtype=torch.long)), size
            else:
                net = PixArt(PixArtConfig(input_size=side))
                assert _forward_flop(net, x_BCHW, t_B, torch.empty(1, 120, 4096))[0] == flop, size


CHECKS = [
    Check("block", kind("block", "PixArt.py:PixArt"), check_block),
    Check("embedders", kind("embedders", "PixArt_blocks.py"), check_embedders),
    Check("net_ms", kind("net_ms", "PixArtMS.py"), check_net_ms),
    Check("net", kind("net", "PixArt.py:PixArt"), check_net),
    Check("pos_embed", kind("pos_embed", "get_2d_sincos_pos_embed"), check_positions),
    Check("controlnet", kind("controlnet", "pixart_controlnet.py"), check_controlnet),
    Check("reparam", kind("reparam", "models.py:DiT"), check_reparameterisation),
    Check("diffusers_net", kind("diffusers_net", "PixArtTransformer2DModel"), check_diffusers),
    Check("full_scale_counts", kind("full_scale_counts", "nets/PixArt.py"), check_full_scale_counts),
]
