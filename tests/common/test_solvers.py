"""The teacher's ODE by any deterministic scheduler of diffusers; those that draw noise are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.pretrained import quiet_libraries
from common.solvers import DiffusionSource
from common.teacher import Teacher
from tests.common.tiny_teacher import tiny_teacher

PROMPTS = ["a red star", "a blue ring", "two red ring"]


def source(**options: Any) -> DiffusionSource:
    return DiffusionSource(tiny_teacher(), "DDIMScheduler", steps=2, **{"guidance": 2.0, **options})


def test_guidance_takes_one_network_call_per_step_and_none_takes_half_the_batch() -> None:
    teacher, sizes = tiny_teacher(), []
    hook = teacher.unet.register_forward_pre_hook(lambda network, args: sizes.append(len(args[0])))
    x0, states = torch.randn(3, 4, 8, 8), teacher.encode(PROMPTS)
    guided, plain = source(), source(guidance=1.0)
    guided(x0, states)
    plain(x0, states)
    hook.remove()
    assert sizes == [6, 6, 3, 3]
    assert (guided.evaluations, plain.evaluations) == (4, 2)


def test_solvers_that_draw_noise_or_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="EulerAncestralDiscreteScheduler draws noise"):
        DiffusionSource(tiny_teacher(), "EulerAncestralDiscreteScheduler", 3)
    with pytest.raises(UserError, match="DDIMScheduler"):
        DiffusionSource(tiny_teacher(), "DDIM", 3)
    with pytest.raises(UserError, match="noise levels of its own"):
        DiffusionSource(tiny_teacher(), "FlowMatchEulerDiscreteScheduler", 3)
    with pytest.raises(UserError, match="PNDMScheduler cannot make 2 steps"):
        DiffusionSource(tiny_teacher(), "PNDMScheduler", 2)


@pytest.mark.parametrize("solver", ["UniPCMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_other_deterministic_schedulers_make_pairs(solver: str) -> None:
    x0, states = torch.randn(1, 4, 8, 8), tiny_teacher().encode(PROMPTS[:1])
    assert torch.isfinite(DiffusionSource(tiny_teacher(), solver, 4)(x0, states)).all()


# What a folder's scheduler config may say, or leave out, that changes where its ODE goes.
CONFIGS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "linspace": {"timestep_spacing": "linspace"},
    "ends on the image": {"set_alpha_to_one": True},
    "clips, as a config that leaves it out": {"clip_sample": True, "prediction_type": "sample"},
    "steps without the offset, as one that leaves it out": {"steps_offset": 0},
    "thresholds": {"thresholding": True, "prediction_type": "v_prediction"},
    "pure noise": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "cosine, few levels": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    "given betas": {"trained_betas": [0.01 + 0.0002 * i for i in range(100)], "num_train_timesteps": 100},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_teacher_goes_where_stock_diffusers_takes_it(name: str) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    teacher = tiny_teacher(**CONFIGS[name])
    config = {key: value for key, value in teacher.scheduler_config.items() if key != "_class_name"}
    with quiet_libraries():
        parts = {"unet": teacher.unet, "vae": teacher.vae, "text_encoder": teacher.text_encoder}
        stock = StableDiffusionPipeline(
            **parts,
            tokenizer=teacher.tokenizer,
            scheduler=DDIMScheduler(**config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        stock.set_progress_bar_config(disable=True)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        options = {"num_inference_steps": 4, "guidance_scale": 2.0, "latents": noise, "output_type": "latent"}
        wanted = stock(PROMPTS[:2], **options).images
    found = DiffusionSource(teacher, "DDIMScheduler", 4, 2.0)(noise, teacher.encode(PROMPTS[:2]))
    assert (wanted - noise).std() > 0.05
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)


def test_a_bfloat16_network_is_stepped_in_float32() -> None:
    full = tiny_teacher()
    half = Teacher(
        copy.deepcopy(full.unet).bfloat16(), full.vae, full.text_encoder, full.tokenizer, full.scheduler_config
    )
    x0, states = torch.randn(2, 4, 8, 8), full.encode(PROMPTS[:2])
    wanted = DiffusionSource(full, steps=4, guidance=2.0)(x0, states)
    made = DiffusionSource(half, steps=4, guidance=2.0)
    x1 = made(x0, states)
    assert x1.dtype == torch.float32
    assert 0 < float((x1 - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())
    assert made.describe()["precision"] == "bfloat16"
