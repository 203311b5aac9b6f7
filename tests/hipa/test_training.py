"""The trainer on a tiny teacher: exact resume, arms, processes, refusals, and what is left for stock code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.adaptors import FILE
from common.images import open_rgb
from common.weights import read_weights, save_weights
from hipa.export import CARD
from hipa.run import WEIGHTS, Run
from hipa.trainer import HipaTraining
from tests.common.tiny_teacher import save_teacher
from tests.drills import kill, same_weights, succeed
from tests.hipa.tiny_run import arguments, losses, train
from tests.refusals import refused

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", "v_prediction")


@pytest.fixture(scope="module")
def reference(cache: None, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All arms, never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run", teacher, arms="[pixel,spatial,hipa]")


def stock(folder: Path, lora: Path | None = None) -> Any:
    """Pictures' latents by stock diffusers in one step, from fixed noise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name=FILE)
        pipeline.scheduler = DDIMScheduler.from_pretrained(lora / "scheduler")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(PROMPTS, latents=noise, **options).images, noise


def test_a_killed_run_goes_on_with_the_same_losses_and_weights(reference: Path, teacher: Path, tmp_path: Path) -> None:
    kill("hipa.train", 5, arguments(tmp_path / "run", teacher))
    assert not (tmp_path / "run" / "hipa" / WEIGHTS).exists()
    train(tmp_path / "run", teacher)
    assert losses(tmp_path / "run") == losses(reference) and len(losses(reference)) == 6
    assert same_weights(tmp_path / "run" / "hipa" / WEIGHTS, reference / "hipa" / WEIGHTS)


def test_every_arm_starts_as_the_raw_one_step_model_and_leaves_out_its_part_of_the_loss(reference: Path) -> None:
    from common.training import read_logs

    parts = {arm: read_logs(reference / arm) for arm in ("pixel", "spatial", "hipa")}
    assert "train/edge" not in parts["spatial"] and {"train/edge", "train/fourier"} <= set(parts["hipa"])
    first = {arm: {k: v[min(v)] for k, v in log.items()} for arm, log in parts.items()}
    assert first["spatial"]["train/spatial"] == first["hipa"]["train/spatial"]  # B = 0: one picture for all
    whole = sum(first["hipa"][f"train/{name}"] for name in ("spatial", "fourier", "edge"))
    assert first["hipa"]["train/loss"] == pytest.approx(whole, rel=1e-6)
    metrics = json.loads((reference / "metrics.json").read_text())
    one_step = [arm for arm, forwards in metrics["unet_forwards_per_image"].items() if forwards == 1]
    assert one_step == ["frozen, 1 step", "pixel loss only, 1 step", "spatial loss only, 1 step", "HiPA, 1 step"]
    assert list(metrics["spectra"]) == one_step and len(metrics["spectra"]["HiPA, 1 step"]["coherence"]) == 5
    assert metrics["costs"]["training_forwards"] == 3 * 6 * 8 and metrics["costs"]["pair_forwards"] == 24 * 2 * 2
    assert open_rgb(reference / "comparison.png").shape[1] > 300 and (reference / "spectra.png").is_file()
    assert (reference / "table.md").read_text().count("\n") == 7


def test_finished_arms_are_not_trained_again(reference: Path, teacher: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(HipaTraining, "training_step", lambda *_: pytest.fail("trained again"))
    before = (reference / "hipa" / WEIGHTS).stat().st_mtime_ns
    train(reference, teacher, arms="[hipa]")
    assert before == (reference / "hipa" / WEIGHTS).stat().st_mtime_ns


def test_micro_batches_undecoded_pairs_and_recomputation_change_no_loss(
    cache: None, reference: Path, teacher: Path, tmp_path: Path
) -> None:
    options = {"trainer__accumulate": 2, "trainer__cache_pictures_gb": 0.0, "loss__recompute": "true"}
    found, wanted = losses(train(tmp_path / "run", teacher, **options)), losses(reference)
    # Adam's first steps divide by gradients near zero and carry on how sums were rounded: from the fourth loss on.
    assert [found[step] for step in range(3)] == pytest.approx([wanted[step] for step in range(3)], rel=1e-5)
    scalar = torch.backends.cpu.get_cpu_capability() == "DEFAULT"  # 5e-4 apart after six steps
    assert found == pytest.approx(wanted, rel=1e-3 if scalar else 2e-4)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(cache: None, reference: Path, teacher: Path, tmp_path: Path) -> None:
    options = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    succeed("-m", "hipa.train", *arguments(tmp_path / "two", teacher, **options))
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), rel=1e-3)
    options |= {"task__name": "superres"}
    succeed("-m", "hipa.train", *arguments(tmp_path / "base", teacher, **options))
    assert (tmp_path / "base" / "hipa" / WEIGHTS).is_file()


