"""Options of the authors' and diffusers' modules: each runs as theirs does, or is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from ldm.diffusion import NoiseSchedule
from ldm.layouts import first_stage_from_diffusers, unet_to_diffusers
from ldm.model import AttentionBlock, BasicTransformerBlock, CrossAttention, SpatialTransformer, timestep_embedding
from ldm.official import autoencoder_of, classifier_of, from_compvis_config, unet_of
from tests.golden_case import Case, assert_close
from tests.ldm.golden_diffusion import assert_each_close
from tests.ldm.golden_networks import check_diffusers_vq, check_spatial_transformer

UNET: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def _fill(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * value if parameter.dim() == 1 else value / parameter[0].numel() ** 0.5)
    return module.eval()


def _vq_case(**changes: Any) -> Case:
    """diffusers' VQModel as a case of ours."""
    from diffusers import VQModel

    config = {
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 16,
        "num_vq_embeddings": 23,
        "norm_num_groups": 8,
        "scaling_factor": 0.7,
        **changes,
    }
    net = _fill(VQModel(**config))
    x_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = net.encode(x_BCHW).latents
        quant, loss, (_, _, indices) = net.quantize(latents)
        outputs = {
            "latents": latents,
            "quant": quant,
            "indices": indices,
            "commit_loss": loss,
            "rec": net.decode(latents).sample,
            "rec_not_quantized": net.decode(latents, force_not_quantize=True).sample,
        }
    tensors = {"in/x": x_BCHW} | {f"param/{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"out/{k}": v for k, v in outputs.items()}
    kept = {k: v for k, v in net.config.items() if not k.startswith("_")}
    return Case(Path("live"), "diffusers_vq", "huggingface/diffusers VQModel", config=kept, tensors=tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vq_embed_dim": 6, "layers_per_block": 2},
        {"mid_block_add_attention": False},
        {
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        },
    ],
)
def test_diffusers_vq_model_is_a_first_stage(changes: dict[str, Any]) -> None:
    check_diffusers_vq(_vq_case(**changes))


@pytest.mark.parametrize(
    ("option", "value"), [("norm_type", "spatial"), ("act_fn", "relu"), ("lookup_from_codebook", True)]
)
def test_what_a_first_stage_of_diffusers_must_not_be_is_named(option: str, value: Any) -> None:
    case = _vq_case()
    with pytest.raises(UserError, match=f"{option}={value!r} is missing here"):
        first_stage_from_diffusers(case.group("param"), {**case.config, "_class_name": "VQModel", option: value})


def test_a_transformer_without_context_attends_to_itself_twice() -> None:
    """Against torch's own attention, with the queries' source as keys in both attentions."""
    net = _fill(SpatialTransformer(32, n_heads=2, d_head=16, depth=2, context_dim=None))
    x_BCHW = torch.randn(2, 32, 4, 6)

    def attend(layer: CrossAttention, x_BLD: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x_BLD).unflatten(2, (2, 16)).transpose(1, 2) for m in (layer.to_q, layer.to_k, layer.to_v))
        weights = (q @ k.transpose(-1, -2) / 4.0).softmax(-1)
        return layer.to_out((weights @ v).transpose(1, 2).flatten(2))

    h_BLD = net.proj_in(net.norm(x_BCHW)).flatten(2).transpose(1, 2)
    for block in net.transformer_blocks:
        assert isinstance(block, BasicTransformerBlock)
        h_BLD = h_BLD + attend(block.attn1, block.norm1(h_BLD))
        h_BLD = h_BLD + attend(block.attn2, block.norm2(h_BLD))
        h_BLD = h_BLD + block.ff(block.norm3(h_BLD))
    y_BCHW = net.proj_out(h_BLD.transpose(1, 2).reshape(2, 32, 4, 6)) + x_BCHW
    case = Case(
        Path("live"),
        "spatial_transformer_none",
        "CompVis/latent-diffusion@x ldm/modules/attention.py:SpatialTransformer",
        config={"in_channels": 32, "n_heads": 2, "d_head": 16, "depth": 2, "context_dim": None, "dropout": 0.0},
        tensors={"in/x": x_BCHW, "out/y": y_BCHW.detach()} | {f"param/{k}": v for k, v in net.state_dict().items()},
    )
    check_spatial_transformer(case)
    block = net.transformer_blocks[0]
    assert isinstance(block, BasicTransformerBlock)
    x_BLD = torch.randn(2, 5, 32)
    case = Case(
        Path("live"),
        "block_none",
        "CompVis/latent-diffusion@x ldm/modules/attention.py:BasicTransformerBlock",
        config={"dim": 32, "n_heads": 2, "d_head": 16, "gated_ff": True},
        tensors={"in/x": x_BLD, "out/y": block(x_BLD).detach()}
        | {f"param/{k}": v for k, v in block.state_dict().items()},
    )
    check_spatial_transformer(case)
    case.config["gated_ff"] = False
    with pytest.raises(UserError, match="gated_ff is False, which is missing here"):
        check_spatial_transformer(case)


def test_the_new_attention_order_is_a_permutation_of_the_old() -> None:
    old, new = _fill(unet_of(UNET)), unet_of({**UNET, "use_new_attention_order": True})
    state = old.state_dict()
    for name in [name for name in state if ".qkv." in name]:
        state[name] = state[name].unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2)
    new.load_state_dict(state)
    x_BCHW, t_B = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert_close(new.eval()(x_BCHW, t_B), old(x_BCHW, t_B), "output")


