"""Rooms, what is lifted onto them, and how they become batches."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scenesplat import data as scenes
from scenesplat import furniture, lifting, teacher
from scenesplat.data import SceneBatches, SceneData, SceneModule, chunks, collate, example
from scenesplat.data_config import DataConfig
from scenesplat.gaussians import Gaussians
from scenesplat.ply import write_scene
from scenesplat.rooms import CLASSES, HEIGHT, SEEN, UNSEEN, Room, make_room, psnr
from scenesplat.teacher import SimulatedTeacher, objects_seen
from scenesplat.voxels import Grid
from tests.refusals import refused

ELEVEN = ["colour", "opacity", "quaternion", "scale"]


@cache
def room(seed: int = 3, part: scenes.Part = "train", **options: object) -> Room:
    return make_room(seed, part, density=60, **options)  # type: ignore[arg-type]


def texts(width: int = 32) -> Tensor:
    return F.normalize(torch.randn(len(CLASSES), width, generator=torch.Generator().manual_seed(0)), dim=1)


# Furniture and rooms


def test_the_archive_is_small_and_every_seen_class_has_models_to_train_on_and_to_hold_out() -> None:
    assert furniture.ARCHIVE.stat().st_size < 8 * 2**20
    for label in furniture.NAMES:
        held_out = [model.held_out for model in furniture.furniture() if model.label == label]
        assert any(held_out) and not all(held_out), label


def test_a_packed_model_lies_within_a_step_of_itself() -> None:
    model = next(m for m in furniture.furniture() if m.label == "chair")
    again = furniture.unpack(furniture.pack([model]))[0]
    step = max(model.size_3) / furniture.STEPS
    assert float(abs(again.points_P3 - model.points_P3).max()) <= step
    assert (again.name, again.maker, again.size_3) == (model.name, model.maker, model.size_3)


def test_an_obj_with_faces_counted_from_its_end_textures_and_fans_becomes_triangles() -> None:
    text = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nusemtl Wood\nf -4/1 -3/1 -2/1 -1/1\nf 1//1 2//1 3//1\n"
    vertices, coordinates, triangles, texels, (materials, names) = furniture._mesh(text)
    assert triangles.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]
    assert texels.tolist() == [[0, 0, 0], [0, 0, 0], [-1, -1, -1]]
    assert [names[i] for i in materials] == ["Wood"] * 3 and len(vertices) == 4 and len(coordinates) == 1


def test_a_room_is_a_function_of_its_seed() -> None:
    again = make_room(3, density=60)
    assert torch.equal(room().gaussians.means_N3, again.gaussians.means_N3)
    assert torch.equal(room().points_Q3, again.points_Q3)
    assert not torch.equal(room().boxes_I6, room(4).boxes_I6) or room(4).kind != room().kind


def test_things_stand_in_the_room_and_in_nothing_else() -> None:
    for seed in range(6):
        found = room(seed)
        half = torch.tensor([found.size_3[0] / 2, found.size_3[1] / 2])
        low, high = found.boxes_I6[:, :3] - found.boxes_I6[:, 3:] / 2, found.boxes_I6[:, :3] + found.boxes_I6[:, 3:] / 2
        things = range(6, len(low))
        assert len(things) >= 5
        for i in things:
            assert bool((low[i, :2] >= -half - 1e-3).all() and (high[i, :2] <= half + 1e-3).all())
            assert float(low[i, 2]) >= -1e-3 and float(high[i, 2]) <= HEIGHT + 1e-3
            for j in things:
                names = {CLASSES[int(found.labels_I[k])] for k in (i, j)}
                may = {"chair", "lamp", "plant", "tv"} & names  # under a table, upon something
                if i < j and not may:
                    assert not bool(((low[i] + 0.03 < high[j]) & (low[j] + 0.03 < high[i])).all()), names


def test_gaussians_lie_on_their_objects_and_carry_their_classes() -> None:
    found = room()
    scene = found.gaussians
    assert scene.labels_N is not None and scene.instances_N is not None and scene.normals_N3 is not None
    floating = scene.instances_N < 0
    assert 0 < float(floating.float().mean()) < 0.03
    inside = scene.select(~floating)
    assert inside.instances_N is not None and inside.labels_N is not None
    boxes = found.boxes_I6[inside.instances_N]
    assert bool(((inside.means_N3 - boxes[:, :3]).abs() <= boxes[:, 3:] / 2 + 0.03).all())
    assert torch.equal(inside.labels_N, found.labels_I[inside.instances_N])
    thin = inside.covariances() @ inside.normals_N3[..., None]  # thinnest along the normal
    across = (inside.normals_N3[:, None] @ thin).flatten().sqrt()
    assert bool((across <= inside.scales_N3.exp().amin(1) * 1.001).all())


def test_training_rooms_hold_neither_models_nor_classes_of_test_rooms() -> None:
    for seed in range(8):
        assert {CLASSES[k] for k in room(seed).labels_I.tolist()} <= set(SEEN)
    strange = room(5, "test", unseen=True)
    assert {CLASSES[k] for k in strange.labels_I.tolist()} & set(UNSEEN)
    refused("test rooms only", make_room, 0, "train", unseen=True)


def test_a_worse_reconstruction_of_the_same_room_has_a_lower_psnr() -> None:
    cameras = room().cameras(2, 48)
    values = [psnr(make_room(3, density=60, quality=q).gaussians, room().gaussians, cameras) for q in (0.3, 0.7, 1.0)]
    assert values[0] < values[1] < values[2] and values[2] > 60


def test_a_view_shows_objects_where_their_boxes_are() -> None:
    found = room()
    camera = found.cameras(4, 64)[0]
    objects = objects_seen(found.gaussians, camera)
    seen = [int(i) for i in objects.unique() if i >= 6]
    assert seen
    for i in seen:
        corners = (
            found.boxes_I6[i, :3] + (torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)) * found.boxes_I6[i, 3:]
        )
        places = corners @ camera.world_44[:3, :3].t() + camera.world_44[:3, 3]
        if float(places[:, 2].min()) < 0.1:
            continue
        pixels = places @ camera.intrinsics_33.t() / places[:, 2:]
        rows, columns = (objects == i).nonzero().t()
        assert float(columns.float().mean()) > float(pixels[:, 0].min()) - 2
        assert float(columns.float().mean()) < float(pixels[:, 0].max()) + 2
        assert float(rows.float().mean()) < float(pixels[:, 1].max()) + 2


# Teacher and lifting


def lifted_share(confusion: float, how: lifting.Lifting = "occam", mask_errors: float = 0.0) -> float:
    """How much of the furniture gets its own class by lifting."""
    found, names = room(), texts()
    answers = SimulatedTeacher(names, found.labels_I, confusion, mask_errors, "masked", 1)
    views = [answers(found.gaussians, camera, i) for i, camera in enumerate(found.cameras(6, 64))]
    lifted = lifting.lift(found.gaussians, views, how)
    labels = found.gaussians.labels_N
    assert labels is not None
    rows = lifted.seen_N & (labels >= 3)
    return float(((lifted.features()[rows] @ names.t()).argmax(1) == labels[rows]).float().mean())


def test_lifting_a_teacher_without_errors_names_almost_everything_and_confusion_costs() -> None:
    clean = lifted_share(0.0)
    assert clean > 0.8
    assert lifted_share(0.6) < clean - 0.1


@pytest.mark.parametrize("how", ["pixels", "median", "nearest"])
def test_the_other_ways_of_lifting_name_most_things_too(how: lifting.Lifting) -> None:
    assert lifted_share(0.0, how) > 0.6


@pytest.mark.parametrize("how", ["occam", "pixels", "median", "nearest"])
def test_a_picture_without_masks_adds_nothing(how: lifting.Lifting) -> None:
    found, names = room(), texts()
    scene = found.gaussians.select(torch.arange(0, len(found.gaussians), 40))
    camera = found.cameras(1, 32)[0]
    answer = SimulatedTeacher(names, found.labels_I, 0.0, 0.0, "masked", 1)(scene, camera, 0)
    empty = lifting.View(camera, torch.full_like(answer.masks_HW, lifting.NONE), answer.features_MF[:0])
    alone, both = lifting.lift(scene, [answer], how), lifting.lift(scene, [answer, empty], how)
    torch.testing.assert_close(both.features(), alone.features())
    assert not lifting.lift(scene, [empty], how).seen_N.any()
    refused("nothing to lift from: expected one picture", lifting.lift, scene, [], how)


def test_the_simulated_teacher_repeats_itself_and_its_errors_are_of_the_wanted_share() -> None:
    found, names = room(), texts()
    camera = found.cameras(1, 64)[0]
    answers = SimulatedTeacher(names, found.labels_I, 0.3, 0.3, "dynamic", 1)
    first, again = answers(found.gaussians, camera, 0), answers(found.gaussians, camera, 0)
    assert torch.equal(first.masks_HW, again.masks_HW) and torch.equal(first.features_MF, again.features_MF)
    torch.testing.assert_close(first.features_MF.norm(dim=1), torch.ones(len(first.features_MF)))
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    exact = replace(answers, confusion=0.3)
    for number in range(300):
        feature = exact._feature(number % len(found.labels_I), generator)
        wrong += int((names @ feature).argmax()) != int(found.labels_I[number % len(found.labels_I)])
    assert 0.2 < wrong / 300 < 0.45


def test_the_crop_of_a_mask_is_square_and_holds_it() -> None:
    pixels = torch.arange(6 * 8 * 3).view(6, 8, 3)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:3, 2:7] = True
    crop = teacher.square_crop(pixels, mask)
    assert crop.shape == (5, 5, 3)
    assert torch.equal(crop[1:3], pixels[1:3, 2:7]) and not crop[0].any() and not crop[3:].any()


def test_real_models_from_folders_answer_for_every_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny ones with random weights: the masks mean nothing, the way through them is the real one."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamModel,
        SamProcessor,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 64, "patch_size": 16, "output_channels": 8, "global_attn_indexes": [0], "mlp_dim": 32}
    sam = SamModel(
        SamConfig(
            vision_config=small | vision | {"window_size": 2, "num_pos_feats": 4},
            prompt_encoder_config={"hidden_size": 8, "image_size": 64, "image_embedding_size": 4},
            mask_decoder_config={"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
            | {"iou_head_hidden_dim": 8},
        )
    )
    sam.save_pretrained(tmp_path / "sam")
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    SamProcessor(SamImageProcessor(**sizes)).save_pretrained(tmp_path / "sam")
    siglip = SiglipModel(SiglipConfig(text_config=small, vision_config=small | {"image_size": 32, "patch_size": 16}))
    siglip.save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "siglip")
    monkeypatch.setattr(teacher, "SCORE", -10.0)
    monkeypatch.setattr(teacher, "GRID", 3)
    answers = teacher.FolderTeacher(tmp_path / "sam", tmp_path / "siglip")
    found = room()
    view = answers(found.gaussians, found.cameras(1, 48)[0], 0)
    assert view.masks_HW.shape == (36, 48) and int(view.masks_HW.max()) < len(view.features_MF)
    torch.testing.assert_close(view.features_MF.norm(dim=1), torch.ones(len(view.features_MF)))
    refused("no config.json", teacher.FolderTeacher, tmp_path / "none", tmp_path / "siglip")
    refused("expected SigLIP", teacher.FolderTeacher, tmp_path / "siglip", tmp_path / "sam")


# Voxels, augmentation and batches


def test_an_example_is_one_gaussian_a_voxel_with_what_belongs_to_it() -> None:
    scene = replace(room().gaussians, features_NF=texts()[room().gaussians.labels_N])
    found = example(scene, 0.1, ELEVEN, 7, augment=True, largest=10**6)
    assert found["feat"].shape == (len(found["coord"]), 11)
    assert len(found["grid_coord"].unique(dim=0)) == len(found["grid_coord"])
    named = found["label"] >= 0
    assert torch.equal((found["lang_feat"][named] @ texts().t()).argmax(1), found["label"][named])
    torch.testing.assert_close(found["feat"][:, 4:8].norm(dim=1), torch.ones(len(found["feat"])))
    assert float(found["feat"][:, 4].min()) >= 0  # the real part, after every turn and mirror
    again = example(scene, 0.1, ELEVEN, 7, augment=True, largest=10**6)
    other = example(scene, 0.1, ELEVEN, 8, augment=True, largest=10**6)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["coord"][:100], other["coord"][:100])


def test_a_scene_above_the_limit_is_cut_to_a_sphere() -> None:
    found = example(room().gaussians, 0.1, ELEVEN, 0, augment=False, largest=500)
    assert len(found["coord"]) == 500
    radius = (found["coord"] - found["coord"].mean(0)).norm(dim=1).max()
    whole = example(room().gaussians, 0.1, ELEVEN, 0, augment=False, largest=10**6)["coord"]
    assert float(radius) < float((whole - whole.mean(0)).norm(dim=1).max())


def test_a_voxels_number_is_that_of_its_exact_coordinate() -> None:
    """0.06 as float32 lies below 3 x 0.02; the float32 quotient is 3."""
    coord = torch.tensor([[0.0, 0, 0], [0.06, 0.02, 0.5]])
    wanted = np.floor(coord.numpy().astype(np.float64) / 0.02).astype(int)
    assert wanted[1].tolist() == [2, 0, 25]
    for order in ("fnv", "ravel"):
        grid = Grid.of(coord, 0.02, order)  # type: ignore[arg-type]
        assert grid.cells_N3.tolist() == wanted.tolist()
    places = torch.tensor([[2.5, 0, 0], [0.5, 1, 0], [0.5, 0, 3], [2.5, 0, 0.5]])
    assert Grid.of(places, 1.0, "ravel").voxel_N.tolist() == [2, 1, 0, 2]
    alone = Grid.of(torch.tensor([[-0.05, 3.0, 7.0]]), 0.02)
    assert alone.cells_N3.tolist() == [[0, 0, 0]] and alone.count_V.tolist() == [1]


def test_without_augmentation_moving_a_scene_changes_no_voxel() -> None:
    scene = room().gaussians
    exact = replace(scene, means_N3=(scene.means_N3 * 256).round() / 256)
    near = example(exact, 0.125, ELEVEN, 0, augment=False, largest=10**6)
    far = example(exact.moved(torch.tensor([512.0, -256.0, 128.0])), 0.125, ELEVEN, 0, augment=False, largest=10**6)
    assert torch.equal(near["grid_coord"], far["grid_coord"])


def test_mixed_scenes_share_an_offset_in_pairs() -> None:
    parts = [{"coord": torch.zeros(n, 3)} for n in (3, 4, 5)]
    assert collate(parts)["offset"].tolist() == [3, 7, 12]
    assert collate(parts, mixed=True)["offset"].tolist() == [7, 12]


def test_elastic_displacements_are_smooth() -> None:
    line = torch.stack([torch.linspace(0, 2, 401), torch.zeros(401), torch.zeros(401)], 1)
    moves = scenes.elastic(line, 0.2, 0.4, torch.Generator().manual_seed(0))
    assert float(moves.abs().max()) > 0.01
    assert float(moves.diff(dim=0).norm(dim=1).max()) < 0.02  # of neighbours 5 mm apart


def test_large_scenes_are_cut_into_windows_and_small_ones_are_kept_whole() -> None:
    """The released preprocessing drops scenes below 3 m."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(20_000, 3, generator=generator) * torch.tensor([12.0, 6.0, 2.0])
    large = replace(room().gaussians.select(torch.zeros(20_000, dtype=torch.long)), means_N3=places)
    windows = chunks(large, least=1000)
    assert 2 <= len(windows) <= 6
    for rows in windows:
        assert bool((places[rows].max(0).values - places[rows].min(0).values <= 6.001).all())
    assert len(torch.cat(windows).unique()) == 20_000
    small = chunks(large.scaled(0.1))
    assert len(small) == 1 and len(small[0]) == 20_000