def test_stock_code_draws_the_trained_student_from_the_file_and_from_the_fused_folder(
    reference: Path, teacher: Path
) -> None:
    run = Run.existing(reference)
    student = run.load("hipa")
    found, noise = stock(reference / "hipa" / "pipeline")
    with torch.no_grad():
        wanted = student(noise, run.base.encode(PROMPTS).float())
        raw = run.frozen()(noise, run.base.encode(PROMPTS).float())
    assert float((wanted - raw).abs().max()) > 1e-3  # it has learned something
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    by_file, _ = stock(teacher, reference / "hipa" / "lora")
    torch.testing.assert_close(by_file, wanted, rtol=1e-4, atol=1e-5)
    card = json.loads((reference / "hipa" / "lora" / CARD).read_text())
    assert (card["guidance_scale"], card["guidance_inside"], card["time"]) == (1.0, 1.5, 999)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_mixed_ranks_and_alphas_of_others_load_at_their_strength_in_any_order(
    layout: str, reference: Path, teacher: Path, tmp_path: Path
) -> None:
    """A file as other programs write it, its keys reversed, through our converter and by stock code."""
    from hipa import convert
    from hipa.sample import adapted

    tensors, _ = read_weights(reference / "hipa" / "lora" / FILE)
    names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    theirs: dict[str, torch.Tensor] = {}
    for number, name in enumerate(names):
        down, up = (tensors[f"{name}.lora_{half}.weight"] for half in "AB")
        rank = 1 + number % 2
        key = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        theirs |= {f"{key}.lora_down.weight": down[:rank], f"{key}.lora_up.weight": up[:, :rank] * 3}
        theirs[f"{key}.alpha"] = torch.tensor(0.5 + number % 3)
    save_weights(tmp_path / "theirs.safetensors", dict(reversed(theirs.items())))
    base = Run.existing(reference).base
    out = tmp_path / ("lora" if layout == "diffusers" else "kohya.safetensors")
    given = ["--lora", str(tmp_path / "theirs.safetensors"), "--teacher", str(teacher)]
    made = convert.main([*given, "--out", str(out), "--layout", layout])
    noise, states = torch.randn(2, 4, 8, 8), base.encode(PROMPTS).float()
    with torch.no_grad():
        ours = [adapted(base, path)(noise, states) for path in (tmp_path / "theirs.safetensors", made)]
        raw = Run.existing(reference).frozen()(noise, states)
    torch.testing.assert_close(*ours, rtol=1e-5, atol=1e-5)
    assert float((ours[0] - raw).abs().max()) > 1e-3
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teacher, local_files_only=True)
    pipeline.load_lora_weights(made.parent, weight_name=made.name)
    from hipa.model import OneStep

    with torch.no_grad():
        by_stock = OneStep(pipeline.unet, base.schedule)(noise, states)
    torch.testing.assert_close(by_stock, ours[0], rtol=1e-4, atol=1e-5)


