"""Checkpoints survive every way between the authors', diffusers' and our form."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError, run_main
from common.pretrained import from_folder
from pixart.config import PixArtConfig
from pixart.convert import (
    export_pipeline,
    infer_config,
    load_dit,
    load_transformer,
    main,
    reparameterise,
    save_diffusers,
    save_official,
    save_transformer,
)
from pixart.model import DiT, PixArt
from pixart.samplers import diffusers_sampler, guided
from tests.pixart.test_model import batch, filled
from tests.refusals import refused

SINGLE = PixArtConfig(input_size=8, width=24, depth=2, heads=2, caption_channels=16, caption_tokens=6)
MULTI = replace(SINGLE, multi_scale=True, interpolation_scale=2.0)
CONFIGS = {"single": SINGLE, "multi": MULTI}


def run(net: PixArt, config: PixArtConfig, drop: bool = False) -> Tensor:
    x, t, caption, mask = batch(config)
    more: dict[str, Any] = {}
    if config.multi_scale:
        more = {"size_B2": torch.tensor([[64.0, 48.0]] * 3), "ratio_B1": torch.full((3, 1), 1.25)}
    if drop:
        more["drop_B"] = torch.tensor([True, False, True])
    with torch.no_grad():
        return net(x, t, caption, mask, **more)


def make(config: PixArtConfig) -> PixArt:
    return filled(PixArt(config)).eval()


@torch.no_grad()
def run_peer(peer: Any, config: PixArtConfig) -> Tensor:
    """What diffusers' network makes of the inputs of `run`."""
    x, t, caption, mask = batch(config)
    added = {"resolution": torch.tensor([[64.0, 48.0]] * 3), "aspect_ratio": torch.full((3, 1), 1.25)}
    options = {"added_cond_kwargs": added if config.multi_scale else {}, "encoder_attention_mask": mask}
    return peer(x, caption, t, **options).sample


GRID = {
    "single": SINGLE,
    "without sigma": replace(SINGLE, learn_sigma=False),
    "interpolated": replace(SINGLE, interpolation_scale=2.0),
    "larger patches": replace(SINGLE, patch_size=4, in_channels=3),
    "multi": replace(MULTI, interpolation_scale=1.0),
    "multi, interpolated": MULTI,
    "deep and wide": replace(SINGLE, depth=3, width=48, heads=4, caption_tokens=9),
    "odd scale": replace(SINGLE, interpolation_scale=3.0),
    "other base": replace(SINGLE, base_size=8),
    "narrow mlp": replace(SINGLE, mlp_ratio=2.0),
    "block": replace(SINGLE, adaln="block"),
}
LOST = {  # by the layout that cannot say it
    "multi, interpolated": {"official": "interpolation_scale 2.0, its readers would take 1.0"},
    "odd scale": {"official": "positions of none of the interpolation scales"},
    "other base": {"official": "a .pth cannot say interpolation_scale 1.0", "diffusers": "base_size"},
    "narrow mlp": {"diffusers": "ratio of 4"},
    "block": {"diffusers": 'adaln "block"'},
}


@pytest.mark.parametrize("target", ["ours", "official", "diffusers"])
@pytest.mark.parametrize("name", GRID)
def test_a_converted_network_is_the_same_or_what_it_loses_is_named(name: str, target: str, tmp_path: Path) -> None:
    net = make(GRID[name])
    save_transformer(net, tmp_path / "source")
    out = tmp_path / ("a.pth" if target == "official" else "a")
    command = ["--to", target, str(tmp_path / "source"), str(out)]
    if message := LOST.get(name, {}).get(target):
        refused(message, main, command)
        assert not out.exists()
        return
    main(command)
    main(["--to", "ours", "--heads", str(net.config.heads), str(out), str(tmp_path / "back")])
    back = load_transformer(tmp_path / "back").eval()
    assert back.config == net.config
    assert torch.equal(run(back, net.config, drop=True), run(net, net.config, drop=True))


