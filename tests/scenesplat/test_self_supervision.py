"""GaussianSSL: what is hidden, heads that train, the trainer and what it leaves behind, fine-tuning."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.weights import read_weights
from scenesplat.crops import CropData, crops_of, hidden_patches, other_colours, sphere
from scenesplat.data import Draws, SceneData, open_scenes
from scenesplat.data_config import DataConfig
from scenesplat.export import LabelModel, SceneModel
from scenesplat.gaussians import Gaussians
from scenesplat.inference import scene_probabilities, test_views
from scenesplat.language_codes import fit, with_codes
from scenesplat.model import PointTransformer
from scenesplat.ply import write_scene
from scenesplat.pretrain_config import CropConfig, LabelConfig, SelfOptimiserConfig, TermsConfig
from scenesplat.rooms import SEEN, make_room
from scenesplat.self_supervision import (
    RELEASED,
    activated,
    effective_rank,
    hidden_error,
    looked_at,
    make_heads,
    masked_head,
    step_losses,
)
from scenesplat.trainer import LabelTraining, SelfSupervision, label_losses, optimiser_of
from tests.drills import kill, same_weights
from tests.refusals import refused
from tests.scenesplat.golden_cases import tiny_network
from tests.scenesplat.tiny_pretraining import command, finetune, logged, pretrain

test_views.__test__ = False  # type: ignore[attr-defined]  # a name of the library's, no test
DATA = DataConfig(density=30, voxel=0.2, augment=False)
NAMES = list(DATA.inputs)
SMALL = TermsConfig(hidden=16, bottleneck=8, codes=[4])


@pytest.fixture(scope="module")
def scenes() -> SceneData:
    """Three rooms whose features are made up: the class, as a direction."""
    rooms = [make_room(seed, "train", density=30) for seed in range(3)]
    directions = torch.nn.functional.normalize(torch.randn(len(SEEN), 12, generator=torch.Generator().manual_seed(0)))
    given = []
    for room in rooms:
        labels = room.gaussians.labels_N
        assert labels is not None
        given.append(replace(room.gaussians, features_NF=directions[labels], valid_N=labels >= 0))
    return SceneData(given, SEEN, DATA, rooms=rooms)


def network() -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(tiny_network(in_channels=11, mask_token=True, pooling="max"))


def batch(scenes: SceneData, options: CropConfig | None = None, seed: int = 3) -> dict[str, Any]:
    coded, _ = with_codes(scenes.scenes, [4], 0, steps=20)
    return CropData(scenes, coded, options or CropConfig(locals=2, patch=0.4)).__getitems__([(0, seed), (1, seed + 1)])


def losses_of(student: PointTransformer, heads: torch.nn.ModuleDict, given: dict[str, Any], terms: TermsConfig) -> Any:
    crops = given["globals"]
    teacher = PointTransformer(student.options) if terms.distillation or terms.patches else None
    masks, weights = [crop["mask"] for crop in crops], [crop["weight"] for crop in crops]
    return step_losses(student, teacher, heads, crops, given["locals"], masks, weights, terms, NAMES)


# Crops


def test_a_share_of_metric_patches_is_hidden_whole_patch_by_patch() -> None:
    coord = torch.cartesian_prod(*[torch.arange(8.0) * 0.1] * 3)
    mask = hidden_patches(coord, 0.5, 0.4, torch.Generator().manual_seed(0))
    cubes = (coord / 0.4 + 1e-4).floor().long()
    for cube in cubes.unique(dim=0):
        inside = mask[(cubes == cube).all(1)]
        assert bool(inside.all()) or not bool(inside.any())
    assert float(mask.float().mean()) == 0.5
    alone = hidden_patches(coord, 0.5, 0.01, torch.Generator().manual_seed(0))  # the released code's patches
    assert float(alone.float().mean()) == 0.5 and not torch.equal(alone, mask)
    assert not hidden_patches(coord, 0.0, 0.4, torch.Generator()).any()
    assert hidden_patches(coord, 1e-6, 0.4, torch.Generator()).any()


def test_both_global_crops_share_their_region_and_locals_are_smaller(scenes: SceneData) -> None:
    options = CropConfig(locals=3, global_least=0.6, local_least=0.1, local_most=0.2)
    globals_, locals_ = crops_of(scenes.scenes[0], DATA, options, 5)
    assert len(globals_) == 2 and len(locals_) == 3
    whole = len(crops_of(scenes.scenes[0], DATA, replace(options, global_least=1.0), 6)[0][0]["coord"])
    assert all(len(crop["coord"]) < 0.25 * whole for crop in locals_)
    for crop in globals_:
        assert len(crop["grid_coord"].unique(dim=0)) == len(crop["grid_coord"]) and crop["feat"].shape[1] == 11
        assert float(crop["weight"].sum()) == pytest.approx(1.0) and len(crop["weight"]) == int(crop["mask"].sum())
    assert not torch.equal(globals_[0]["feat"][:50, :3], globals_[1]["feat"][:50, :3])  # other colours
    again = crops_of(scenes.scenes[0], DATA, options, 5)[0][0]
    assert all(torch.equal(globals_[0][name], again[name]) for name in again)
    bare = crops_of(scenes.scenes[0], DATA, options, 5, masked=False)[0][0]
    assert not bare["mask"].any() and len(bare["weight"]) == 0


def test_a_sphere_holds_the_nearest_voxels_and_other_colours_stay_colours() -> None:
    places = torch.rand(400, 3, generator=torch.Generator().manual_seed(1))
    rows = sphere(places, 0.25, 10**6, Draws(0))
    assert len(rows) == 100
    inside = (places[rows] - places[rows].mean(0)).norm(dim=1).mean()
    assert float(inside) < float((places - places.mean(0)).norm(dim=1).mean())
    assert len(sphere(places, 1.0, 50, Draws(0))) == 50
    colours = 255 * torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
    found = [other_colours(colours, Draws(seed), True) for seed in range(20)]
    assert all(float(one.min()) >= 0 and float(one.max()) <= 255 for one in found)
    assert any(torch.equal(one[:, 0], one[:, 1]) for one in found)  # grey


def test_half_of_the_scenes_is_masked_where_the_released_share_is_asked_for(scenes: SceneData) -> None:
    given = batch(scenes, CropConfig(locals=0, masked=0.5, ratio_least=0.1, ratio_most=0.5))
    ends = [0, *given["globals"][0]["offset"].tolist()]
    masked = [bool(given["globals"][0]["mask"][a:b].any()) for a, b in itertools.pairwise(ends)]
    assert sorted(masked) == [False, True] and given["locals"] == []


# Terms


def test_nothing_hidden_leaks_where_it_is_hidden_before_the_first_convolution(scenes: SceneData) -> None:
    """With hiding after it, as in the released code, the attributes of hidden Gaussians change what is seen of them."""
    given, student = batch(scenes), network().eval()
    crop = given["globals"][0]
    other = {**crop, "feat": torch.where(crop["mask"][:, None], crop["feat"].flip(0), crop["feat"])}
    for before, equal in ((True, True), (False, False)):
        one, two = (looked_at(student, each, crop["mask"], before)[1]() for each in (crop, other))
        assert torch.equal(one, two) == equal


def test_every_term_moves_the_encoder_and_its_own_head_and_the_head_of_no_other(scenes: SceneData) -> None:
    given = batch(scenes)
    for name, key in {"masked": "mae", "distillation": "dino", "patches": "ibot", "language": "language"}.items():
        others = {other: 0.0 for other in ("masked", "distillation", "patches", "language") if other != name}
        terms, student = replace(SMALL, **others), network()
        heads = make_heads(16, 12, 11, terms, 4)
        assert list(heads) == [key]
        losses_of(student, heads, given, terms)["loss"].backward()
        gradients = [p.grad for p in heads.parameters()]
        assert all(g is not None and float(g.abs().sum()) > 0 for g in gradients), name
        assert float(sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None)) > 0, name


def test_heads_train_and_their_loss_falls_where_frozen_ones_stay_as_they_were_drawn(scenes: SceneData) -> None:
    """The released code leaves its heads out of the optimiser."""
    given, found = batch(scenes), {}
    for trained in (True, False):
        terms = replace(SMALL, train_heads=trained)
        torch.manual_seed(0)
        module = SelfSupervision(network(), terms, SelfOptimiserConfig(), NAMES, 4, seed=0, steps=40, batch_size=2)
        begun = {name: p.detach().clone() for name, p in module.heads.named_parameters()}
        both = torch.nn.ModuleDict({"network": module.network, "heads": module.heads})
        optimiser, _ = optimiser_of(both, SelfOptimiserConfig(lr=0.02, block_lr=0.01), 400)
        values = []
        for _ in range(25):
            parts = losses_of(module.network, module.heads, given, replace(terms, distillation=0.0, patches=0.0))
            optimiser.zero_grad()
            parts["loss"].backward()
            optimiser.step()
            values.append({name: float(value.detach()) for name, value in parts.items()})
        moved = {name: not torch.equal(p, begun[name]) for name, p in module.heads.named_parameters()}
        asked = [name for name in moved if name.startswith(("mae", "language"))]
        assert all(moved[name] for name in asked) if trained else not any(moved.values())
        found[trained] = values
    for name in ("mae", "language"):
        assert found[True][-1][name] < 0.9 * found[True][0][name]
        assert found[True][-1][name] < found[False][-1][name]


def test_a_batch_with_nothing_hidden_has_a_finite_loss(scenes: SceneData) -> None:
    given = batch(scenes, CropConfig(locals=1, masked=0.0))
    parts = losses_of(network(), make_heads(16, 12, 11, SMALL, 4), given, SMALL)
    assert all(bool(torch.isfinite(value)) for value in parts.values())
    parts["loss"].backward()
    assert parts["mae"].item() == parts["language"].item() == 0.0


def test_a_masked_head_with_fewer_answers_is_asked_for_the_last_attributes(scenes: SceneData) -> None:
    given, student = batch(scenes), network().eval()
    terms, head, crop = replace(RELEASED, distillation=0.0, patches=0.0), masked_head(12, 8), given["globals"][0]
    found = losses_of(student, torch.nn.ModuleDict({"mae": head}), given, terms)["mae"]
    guess = head(looked_at(student, crop, crop["mask"])[1]()[crop["mask"]])
    torch.testing.assert_close(found, (guess - crop["feat"][crop["mask"]][:, 3:]).square().mean())


def test_the_masked_head_ends_in_the_ranges_of_its_attributes() -> None:
    found = activated(5 * torch.randn(50, 11, generator=torch.Generator().manual_seed(0)), NAMES)
    assert float(found[:, :3].abs().max()) <= 1 and float(found[:, :3].min()) < 0
    assert float(found[:, 3].min()) >= 0 and float(found[:, 8:].max()) <= 1
    torch.testing.assert_close(found[:, 4:8].norm(dim=1), torch.ones(50))
    assert activated(torch.randn(4, 14), [*NAMES, "normal"]).shape == (4, 14)


def test_the_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    assert effective_rank(torch.randn(5000, 8, generator=generator)) == pytest.approx(8, abs=0.1)
    line = torch.randn(5000, 1, generator=generator) * torch.ones(1, 8)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(10, 3)) == pytest.approx(1, abs=1e-3)


def test_the_hidden_error_is_that_of_the_mean_where_nothing_was_learned(scenes: SceneData) -> None:
    batches = [batch(scenes)]

    class Mean(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            crop = batches[0]["globals"][0]
            return crop["feat"][crop["mask"]].mean(0).expand(len(x), -1)

    found = hidden_error(network().eval(), Mean(), batches, replace(SMALL, activations=False), NAMES)
    assert found["hidden_error"] == pytest.approx(found["mean_error"], rel=1e-5)


# Language codes


def test_codes_are_unit_shorter_and_bring_most_of_a_feature_back() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 24, generator=generator)
    features = torch.nn.functional.normalize(torch.randn(2000, 3, generator=generator) @ basis)
    coder, cosine = fit(features, 6, seed=1, steps=200)
    assert cosine > 0.95
    torch.testing.assert_close(coder.encode(features).norm(dim=1), torch.ones(2000))
    same, _ = fit(features, 6, seed=1, steps=200)
    assert torch.equal(coder.encode(features), same.encode(features))


def test_codes_are_made_step_by_step_and_only_where_there_are_features(scenes: SceneData) -> None:
    none = scenes.scenes[0].valid_N
    assert none is not None
    partly = replace(scenes.scenes[0], valid_N=torch.arange(len(none)) % 2 == 0)
    found, _ = with_codes([partly, scenes.scenes[1]], [8, 4], 0, steps=20)
    assert [one.features_NF.shape[1] for one in found if one.features_NF is not None] == [4, 4]
    first = found[0]
    assert first.features_NF is not None and first.valid_N is not None
    assert not first.features_NF[~first.valid_N].any() and first.features_NF[first.valid_N].any(1).all()
    each, _ = with_codes(scenes.scenes[:2], [4], 0, each=True, steps=20)
    together, _ = with_codes(scenes.scenes[:2], [4], 0, steps=20)
    assert each[0].features_NF is not None and together[0].features_NF is not None
    assert not torch.equal(each[0].features_NF, together[0].features_NF)


# Runs


@pytest.fixture(scope="module")
def reference(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training that was never interrupted."""
    return pretrain(tmp_path_factory.mktemp("pretrained") / "run")


