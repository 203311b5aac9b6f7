"""Saved flows are what stock diffusers loads and steps; the pipeline's own options; converting; LoRA; the CLI."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from instaflow import sample
from instaflow.convert import convert
from instaflow.flow import UNetFlow
from instaflow.pipeline import Card, InstaFlowPipeline, merge_delta, slerp
from instaflow.student import make_student, stack
from tests.common.tiny_teacher import save_teacher, tiny_teacher

PROMPTS = ["a red star", "the blue ring"]
# Noise levels of the teacher by what it predicts; the tiny teacher's own for v.
SCHEDULES: dict[str, dict[str, Any]] = {
    "epsilon": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
    "sample": {"beta_schedule": "linear", "beta_end": 0.02, "rescale_betas_zero_snr": True},
}


def pipeline(init: str = "negate", predicts: str = "v_prediction", **card: object) -> InstaFlowPipeline:
    teacher = tiny_teacher(predicts, **SCHEDULES.get(predicts, {}))
    return InstaFlowPipeline.of(make_student(teacher, init).eval(), teacher, Card(init=init, **card))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline().save(tmp_path_factory.mktemp("flow") / "pipeline")


def stock(folder: Path):  # type: ignore[no-untyped-def]
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_stock_diffusers_draws_the_same_image_in_one_step(saved: Path) -> None:
    ours, z = pipeline(), pipeline().noise(2, seed=5)
    wanted = ours(PROMPTS, latents=z, output="latent")
    options = {"guidance_scale": 0, "latents": z, "output_type": "latent"}
    loaded = stock(saved)
    assert type(loaded).__name__ == "StableDiffusionPipeline"
    torch.testing.assert_close(loaded(PROMPTS, num_inference_steps=1, **options).images, wanted, atol=1e-5, rtol=1e-5)


def test_stock_diffusers_takes_our_euler_steps_with_guidance_and_negative_prompt(saved: Path) -> None:
    z = pipeline().noise(2)
    wanted = pipeline()(PROMPTS, steps=4, guidance=1.5, negative_prompts="two", latents=z, output="latent")
    got = stock(saved)(
        PROMPTS,
        sigmas=np.linspace(1, 1 / 4, 4),
        guidance_scale=1.5,
        negative_prompt=["two", "two"],
        latents=z,
        output_type="latent",
    )
    torch.testing.assert_close(got.images, wanted, atol=2e-5, rtol=1e-5)


def test_a_plain_loop_over_the_stock_unet_is_our_pipeline_bit_for_bit(saved: Path) -> None:
    ours = InstaFlowPipeline.load(saved)
    states, x = ours.encode(PROMPTS), ours.noise(2)
    wanted = ours(PROMPTS, steps=3, latents=x, output="latent")
    unet, steps = stock(saved).unet, 3
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((2,), i / steps)
            x = x - unet(x, 1000 * (1 - t), states).sample / steps
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_saving_and_loading_changes_nothing(layout: str, tmp_path: Path) -> None:
    ours = pipeline(guidance=1.5, teacher="abc")
    loaded = InstaFlowPipeline.load(ours.save(tmp_path / "x", layout=layout))
    assert torch.equal(loaded(PROMPTS, output="latent"), ours(PROMPTS, output="latent"))
    assert (loaded.card.guidance, loaded.card.teacher, loaded.card.layout) == (1.5, "abc", layout)


def test_channels_last_draws_the_same_and_saves_the_same(saved: Path, tmp_path: Path) -> None:
    ours = pipeline()
    wanted = ours(PROMPTS, output="latent")
    got = ours.channels_last()(PROMPTS, output="latent")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    got.requires_grad_().add(1).sum().backward()  # an ordinary tensor, not one of inference mode
    again = InstaFlowPipeline.load(ours.save(tmp_path / "x"))
    assert torch.equal(again(PROMPTS, output="latent"), wanted)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_a_wrapped_flow_is_a_one_step_ddim_model_for_stock_diffusers(predicts: str, tmp_path: Path) -> None:
    ours = pipeline("wrapped", predicts)
    folder, z = ours.save(tmp_path / "wrapped"), ours.noise(2)
    wanted = ours(PROMPTS, latents=z, output="latent")
    assert torch.equal(InstaFlowPipeline.load(folder)(PROMPTS, latents=z, output="latent"), wanted)
    got = stock(folder)(PROMPTS, num_inference_steps=1, guidance_scale=0, latents=z, output_type="latent").images
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="official layout cannot hold it"):
        ours.save(tmp_path / "other", layout="official")


def test_the_official_layout_predicts_data_minus_noise(tmp_path: Path) -> None:
    ours = pipeline()
    unet = stock(ours.save(tmp_path / "official", layout="official")).unet
    z, states = ours.noise(2), ours.encode(PROMPTS)
    with torch.no_grad():
        step = z + unet(z, 1000.0, states).sample
    assert torch.equal(step, ours(PROMPTS, latents=z, output="latent"))


def test_published_directories_load_once_the_user_says_what_they_are(tmp_path: Path) -> None:
    # The published ones are Stable Diffusion directories: identical names, PNDM, epsilon; random weights here.
    folder = save_teacher(tmp_path / "2_rectified_flow", "epsilon", "PNDMScheduler")
    with pytest.raises(UserError, match="layout official"):
        InstaFlowPipeline.load(folder)
    flow = InstaFlowPipeline.load(folder, layout="official").flow
    z, states = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)
    with torch.no_grad():
        assert torch.equal(
            flow(z, torch.zeros(2), states), tiny_teacher().unet(z, torch.full((2,), 1e3), states).sample
        )
    ours = convert(folder, tmp_path / "ours")
    back = convert(ours, tmp_path / "back", to="official")
    for converted in (ours, back):
        with torch.no_grad():
            again = InstaFlowPipeline.load(converted).flow(z, torch.zeros(2), states)
            assert torch.equal(again, flow(z, torch.zeros(2), states))


@pytest.mark.parametrize("shared", [False, True])
def test_stacked_flows_are_saved_and_loaded(shared: bool, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    flow = stack(make_student(teacher, "negate"), shared=shared)
    ours = InstaFlowPipeline.of(flow, teacher, Card(init="negate"))
    folder = ours.save(tmp_path / "stacked")
    loaded = InstaFlowPipeline.load(folder)
    assert torch.equal(loaded(PROMPTS, output="latent"), ours(PROMPTS, output="latent"))
    with pytest.raises(Exception, match=r"StackedUNet|instaflow"):
        stock(folder)


def test_a_distilled_flow_warns_about_more_steps_and_about_guidance_on_top() -> None:
    distilled = pipeline(one_step=True, guidance=1.5)
    with pytest.warns(UserWarning, match="distilled for one step"):
        distilled(PROMPTS, steps=2, output="latent")
    with pytest.warns(UserWarning, match=r"guidance 1.5 is inside"):
        distilled(PROMPTS, guidance=2.0, output="latent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distilled(PROMPTS, output="latent")
        pipeline()(PROMPTS, steps=2, guidance=2.0, output="latent")


def test_guidance_zero_and_one_are_the_plain_velocity_and_negatives_act_above_one() -> None:
    ours = pipeline()
    plain = ours(PROMPTS, steps=2, output="latent")
    assert torch.equal(ours(PROMPTS, steps=2, guidance=0.0, negative_prompts="a", output="latent"), plain)
    first = ours(PROMPTS, steps=2, guidance=2.0, output="latent")
    assert not torch.equal(first, plain)
    assert not torch.equal(first, ours(PROMPTS, steps=2, guidance=2.0, negative_prompts="two star", output="latent"))


def test_images_depend_on_seed_and_index_and_on_given_latents() -> None:
    ours = pipeline()
    assert torch.equal(ours([PROMPTS[0]] * 3, seed=4)[:1], ours(PROMPTS[0], seed=4))
    assert torch.equal(ours(PROMPTS, latents=ours.noise(2, 4)), ours(PROMPTS, seed=4))
    assert ours(PROMPTS).dtype == torch.uint8
    for wrong in (torch.randn(3, 4, 8, 8), torch.randn(2, 3, 8, 8)):
        with pytest.raises(UserError, match="latents"):
            ours(PROMPTS, latents=wrong)
    with pytest.raises(UserError, match="negative prompts"):
        ours(PROMPTS, guidance=2.0, negative_prompts=["a", "a", "a"])


def test_interpolation_begins_and_ends_at_its_two_images() -> None:
    ours = pipeline()
    images = ours.interpolate((PROMPTS[0], PROMPTS[1]), (1, 2), 5)
    ends = torch.cat([ours(PROMPTS[0], seed=1), ours(PROMPTS[1], seed=2)])
    assert len(images) == 5
    assert int((images[[0, -1]].int() - ends.int()).abs().max()) <= 1
    a, b = torch.randn(1, 64), torch.randn(1, 64)
    middle = slerp(a / a.norm(), b / b.norm(), 0.3)
    assert float(middle.norm()) == pytest.approx(1.0, abs=1e-5)


def test_lora_deltas_full_and_low_rank_are_added_to_the_weights() -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    flow, other = make_student(tiny_teacher(), "raw"), make_student(tiny_teacher(), "raw")
    before = flow.unet.get_parameter(f"{name}.weight").detach().clone()
    down, up = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    pair = {
        f"unet.{name}.lora_A.weight": down,
        f"unet.{name}.lora_B.weight": up,
        f"unet.{name}.alpha": torch.tensor(4.0),
    }
    assert merge_delta(flow, pair, scale=0.5) == [f"{name}.weight"]
    torch.testing.assert_close(flow.unet.get_parameter(f"{name}.weight"), before + 0.5 * 2 * up @ down)
    merge_delta(other, {f"{name}.weight": 2 * up @ down}, scale=0.5)
    torch.testing.assert_close(other.unet.get_parameter(f"{name}.weight"), flow.unet.get_parameter(f"{name}.weight"))
    with pytest.raises(UserError, match="no parameter nowhere"):
        merge_delta(flow, {"nowhere.weight": down})
    with pytest.raises(UserError, match=r"lora_B.*missing"):
        merge_delta(flow, {f"{name}.lora_A.weight": down})


def test_a_merged_delta_turns_the_flow_of_a_teacher_into_that_of_the_tuned_teacher() -> None:
    teacher, tuned = tiny_teacher(), make_student(tiny_teacher(), "raw")
    delta = {name: torch.randn_like(p) * 0.1 for name, p in tuned.unet.named_parameters() if "conv" in name}
    merge_delta(tuned, delta)
    flow = make_student(teacher, "negate")
    merge_delta(flow, delta, init="negate")
    x, t, states = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 6, 16)
    with torch.no_grad():
        torch.testing.assert_close(flow(x, t, states), -tuned(x, t, states))


def test_saving_replaces_a_pipeline_and_nothing_else(tmp_path: Path) -> None:
    ours = pipeline()
    ours.save(tmp_path / "run", dtype=torch.float16)
    assert ours.save(tmp_path / "run").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="not replaced"):
        ours.save(tmp_path / "notes")


def test_half_precision_files_draw_nearly_the_same_image(tmp_path: Path) -> None:
    ours = pipeline()
    half = InstaFlowPipeline.load(ours.save(tmp_path / "half", dtype=torch.float16))
    torch.testing.assert_close(half(PROMPTS, output="latent"), ours(PROMPTS, output="latent"), atol=2e-2, rtol=2e-2)
    assert next(ours.flow.parameters()).dtype == torch.float32


def test_the_command_line_draws_interpolates_and_names_mistakes(saved: Path, tmp_path: Path) -> None:
    base = ["--model", str(saved), "--device", "cpu", "--count", "2", "--out", str(tmp_path / "grid.png")]
    kept = tmp_path / "latents.safetensors"
    sample.main([*base, "--prompt", "a red star", "--steps", "2", "--guidance", "1.5", "--save_latents", str(kept)])
    assert (tmp_path / "grid.png").is_file()
    sample.main([*base, "--prompt", "a star", "--latents", str(kept)])
    sample.main([*base, "--prompt", "a red star", "--prompt", "a ring", "--interpolate"])
    with pytest.raises(UserError, match="--prompt is missing"):
        sample.main(base)
    save_file({"other": torch.zeros(1)}, kept)
    with pytest.raises(UserError, match="no tensor named latents"):
        sample.main([*base, "--prompt", "a star", "--latents", str(kept)])
    with pytest.raises(UserError, match="not a diffusers directory"):
        sample.main(["--model", str(tmp_path), "--prompt", "a star"])


def test_damaged_cards_and_unknown_layouts_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusers, official"):
        InstaFlowPipeline.load(saved, layout="mine")
    with pytest.raises(UserError, match="its layout is diffusers, not official"):
        InstaFlowPipeline.load(saved, layout="official")
    with pytest.raises(UserError, match="diffusers, official"):
        pipeline().save(tmp_path / "x", layout="mine")
    folder = pipeline().save(tmp_path / "card")
    (folder / "instaflow.json").write_text('{"unknown": 1}')
    with pytest.raises(UserError, match="damaged"):
        InstaFlowPipeline.load(folder)
    assert isinstance(pipeline().flow, UNetFlow)
