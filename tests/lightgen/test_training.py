"""The trainer on tiny networks: exact resume, processes, hand-over, preferences, folders that stand alone, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.images import open_rgb
from common.weights import read_weights
from lightgen.painter import Painter
from lightgen.run import AVERAGE, MODEL, WEIGHTS, Run
from lightgen.trainer import MaskedTraining, PreferenceTraining
from tests.drills import kill, same_weights, succeed
from tests.lightgen.tiny_run import arguments, inputs, losses, train
from tests.refusals import refused

STEPS = {"stage1": 3, "stage2": 4, "sft": 3, "dpo": 3}
PARTS = tuple(STEPS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where teacher and text encoder lie."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs(folder)
    return folder


@pytest.fixture(scope="module")
def reference(cache: None, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts, never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run", place)


def test_a_run_leaves_its_parts_and_both_errors_of_preferences(reference: Path) -> None:
    assert all((reference / part / WEIGHTS).is_file() for part in PARTS)
    metrics = json.loads((reference / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["before", "sft", "dpo"] and metrics["prompts"] == 12
    columns = ("single", "two", "colors", "counting", "position", "attribution", "overall", "sides")
    assert all(column in metrics["arms"]["dpo"] for column in columns)
    assert (reference / "table.md").read_text().count("\n") == 5 and (reference / "preferences.png").is_file()
    for name in ("accuracy", "margin", "winner_error", "loser_error", "winner_change", "loser_change"):
        assert len(losses(reference, "dpo", name)) == 3
    first = {name: losses(reference, "dpo", name)[0] for name in ("margin", "winner_change", "loss")}
    assert abs(first["margin"]) < 1e-4 and abs(first["winner_change"]) < 1e-6
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_killed_run_goes_on_with_the_same_losses_and_weights(reference: Path, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill("lightgen.train", 6, arguments(run, place))  # in the second stage, after its checkpoint
    train(run, place)
    for part in PARTS:
        assert losses(run, part) == losses(reference, part) and len(losses(run, part)) == STEPS[part]
        assert same_weights(run / part / WEIGHTS, reference / part / WEIGHTS)


def test_finished_parts_are_not_trained_again(reference: Path, place: Path, monkeypatch: Any) -> None:
    for kind in (MaskedTraining, PreferenceTraining):
        monkeypatch.setattr(kind, "training_step", lambda *_: pytest.fail("trained again"))
    train(reference, place)


def test_micro_batches_give_the_losses_of_one(reference: Path, place: Path, tmp_path: Path) -> None:
    parts = train(tmp_path / "parts", place, trainer__accumulate=2, network__dropout=0.0)
    whole = train(tmp_path / "whole", place, network__dropout=0.0)
    for part in PARTS:
        assert losses(parts, part) == pytest.approx(losses(whole, part), rel=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(place: Path, cache: None, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", place, network__dropout=0.0)
    options = {"trainer__devices": 2, "trainer__strategy": "ddp", "network__dropout": 0.0}
    succeed("-m", "lightgen.train", *arguments(tmp_path / "two", place, **options))
    for part in PARTS:
        assert losses(tmp_path / "two", part) == pytest.approx(losses(whole, part), rel=1e-3)


def test_a_stage_begins_with_both_weights_of_the_one_before(reference: Path, place: Path) -> None:
    run = Run.existing(reference)
    trained, averaged = run.restore("stage1") or pytest.fail("not finished")
    config = run.config
    module = MaskedTraining(
        trained,
        averaged,
        lambda ids: torch.zeros(len(ids), 6, 16),
        config.stages,
        config.optimiser,
        seed=0,
        lr=1e-3,
        steps=3,
        batch_size=8,
    )
    assert module.ema is not None
    handed = module.averaged().state_dict()
    assert all(torch.equal(handed[name], value) for name, value in averaged.state_dict().items())
    assert not torch.equal(handed["cross_in.weight"], trained.state_dict()["cross_in.weight"])
    assert module.ema._updates == -1  # its horizon goes on, it is not warmed up again


def test_a_cosine_ends_at_the_least_rate() -> None:
    from lightgen.config import NetworkConfig, OptimiserConfig, StagesConfig
    from lightgen.model import Fluid

    model = Fluid(NetworkConfig(16, 1, 1, 1, 1, 2, 2, 2, head_width=8, head_depth=1, grid=4), 4, 12)
    options = OptimiserConfig(warmup=2, schedule="cosine", min_lr=1e-4, ema_decay=0.0)
    module = MaskedTraining(
        model,
        None,
        lambda ids: torch.zeros(len(ids), 6, 12),
        StagesConfig(),
        options,
        seed=0,
        lr=1e-3,
        steps=10,
        batch_size=8,
    )
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = [scheduler.lr_lambdas[0](step) * 1e-3 for step in (1, 5, 9)]
    assert rates == pytest.approx([1e-3, 1e-4 + 0.9e-3 * 0.5, 1e-4])


def test_the_reference_stays_what_the_policy_began_as(reference: Path, place: Path, monkeypatch: Any) -> None:
    """To the bit, at every step; and what is kept of preferences is another model."""
    run = Run.existing(reference)
    start = run.load("stage2").state_dict()
    seen: list[bool] = []
    step = PreferenceTraining.training_step

    def watched(self: PreferenceTraining, *args: Any) -> Any:
        now = self.reference.state_dict()
        seen.append(all(torch.equal(now[name], value) for name, value in start.items()))
        return step(self, *args)

    monkeypatch.setattr(PreferenceTraining, "training_step", watched)
    shutil.rmtree(reference / "dpo")
    train(reference, place)
    assert seen == [True] * 3
    after = run.load("dpo").state_dict()
    assert any(not torch.equal(after[name], value) for name, value in start.items())
    assert not any(
        key.startswith("_reference")
        for key in torch.load(reference / "dpo" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    )


def test_pairs_are_never_mirrored_and_belong_to_one_caption(reference: Path, place: Path) -> None:
    from lightgen.data import given_pictures
    from lightgen.preferences import LOSER_SEED, build_pairs

    run = Run.existing(reference)
    given = given_pictures(run.config, run.pictures, 12)
    painter = run.painter(run.load("stage2"))
    pairs = build_pairs(painter, given, reference / "pairs", progress=False)
    assert pairs.captions == given.captions and len(pairs.table) == 12
    assert torch.equal(pairs.table.columns["winner"], run.autoencoder.encode(given.images(list(range(12)))))
    own = painter.draw([given.captions[5]], LOSER_SEED, first=5)
    torch.testing.assert_close(pairs.table.columns["loser"][5:6], run.autoencoder.encode(own), rtol=1e-3, atol=1e-3)

    def some(pictures: torch.Tensor, captions: Any) -> list[bool]:
        return [index % 3 == 0 for index in range(len(captions))]

    kept = build_pairs(painter, given, reference.parent / "filtered", some, progress=False)
    assert kept.captions == given.captions[::3] and len(kept.table) == 4
    refused(
        "the filter of preferences keeps none",
        build_pairs,
        painter,
        given,
        reference.parent / "nothing",
        lambda pictures, captions: [False] * len(captions),
        progress=False,
    )


def test_the_model_folder_stands_alone(reference: Path, tmp_path: Path) -> None:
    from lightgen import evaluate, geneval, sample

    model = tmp_path / "model"
    shutil.copytree(reference / "model", model)
    given = ["--model", str(model), "--prompt", "a red star", "--device", "cpu", "--count", "2"]
    first = sample.main([*given, "--out", str(tmp_path / "a.png")])
    second = sample.main([*given, "--out", str(tmp_path / "b.png")])
    assert first.read_bytes() == second.read_bytes()
    more = sample.main([*given, "--iterations", "1", "--sampler", "ddim", "--out", str(tmp_path / "c.png")])
    assert more.read_bytes() != first.read_bytes()
    assert open_rgb(sample.main([*given, "--size", "16x32", "--out", str(tmp_path / "d.png")])).shape[1] > 2 * 128
    refused("size 15x16: expected multiples of 4", sample.main, [*given, "--size", "15x16"])
    refused("--image goes with --mask or --outpaint", sample.main, [*given, "--image", str(first)])
    found = evaluate.main(["--model", str(model), "--per_task", "1", "--world", "small"])
    assert 0 <= found["overall"] <= 1
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"tag": "single_object", "include": [], "prompt": "a photo of a bench"}) + "\n")
    out = geneval.main(
        ["write", "--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--count", "2"]
    )
    assert sorted(p.name for p in (out / "00000" / "samples").iterdir()) == ["0000.png", "0001.png"]
    assert json.loads((out / "00000" / "metadata.jsonl").read_text())["tag"] == "single_object"


def test_a_hole_and_a_margin_are_drawn_and_the_rest_is_the_picture(reference: Path, tmp_path: Path) -> None:
    from lightgen import sample

    painter = Painter.load(reference / "model")
    image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[5, 5] = True
    drawn = painter.fill(["a red star"] * 2, image, hole)
    cells = (drawn != image[None]).any(1)
    assert bool(cells[:, 4:8, 4:8].any()) and not bool(cells[:, 8:].any()) and not bool(cells[:, :, 8:].any())
    refused("there is no hole", painter.fill, ["a"], image, torch.zeros(16, 16, dtype=torch.bool))
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(picture)
    Image.fromarray((255 * hole.numpy()).astype("uint8")).save(mask)
    given = ["--model", str(reference / "model"), "--prompt", "a red star", "--count", "1", "--device", "cpu"]
    given += ["--image", str(picture)]
    filled = sample.main([*given, "--mask", str(mask), "--out", str(tmp_path / "a.png")])
    assert open_rgb(filled).shape[0] > 16
    sample.main([*given, "--outpaint", "4", "--out", str(tmp_path / "b.png")])
    refused("--outpaint 8: expected less than half", sample.main, [*given, "--outpaint", "8"])


def test_the_authors_weights_come_in_and_go_out(reference: Path, place: Path, tmp_path: Path) -> None:
    from lightgen import convert
    from lightgen.model import Mar, MarConfig, official

    theirs = convert.main(["--model", str(reference / "model"), "--out", str(tmp_path / "official.safetensors")])
    state, _ = read_weights(theirs)
    assert "diffloss.net.res_blocks.0.adaLN_modulation.1.weight" in state and "fake_latent" in state
    import argparse

    checkpoint = {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state, "args": argparse.Namespace(lr=1.0)}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    teacher, encoder = inputs(place)
    given = ["--official", str(tmp_path / "checkpoint.pth"), "--autoencoder", str(teacher), "--text", str(encoder)]
    given += ["--length", "6", "--size", "16", "--heads", "2"]
    back = convert.main([*given, "--out", str(tmp_path / "back")])
    assert same_weights(back / "model.safetensors", reference / "model" / "model.safetensors")
    # Our own file tells the rest by itself.
    direct = ["--official", str(theirs), "--autoencoder", str(teacher), "--text", str(encoder)]
    again, source = (
        Painter.load(folder)
        for folder in (convert.main([*direct, "--out", str(tmp_path / "direct")]), reference / "model")
    )
    assert again.model.config == source.model.config and again.sampling == source.sampling
    assert (again.size, again.text.config.length) == (source.size, source.text.config.length)
    other = convert.main([*given, "--weights", "trained", "--out", str(tmp_path / "other")])
    assert not same_weights(other / "model.safetensors", back / "model.safetensors")
    a, b = (Painter.load(folder).model for folder in (back, reference / "model"))
    assert a.config.head_depth == b.config.head_depth and a.config.text_depth == b.config.text_depth
    refused("width 16 was not published", convert.main, [*given[:-2], "--out", str(tmp_path / "none")])
    refused("exists; choose another name", convert.main, [*given, "--out", str(back)])
    torch.manual_seed(0)
    mar = Mar(MarConfig(16, 1, 2, 16, 1, 2, tokens=2, token=4, buffer=3, classes=5, head_width=16, head_depth=1))
    torch.save({"model_ema": {official(k, "mar"): v for k, v in mar.state_dict().items()}}, tmp_path / "mar.pth")
    file = convert.main(
        ["--mar", str(tmp_path / "mar.pth"), "--heads", "2", "--out", str(tmp_path / "mar.safetensors")]
    )
    loaded = convert.load_mar(file)
    tokens, masked = torch.randn(2, 4, 4), torch.tensor([[True, False, True, False]] * 2)
    with torch.no_grad():
        wanted = mar.eval()(tokens, masked, torch.tensor([0, 4]))
        torch.testing.assert_close(loaded(tokens, masked, torch.tensor([0, 4])), wanted)


def test_a_teachers_set_goes_on_and_mends_itself(place: Path, tmp_path: Path) -> None:
    from common.data.folders import open_source
    from lightgen import distil

    teacher, _ = inputs(place)
    out = tmp_path / "set"
    given = ["--teacher", str(teacher), "--captions", "shapes", "--count", "6", "--steps", "2", "--out", str(out)]
    distil.main([*given, "--device", "cpu"])
    whole = {file.name: file.read_bytes() for file in out.rglob("*.png")}
    assert len(whole) == 6 and len((out / "metadata.jsonl").read_text().splitlines()) == 6
    assert json.loads((out / "provenance.json").read_text())["teacher"]["solver"] == "DDIMScheduler"
    victim = next(out.rglob("*3.png"))
    victim.write_bytes(b"damaged")
    distil.main([*given, "--device", "cpu"])
    assert {file.name: file.read_bytes() for file in out.rglob("*.png")} == whole
    refused("holds another set .seed differ", distil.main, [*given, "--seed", "1", "--device", "cpu"])
    source = open_source(out)
    assert len(source) == 6 and source.label(0)[0]
    drawn = distil.main(
        ["--teacher", "renderer", "--captions", "shapes", "--count", "3", "--size", "16", "--out", str(tmp_path / "r")]
    )
    assert open_rgb(next(drawn.rglob("*.png"))).shape == (16, 16, 3)
    refused(
        "--teacher renderer draws --captions shapes only",
        distil.main,
        ["--teacher", "renderer", "--captions", "emoji", "--out", str(tmp_path / "x")],
    )


def test_any_pipeline_of_diffusers_can_be_the_teacher(place: Path, tmp_path: Path) -> None:
    """One that is no U-Net of Stable Diffusion's kind goes through its own pipeline: here, for its size alone."""
    from lightgen import distil

    teacher, _ = inputs(place)
    out = tmp_path / "set"
    given = ["--teacher", str(teacher), "--captions", "shapes", "--count", "2", "--steps", "2", "--size", "32"]
    distil.main([*given, "--out", str(out), "--device", "cpu"])
    assert {open_rgb(file).shape for file in out.rglob("*.png")} == {(32, 32, 3)}


