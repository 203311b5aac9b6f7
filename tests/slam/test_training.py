"""The trainer on a tiny teacher: exact resume, processes, LCM beside SLAM, refusals, what is left for stock code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.images import open_rgb
from common.teacher_runs import WEIGHTS
from slam.export import CARD, load_student
from slam.model import Reading
from slam.trainer import SlamTraining
from tests.common.tiny_teacher import save_teacher
from tests.drills import kill, same_weights, succeed
from tests.refusals import refused
from tests.slam.tiny_run import arguments, losses, train

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", "v_prediction")


@pytest.fixture(scope="module")
def reference(cache: None, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both students, never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run", teacher)


@pytest.fixture(scope="module")
def lora(cache: None, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"student__kind": "lora", "student__rank": 2, "student__alpha": 5.0, "baseline": "false"}
    return train(tmp_path_factory.mktemp("lora") / "run", teacher, **options)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_goes_on_with_the_same_losses_and_weights(
    kind: str, reference: Path, lora: Path, teacher: Path, tmp_path: Path
) -> None:
    more = {"student__kind": "lora", "student__rank": 2, "student__alpha": 5.0} if kind == "lora" else {}
    options: dict[str, Any] = {**more, "baseline": "false"}
    whole = lora if kind == "lora" else reference
    kill("slam.train", 5, arguments(tmp_path / "run", teacher, **options))
    assert not (tmp_path / "run" / "slam" / WEIGHTS).exists()
    train(tmp_path / "run", teacher, **options)
    assert losses(tmp_path / "run") == losses(whole) and len(losses(whole)) == 6
    assert same_weights(tmp_path / "run" / "slam" / WEIGHTS, whole / "slam" / WEIGHTS)


def test_both_students_see_the_same_data_and_differ_in_gamma_alone(reference: Path) -> None:
    assert losses(reference) != losses(reference, "lcm")
    metrics = json.loads((reference / "metrics.json").read_text())
    arms = ["teacher 3 steps", "teacher 4 steps", "LCM 1 step", "LCM 2 steps", "SLAM 1 step", "SLAM 2 steps"]
    assert list(metrics["arms"]) == arms
    assert metrics["unet_forwards_per_image"] == dict(zip(arms, (6, 8, 1, 2, 1, 2)))
    assert open_rgb(reference / "comparison.png").shape[1] > 300 and (reference / "errors.png").is_file()
    assert (reference / "table.md").read_text().count("\n") == 8


def test_finished_students_are_not_trained_again(reference: Path, teacher: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(SlamTraining, "training_step", lambda *_: pytest.fail("trained again"))
    before = (reference / "slam" / WEIGHTS).stat().st_mtime_ns
    train(reference, teacher)
    assert before == (reference / "slam" / WEIGHTS).stat().st_mtime_ns


def test_micro_batches_and_two_processes_give_the_losses_of_one(reference: Path, teacher: Path, tmp_path: Path) -> None:
    parts = train(tmp_path / "parts", teacher, trainer__accumulate=2, baseline="false")
    assert losses(parts) == pytest.approx(losses(reference), rel=1e-4)
    options = {"trainer__devices": 2, "trainer__strategy": "ddp", "baseline": "false"}
    succeed("-m", "slam.train", *arguments(tmp_path / "two", teacher, **options))
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_stock_lcm_code_draws_the_exported_student(steps: int, reference: Path) -> None:
    from diffusers import LatentConsistencyModelPipeline

    from slam.sampler import sample

    folder = reference / "slam" / "pipeline"
    stock = LatentConsistencyModelPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    student, around = load_student(folder)
    assert student.paths.steps == 10
    noise = torch.randn(2, *around.latent_shape, generator=torch.Generator().manual_seed(1))
    fresh = torch.Generator().manual_seed(5)
    states = around.encode(PROMPTS)
    wanted = sample(student, noise, states, steps, lambda _: torch.randn(noise.shape, generator=fresh))
    drawn = stock(
        PROMPTS,
        latents=noise,
        num_inference_steps=steps,
        original_inference_steps=10,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)


def test_the_exported_student_is_the_trained_one(reference: Path) -> None:
    """Equal latents from the trainer's averaged student, with its effective time, and from the folder."""
    from slam.run import Run
    from slam.sampler import sample

    run = Run.existing(reference)
    trained, (exported, around) = run.load("slam"), load_student(reference / "slam" / "pipeline")
    noise, states = torch.randn(2, *around.latent_shape), around.encode(PROMPTS)
    ours, theirs = (sample(s, noise, states, 2, lambda _: torch.ones_like(noise)) for s in (trained, exported))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_adaptors_fused_or_loaded_by_stock_code_draw_the_same(lora: Path, teacher: Path) -> None:
    from diffusers import StableDiffusionPipeline

    fused = StableDiffusionPipeline.from_pretrained(lora / "slam" / "pipeline", local_files_only=True).unet
    stock = StableDiffusionPipeline.from_pretrained(teacher, local_files_only=True)
    stock.load_lora_weights(lora / "slam" / "lora", weight_name="pytorch_lora_weights.safetensors")
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([999, 99]), torch.randn(2, 6, 16)
    with torch.no_grad():
        a, b = (unet(x, t, states, return_dict=False)[0] for unet in (fused, stock.unet))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    card = json.loads((lora / "slam" / "lora" / CARD).read_text())
    assert card["guidance_scale"] == 1.0 and card["guidance_inside"] == 2.0