def test_a_killed_pretraining_goes_on_with_the_same_losses_and_weights(reference: Path, tmp_path: Path) -> None:
    kill("scenesplat.pretrain", 3, command(tmp_path / "run"))
    assert not (tmp_path / "run" / "encoder").exists()
    pretrain(tmp_path / "run")
    for name in ("loss", "mae", "dino", "ibot", "language"):
        whole = logged(reference / "pretraining", name)
        assert logged(tmp_path / "run" / "pretraining", name) == whole and len(whole) == 6
    for name in ("encoder", "heads"):
        file = Path("pretraining") / f"{name}.safetensors"
        assert same_weights(tmp_path / "run" / file, reference / file)


def test_a_finished_pretraining_has_an_encoder_and_numbers(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfSupervision, "training_step", lambda *_: pytest.fail("trained again"))
    before = json.loads((reference / "metrics.json").read_text())
    pretrain(reference)
    after = json.loads((reference / "metrics.json").read_text())
    assert {k: v for k, v in before.items() if k != "seconds"} == {k: v for k, v in after.items() if k != "seconds"}
    assert 1 <= after["rank_decoder"] <= 12 and 0 < after["autoencoder_cosine"] <= 1
    assert 0 < after["hidden_error"] < 10 * after["mean_error"]
    weights, _ = read_weights(reference / "encoder" / "model.safetensors")
    assert "mask_token" in weights and not any("heads" in name for name in weights)
    refused("a self-supervised encoder knows no texts", SceneModel.load, reference / "encoder")


