"""The trainer on a few rooms: exact resume, refusals, what a run leaves behind, and the programs that read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.images import open_rgb
from common.weights import read_weights
from scenesplat.export import SceneModel
from scenesplat.gaussians import Gaussians
from scenesplat.inference import passes, scene_classes, scene_features
from scenesplat.ply import Reading, read_scene, write_scene
from scenesplat.rooms import make_room
from scenesplat.run import WEIGHTS
from scenesplat.trainer import LanguagePretraining
from scenesplat.voxels import fragments
from tests.drills import kill, same_weights, succeed
from tests.refusals import refused
from tests.scenesplat.tiny_run import command, losses, train


@pytest.fixture(scope="module")
def reference(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="module")
def model(reference: Path) -> SceneModel:
    return SceneModel.load(reference / "model")


@pytest.fixture(scope="module")
def scene() -> Gaussians:
    return make_room(7, "test", density=30).gaussians


def test_a_killed_run_goes_on_with_the_same_losses_and_weights(reference: Path, tmp_path: Path) -> None:
    kill("scenesplat.train", 3, command(tmp_path / "run"))
    assert not (tmp_path / "run" / WEIGHTS).exists()
    train(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(reference) and len(losses(reference)) == 6
    assert same_weights(tmp_path / "run" / WEIGHTS, reference / WEIGHTS)


def test_a_finished_run_is_not_trained_again_and_has_its_numbers_and_pictures(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguagePretraining, "training_step", lambda *_: pytest.fail("trained again"))
    before = json.loads((reference / "metrics.json").read_text())
    train(reference)
    after = json.loads((reference / "metrics.json").read_text())
    assert before["arms"] == after["arms"] and next(iter(after["arms"])) == "network"
    assert after["scenes"] == 1 and "wall" in after["classes"]
    assert (reference / "table.md").read_text().count("\n") == 6
    assert open_rgb(reference / "room.png").shape[1] > 800


@pytest.mark.slow
def test_two_processes_train_and_write_one_run(cache: None, tmp_path: Path) -> None:
    options = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__max_steps": 3}
    succeed("-m", "scenesplat.train", *command(tmp_path / "two", **options))
    assert len(losses(tmp_path / "two")) == 3 and (tmp_path / "two" / "metrics.json").is_file()


def test_pseudo_classes_need_no_labels(cache: None, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", loss__classes="pseudo", loss__schedule="all", trainer__max_steps=2)
    assert all(value > 0 for value in losses(folder).values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"network__in_channels": 14}, "--network.in_channels 14: expected 11, of colour, opacity, quaternion, scale"),
        ({"network__enc_heads": "[1,3]"}, "16 channels cannot be divided among 3 heads"),
        ({"network__dec_channels": "[16]"}, "expected 12 as the first, the width of the text features"),
        ({"network__enc_depths": "[1]"}, "expected two stages and one curve at least"),
        ({"network__strides": "[2,2]"}, "--network.strides: expected 1 numbers for the 2 stages"),
        ({"network__rpe": "true"}, "expected --network.patches shrinking"),
        ({"network__convolution": "spconv"}, "no backward pass on CPUs; expected gather"),
        ({"data__name": "scenes"}, "--data.name scenes needs --data.path"),
        ({"text__encoder": "none.safetensors"}, "none.safetensors: no such file"),
        ({"trainer__batch_size": 100}, "--trainer.batch_size 100: expected at most 4 times the 3 training scenes"),
        ({"loss__temperature": 0}, "--loss.temperature 0.0: expected a number above 0"),
        ({"init_from": "nowhere"}, "--init_from nowhere: no config.json there"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, cache: None, tmp_path: Path
) -> None:
    refused(sentence, train, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(pred: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
        return {"loss": pred.sum() * float("nan")}

    monkeypatch.setattr("scenesplat.trainer.language_losses", broken)
    refused("the loss became nan at step 1", train, tmp_path / "nan")
    assert not (tmp_path / "nan" / WEIGHTS).exists()


def test_a_run_starts_from_a_models_weights(reference: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "run", init_from=reference / "model", trainer__max_steps=1)
    assert losses(again)[0] < losses(reference)[0]
    recorded = json.loads((again / "inputs.json").read_text())
    assert set(recorded) == {"data", "text", "weights"}


# What a model answers


def test_passes_show_every_gaussian_or_an_even_share_of_a_full_voxel() -> None:
    voxel = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2])
    every = [rows.tolist() for rows in fragments(voxel)]
    assert len(every) == 8 and {row for rows in every for row in rows} == set(range(11))
    assert all(voxel[rows].tolist() == [0, 1, 2] for rows in every)
    some = [rows.tolist() for rows in fragments(voxel, limit=2)]
    assert [rows[1] for rows in some] == [1, 5] and some[0][0] == 0 and [rows[2] for rows in some] == [9, 10]


def test_answers_are_equal_on_every_run_and_for_any_number_of_passes_at_once(
    model: SceneModel, scene: Gaussians
) -> None:
    first = scene_features(model, scene)
    assert torch.equal(first, scene_features(model, scene))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(len(scene)))
    torch.testing.assert_close(first, scene_features(model, scene, at_once=3), rtol=1e-5, atol=1e-5)
    seen = torch.cat([rows for rows, _, _ in passes(model, scene)])
    assert set(seen.tolist()) == set(range(len(scene)))


def test_a_scene_far_away_gets_the_same_answers(model: SceneModel, scene: Gaussians) -> None:
    """By whole voxels of a power of two, so that no coordinate is rounded."""
    model = replace(model, voxel=0.25)
    far = scene.moved(torch.tensor([64.0, -32.0, 16.0]))
    near = replace(far, means_N3=far.means_N3 - torch.tensor([64.0, -32.0, 16.0]))
    torch.testing.assert_close(scene_features(model, far), scene_features(model, near), rtol=1e-4, atol=1e-4)


def test_the_class_of_a_gaussian_is_the_nearest_text(model: SceneModel, scene: Gaussians) -> None:
    texts = model.text.embed(model.classes)
    once = scene_classes(model, scene, texts, limit=1)
    features = scene_features(model, scene, limit=1)
    assert torch.equal(once, (features @ texts.t()).argmax(1))


def test_a_query_prints_numbers_and_saves_what_it_found(
    reference: Path, scene: Gaussians, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scenesplat import query

    write_scene(tmp_path / "room.ply", scene)
    words = [str(tmp_path / "room.ply"), "--model", str(reference / "model")]
    chair = tmp_path / "chair.ply"
    found = query.main([*words, "a chair", "--best", "50", "--save", str(chair), "--json"])
    assert json.loads(capsys.readouterr().out) == found
    assert found[0]["query"] == "a chair" and found[0]["gaussians"] == 50 and found[0]["of"] == len(scene)
    saved = read_scene(chair, Reading(up="z"))  # a part of a room may lie on any side
    assert len(saved) == 50 and saved.colours_NC.shape[1] == scene.colours_NC.shape[1]
    places = {tuple(round(v, 3) for v in row) for row in scene.means_N3.tolist()}
    origin = torch.zeros(3) if saved.origin_3 is None else saved.origin_3
    assert {tuple(round(v, 3) for v in row) for row in (saved.means_N3.double() + origin).tolist()} <= places

    two = query.main([*words, "a chair", "sofa", "--threshold", "0", "--out", str(tmp_path / "found.png")])
    assert [answer["gaussians"] for answer in two] == [len(scene)] * 2
    assert open_rgb(tmp_path / "found.png").shape[1] > 500
    refused("no Gaussian scores above 1", query.main, [*words, "a chair", "--threshold", "1", "--save", str(chair)])
    refused("--save: expected one query", query.main, [*words, "a chair", "sofa", "--save", str(chair)])
    refused("--out x.jpg: expected a name that ends in .png", query.main, [*words, "a", "--out", "x.jpg"])
    pca = tmp_path / "pca.ply"
    query.main([*words, "a chair", "--features", str(pca), "--paint", str(tmp_path / "red.ply"), "--threshold", "0"])
    assert len(read_scene(pca)) == len(read_scene(tmp_path / "red.ply")) == len(scene)
    query.main([*words, "a chair", "--features", str(tmp_path / "f.safetensors")])
    kept = read_weights(tmp_path / "f.safetensors")[0]["features"]
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(len(scene)))


def test_a_score_is_the_odds_against_the_hardest_negative() -> None:
    from scenesplat.query import negatives_for, relevance

    features = torch.eye(3)
    score = relevance(features, torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0], [0.5, 0, 0]]))
    wanted = [1 / (1 + 2.718281828 ** (-10 * (1 - 0.5))), 1 / (1 + 2.718281828**10), 0.5]
    assert score[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert negatives_for(["the Wall"], ["wall", "floor"]) == ["floor"]
    refused("--negatives a wall: expected another name", negatives_for, ["wall"], ["a wall"])


def test_labelled_scenes_of_the_users_are_measured(reference: Path, tmp_path: Path) -> None:
    from scenesplat import evaluate

    refused("expected either --run_dir", evaluate.main, [])
    words = ["--model", str(reference / "model")]
    refused("--scenes is missing", evaluate.main, words)
    refused(
        "--labels nonsense: expected one of scannet20", evaluate.main, [*words, "--scenes", "x", "--labels", "nonsense"]
    )
    assert evaluate.main(["--run_dir", str(reference)])["scenes"] == 1
