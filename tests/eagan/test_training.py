"""The whole program: a run, its folder, exact resume, the programs that read it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.images import open_rgb
from eagan.augment import augmented
from eagan.config import GameOptions, NetworkConfig
from eagan.data import RealBatches, open_pictures
from eagan.evaluate import main as evaluate
from eagan.genotypes import PUBLISHED
from eagan.model import ConvOp, Discriminator, Generator
from eagan.retraining import Training, load_discriminator, load_generator
from eagan.run import given_pair, stage_options, stages
from eagan.sample import main as sample
from eagan.training import Diverged, Game, adam, placed
from tests.drills import kill, same_weights
from tests.eagan.tiny_run import CPU, NETWORK, RUN, TRAIN, arguments, digits, train
from tests.refusals import refused


@pytest.fixture(scope="module")
def whole(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


def test_a_run_searches_trains_and_measures(whole: Path) -> None:
    metrics = json.loads((whole / "metrics.json").read_text())
    genes = json.loads((whole / "genotype.json").read_text())
    about = json.loads((whole / "model" / "config.json").read_text())
    assert about["generator"] == metrics["generator"] == genes["generator"]  # the found pair, not another
    assert about["discriminator"] == metrics["discriminator"] == genes["discriminator"]
    assert metrics["images"] == metrics["floor"]["images"] == 24 and metrics["judge"] == "classes64"
    assert set(metrics["ways_of_normalising"]) == {"running", "batch", "genotype"}
    assert metrics["fid"] == metrics["ways_of_normalising"]["genotype"]["fid"]
    assert metrics["augment"] == ["colour", "translation", "cutout"]
    for stage in ("stage_g", "stage_d"):
        rounds = sorted(path.name for path in (whole / stage / "rounds").iterdir())
        assert rounds == ["00.json", "00.png", "01.json", "01.png"]
        assert (whole / stage / "fronts.png").is_file() and not (whole / stage / "evaluated").exists()
    last = json.loads((whole / "stage_d" / "rounds" / "01.json").read_text())["individuals"]
    (best,) = [row for row in last if row["best"]]
    assert best["discriminator"] == genes["discriminator"] and best["fid"] == min(row["fid"] for row in last)
    assert open_rgb(whole / "samples.png").shape[1] > 400
    table = (whole / "table.md").read_text()
    assert "| stage_d, round 1: mean (best) of the population |" in table and "| real against real |" in table
    assert "generator, cell 3" in (whole / "generator.svg").read_text()


def test_a_killed_run_ends_as_one_that_nothing_befell(whole: Path, tmp_path: Path) -> None:
    kill("eagan.train", 13, arguments(tmp_path / "run"))
    train(tmp_path / "run")
    for name in ("generator", "discriminator"):
        file = Path("model") / f"{name}.safetensors"
        assert same_weights(tmp_path / "run" / file, whole / file)
    fids = [json.loads((folder / "metrics.json").read_text())["fid"] for folder in (tmp_path / "run", whole)]
    assert fids[0] == fids[1]


def test_a_finished_run_is_only_measured_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Game, "discriminator_step", lambda *_: pytest.fail("trained again"))
    before = json.loads((whole / "metrics.json").read_text())
    after = train(whole)
    assert after["fid"] == before["fid"] and after["seconds"] == before["seconds"]


def test_programs_read_the_folder_alone(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagan.data.open_pictures", lambda *_: pytest.fail("opened the data"))
    content = evaluate(["--run_dir", str(whole)])
    metrics = json.loads((whole / "metrics.json").read_text())
    assert content["ways_of_normalising"]["running"]["fid"] == metrics["ways_of_normalising"]["running"]["fid"]
    model = ["--model", str(whole / "model"), "--seed", "3"]
    many = sample([*model, "--count", "9", "--folder", str(tmp_path / "nine")])
    few = sample([*model, "--count", "2", "--folder", str(tmp_path / "two")])
    assert len([*many.iterdir()]) == 9
    assert (many / "00001.png").read_bytes() == (few / "00001.png").read_bytes()  # a function of (seed, i)
    walk = sample([*model, "--count", "2", "--walk", "3", "--out", str(tmp_path / "walk.png")])
    assert open_rgb(walk).shape[1] == 3 * 66 + 2
    refused("--walk 1: expected at least 2", sample, [*model, "--walk", "1"])
    refused("expected the folder `model`", sample, ["--model", str(tmp_path)])
    assert load_discriminator(whole / "model").genotype is not None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"network__latent_dim": 7}, "--network.latent_dim 7: expected a multiple of three"),
        ({"network__bottom_width": 3}, "--network.bottom_width 3: expected an even number"),
        ({"search__fixed": "nothing"}, "--search.fixed nothing: no such file"),
        ({"genotype": "best_G"}, "--genotype best_G: expected a JSON file, or two names"),
        ({"data__only": "[eleven]"}, "--data.only eleven: digits has the classes 0, 1"),
        ({"data__name": "folder"}, "--data.name folder needs --data.path"),
        ({"data__name": "stl10"}, "--data.name stl10 needs --data.path"),
        ({"evaluation__images": 100}, "--evaluation.images 100: digits has 60 training pictures"),
        ({"evaluation__judge": "nobody"}, 'unknown feature extractor "nobody"'),
        ({"stage_g__batch_real": 10**6}, "--stage_g.batch_real 1000000: expected at most"),
        ({"search__fixed": "simple"}, "--search.fixed simple: expected pictures of at least 32 pixels, not 16"),
        ({"search__population": 1}, "--search.population 1: expected a whole number"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, cache: None, tmp_path: Path
) -> None:
    refused(sentence, train, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_told_where_they_may_help(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("trains in one process; .* see --evaluation.engine", train, tmp_path / "run")


def test_the_variants_of_section_5_3_are_orders_of_stages() -> None:
    from common.cli import parse_config
    from eagan.config import RunConfig

    def run(*words: str) -> RunConfig:
        return parse_config(RunConfig, None, "", list(words))[0]

    assert stages(run()) == [("stage_g", "generator"), ("stage_d", "discriminator")]
    assert stages(run("--search.order", "d_first")) == [("stage_d", "discriminator"), ("stage_g", "generator")]
    assert stages(run("--search.order", "g_only")) == [("stage_g", "generator")]
    assert stages(run("--search.order", "coupled")) == [("coupled", "both")]
    config = run("--stage_g.rounds", "3", "--stage_d.rounds", "4")
    assert stage_options(config, "both").rounds == 7 and stage_options(config, "both").lr_d == config.stage_g.lr_d
    assert given_pair(run("--genotype", "best_G,simple")) == (PUBLISHED["best_G"], None)


SIMPLE = {"search__order": "g_only", "search__fixed": "simple", "network__bottom_width": 4}


@pytest.mark.parametrize("options", [{"search__order": "d_first"}, SIMPLE])
def test_other_orders_end_with_a_trained_pair(options: dict[str, Any], cache: None, tmp_path: Path) -> None:
    metrics = train(tmp_path / "run", **options, stage_g__rounds=1, stage_d__rounds=1, search__selection="cars")
    if options["search__order"] == "g_only":
        assert metrics["discriminator"] == "simple" and not (tmp_path / "run" / "stage_d").exists()
    else:
        assert metrics["discriminator"] != json.loads(json.dumps(PUBLISHED["base_D"]))
    assert load_generator(tmp_path / "run" / "model")[1]["generator"] == json.loads(json.dumps(metrics["generator"]))


# The two steps


def game(options: GameOptions) -> tuple[Game, Generator, Discriminator]:
    torch.manual_seed(0)
    batches = RealBatches(digits().train, options.batch_real, 10, 0)
    pair = Generator(NETWORK, PUBLISHED["best_G"]), Discriminator(NETWORK, PUBLISHED["base_D"])
    return Game(options, batches, NETWORK.latent_dim, 0, CPU, False), *pair


def test_each_step_moves_its_own_network_alone(cache: None) -> None:
    play, generator, discriminator = game(GameOptions(4, 4))
    before = [{n: p.clone() for n, p in net.named_parameters()} for net in (generator, discriminator)]

    def moved() -> list[bool]:
        pairs = zip((generator, discriminator), before)
        return [any(not torch.equal(p, old[n]) for n, p in net.named_parameters()) for net, old in pairs]

    play.discriminator_step(0, generator, discriminator, adam(discriminator, 0.01))
    assert moved() == [False, True]
    before[1] = {n: p.clone() for n, p in discriminator.named_parameters()}
    play.generator_step(0, generator, discriminator, adam(generator, 0.01))
    assert moved() == [True, False] and all(p.requires_grad for p in discriminator.parameters())


def test_channels_last_takes_the_same_step(cache: None) -> None:
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        play, generator, discriminator = game(GameOptions(4, 4))
        generator.to(memory_format=layout)  # type: ignore[call-overload]
        discriminator.to(memory_format=layout)  # type: ignore[call-overload]
        play.generator_step(0, generator, discriminator, adam(generator, 0.0))
        gradients.append(torch.cat([p.grad.flatten() for p in generator.parameters() if p.grad is not None]))
    plain, last = gradients
    assert (plain - last).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_placed_has_finite_gradients(bf16: bool) -> None:
    # With channels last, in bf16 and on a CPU, oneDNN's gradient of a dilated convolution's weight is not.
    torch.manual_seed(0)
    operation = placed(ConvOp(24, 5, 2, 1, spectral=False), CPU, bf16)
    weight = operation.get_submodule("dilconv").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last) == (not bf16)
    pictures = torch.randn(32, 24, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        operation(pictures).float().square().mean().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_a_training_pass_follows_the_spectral_norm_once_for_real_and_once_for_generated(cache: None) -> None:
    play, generator, discriminator = game(GameOptions(4, 4))
    weight = discriminator.block1.c1
    original, calls = weight.normalised, []
    weight.normalised = lambda: (calls.append(1), original())[1]  # type: ignore[method-assign]
    play.discriminator_step(0, generator, discriminator, adam(discriminator, 0.0))
    play.generator_step(0, generator, discriminator, adam(generator, 0.0))
    assert len(calls) == 3


def test_gradients_are_clipped_by_their_norm(cache: None) -> None:
    play, generator, discriminator = game(GameOptions(4, 4, clip=1e-3))
    optimiser = torch.optim.SGD(generator.parameters(), 1.0)
    before = torch.cat([p.detach().flatten() for p in generator.parameters()])
    _, norm = play.generator_step(0, generator, discriminator, optimiser)
    after = torch.cat([p.detach().flatten() for p in generator.parameters()])
    assert norm > 1e-2 and float((after - before).norm()) == pytest.approx(1e-3, rel=0.02)


def test_the_average_has_the_live_networks_statistics(cache: None, tmp_path: Path) -> None:
    pair = PUBLISHED["best_G"], PUBLISHED["base_D"]
    training = Training(replace(TRAIN, ema_decay=0.5), NETWORK, *pair, digits(), tmp_path, 0, RUN, CPU)
    averaged, _ = training.run()
    live = training.generator
    assert torch.equal(averaged.to_rgb[0].running_mean, live.to_rgb[0].running_mean)
    assert not torch.equal(averaged.l1.weight, live.l1.weight)


def test_a_training_that_diverges_stops_and_keeps_its_checkpoint(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = PUBLISHED["best_G"], PUBLISHED["base_D"]
    training = Training(TRAIN, NETWORK, *pair, digits(), tmp_path, 0, RUN, CPU)
    training.train(stop_after=4)
    monkeypatch.setattr("eagan.training.discriminator_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(Diverged):
        training.game.discriminator_step(0, training.generator, training.discriminator, training.d_optimiser)
    sentence = refused("the loss or a gradient became nan at step 5: stopped; the last good", training.train)
    assert str(tmp_path / "last.ckpt") in sentence


# Pictures


def test_changes_of_pictures_are_drawn_anew_and_let_gradients_through() -> None:
    x = torch.rand(6, 3, 16, 16, requires_grad=True)
    for name in ("colour", "translation", "cutout"):
        found = augmented(x, [name], torch.Generator().manual_seed(1))  # type: ignore[list-item]
        again = augmented(x, [name], torch.Generator().manual_seed(1))  # type: ignore[list-item]
        other = augmented(x, [name], torch.Generator().manual_seed(2))  # type: ignore[list-item]
        assert found.shape == x.shape and torch.equal(found, again) and not torch.equal(found, other)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        assert gradient.abs().sum() > 0
    assert augmented(x, [], torch.Generator()) is x
    cut = augmented(torch.ones(9, 3, 16, 16), ["cutout"], torch.Generator().manual_seed(0))
    assert all(0 < float((picture == 0).float().mean()) <= 0.25 for picture in cut)


def test_stl10_is_read_column_by_column(tmp_path: Path) -> None:
    from eagan.config import DataConfig

    picture = torch.zeros(3, 96, 96, dtype=torch.uint8)
    picture[:, :, 48:] = 200  # the right half is bright
    for name, count in (("train_X", 3), ("unlabeled_X", 4), ("test_X", 2)):
        (tmp_path / f"{name}.bin").write_bytes(bytes(picture.transpose(1, 2).contiguous().flatten().tolist()) * count)
    found = open_pictures(DataConfig(name="stl10", path=str(tmp_path)), NetworkConfig(bottom_width=6).side)
    assert (len(found.train), len(found.held_out)) == (7, 2)
    one = found.train.source.take(torch.tensor([0]))[0]
    assert one.shape == (3, 48, 48) and one[:, :, :20].max() < 10 and one[:, :, 28:].min() > 190
    (tmp_path / "test_X.bin").write_bytes(b"1234")
    refused("test_X.bin: 4 bytes are no whole number", open_pictures, DataConfig(name="stl10", path=str(tmp_path)), 48)
