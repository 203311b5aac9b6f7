"""Editing, inpainting and super-resolution: what the one step begins with, the bases, and the whole path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.data.captioned import Captioned
from common.images import open_rgb
from common.teacher import Teacher
from hipa.config import AdaptorConfig, TaskConfig
from hipa.model import OneStep, make_student
from hipa.tasks import (
    Inputs,
    blended,
    extra_channels,
    has_picture_input,
    inverted,
    many_steps,
    mask_of,
    small_input,
    start_time,
    widened,
)
from tests.common.tiny_teacher import save_teacher, tiny_teacher
from tests.hipa.tiny_run import train
from tests.refusals import refused

IMAGES = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
PICTURES = Captioned(["a red star"] * 6, lambda rows: IMAGES[rows], "six")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", "v_prediction")


class Knows(torch.nn.Module):
    """A network that gives a known answer at one time."""

    def __init__(self, told: torch.Tensor, time: int) -> None:
        super().__init__()
        self.told, self.time = torch.nn.Parameter(told), time

    def forward(self, x: torch.Tensor, t: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        assert t.tolist() == [self.time] * len(x)
        return (self.told,)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_one_step_inverts_what_the_schedule_mixes(kind: str) -> None:
    """From a network that knows the noise, the clean latents come back at any step."""
    teacher = tiny_teacher(kind)
    x1, noise = torch.randn(2, 2, 4, 8, 8)
    for time in (999, 400):
        alpha, sigma = teacher.schedule.levels(torch.tensor([time]))
        told = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x1, "sample": x1}[kind]

        found = OneStep(Knows(told, time), teacher.schedule, time)(alpha * x1 + sigma * noise, torch.zeros(2, 1, 1))
        torch.testing.assert_close(found, x1, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_one_step_is_the_clean_estimate_of_the_stock_scheduler(zero_snr: bool, schedule: str, kind: str) -> None:
    from diffusers import DDIMScheduler

    options = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr, "prediction_type": kind}
    teacher = tiny_teacher(**options)
    stock = DDIMScheduler(**{"beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False, **options})
    noise, told = torch.randn(2, 2, 4, 8, 8)
    found = OneStep(Knows(told, 999), teacher.schedule)(noise, torch.zeros(2, 1, 1))
    stock.set_timesteps(1)
    torch.testing.assert_close(found, stock.step(told, 999, noise).pred_original_sample, rtol=1e-6, atol=1e-6)


def test_a_student_starts_as_the_raw_one_step_model_wherever_its_adaptors_are() -> None:
    teacher = tiny_teacher("v_prediction")
    noise, states = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)
    raw = OneStep(teacher.unet, teacher.schedule)(noise, states)
    counts = {}
    for placement in ("qv", "attention", "attention_ff", "attention_conv", "everywhere", "full"):
        student = make_student(teacher, AdaptorConfig(rank=2, placement=placement))  # type: ignore[arg-type]
        torch.testing.assert_close(student(noise, states), raw, rtol=1e-4, atol=1e-5)
        counts[placement] = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert [*counts.values()] == sorted(counts.values())
    assert counts["full"] == sum(p.numel() for p in teacher.unet.parameters())


def test_a_widened_teacher_computes_the_same_whatever_stands_beside_the_noise() -> None:
    teacher = tiny_teacher("v_prediction")
    noise, states = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)
    unet = widened(teacher, 5)
    assert unet.config.in_channels == 9  # Stable Diffusion's inpainting layout for 4 latent channels
    beside = torch.randn(2, 5, 8, 8)
    t = torch.tensor([999, 3])
    with torch.no_grad():
        ours = unet(torch.cat([noise, beside], 1), t, states, return_dict=False)[0]
        torch.testing.assert_close(ours, teacher.unet(noise, t, states, return_dict=False)[0], rtol=1e-5, atol=1e-6)


def test_what_a_step_begins_with_is_a_function_of_seed_and_row() -> None:
    teacher = tiny_teacher("v_prediction")
    for name, channels in (("text", 4), ("editing", 4), ("inpainting", 9), ("superres", 4 + 3)):
        task = TaskConfig(name=name)  # type: ignore[arg-type]
        inputs = Inputs(task, teacher, PICTURES, 7)
        whole, some = inputs([0, 1, 2, 3]), inputs([2, 3])
        assert whole.shape == (4, channels, 8, 8) and channels == 4 + extra_channels(task, teacher)
        torch.testing.assert_close(whole[2:], some, rtol=1e-5, atol=1e-5)
    assert start_time(TaskConfig(name="editing", strength=0.5), teacher.schedule) == 500
    assert start_time(TaskConfig(name="editing", strength=1.0), teacher.schedule) == 999
    masked = Inputs(TaskConfig(name="inpainting"), teacher, PICTURES, 7).beside([0])
    mask = mask_of(7, 0, 16, 16)
    assert 0.09 <= float(mask.mean()) <= 0.5 and set(masked[:, 0].unique().tolist()) == {0.0, 1.0}


def test_the_small_picture_stands_pixel_by_pixel_on_the_latents_grid() -> None:
    teacher = tiny_teacher("v_prediction")  # 16 pixels, 8 latents
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    torch.testing.assert_close(small_input(teacher, ramp, 2), ramp.float() / 127.5 - 1)
    refused("--task.scale 3: expected a divisor", extra_channels, TaskConfig(name="superres", scale=3), teacher)


def test_inversion_undoes_drawing_the_better_the_more_steps_it_takes() -> None:
    teacher = tiny_teacher("v_prediction")
    states = torch.randn(2, 6, 16)
    unit = IMAGES[:2].float() / 127.5 - 1
    latents, errors = teacher.encode_images(unit), []
    for steps in (5, 40):
        back = many_steps(teacher, inverted(teacher, unit, states, steps), states, steps, 1.0, 999)
        errors.append(float((back - latents).norm() / latents.norm()))
    assert errors[1] < 0.5 and errors[1] < errors[0]


def test_blending_keeps_what_is_known() -> None:
    teacher = tiny_teacher("v_prediction")
    unit, mask = IMAGES[:2].float() / 127.5 - 1, torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    drawn = torch.randn(2, 4, 8, 8)
    found = blended(teacher, drawn, unit, mask)
    assert torch.equal(found[..., :4], drawn[..., :4])
    assert torch.equal(found[..., 4:], teacher.encode_images(unit)[..., 4:])


@pytest.mark.parametrize("task", ["editing", "inpainting", pytest.param("superres", marks=pytest.mark.slow)])
def test_each_task_has_an_adaptor_of_its_own_on_its_own_base(
    task: str, cache: None, teacher: Path, tmp_path: Path
) -> None:
    from hipa import analyse, sample

    options = {"task__name": task, "trainer__max_steps": 2, "pairs__count": 16}
    folder = train(tmp_path / "run", teacher, **options)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["teacher 2 steps", "frozen, 1 step", "HiPA, 1 step"]
    assert metrics["task"] == task and metrics["arms"]["teacher 2 steps"]["perceptual"] == 0
    pipeline = folder / "hipa" / "pipeline"
    if task != "editing":
        base = Teacher.load(folder / "base" / "pipeline", pictures=True)
        assert has_picture_input(TaskConfig(name=task), base)  # type: ignore[arg-type]
        refused("expected a plain text-to-image model", Teacher.load, pipeline)
        again = train(tmp_path / "again", folder / "base" / "pipeline", **options)
        assert not (again / "base").exists()  # it is a base already
    picture, hole = tmp_path / "picture.png", tmp_path / "hole.png"
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).save(picture)
    Image.new("L", (16, 16), 255).crop((0, 0, 16, 16)).save(hole)
    words = ["--model", str(pipeline), "--prompt", "a blue ring", "--count", "2", "--device", "cpu"]
    more = ["--mask", str(hole)] if task == "inpainting" else []
    out = sample.main([*words, "--image", str(picture), *more, "--out", str(tmp_path / "out.png")])
    assert open_rgb(out).shape[0] > 16
    refused(f"--image is missing: {task} begins with a picture", sample.main, words)
    refused(f"--task text: these files are for {task}", sample.main, [*words, "--task", "text"])
    if task == "inpainting":
        found = analyse.main(["--run_dir", str(folder), "--images", "4", "--out", str(tmp_path / "spectra")])
        assert list(found) == ["frozen", "hipa"]


def test_a_text_model_inpaints_by_blending_and_edits_from_inverted_noise(teacher: Path, tmp_path: Path) -> None:
    from hipa import sample

    picture, hole = tmp_path / "picture.png", tmp_path / "hole.png"
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).save(picture)
    Image.new("L", (16, 16), 0).save(hole)
    words = ["--model", str(teacher), "--prompt", "a blue ring", "--count", "1", "--device", "cpu"]
    words += ["--image", str(picture)]
    kept = sample.main([*words, "--mask", str(hole), "--out", str(tmp_path / "kept.png")])
    other = sample.main([*words, "--mask", str(hole), "--seed", "5", "--out", str(tmp_path / "other.png")])
    assert (open_rgb(kept) == open_rgb(other)).all()  # nothing is to be painted
    sample.main([*words, "--invert", str(teacher), "--out", str(tmp_path / "edited.png")])
    refused("--image needs --mask", sample.main, words)


def test_any_folders_of_pictures_are_analysed(tmp_path: Path) -> None:
    from hipa import analyse

    for name in ("one", "many", "few"):
        (tmp_path / name).mkdir()
        for number in range(1 if name == "few" else 4):
            Image.fromarray(IMAGES[number].permute(1, 2, 0).numpy()).save(tmp_path / name / f"{number}.png")
    one, many = ["--one", str(tmp_path / "one")], ["--many", str(tmp_path / "many")]
    found = analyse.main([*one, *many, "--judge", "shapes64", "--out", str(tmp_path / "spectra")])
    assert max(found["one step"]["error"]) == 0 and min(found["one step"]["coherence"]) == pytest.approx(1)
    refused("expected two pictures or more", analyse.main, [*one, "--many", str(tmp_path / "few")])
    refused("expected one of --run_dir, --teacher", analyse.main, one)
