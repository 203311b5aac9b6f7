"""Forms of the published networks beyond the recorded ones: no learned sigma, ControlNet on many sizes, old folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from pixart.buckets import bucket_table
from pixart.controlnet import ControlPixArt
from pixart.convert import from_diffusers, load_transformer, main, read_state_dict, to_diffusers
from pixart.diffusion import Diffusion
from pixart.model import PixArt, position_embedding, unpatchify
from pixart.samplers import iddpm
from pixart.text import parse_prompt
from tests.golden_case import Case, assert_close
from tests.pixart.golden_networks import check_controlnet, check_net, our_config
from tests.pixart.golden_process import check_training_loss
from tests.pixart.test_model import TINY, batch, filled

MULTI = replace(TINY, depth=4, width=48, heads=2, multi_scale=True)


def _diffusers(out_channels: int = 8, **changes: Any) -> Any:
    from diffusers import PixArtTransformer2DModel

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "sample_size": 8,
        "use_additional_conditions": False,
        "out_channels": out_channels,
        **changes,
    }
    return filled(PixArtTransformer2DModel(**config))


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask_BL = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    caption_BLC = torch.randn(2, 6, 16, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([7, 640]), caption_BLC, mask_BL


def _sample(net: Any, *inputs: Tensor) -> Tensor:
    x, t, caption, mask = inputs
    conditions = {"resolution": None, "aspect_ratio": None}
    return net(
        x,
        encoder_hidden_states=caption,
        timestep=t,
        encoder_attention_mask=mask,
        added_cond_kwargs=conditions,
    ).sample


# Published folders


def _published(folder: Path, **changes: Any) -> tuple[Any, Tensor]:
    """A folder as PixArt-alpha published it: the general class's name, and the null caption among the weights."""
    from safetensors.torch import save_file

    net = _diffusers()
    null_LC = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
    state = {**net.state_dict(), "caption_projection.y_embedding": null_LC}
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    # The keys of the published config.json.
    kept = (
        *("activation_fn", "attention_bias", "attention_head_dim", "attention_type", "caption_channels"),
        *("cross_attention_dim", "dropout", "in_channels", "norm_elementwise_affine", "norm_eps", "norm_num_groups"),
        *("norm_type", "num_attention_heads", "num_embeds_ada_norm", "num_layers", "out_channels", "patch_size"),
        *("sample_size", "upcast_attention"),
    )
    config = {name: net.config[name] for name in kept}
    old = {"double_self_attention": False, "only_cross_attention": False, "use_linear_projection": False}
    config |= {**old, "num_vector_embeds": None, "_class_name": "Transformer2DModel", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return net, null_LC


def test_a_published_folder_loads_with_its_null_caption(tmp_path: Path) -> None:
    theirs, null_LC = _published(tmp_path / "transformer")
    net = load_transformer(tmp_path)
    assert net.has_null_caption and torch.equal(net.y_embedder.y_embedding, null_LC)
    inputs = _inputs()
    with torch.no_grad():
        assert_close(net(*inputs), _sample(theirs, *inputs), "prediction")
        x, t, caption, mask = inputs
        dropped = net(x, t, caption, mask, drop_B=torch.tensor([True, False]))
        nulled = torch.stack([null_LC, caption[1]])
        assert_close(dropped, _sample(theirs, x, t, nulled, mask), "prediction without the first caption")


def test_the_null_caption_survives_every_conversion(tmp_path: Path) -> None:
    _, null_LC = _published(tmp_path / "published")
    main(["--to", "official", "--heads", "2", str(tmp_path / "published"), str(tmp_path / "a.pth")])
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["y_embedder.y_embedding"], null_LC)
    main(["--to", "diffusers", "--heads", "2", str(tmp_path / "a.pth"), str(tmp_path / "again")])
    main(["--to", "ours", str(tmp_path / "again"), str(tmp_path / "ours")])
    assert torch.equal(load_transformer(tmp_path / "ours").y_embedder.y_embedding, null_LC)