def test_sampling_and_converting_need_the_folder_alone(
    reference: Path, lora: Path, teacher: Path, tmp_path: Path
) -> None:
    from slam import convert, evaluate, sample

    model = str(reference / "slam" / "pipeline")
    common = ["--prompt", "a red star", "--count", "2", "--steps", "2", "--device", "cpu"]
    first = sample.main(["--model", model, *common, "--out", str(tmp_path / "a.png")])
    second = sample.main(["--model", model, *common, "--out", str(tmp_path / "b.png")])
    assert first.read_bytes() == second.read_bytes()
    near = ["--image", str(first), "--strength", "0.4"]
    sample.main(["--model", model, *common, *near, "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes() != first.read_bytes()
    adaptors = ["--lora", str(lora / "slam" / "lora")]
    refused("holds adaptors; give them as --lora", sample.main, ["--model", adaptors[-1], *common])
    by_file = sample.main(["--model", str(teacher), *adaptors, *common, "--out", str(tmp_path / "d.png")])
    fused = sample.main(["--model", str(lora / "slam" / "pipeline"), *common, "--out", str(tmp_path / "e.png")])
    assert abs(open_rgb(by_file).astype(int) - open_rgb(fused)).max() <= 1
    kohya = convert.main(
        [*adaptors, "--teacher", str(teacher), "--out", str(tmp_path / "k.safetensors"), "--layout=kohya"]
    )
    again = sample.main(["--model", str(teacher), "--lora", str(kohya), *common, "--out", str(tmp_path / "f.png")])
    assert abs(open_rgb(by_file).astype(int) - open_rgb(again)).max() <= 1  # its header tells the grid of times
    whole = convert.main(["--unet", f"{model}/unet", "--teacher", str(teacher), "--out", str(tmp_path / "published")])
    found = evaluate.main(["--model", str(whole), "--steps", "1", "--images", "4"])
    assert list(found["arms"]) == ["1 steps"]


def test_the_options_of_a_published_scheduler_are_read_and_travel(
    reference: Path, teacher: Path, tmp_path: Path
) -> None:
    from slam import convert, sample

    published = shutil.copytree(reference / "slam" / "pipeline", tmp_path / "published")
    file = published / "scheduler" / "scheduler_config.json"
    changed = {"timestep_scaling": 0.02, "thresholding": True, "sample_max_value": 3.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    again = convert.main(["--unet", str(published), "--teacher", str(teacher), "--out", str(tmp_path / "again")])
    for folder in (published, again):
        reading = load_student(folder)[0].reading
        assert (reading.timestep_scaling, reading.quantile, reading.largest_quantile) == (0.02, 0.995, 3.0)
    assert load_student(reference / "slam" / "pipeline")[0].reading == Reading()
    common = ["--prompt", "a red star", "--count", "1", "--device", "cpu", "--times", "999", "299"]
    first, second = (
        sample.main(["--model", str(folder), *common, "--out", str(tmp_path / f"{number}.png")]).read_bytes()
        for number, folder in enumerate((published, again))
    )
    assert first == second
    refused("expected falling training steps", sample.main, ["--model", str(again), *common[:-2], "299", "999"])


def test_what_a_student_cannot_do_is_said(reference: Path, teacher: Path, tmp_path: Path) -> None:
    from slam import sample

    model = ["--model", str(reference / "slam" / "pipeline"), "--prompt", "a red star", "--device", "cpu"]
    refused("--negative does nothing here", sample.main, [*model, "--negative", "blue"])
    refused("--guidance 7.5: guidance .2.0. is inside", sample.main, [*model, "--guidance", "7.5"])
    refused("11 steps at strength 1: expected 1 to 10", sample.main, [*model, "--steps", "11"])
    refused("no model_index.json", sample.main, ["--model", str(tmp_path), "--prompt", "a"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"subpath__solver_steps": 2000}, "--subpath.solver_steps 2000: expected a whole number"),
        ({"loss__huber_c": 0}, "--loss.huber_c 0.0: expected a number"),
        ({"loss__w_range": "[3,1]"}, "--loss.w_range .3.0, 1.0.: expected two numbers"),
        ({"loss__w_range": "[1,3]"}, "expected --subpath.gamma one"),
        ({"data__name": "folder"}, "--data.name folder needs --data.path"),
        ({"data__images": 0}, "--data.images 0: expected a number of at least 1"),
        ({"evaluation__steps": "[1,11]"}, "--evaluation.steps 11: expected at most --subpath.solver_steps 10"),
        ({"trainer__batch_size": 10**6}, "--trainer.batch_size 1000000: expected at most"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, teacher: Path, tmp_path: Path
) -> None:
    refused(sentence, train, tmp_path / "run", teacher, **options)
    assert not (tmp_path / "run").exists()


def test_lcms_own_recipe_embeds_its_guidance(cache: None, teacher: Path, tmp_path: Path) -> None:
    from slam import sample

    options = {"subpath__gamma": "one", "loss__w_range": "[1,3]", "baseline": "false", "trainer__max_steps": 2}
    folder = train(tmp_path / "run", teacher, student__zero_init="false", **options)
    model = ["--model", str(folder / "slam" / "pipeline"), "--prompt", "a red star", "--device", "cpu", "--count", "1"]
    refused("--guidance 5.0: this student was trained with 2 to 4", sample.main, [*model, "--guidance", "5"])
    low, high = (
        sample.main([*model, "--guidance", g, "--out", str(tmp_path / f"{g}.png")]).read_bytes() for g in ("2", "4")
    )
    assert low != high


def test_another_teacher_or_a_loss_that_is_not_finite_stops_the_run(cache: None, teacher: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", teacher, baseline="false", trainer__max_steps=2)
    other = save_teacher(tmp_path / "other", "v_prediction", seed=12)
    refused("another teacher than there is now", train, folder, other, baseline="false", trainer__max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slam.trainer.subpath_loss", lambda student, *_: student.unet.conv_in.bias.sum() * float("nan"))
        refused("the loss became nan at step 1", train, tmp_path / "nan", teacher, baseline="false")
    assert not (tmp_path / "nan" / "slam" / WEIGHTS).exists()