def test_resampling_without_convolutions_averages_and_repeats() -> None:
    net = _fill(unet_of({**UNET, "conv_resample": False, "attention_resolutions": []}))
    assert not [name for name in net.state_dict() if name.endswith(("op.weight", ".conv.weight"))]
    x_BCHW, t_B = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    emb = F.silu(net.time_embed(timestep_embedding(t_B, 32)))
    skips = [net.input_blocks[0][0](x_BCHW)]
    skips.append(net.input_blocks[1][0](skips[-1], emb))
    skips.append(F.avg_pool2d(skips[-1], 2))
    skips.append(net.input_blocks[3][0](skips[-1], emb))
    h_BCHW = net.middle_block(skips[-1], emb)
    for i, stage in enumerate(net.output_blocks):
        h_BCHW = stage[0](torch.cat([h_BCHW, skips.pop()], 1), emb)
        if i == 1:
            h_BCHW = h_BCHW.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = net.out[2](F.silu(net.out[0](h_BCHW)))
    assert_close(net(x_BCHW, t_B), expected, "output")


def test_heads_of_the_way_up_are_their_own_where_num_heads_rules() -> None:
    def heads(**options: Any) -> set[int]:
        net = unet_of({**UNET, "num_heads_upsample": 4, **options})
        return {m.num_heads for m in net.output_blocks.modules() if isinstance(m, AttentionBlock)}

    assert heads() == {4}
    assert heads(legacy=False) == {2}
    assert heads(num_heads=-1, num_head_channels=32) == {1, 2}


def test_a_codebook_head_reads_the_last_features() -> None:
    net = _fill(unet_of({**UNET, "n_embed": 11}))
    seen: list[torch.Tensor] = []
    net.output_blocks[-1].register_forward_hook(lambda *given: seen.append(given[-1]))
    logits = net(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
    assert logits.shape == (2, 11, 8, 8)
    norm, conv = net.id_predictor
    assert_close(logits, conv(norm(seen[0])), "logits")


@pytest.mark.parametrize(
    ("option", "value"), [("use_new_attention_order", True), ("conv_resample", False), ("num_heads_upsample", 4)]
)
def test_options_that_diffusers_lacks_are_named_when_a_network_is_converted(option: str, value: Any) -> None:
    net = unet_of({**UNET, option: value})
    with pytest.raises(UserError, match=f"no counterpart of {option}"):
        unet_to_diffusers(net.state_dict(), net.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 3}, "dims is 3"),
        ({"use_fp16": True}, "use_fp16 is True"),
        ({"adm_in_channels": 5}, "option adm_in_channels is missing here"),
    ],
)
def test_unet_options_that_are_missing_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unet_of({**UNET, **change})
    with pytest.raises(UserError, match=message):
        classifier_of({**UNET, "image_size": 8, "pool": "adaptive", **change})


@pytest.mark.parametrize(
    ("option", "value"), [("tanh_out", True), ("resamp_with_conv", False), ("use_linear_attn", True)]
)
def test_first_stage_options_that_are_missing_are_named(option: str, value: Any) -> None:
    autoencoder_of({**DDCONFIG, option: not value}, 3, 7)
    with pytest.raises(UserError, match=f"{option} is {value!r}"):
        autoencoder_of({**DDCONFIG, option: value}, 3, 7)


MODEL: dict[str, Any] = {
    "unet_config": {"params": UNET},
    "first_stage_config": {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {"ddconfig": DDCONFIG, "embed_dim": 3, "n_embed": 7, "lossconfig": {}, "image_key": "segmentation"},
    },
}


def test_model_options_that_are_missing_are_named() -> None:
    from_compvis_config(MODEL)
    for option, value in {"given_betas": [0.1, 0.2], "num_timesteps_cond": 5, "cond_stage_forward": "encode"}.items():
        with pytest.raises(UserError, match=f"model: {option} is"):
            from_compvis_config({**MODEL, option: value})
    remapped = json.loads(json.dumps(MODEL))
    remapped["first_stage_config"]["params"]["remap"] = "used.npy"
    with pytest.raises(UserError, match="first stage: remap is 'used"):
        from_compvis_config(remapped)


@pytest.mark.parametrize(("start", "end"), [(1e-4, 2e-2), (0.00085, 0.012), (1e-5, 0.08)])
@pytest.mark.parametrize("v_posterior", [0.0, 0.4])
def test_bound_weights_equal_the_authors_expression_entry_by_entry(
    start: float, end: float, v_posterior: float
) -> None:
    """`register_schedule` forms them from float32 buffers."""
    for prediction in ("eps", "x0"):
        schedule = NoiseSchedule("linear", 1000, start, end, v_posterior=v_posterior, prediction=prediction)  # type: ignore[arg-type]
        alphas = 1.0 - torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
        if prediction == "eps":
            expected = schedule.betas**2 / (
                2 * schedule.posterior_variance * alphas.float() * (1 - schedule.alphas_cumprod)
            )
        else:
            expected = 0.5 * schedule.alphas_cumprod.sqrt() / (2.0 * 1 - schedule.alphas_cumprod)
        expected[0] = expected[1]
        assert_each_close(schedule.lvlb_weights, expected, "weights of the bound")