def test_official_results_become_columns(tmp_path: Path) -> None:
    from lightgen import geneval

    lines = [{"tag": tag, "prompt": "a", "correct": i % 2 == 0} for tag in geneval.TAGS for i in range(4)]
    lines += [{"tag": "single_object", "prompt": "a", "correct": True}] * 4
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = geneval.main(["table", "--results", str(file)])
    assert found["single"] == 0.75 and found["two"] == 0.5
    assert found["overall"] == pytest.approx((0.75 + 5 * 0.5) / 6)  # of tasks, not of prompts
    file.write_text('{"tag": "colors", "prompt": "a"}\n')
    refused('line 1: "correct" is missing', geneval.main, ["table", "--results", str(file)])
    file.write_text('{"tag": "shape", "prompt": "a"}\n')
    refused("line 1: expected an object", geneval.main, ["table", "--results", str(file)])


def test_left_and_right_count_only_where_both_objects_are_there() -> None:
    import numpy as np

    from common.data.shapes import Object, Scene, render, spec_of
    from lightgen.geneval import columns, sides_right

    def scene(left: bool) -> Scene:
        red = Object("star", "red", "solid", 0.25 if left else 0.75, 0.5, 0.2)
        blue = Object("circle", "blue", "solid", 0.75 if left else 0.25, 0.5, 0.2)
        return Scene("position", "white", (red, blue), "left of" if left else "right of")

    images = torch.from_numpy(np.stack([render(scene(side), 64).transpose(2, 0, 1) for side in (True, False)]))
    spec = spec_of(scene(True))
    assert sides_right(images, [spec, spec]) == (0.5, 2)
    blank = torch.full_like(images[:1], 250)
    assert sides_right(torch.cat([images[:1], blank]), [spec, spec]) == (1.0, 1)
    assert columns(images, [spec, spec])["position"] == 0.5