def test_without_language_no_picture_is_drawn_and_own_scenes_need_no_classes(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scenesplat.data.views_of", lambda *_: pytest.fail("a picture was drawn"))
    for part in ("train", "test"):
        for seed in range(2):
            scene = make_room(seed, "train", density=20).gaussians
            write_scene(tmp_path / "scenes" / part / f"{seed}.ply", replace(scene, labels_N=None))
    own = {"data__name": "scenes", "data__path": tmp_path / "scenes", "data__augment": "false"}
    run = pretrain(tmp_path / "run", terms__language=0, trainer__max_steps=2, **own)
    assert len(logged(run / "pretraining")) == 2 and logged(run / "pretraining", "language") == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"network__mask_token": "false"}, "--network.mask_token false: expected true"),
        ({"network__in_channels": 3}, "--network.in_channels 3: expected 11"),
        ({f"terms__{k}": 0 for k in ("masked", "distillation", "patches", "language")}, "--terms: expected one term"),
        ({"crops__ratio_least": 0.7}, "--crops.ratio_least 0.7: expected at most --crops.ratio_most, 0.6"),
        ({"crops__local_least": 0.9}, "--crops.local_least 0.9: expected at most --crops.local_most, 0.4"),
        ({"terms__codes": "[]"}, r"--terms.codes \[\]: expected one width at least"),
        (
            {"terms__codes_from": "pictures", "terms__autoencoder": "each"},
            "--terms.autoencoder each: expected together",
        ),
        ({"data__name": "scenes"}, "--data.name scenes needs --data.path"),
        ({"trainer__batch_size": 50}, "--trainer.batch_size 50: expected at most 4 times the 3 training scenes"),
        ({"optimiser__momentum": 2}, "--optimiser.momentum 2.0: expected a number from 0 to 1"),
    ],
)
def test_a_wrong_option_of_pretraining_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, cache: None, tmp_path: Path
) -> None:
    refused(sentence, pretrain, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tuned(reference: Path) -> Path:
    """A fine-tuning of that encoder."""
    return finetune(reference.parent / "tuned", init_from=reference / "encoder")


def test_a_killed_fine_tuning_goes_on_with_the_same_losses_and_weights(
    reference: Path, tuned: Path, tmp_path: Path
) -> None:
    kill("scenesplat.finetune", 3, command(tmp_path / "run", True, init_from=reference / "encoder"))
    finetune(tmp_path / "run", init_from=reference / "encoder")
    assert logged(tmp_path / "run" / "tuning") == logged(tuned / "tuning") and len(logged(tuned / "tuning")) == 6
    assert same_weights(tmp_path / "run" / "tuning" / "labels.safetensors", tuned / "tuning" / "labels.safetensors")


def test_a_fine_tuned_model_is_measured_and_says_what_it_is(reference: Path, tuned: Path, tmp_path: Path) -> None:
    from scenesplat import evaluate

    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["scenes"] == 1 and set(metrics["arms"]) == {"tester", "hook"}
    assert {*json.loads((tuned / "inputs.json").read_text())} == {"data", "weights"}
    model = LabelModel.load(tuned / "model")
    assert model.classes == list(SEEN)
    write_scene(tmp_path / "room", make_room(7, "test", density=20).gaussians)
    found = evaluate.main(["--model", str(tuned / "model"), "--scenes", str(tmp_path)])
    assert found["scenes"] == 1 and 0 <= found["arms"]["tester"]["f_miou"] <= 1
    words = ["--model", str(tuned / "model"), "--scenes", str(tmp_path), "--labels", "scannet20"]
    refused("--labels scannet20: .* answers with the classes it was tuned with", evaluate.main, words)
    refused("fine-tuned with labels answers with classes", SceneModel.load, tuned / "model")
    refused("no config.json there", finetune, tmp_path / "run", init_from=tmp_path)


def test_a_linear_probe_leaves_the_encoder_alone_and_needs_one(reference: Path, tmp_path: Path) -> None:
    probe = finetune(tmp_path / "probe", init_from=reference / "encoder", loss__frozen="true", trainer__max_steps=3)
    before, _ = read_weights(reference / "encoder" / "model.safetensors")
    after, _ = read_weights(probe / "model" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after)
    refused("--loss.frozen: expected --init_from FOLDER", finetune, tmp_path / "run", loss__frozen="true")


def test_probabilities_add_up_over_turned_views_of_a_scene(tuned: Path) -> None:
    model, scene = LabelModel.load(tuned / "model"), make_room(7, "test", density=20).gaussians
    found = scene_probabilities(model, scene, limit=1, views=2)
    torch.testing.assert_close(found.sum(1), torch.ones(len(scene)))
    assert not torch.equal(found, scene_probabilities(model, scene, limit=1))
    views = list(test_views(scene))
    assert len(views) == 13
    extents = [float((view.means_N3.max(0).values - view.means_N3.min(0).values)[2]) for view in views]
    assert extents[4] == pytest.approx(0.95 * extents[0]) and extents[8] == pytest.approx(1.05 * extents[0])


def test_label_losses_are_cross_entropy_and_lovasz_and_nothing_without_labels() -> None:
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]], requires_grad=True)
    right = label_losses(logits, torch.tensor([0, 1]), LabelConfig())
    wrong = label_losses(logits, torch.tensor([1, 0]), LabelConfig())
    assert float(right["loss"]) < 0.01 < 1 < float(wrong["loss"])
    assert float(wrong["loss"]) == pytest.approx(float(wrong["entropy"] + wrong["lovasz"]))
    none = label_losses(logits[:0], torch.zeros(0, dtype=torch.long), LabelConfig())
    assert float(none["loss"]) == 0.0


def test_labels_that_are_missing_or_beyond_the_classes_are_named(cache: None, tmp_path: Path) -> None:
    scene = make_room(0, "train", density=20).gaussians
    for part in ("train", "test"):
        write_scene(tmp_path / "scenes" / part / "one", replace(scene, labels_N=None))
    own = {"data__name": "scenes", "data__path": tmp_path / "scenes", "trainer__batch_size": 1}
    refused("no classes.txt in it", finetune, tmp_path / "run", **own)
    (tmp_path / "scenes" / "classes.txt").write_text("wall\nfloor\n")
    refused("training scene 1 has no labels", finetune, tmp_path / "run", **own)
    write_scene(tmp_path / "scenes" / "train" / "one", scene)
    refused("has class .*, classes.txt names 2", finetune, tmp_path / "run", **own)


def test_rooms_without_a_text_space_have_labels_and_no_features(cache: None) -> None:
    found = open_scenes(DataConfig(rooms=1, density=20), "train", None)
    assert found.scenes[0].features_NF is None and found.scenes[0].labels_N is not None
    assert isinstance(found.scenes[0], Gaussians) and LabelTraining.__name__ == "LabelTraining"