def test_batches_take_data_sets_in_turn_by_their_shares_each_batch_from_one() -> None:
    groups = ["a"] * 5 + ["b"] * 3
    sampler = SceneBatches(groups, {"a": 3, "b": 1}, 2, 40, 0)
    batches = list(sampler)
    used = [{groups[row] for row, _ in batch} for batch in batches]
    assert all(len(names) == 1 for names in used)
    for start in range(0, 40, 4):
        assert sum("b" in names for names in used[start : start + 4]) == 1
    rows = [row for batch in batches for row, _ in batch if groups[row] == "b"]
    assert rows[:3] != rows[3:6] or sorted(rows[:3]) == [5, 6, 7]
    assert sorted(rows[:3]) == [5, 6, 7]  # each scene once before one comes again
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    assert sampler.batch(17) == SceneBatches(groups, {"a": 3, "b": 1}, 2, 40, 0).batch(17)
    halves = [SceneBatches(groups, {}, 2, 40, 0, rank=r, world=2).batch(9) for r in range(2)]
    assert [*halves[0], *halves[1]] == SceneBatches(groups, {}, 2, 40, 0).batch(9)
    refused("no scenes of c", SceneBatches, groups, {"c": 1}, 2, 40, 0)


# What the options describe


class _Space:
    """Random unit vectors for names, where a test asks for no meaning."""

    width, fingerprint = 32, "random"

    def embed(self, names: list[str]) -> Tensor:
        return texts()[: len(names)]