def test_every_arm_of_data_trains(cache: None, place: Path, tmp_path: Path) -> None:
    """Drawn scenes without an autoencoder, in raster order; the user's own with a regression head."""
    options: dict[str, Any] = {"autoencoder": "pixels", "preferences__pairs": 0, "stages__sizes": "[16]"}
    options |= {"stages__steps": "[2]", "stages__lr": "[0.001]", "network__patch": 4, "network__grid": 4}
    first = train(tmp_path / "a", place, data__name="shapes", network__order="raster", **options)
    assert len(losses(first)) == 2 and not (first / "model" / "vae").exists()
    painter = Painter.load(first / "model")
    assert painter.draw(["a red star"]).shape == (1, 3, 16, 16)
    refused(
        "a model in raster order cannot fill holes",
        painter.fill,
        ["a"],
        torch.zeros(3, 16, 16, dtype=torch.uint8),
        torch.ones(16, 16, dtype=torch.bool),
    )
    own = tmp_path / "own"
    own.mkdir()
    for number in range(20):
        Image.new("RGB", (20, 16), (12 * number, 99, 0)).save(own / f"{number}.png")
        (own / f"{number}.txt").write_text(f"a red star {number}")
    owned = {"data__name": "folder", "data__path": own, "evaluation__grid": 1}
    second = train(tmp_path / "b", place, network__head="regression", **owned, **options)
    metrics = json.loads((second / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"before", "pictures held out"} and "r_at_1" in metrics["arms"]["before"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stages__sizes": "[8]"}, "--stages.sizes .8., steps .3, 4.*: expected as many entries"),
        ({"stages__sizes": "[16,8]"}, "--stages.sizes .16, 8.: expected rising sizes"),
        ({"stages__sizes": "[8,15]"}, "size 15x15: expected multiples of 4"),
        ({"network__encoder_heads": 3}, "--network.encoder_heads 3 does not divide"),
        ({"network__head": "regression"}, "expected --preferences.pairs 0"),
        ({"sampling__head_chain": "fast"}, "chain 'fast': expected a number of steps"),
        ({"data__name": "folder"}, "--data.name folder needs --data.path"),
        ({"data__images": 0}, "--data.images 0: expected a number of at least 1"),
        ({"autoencoder": "no_such"}, "--autoencoder no_such: no vae/config.json"),
        ({"text__length": 7}, "reads at most 6 tokens, 7 were asked for"),
        ({"preferences__batch_size": 4000}, "--preferences.batch_size 4000: expected at most"),
        ({"trainer__batch_size": 10**6}, "--trainer.batch_size 1000000: expected at most"),
        ({"preferences__beta": 0}, "--preferences.beta 0.0: expected a number"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, place: Path, cache: None, tmp_path: Path
) -> None:
    refused(sentence, train, tmp_path / "run", place, **options)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(cache: None, place: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightgen.trainer.masked_loss", lambda model, *_: model.mask_token.sum() * float("nan"))
        refused("the loss became nan at step 1", train, tmp_path / "nan", place)
    assert not (tmp_path / "nan" / "stage1" / WEIGHTS).exists()


def test_weights_of_both_kinds_are_kept(reference: Path) -> None:
    state, _ = read_weights(reference / "stage2" / WEIGHTS)
    starts = {name.partition(".")[0] + "." for name in state}
    assert starts == {MODEL, AVERAGE}
