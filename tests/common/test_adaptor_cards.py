"""Adaptors draw the same pictures in every layout: what they are for travels with them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.adaptors import write_with_card
from common.teacher import Teacher
from tests.common.tiny_teacher import save_teacher
from tests.refusals import refused


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def adaptors(teacher: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random ones on every query of the U-Net."""
    torch.manual_seed(2)
    unet = Teacher.load(teacher).unet
    queries = {n: m for n, m in unet.named_modules() if n.endswith("to_q")}
    return {n: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2)) for n, m in queries.items()}


SLAM: dict[str, Any] = {"guidance_scale": 1.0, "solver_steps": 8, "sigma": "linear"}


def test_the_sub_paths_of_a_student_travel_in_every_layout(teacher: Path, tmp_path: Path) -> None:
    from slam import convert, sample
    from slam.evaluate import few_step_source
    from slam.export import CARD

    write_with_card(tmp_path / "lora", adaptors(teacher), SLAM, CARD)
    write_with_card(tmp_path / "bare", adaptors(teacher), {}, CARD)
    own = ["--lora", str(tmp_path / "lora"), "--teacher", str(teacher)]
    kohya = convert.main([*own, "--out", str(tmp_path / "k" / "k.safetensors"), "--layout", "kohya"])
    folder = convert.main([*own, "--out", str(tmp_path / "again")])
    fused = convert.main([*own, "--out", str(tmp_path / "fused"), "--layout", "fused"])
    unet = convert.main(["--unet", str(fused / "unet"), "--teacher", str(teacher), "--out", str(tmp_path / "whole")])

    def drawn(model: Path, lora: Path | None = None) -> torch.Tensor:
        """Latents; the tiny autoencoder would hide small differences."""
        options = Namespace(model=model, lora=lora, teacher=None, device="cpu", guidance=None)
        student, around, w = sample.open_model(options)
        torch.manual_seed(1)
        noise, states = torch.randn(2, *around.latent_shape), around.encode(["a red star", "two rings"]).float()
        return few_step_source(student, 3, w)(noise, states)

    wanted = drawn(teacher, tmp_path / "lora")
    for place in (kohya, folder.parent):
        torch.testing.assert_close(drawn(teacher, place), wanted, atol=1e-5, rtol=1e-5)
    for place in (fused, unet):
        torch.testing.assert_close(drawn(place), wanted, atol=1e-4, rtol=1e-4)
    assert (drawn(teacher, tmp_path / "bare") - wanted).abs().max() > 1e-3
    write_with_card(tmp_path / "odd", adaptors(teacher), {**SLAM, "sigma": "cubic"}, CARD)
    command = ["--model", str(teacher), "--lora", str(tmp_path / "odd"), "--prompt", "a"]
    refused("solver_steps 8, sigma 'cubic'; expected", sample.main, command)


def test_the_task_of_a_one_step_student_travels_in_every_layout(teacher: Path, tmp_path: Path) -> None:
    from hipa import convert
    from hipa.config import TaskConfig
    from hipa.export import CARD, card_of, read_card

    task = TaskConfig(name="editing")
    card = card_of(Teacher.load(teacher), task, 1.5, 999)
    write_with_card(tmp_path / "lora", adaptors(teacher), card, CARD)
    own = ["--lora", str(tmp_path / "lora"), "--teacher", str(teacher)]
    for name, layout in (("k/k.safetensors", "kohya"), ("d/d.safetensors", "diffusers"), ("folder", "diffusers")):
        convert.main([*own, "--out", str(tmp_path / name), "--layout", layout])
        assert read_card(tmp_path / name) == (card, task)
        # And back again.
        own[1] = str(tmp_path / name)
    fused = convert.main([*own, "--out", str(tmp_path / "fused"), "--layout", "fused"])
    assert read_card(fused)[1] == task
    write_with_card(tmp_path / "x.safetensors", adaptors(teacher), {"task": 3}, CARD)
    refused("the note hipa.json in its header is damaged", read_card, tmp_path / "x.safetensors")