def test_published_folders_are_read_by_their_old_names(tmp_path: Path) -> None:
    net = make(SINGLE)
    save_diffusers(net, tmp_path / "transformer")
    (tmp_path / "transformer" / "null_caption.safetensors").unlink()
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights) | {"caption_projection.y_embedding": net.y_embedder.y_embedding.detach()}
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    config["_class_name"] = "Transformer2DModel"
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    places = {key: f"{number % 2}.safetensors" for number, key in enumerate(state)}
    for file in set(places.values()):
        mine = {key: value.contiguous() for key, value in state.items() if places[key] == file}
        save_file(mine, tmp_path / "transformer" / file, {"format": "pt"})
    weights.unlink()
    (tmp_path / "transformer" / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = load_transformer(tmp_path).eval()
    assert loaded.config == SINGLE and loaded.has_null_caption
    assert torch.equal(run(loaded, SINGLE, drop=True), run(net, SINGLE, drop=True))


def test_a_pipeline_on_other_noise_levels_is_refused(tmp_path: Path) -> None:
    save_diffusers(make(SINGLE), tmp_path / "transformer")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"}))
    load_transformer(tmp_path)
    for change, message in (
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is 'scaled_linear'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ):
        path.write_text(json.dumps(change))
        refused(message, main, ["--to", "ours", str(tmp_path), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["t_block.1.bias", "blocks.1.attn.qkv.weight"])
def test_weights_that_are_not_finite_are_not_converted(part: str, tmp_path: Path) -> None:
    net = make(SINGLE)
    with torch.no_grad():
        net.get_parameter(part).view(-1)[0] = float("nan")
    save_official(net, tmp_path / "bad.pth")
    message = f"{part} holds numbers that are not finite"
    refused(message, main, ["--to", "ours", "--heads", "2", str(tmp_path / "bad.pth"), str(tmp_path / "out")])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_form_gives_the_same_network_back(tmp_path: Path, name: str) -> None:
    config = replace(CONFIGS[name], interpolation_scale=1.0)  # the one that a .pth of a multi-scale network means
    net = make(config)
    expected = run(net, config, drop=True)
    save_transformer(net, tmp_path / "ours")
    save_official(net, tmp_path / "official.pth")
    save_diffusers(net, tmp_path / "theirs")
    official = load_transformer(tmp_path / "official.pth", heads=2)
    for path, loaded in (
        (tmp_path / "ours", load_transformer(tmp_path / "ours")),
        (tmp_path / "official.pth", official),
        (tmp_path / "theirs", load_transformer(tmp_path / "theirs")),
    ):
        assert loaded.config == config, path
        assert torch.equal(run(loaded, config, drop=True), expected), path


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_computes_the_same_from_what_is_written(tmp_path: Path, name: str) -> None:
    from diffusers import PixArtTransformer2DModel

    config = CONFIGS[name]
    net = make(config)
    save_diffusers(net, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer, problems = PixArtTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    torch.testing.assert_close(run(net, config), run_peer(peer, config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("additional", [False, True])
def test_a_random_diffusers_network_computes_the_same_here(tmp_path: Path, additional: bool) -> None:
    from diffusers import PixArtTransformer2DModel

    peer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=additional,
    )
    filled(peer)
    peer.eval().save_pretrained(tmp_path / "transformer")
    net = load_transformer(tmp_path).eval()
    assert net.config == replace(SINGLE, multi_scale=additional, caption_tokens=120)
    config = replace(SINGLE, multi_scale=additional)
    torch.testing.assert_close(run(net, config), run_peer(peer, config), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="empty prompt"):  # diffusers has no null caption
        run(net, config, drop=True)
    save_transformer(net, tmp_path / "ours")
    assert not load_transformer(tmp_path / "ours").has_null_caption


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "config",
    [
        SINGLE,
        replace(SINGLE, learn_sigma=False, interpolation_scale=2.0),
        replace(MULTI, input_size=128, patch_size=16),
    ],
    ids=["single", "without variance, interpolated", "multi"],
)
def test_the_exported_pipeline_draws_what_our_network_draws(
    tmp_path: Path, config: PixArtConfig, guidance: float
) -> None:
    from diffusers import AutoencoderKL, PixArtAlphaPipeline

    vae = AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4)
    net = make(config)
    export_pipeline(net, tmp_path / "pipeline", vae=vae)
    pipeline = from_folder(PixArtAlphaPipeline, tmp_path / "pipeline", tokenizer=None, text_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    _, _, caption, mask = batch(config)
    side = config.input_size
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=caption[:1],
        prompt_attention_mask=mask[:1],
        negative_prompt_embeds=caption[1:2],
        negative_prompt_attention_mask=mask[1:2],
        height=2 * side,
        width=2 * side,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=guidance,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    sizes = {"size_B2": torch.tensor([[2.0 * side, 2.0 * side]]), "ratio_B1": torch.ones(1, 1)}
    conditions = sizes if config.multi_scale else {}
    model = guided(net, caption[:1], mask[:1], guidance, null=(caption[1:2], mask[1:2]), **conditions)
    ours = diffusers_sampler(model, noise, 3)
    assert (ours - noise).std() > 0.1
    # The first step divides by alpha, 1 / 160, which makes rounding large.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_a_multi_scale_network_that_stock_pipelines_would_not_tell_its_size_is_not_exported(tmp_path: Path) -> None:
    refused("latents of side 128 only, this one has 8", export_pipeline, make(MULTI), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_ema_is_preferred_and_trained_weights_can_be_chosen(tmp_path: Path) -> None:
    trained, averaged = make(SINGLE), filled(PixArt(SINGLE), seed=5)
    path = tmp_path / "both.pth"
    torch.save({"state_dict": trained.state_dict(), "state_dict_ema": averaged.state_dict(), "epoch": 3}, path)
    for weights, expected in (("ema", averaged), ("trained", trained)):
        loaded = load_transformer(path, weights=weights, heads=2)
        assert torch.equal(loaded.get_parameter("t_block.1.weight"), expected.get_parameter("t_block.1.weight"))


def test_weights_of_another_resolution_load_without_their_positions(tmp_path: Path) -> None:
    net = make(SINGLE)
    save_official(net, tmp_path / "small.pth")
    large = load_transformer(tmp_path / "small.pth", replace(SINGLE, input_size=16))
    assert large.pos_embed.shape == (1, 64, 24)
    assert torch.equal(large.pos_embed, PixArt(large.config).pos_embed)
    assert torch.equal(large.get_parameter("blocks.1.mlp.fc1.weight"), net.get_parameter("blocks.1.mlp.fc1.weight"))
    # Micro-conditioning is new there: its embedders keep their initialisation.
    multi = load_transformer(tmp_path / "small.pth", replace(MULTI, input_size=16))
    assert multi.get_parameter("csize_embedder.mlp.0.weight").any()


def test_shapes_are_read_from_the_weights() -> None:
    for config in (SINGLE, replace(SINGLE, patch_size=4, learn_sigma=False, mlp_ratio=2.0, interpolation_scale=2.0)):
        assert infer_config(PixArt(config).state_dict(), "file", heads=2) == config
    assert infer_config(PixArt(replace(SINGLE, adaln="block")).state_dict(), "file", heads=2).adaln == "block"


def test_bad_files_are_explained(tmp_path: Path) -> None:
    net = make(SINGLE)
    save_official(net, tmp_path / "good.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:2000])
    torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    state = net.state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save({"state_dict": state}, tmp_path / "lacking.pth")
    torch.save({"state_dict": DiT(replace(SINGLE, classes=3)).state_dict()}, tmp_path / "dit.pth")
    torch.save({"state_dict": {"x": torch.nn.Linear(2, 2)}}, tmp_path / "pickle.pth")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing.pth", "no such file"),
        ("cut.pth", "truncated"),
        ("other.pth", r'"x_embedder.proj.weight" is missing'),
        ("lacking.pth", r"does not fit the network: blocks.1.mlp.fc2.bias is missing"),
        ("dit.pth", "class-conditional DiT"),
        ("pickle.pth", "refused"),
        ("empty", "no network in this folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_transformer(tmp_path / name, heads=2)
        if name.endswith("pth") and name not in ("lacking.pth",):
            with pytest.raises(UserError, match=message):
                load_transformer(tmp_path / name, SINGLE)
    with pytest.raises(UserError, match="give --heads"):
        load_transformer(tmp_path / "good.pth")
    with pytest.raises(UserError, match=r"x_embedder.proj.weight has the shape \[24, 4, 2, 2\], expected \[48"):
        load_transformer(tmp_path / "good.pth", replace(SINGLE, width=48))


def test_what_diffusers_cannot_hold_is_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"adaln": "block"}, 'adaln "block"'),
        ({"mlp_ratio": 2.0}, "ratio of 4"),
        ({"base_size": 8}, "base_size"),
    ):
        with pytest.raises(UserError, match=message):
            save_diffusers(PixArt(replace(SINGLE, **change)), tmp_path)
    save_diffusers(make(SINGLE), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_type": "ada_norm_zero"}))
    with pytest.raises(UserError, match="norm_type='ada_norm_zero'"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("t", [500.0, 123.5])
def test_a_reparameterised_network_is_the_dit_at_the_selected_time(t: float) -> None:
    dit = filled(DiT(replace(SINGLE, classes=3)))
    net = PixArt(SINGLE)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    reparameterise(dit, net, t)
    x, _, caption, mask = batch(SINGLE)
    with torch.no_grad():
        at = [f(torch.full((3,), t)) for f in (lambda s: dit(x, s), lambda s: net(x, s, caption, mask))]
        elsewhere = [f(torch.full((3,), t + 300)) for f in (lambda s: dit(x, s), lambda s: net(x, s, caption, mask))]
    torch.testing.assert_close(at[0], at[1], rtol=1e-4, atol=1e-5)
    assert (elsewhere[0] - elsewhere[1]).abs().max() > 1e-3
    kept = [key for key in before if key.startswith(("t_block", "y_embedder")) or "kv_linear" in key]
    assert all(torch.equal(before[key], net.state_dict()[key]) for key in kept)


def test_the_ablation_takes_the_dits_own_modulation() -> None:
    dit = filled(DiT(replace(SINGLE, classes=3)))
    net = PixArt(replace(SINGLE, adaln="block"))
    reparameterise(dit, net)
    name = "blocks.1.adaLN_modulation.1.weight"
    assert torch.equal(net.get_parameter(name), dit.get_parameter(name))


def test_networks_that_differ_cannot_be_reparameterised() -> None:
    with pytest.raises(UserError, match="depth 3, the text-conditional network 2"):
        reparameterise(DiT(replace(SINGLE, classes=3, depth=3)), PixArt(SINGLE))


def test_the_program_converts_and_reparameterises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit = filled(DiT(replace(SINGLE, classes=3)))
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    save_transformer(make(SINGLE), tmp_path / "start")
    options = ["--to", "official", "--heads", "2", "--reparameterise", str(tmp_path / "dit.pt")]
    main([*options, str(tmp_path / "start"), str(tmp_path / "new.pth")])
    main(["--to", "diffusers", "--heads", "2", str(tmp_path / "new.pth"), str(tmp_path / "theirs")])
    main(["--to", "ours", "--input-size", "16", str(tmp_path / "theirs"), str(tmp_path / "larger")])
    assert capsys.readouterr().out.count("wrote") == 3
    larger = load_transformer(tmp_path / "larger")
    assert larger.config.input_size == 16
    assert torch.equal(larger.x_embedder.proj.weight, dit.get_parameter("x_embedder.proj.weight"))
    with pytest.raises(SystemExit):
        run_main(lambda: main(["--to", "ours", str(tmp_path / "nothing.pth"), str(tmp_path / "x")]))
    assert "nothing.pth: no such file" in capsys.readouterr().err


def test_dit_files_of_both_kinds_load(tmp_path: Path) -> None:
    dit = filled(DiT(replace(SINGLE, classes=3)))
    save_transformer(dit, tmp_path / "ours")
    torch.save({"model": DiT(dit.config).state_dict(), "ema": dit.state_dict()}, tmp_path / "official.pt")
    for loaded in (load_dit(tmp_path / "ours"), load_dit(tmp_path / "official.pt", heads=2)):
        assert replace(loaded.config, caption_channels=16, caption_tokens=6) == dit.config
        assert torch.equal(
            loaded.get_parameter("blocks.1.attn.qkv.weight"), dit.get_parameter("blocks.1.attn.qkv.weight")
        )
    save_official(make(SINGLE), tmp_path / "text.pth")
    with pytest.raises(UserError, match="not a class-conditional DiT"):
        load_dit(tmp_path / "text.pth")