def test_fused_and_unfused_again_is_the_teacher_and_foreign_keys_are_refused(
    reference: Path, teacher: Path, tmp_path: Path
) -> None:
    from common.teacher import Teacher
    from hipa import convert

    lora = ["--lora", str(reference / "hipa" / "lora")]
    fused = convert.main([*lora, "--teacher", str(teacher), "--out", str(tmp_path / "fused"), "--layout", "fused"])
    assert same_weights(
        *(f / "unet" / "diffusion_pytorch_model.safetensors" for f in (fused, reference / "hipa/pipeline"))
    )
    back = convert.main([*lora, "--teacher", str(fused), "--out", str(tmp_path / "back"), "--layout", "unfused"])
    for ours, theirs in zip(*(Teacher.load(f).unet.state_dict().values() for f in (back, teacher)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    refused("exists; choose another name", convert.main, [*lora, "--teacher", str(teacher), "--out", str(fused)])
    weights = fused / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, notes = read_weights(weights)
    for change, sentence in (
        (lambda name: name.replace("to_q.weight", "to_q.base_layer.weight"), "lack .*to_q.weight"),
        (lambda name: name, "holds .*lora_A.* that is no weight of this network"),
    ):
        more = {} if "lack" in sentence else {"mid_block.attentions.0.to_q.lora_A.weight": torch.ones(1)}
        save_weights(weights, {change(name): tensor for name, tensor in tensors.items()} | more, notes)
        refused(sentence, Teacher.load, fused)


def test_sampling_needs_the_folder_alone_and_is_the_same_twice(reference: Path, teacher: Path, tmp_path: Path) -> None:
    from hipa import evaluate, sample

    common = ["--prompt", "a red star", "--count", "2", "--device", "cpu"]
    model = str(reference / "hipa" / "pipeline")
    first, second = (sample.main(["--model", model, *common, "--out", str(tmp_path / f"{n}.png")]) for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    lora = ["--model", str(teacher), "--lora", str(reference / "hipa" / "lora")]
    by_file = sample.main([*lora, *common, "--out", str(tmp_path / "c.png")])
    assert abs(open_rgb(by_file).astype(int) - open_rgb(first)).max() <= 1
    refused("--negative does nothing here", sample.main, ["--model", model, *common, "--negative", "blue"])
    refused("guidance .1.5. is inside", sample.main, ["--model", model, *common, "--guidance", "7.5"])
    refused("is not a diffusers directory", sample.main, ["--model", str(tmp_path), *common])
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    refused("holds adaptors; give them as --lora", sample.main, ["--model", str(tmp_path), *common])
    found = evaluate.main(["--teacher", str(teacher), *lora[2:], "--images", "4", "--steps", "2"])
    assert list(found["arms"]) == ["teacher 2 steps", "frozen, 1 step", "adapted, 1 step"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adaptor__rank": 0}, "--adaptor.rank 0: expected a whole number"),
        ({"loss__space": "latents"}, "--loss.space latents has no picture to look at"),
        ({"loss__mask": "gaussian", "loss__fourier": "l1_complex"}, "--loss.mask gaussian goes with"),
        ({"loss__trunk": "missing.pth"}, "missing.pth"),
        ({"pairs__solver": "EulerAncestralDiscreteScheduler"}, "noise"),
        ({"pairs__count": 0}, "--pairs.count 0: expected a whole number"),
        ({"arms": "[]"}, "--arms .*: expected one or more of hipa, spatial, pixel"),
        ({"task__name": "editing", "pairs__target": "data"}, "--pairs.target data: no picture shows"),
        ({"task__name": "superres", "task__scale": 3}, "--task.scale 3: expected a divisor"),
        ({"trainer__batch_size": 10**6}, "--trainer.batch_size 1000000: expected at most"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, teacher: Path, tmp_path: Path
) -> None:
    refused(sentence, train, tmp_path / "run", teacher, **options)
    assert not (tmp_path / "run").exists()


def test_another_teacher_or_a_loss_that_is_not_finite_stops_the_run(cache: None, teacher: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", teacher, trainer__max_steps=2)
    other = save_teacher(tmp_path / "other", "v_prediction", seed=12)
    refused("another teacher than there is now", train, folder, other, trainer__max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hipa.losses.edge_loss", lambda x, y: x.sum() * float("nan"))
        refused("the loss became nan at step 1", train, tmp_path / "nan", teacher)
    assert not (tmp_path / "nan" / "hipa" / WEIGHTS).exists()


def test_real_pictures_may_stand_for_the_teachers_with_fresh_noise(cache: None, teacher: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", teacher, pairs__target="data", trainer__max_steps=2, adaptor__placement="full")
    assert json.loads((folder / "metrics.json").read_text())["costs"]["pair_forwards"] == 0
    assert not (folder / "hipa" / "lora").exists() and (folder / "hipa" / "pipeline" / "unet").is_dir()
