"""The trainer on a tiny teacher: exact resume in and between stages, processes, refusals, what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.training import load_checkpoint
from instaflow.run import WEIGHTS
from instaflow.trainer import StudentTrainer
from tests.common.tiny_teacher import save_teacher
from tests.drills import succeed
from tests.instaflow.tiny_run import PROMPTS, STAGES, arguments, losses, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def reference(cache: None, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run", teacher)


def test_finished_stages_are_not_trained_again(reference: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StudentTrainer, "training_step", lambda *_: pytest.fail("trained again"))
    before = [(reference / stage / WEIGHTS).stat().st_mtime_ns for stage in STAGES]
    train(reference, teacher)
    assert before == [(reference / stage / WEIGHTS).stat().st_mtime_ns for stage in STAGES]


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(
    reference: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = train(tmp_path / "run", teacher, trainer__accumulate=2, stages="[pairs,reflow]")
    assert losses(folder, "reflow_1") == pytest.approx(losses(reference, "reflow_1"), rel=1e-4)


def test_two_processes_give_the_losses_of_one(reference: Path, teacher: Path, tmp_path: Path) -> None:
    options = {"trainer__devices": 2, "trainer__strategy": "ddp", "stages": "[pairs,reflow,distil]"}
    succeed("-m", "instaflow.train", *arguments(tmp_path / "two", teacher, **options))
    for stage in ("reflow_1", "distil"):
        assert losses(tmp_path / "two", stage) == pytest.approx(losses(reference, stage), rel=1e-3)


def test_drawing_sample_grids_changes_no_loss(reference: Path, teacher: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", teacher, trainer__sample_every=3, stages="[pairs,reflow]")
    grids = sorted(path.name for path in (folder / "reflow_1" / "samples").iterdir())
    assert grids == ["step_000003.png", "step_000006.png"]
    assert losses(folder, "reflow_1") == losses(reference, "reflow_1")


def test_one_step_pipeline_is_drawn_by_stock_diffusers(reference: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from instaflow.pipeline import InstaFlowPipeline

    stock = StableDiffusionPipeline.from_pretrained(reference / "pipeline", local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    ours = InstaFlowPipeline.load(reference / "pipeline")
    noise = ours.noise(2, seed=3)
    wanted = ours(PROMPTS[:2], latents=noise)
    drawn = stock(PROMPTS[:2], latents=noise, num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    difference = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 255 - wanted.float()
    assert difference.abs().max() <= 1.0
    assert json.loads((reference / "pipeline" / "instaflow.json").read_text())["one_step"] is True


def test_second_round_of_reflow_starts_from_the_first(reference: Path, teacher: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", teacher, reflow__rounds=2, reflow__later_lr=1e-9, stages="[pairs,reflow]")
    assert losses(folder, "reflow_1") == losses(reference, "reflow_1")
    first, second = (load_file(folder / f"reflow_{i}" / WEIGHTS) for i in (1, 2))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    assert not torch.equal(first["unet.conv_out.weight"], second["unet.conv_out.weight"])
    x0 = [load_file(p)["x0"] for p in sorted((folder / "reflow_2" / "pairs").glob("*.safetensors"))]
    assert sum(map(len, x0)) == 24


def test_second_phase_of_a_round_has_its_own_batch(teacher: Path, cache: None, tmp_path: Path) -> None:
    folder = train(
        tmp_path / "run",
        teacher,
        reflow__then__steps=3,
        reflow__then__batch_size=16,
        stages="[pairs,reflow]",
    )
    assert len(losses(folder / "reflow_1", "phase_1")) == 6 and len(losses(folder, "reflow_1")) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"student__init": "wrapped"},
        {"student__init": "raw"},
        {"student__stack": "separate"},
        {"student__stack": "shared", "student__pruning": "none"},
        {"reflow__rounds": 0},
        {"distil__k": 2},
        {"pairs__online": "true"},
        {"reflow__loss": "halfsum"},
    ],
    ids=lambda options: "-".join(f"{k.split('__')[1]}_{v}" for k, v in options.items()),
)
def test_every_variant_trains_and_is_saved(options: dict[str, Any], teacher: Path, cache: None, tmp_path: Path) -> None:
    from instaflow.pipeline import InstaFlowPipeline

    small = {"reflow__steps": 2, "distil__steps": 2, "perceptual__steps": 1}
    folder = train(tmp_path / "run", teacher, **small, **options)
    pipeline = InstaFlowPipeline.load(folder / "pipeline")
    assert pipeline(PROMPTS[:2], steps=options.get("distil__k", 1)).shape == (2, 3, 16, 16)
    assert pipeline.card.one_step is ("distil__k" not in options)
    assert (folder / "reflowed").exists() is ("reflow__rounds" not in options)


def test_perceptual_stage_moves_towards_the_decoded_target(reference: Path) -> None:
    before, after = load_file(reference / "distil" / WEIGHTS), load_file(reference / "perceptual" / WEIGHTS)
    assert not torch.equal(before["unet.conv_out.weight"], after["unet.conv_out.weight"])
    assert all(value > 0 for value in losses(reference, "perceptual").values())


def test_nan_loss_stops_with_a_sentence_and_keeps_the_last_good_checkpoint(
    teacher: Path, cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of = StudentTrainer.training_step

    def broken(self: StudentTrainer, batch: Any, batch_idx: int) -> torch.Tensor:
        return step_of(self, batch, batch_idx) * (float("nan") if self.trainer.global_step == 5 else 1.0)

    monkeypatch.setattr(StudentTrainer, "training_step", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 6: stopped; the last good checkpoint is .*last"):
        train(tmp_path / "run", teacher)
    assert load_checkpoint(tmp_path / "run" / "reflow_1" / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_wrong_options_are_refused_by_name(reference: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another configuration \(reflow.lr was 0.001, is 0.5\)"):
        train(reference, teacher, reflow__lr=0.5)
    with pytest.raises(UserError, match="not empty"):
        train(reference, teacher, resume="never")
    for options, sentence in (
        ({"trainer__accumulate": 3}, "cannot be divided into --trainer.accumulate 3"),
        ({"student__init": "wrapped", "student__stack": "shared"}, "a wrapped network cannot be stacked"),
        ({"reflow__rounds": 0, "pairs__online": "true"}, "--pairs.online is for reflow"),
        ({"trainer__strategy": "fsdp"}, "shards the weights that the moving average follows"),
        ({"pairs__prompts": "absent.txt"}, "absent.txt: no such file"),
        ({"pairs__solver": "EulerAncestralDiscreteScheduler"}, "draws noise"),
        ({"stages": "[perceptual]"}, "distil is not finished|reflow_1 is not finished"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(tmp_path / "other" / "run", teacher, **options)
        (tmp_path / "other" / "run" / "config.yaml").unlink(missing_ok=True)


def test_run_refuses_a_teacher_whose_weights_were_replaced(cache: None, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", seed=1)
    options = {"stages": "[pairs,reflow]", "reflow__steps": 1}
    folder = train(tmp_path / "run", teacher, **options)
    save_teacher(teacher, seed=2)
    with pytest.raises(UserError, match="begun with another teacher"):
        train(folder, teacher, **options)


def test_damaged_stage_weights_are_refused_by_name(teacher: Path, cache: None, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", teacher, stages="[pairs,reflow]")
    (folder / "reflow_1" / WEIGHTS).write_bytes(b"half")
    with pytest.raises(UserError, match=r"reflow_1/student.safetensors is truncated"):
        train(folder, teacher)


def test_config_files_name_only_known_options() -> None:
    from common.cli import parse_config
    from instaflow.config import InstaFlowConfig
    from instaflow.train import CONFIGS

    for path in sorted(CONFIGS.glob("*.yaml")):
        config, _ = parse_config(InstaFlowConfig, path, "", [])
        assert config.pairs.count > 0, path
    paper, _ = parse_config(InstaFlowConfig, CONFIGS / "paper.yaml", "", [])
    assert paper.reflow.then is not None and (paper.reflow.batch_size, paper.reflow.then.batch_size) == (64, 1024)
    assert (paper.pairs.guidance, paper.pairs.steps, paper.distil.alpha, paper.reflow.lr) == (5.0, 25, 1.5, 1e-6)