def test_lifted_labels_are_made_once_and_rooms_of_both_parts_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    options = DataConfig(rooms=2, eval_rooms=1, density=40, views=3, view_size=48)
    first = scenes.open_scenes(options, "train", _Space())  # type: ignore[arg-type]
    monkeypatch.setattr(scenes, "lifted", lambda *_: pytest.fail("made again"))
    again = scenes.open_scenes(options, "train", _Space())  # type: ignore[arg-type]
    assert first.fingerprint == again.fingerprint and first.classes == list(SEEN)
    assert first.scene(0).features_NF is not None
    batch = first.__getitems__([(0, 1), (1, 2)])
    assert set(batch) == {"coord", "grid_coord", "feat", "offset", "label", "instance", "lang_feat", "valid"}
    module = SceneModule(first, 2, 4, 0)
    assert [row for row, _ in next(iter(module.sampler(2, 4, 0)))] != []


def test_a_users_folder_is_read_by_data_set_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    scene = replace(room().gaussians, features_NF=texts()[room().gaussians.labels_N], normals_N3=None)
    options = DataConfig(name="scenes", path=str(tmp_path))
    space = _Space()
    refused("no such folder|classes.txt", scenes.open_scenes, options, "train", space)
    for name in ("halls/one", "halls/two", "flats/three"):
        write_scene(tmp_path / "train" / name, scene)
    refused("classes.txt is missing", scenes.open_scenes, options, "train", space)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    found = scenes.open_scenes(options, "train", space)  # type: ignore[arg-type]
    assert len(found) == 3 and sorted(found.groups) == ["flats", "halls", "halls"]
    write_scene(tmp_path / "train" / "halls" / "four.ply", scene)
    refused("lang_feat.npy", scenes.open_scenes, options, "train", space)
    (tmp_path / "train" / "halls" / "four.ply").unlink()
    space.width = 7
    refused("lang_feat.npy has 32 values", scenes.open_scenes, options, "train", space)
    refused("needs --data.path", scenes.open_scenes, DataConfig(name="scenes"), "train", space)


def test_a_data_set_without_features_still_makes_examples() -> None:
    whole = SceneData([room().gaussians], list(SEEN), DataConfig(mix=0.0, augment=False))
    batch = whole.__getitems__([(0, 0)])
    assert "lang_feat" not in batch and batch["offset"].tolist() == [len(batch["coord"])]
    assert isinstance(whole.scene(0), Gaussians) and math.isfinite(float(batch["feat"].abs().max()))