def test_the_general_class_means_its_own_defaults(tmp_path: Path) -> None:
    _published(tmp_path / "transformer")
    file = tmp_path / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for name, default in (("norm_type", "layer_norm"), ("activation_fn", "geglu"), ("attention_bias", False)):
        file.write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        with pytest.raises(UserError, match=f"{name}={default!r}"):
            load_transformer(tmp_path)
    for name, value in (("only_cross_attention", True), ("num_vector_embeds", 5), ("out_channels", 6)):
        file.write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError, match=f"{name}={value!r}"):
            load_transformer(tmp_path)
    file.write_text(json.dumps({**config, "_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(UserError, match="expected PixArtTransformer2DModel or Transformer2DModel"):
        load_transformer(tmp_path)


# Without learned sigma


def test_a_network_without_learned_sigma_is_diffusers_with_as_many_channels_out() -> None:
    theirs = _diffusers(out_channels=4)
    state, config = from_diffusers(theirs.state_dict(), dict(theirs.config))
    assert not config.learn_sigma
    net = PixArt(replace(config, caption_tokens=6)).eval()
    net.load_state_dict(state, strict=False)
    x, t, caption, mask = _inputs()
    with torch.no_grad():
        prediction = net(x, t, caption, mask)
        expected = _sample(theirs, x, t, caption, mask)
    assert_close(prediction, expected, "prediction")
    back, back_config = to_diffusers(net.state_dict(), net.config)
    assert back_config["out_channels"] == 4
    assert all(
        torch.equal(back[name], value) for name, value in theirs.state_dict().items() if "pos_embed.pos" not in name
    )

    # As a recorded case of the authors' network: `forward_with_dpmsolver` halves the channels whatever they are.
    recorded = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "caption_channels": 16,
        "model_max_length": 6,
        "lewei_scale": 1.0,
        "pred_sigma": False,
        "params": "stored",
    }
    for solver in (expected, expected.chunk(2, dim=1)[0]):
        case = Case(Path("live"), "net_plain", "PixArt-alpha nets/PixArt.py:PixArt", config=recorded)
        case.tensors |= {f"param/{name}": value for name, value in net.state_dict().items()}
        case.tensors |= {"in/x": x, "in/timestep": t, "in/y": caption[:, None], "in/mask": mask[:, None, None]}
        case.tensors |= {"out/pred": expected, "out/dpmsolver": solver}
        check_net(case)
    case.config["qk_norm"] = True
    with pytest.raises(AssertionError, match="option qk_norm is True: missing here"):
        check_net(case)


def test_the_loss_without_learned_sigma_is_the_noise_alone() -> None:
    """Against diffusers' scheduler and network, gradients included."""
    from diffusers import DDPMScheduler

    theirs = _diffusers(out_channels=4)
    x0, t, caption, mask = _inputs()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    prediction = _sample(theirs, scheduler.add_noise(x0, noise, t), t, caption, mask)
    loss_B = (prediction - noise).square().flatten(1).mean(1)
    loss_B.mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    renamed, config = from_diffusers(gradients, dict(theirs.config))
    weights = from_diffusers(theirs.state_dict(), dict(theirs.config))[0]
    case = Case(Path("live"), "train_loss_plain", "gaussian_diffusion.py:training_losses")
    case.config = {
        "hidden_size": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "caption_channels": 16,
        "model_max_length": 6,
        "input_size": 8,
        "learn_sigma": False,
        "snr": False,
    }
    net = PixArt(our_config(case.config, weights))
    whole = {**net.state_dict(), **weights}
    case.tensors = {f"param/{name}": value for name, value in whole.items()}
    case.tensors |= {"in/x_start": x0, "in/t": t, "in/noise": noise, "in/y": caption[:, None]}
    case.tensors |= {"in/mask": mask[:, None, None], "out/loss": loss_B.detach(), "out/mse": loss_B.detach()}
    case.tensors |= {f"out/grad/{name}": value for name, value in renamed.items()}
    check_training_loss(case)
    case.config["predict_xstart"] = True
    with pytest.raises(AssertionError, match="option predict_xstart is True: missing here"):
        check_training_loss(case)


@pytest.mark.parametrize("kind", ["fixed_large", "fixed_small"])
def test_ancestral_steps_with_a_fixed_variance_are_those_of_ddpm(kind: str) -> None:
    """diffusers' DDPMScheduler on the respaced betas."""
    from diffusers import DDPMScheduler

    chain = Diffusion().respaced("10")
    scheduler = DDPMScheduler(
        len(chain.betas), trained_betas=chain.betas.tolist(), variance_type=kind, clip_sample=False
    )
    generator = torch.Generator().manual_seed(2)
    x = start = torch.randn(2, 4, 3, 3, generator=generator)
    noises = torch.randn(10, 2, 4, 3, 3, generator=generator)

    def network(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return 0.9 * x_BCHW * (1 + t_B.view(-1, 1, 1, 1) / 1000) / 2 + 0.1 * torch.tanh(x_BCHW.roll(1, -1))

    for index in reversed(range(10)):
        eps = network(x, torch.full((2,), chain.timestep_map[index]))
        known = scheduler.step(eps, index, x, generator=torch.Generator().manual_seed(0)).prev_sample
        if index:  # diffusers draws its own noise: take that away and add the recorded one
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            variance = scheduler._get_variance(index, variance_type=kind)
            known = known + variance**0.5 * (noises[9 - index] - drawn)
        x = known
    given = iter(noises)
    ours = iddpm(network, start, "10", small_variance=kind == "fixed_small", noise=lambda like: next(given))
    assert_close(ours, x, "latents", 1e-5)


# ControlNet on the multi-scale network


def _control_case() -> Case:
    """The authors' ControlPixArtMSHalf, step by step from the parts of the multi-scale network, on a wide latent."""
    net = ControlPixArt(filled(PixArt(MULTI)), copied_blocks=2)
    filled(net.controlnet, seed=7)
    base, branches = net.base_model, list(net.branches())
    generator = torch.Generator().manual_seed(4)
    x, hint = torch.randn(2, 2, 4, 6, 10, generator=generator)
    _, _, caption, mask = batch(MULTI, 2)
    t = torch.tensor([3, 777])
    size, ratio = torch.tensor([[300.0, 500.0], [640.0, 512.0]]), torch.tensor([[0.6], [0.6]])
    positions = position_embedding(48, 3, 5, MULTI.base, MULTI.interpolation_scale)[None]
    with torch.no_grad():
        time = base.t_embedder(t)
        height, width = (base.csize_embedder(size[:, i : i + 1]) for i in (0, 1))
        time = time + torch.cat([height, width, base.ar_embedder(ratio)], dim=1)
        shared = base.t_block(time)
        context = base.project_caption(caption, mask, None)
        outputs = {}
        for name, control in (("pred", hint), ("pred_without_hint", None)):
            h = base.x_embedder(x) + positions
            c = None if control is None else base.x_embedder(control) + positions
            h = base.blocks[0](h, shared, context)
            for i in range(1, MULTI.depth):
                if c is not None and i <= len(branches):
                    copy = branches[i - 1]
                    c = copy.copied_block(h + copy.before_proj(c) if i == 1 else c, shared, context)
                    h = h + copy.after_proj(c)
                h = base.blocks[i](h, shared, context)
            outputs[f"out/{name}"] = unpatchify(base.final_layer(h, time), 3, 5, 2)
    config = {
        "ms": True,
        "depth": MULTI.depth,
        "hidden_size": 48,
        "num_heads": 2,
        "caption_channels": MULTI.caption_channels,
        "model_max_length": MULTI.caption_tokens,
        "copy_blocks_num": 2,
        "input_size": MULTI.input_size,
        "latent_hw": [6, 10],
        "lewei_scale": MULTI.interpolation_scale,
    }
    tensors = {"in/x": x, "in/hint_latent": hint, "in/timestep": t, "in/y": caption[:, None]}
    tensors |= {"in/mask": mask[:, None, None], "in/img_hw": size, "in/aspect_ratio": ratio}
    tensors |= {f"param/{name}": value for name, value in net.state_dict().items()}
    tensors["param/base_model.pos_embed"] = torch.zeros(1, 16, 48)  # as multi-scale files hold it
    return Case(Path("live"), "controlnet_ms", "nets/pixart_controlnet.py", config=config, tensors=tensors | outputs)


def test_control_of_the_multi_scale_network_follows_the_authors_order() -> None:
    check_controlnet(_control_case())


def test_the_sizes_of_a_controlled_network_are_heard() -> None:
    case = _control_case()
    case.tensors["in/img_hw"] = case.tensors["in/img_hw"] * 1.5
    with pytest.raises(AssertionError, match="pred: max difference"):
        check_controlnet(case)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "text", "ratio", "size"),
    [
        ("a cat --ar 16:9 --hw 640:896", "a cat ", 1.75, (640, 896)),
        ("a cat --hw 640:896 --ar 16:9", "a cat ", 1.75, (640, 896)),
        ("a cat --ar 2:1 --aspect_ratio 1:2", "a cat ", 0.5, (704, 1408)),
        ("a cat --aspect_ratio 1:2 --ar 2:1 --hw 300:500", "a cat ", 0.5, (300, 500)),
        ("a cat --ar 3:1 --ar 1:1", "a cat ", 3.0, (1728, 576)),
        ("a cat --hw 300:500 --hw 700:800", "a cat ", 1.0, (300, 500)),
        ("a cat --hw 512:512 on a mat --ar 1:2", "a cat ", 0.5, (512, 512)),
    ],
)
def test_a_prompt_with_several_flags(prompt: str, text: str, ratio: float, size: tuple[int, int]) -> None:
    """--aspect_ratio goes before --ar, --hw sets the pixels and not the ratio, the first of equal flags counts."""
    parsed = parse_prompt(prompt, base=1024)
    assert (parsed.text, parsed.ratio, (parsed.height, parsed.width)) == (text, ratio, size)
    default = next(bucket for bucket in bucket_table(1024, inference=True) if bucket.ratio == ratio)
    assert "--hw" in prompt or (default.height, default.width) == size
