"""Gaussians fitted to pictures: cameras of other tools, losses, growth, and a fit that goes on where it was killed."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.metrics.image import ssim
from scenesplat import fit, photos
from scenesplat.fit_config import FitConfig, GrowthConfig, PicturesConfig
from scenesplat.fitting import CHECKPOINT, Fitting, depth_loss, labelled, similarity, start
from scenesplat.gaussians import quaternions
from scenesplat.mcmc import MOST_COPIES, drawn, shared
from scenesplat.photos import Photo, Photos, open_photos, room_photos, seen_points, sharpness
from scenesplat.ply import read_scene
from scenesplat.rasterize import Camera
from scenesplat.rooms import Room, make_room
from tests.refusals import refused

PICTURES = PicturesConfig(room=3, density=60, views=12, width=48, test_every=6)
CONFIG = FitConfig(
    steps=24,
    first=300,
    most=500,
    checkpoint_every=8,
    log_every=4,
    progress=False,
    pictures=PICTURES,
    growth=GrowthConfig(begin=0.0, end=1.0, every=6, births=0.2),
)


@cache
def room() -> Room:
    return make_room(3, "test", 60)


def seen() -> Photos:
    return room_photos(room(), PICTURES, 0)


# Pictures and cameras


def alike(found: Photo, wanted: Photo, pixels: float = 0.0) -> None:
    torch.testing.assert_close(found.camera.world_44, wanted.camera.world_44, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.camera.intrinsics_33, wanted.camera.intrinsics_33, atol=1e-3, rtol=0)
    assert float((found.rgb_HW3.float() - wanted.rgb_HW3.float()).abs().max()) <= pixels


def written(folder: Path, pictures: list[Photo]) -> None:
    (folder / "images").mkdir(parents=True)
    for number, photo in enumerate(pictures):
        Image.fromarray(photo.rgb_HW3.numpy()).save(folder / "images" / f"{number:03}.png")


def colmap_pose(camera: Camera) -> list[float]:
    return [*quaternions(camera.world_44[None, :3, :3])[0].tolist(), *camera.world_44[:3, 3].tolist()]


@pytest.mark.parametrize("binary", [True, False])
def test_a_colmap_folder_gives_the_cameras_pictures_and_points_that_are_in_it(tmp_path: Path, binary: bool) -> None:
    views = seen().train
    written(tmp_path, views)
    sparse = tmp_path / "sparse" / "0"
    sparse.mkdir(parents=True)
    (fx, _, cx), (_, fy, cy), _ = views[0].camera.intrinsics_33.tolist()
    if binary:
        (sparse / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 7, 1, 48, 36, fx, fy, cx, cy))
        rows = [struct.pack("<Q", len(views))]
        for number, photo in enumerate(views):
            name = f"{number:03}.png\0".encode()
            points = struct.pack("<Q", 2) + bytes(48)
            rows.append(struct.pack("<i7di", number + 1, *colmap_pose(photo.camera), 7) + name + points)
        (sparse / "images.bin").write_bytes(b"".join(rows))
        point = struct.pack("<Q3d3BdQ", 9, 0.5, -1, 2, 255, 0, 51, 0.1, 3) + bytes(24)
        (sparse / "points3D.bin").write_bytes(struct.pack("<Q", 2) + point + point)
    else:
        (sparse / "cameras.txt").write_text(f"# a comment\n7 PINHOLE 48 36 {fx} {fy} {cx} {cy}\n")
        lines = ["# two lines a picture"]
        for number, photo in enumerate(views):
            pose = " ".join(map(repr, colmap_pose(photo.camera)))
            lines += [f"{number + 1} {pose} 7 {number:03}.png", "1.0 2.0 -1"]
        (sparse / "images.txt").write_text("\n".join(lines) + "\n")
        (sparse / "points3D.txt").write_text("9 0.5 -1 2 255 0 51 0.1 1 2\n" * 2)
    found = open_photos(replace(PICTURES, path=str(tmp_path)), 0)
    every = {photo.name: photo for photo in [*found.train, *found.held_out]}
    assert len(every) == len(views)
    for number, photo in enumerate(views):
        alike(every[f"{number:03}.png"], photo)
    assert found.points_Q3.tolist() == [[0.5, -1, 2]] * 2
    torch.testing.assert_close(found.colours_Q3[0], torch.tensor([1, 0, 0.2]))


def transforms(folder: Path, views: list[Photo], **more: object) -> None:
    flip = np.diag([1.0, -1, -1, 1])
    frames = []
    for number, photo in enumerate(views):
        matrix = np.linalg.inv(photo.camera.world_44.double().numpy()) @ flip
        frames.append({"file_path": f"images/{number:03}.png", "transform_matrix": matrix.tolist()})
    (fx, _, cx), (_, fy, cy), _ = views[0].camera.intrinsics_33.tolist()
    lens = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": 48, "h": 36}
    (folder / "transforms.json").write_text(json.dumps({**lens, "frames": frames, **more}))


def test_nerfstudios_transforms_give_the_same_cameras_with_depth_and_points(tmp_path: Path) -> None:
    views = seen().train
    written(tmp_path, views)
    transforms(tmp_path, views)
    found = open_photos(replace(PICTURES, path=str(tmp_path)), 0)
    for photo in [*found.train, *found.held_out]:
        alike(photo, views[int(photo.name[7:10])])
    content = json.loads((tmp_path / "transforms.json").read_text())
    for number, frame in enumerate(content["frames"]):
        depth_HW = views[number].depth_HW
        assert depth_HW is not None
        millimetres = (depth_HW * 1000).round().numpy().astype(np.uint16)
        Image.fromarray(millimetres).save(tmp_path / "images" / f"depth{number}.png")
        frame["depth_file_path"] = f"images/depth{number}.png"
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    photo = open_photos(replace(PICTURES, path=str(tmp_path)), 0).train[0]
    wanted = views[int(photo.name[7:10])].depth_HW
    assert photo.depth_HW is not None and wanted is not None
    torch.testing.assert_close(photo.depth_HW, wanted, atol=6e-4, rtol=0)


def test_pictures_that_are_shrunk_keep_their_view(tmp_path: Path) -> None:
    views = seen().train
    written(tmp_path, views)
    transforms(tmp_path, views)
    photo = open_photos(replace(PICTURES, path=str(tmp_path), width=24), 0).train[0]
    assert photo.rgb_HW3.shape == (18, 24, 3)
    whole = views[int(photo.name[7:10])].camera.intrinsics_33
    torch.testing.assert_close(photo.camera.intrinsics_33[:2], whole[:2] / 2, atol=1e-4, rtol=0)


def test_a_bent_lens_is_made_straight_by_the_equation(tmp_path: Path) -> None:
    width, height, focal = 64, 48, 50.0
    ramp = torch.arange(width).float() * 4
    picture = ramp.byte()[None, :, None].repeat(height, 1, 3).contiguous()
    camera = Camera(torch.eye(4), torch.tensor([[focal, 0, 32], [0, focal, 24], [0, 0, 1]]), width, height)
    k1, k2, p1, p2 = 0.1, -0.05, 0.01, -0.02
    straight, _ = photos._straightened(picture, None, camera, [k1, k2, p1, p2])
    row, column = 30, 40
    x, y = (column + 0.5 - 32) / focal, (row + 0.5 - 24) / focal
    r = x * x + y * y
    bent = x * (1 + k1 * r + k2 * r * r) + 2 * p1 * x * y + p2 * (r + 2 * x * x)
    assert abs(float(straight[row, column, 0]) - 4 * (bent * focal + 32 - 0.5)) <= 0.51


def test_depth_pictures_become_points_on_the_rooms_surfaces() -> None:
    from scipy.spatial import cKDTree

    for photo in seen().train[:3]:
        points, _ = seen_points(photo)
        distance, _ = cKDTree(room().points_Q3.numpy()).query(points.numpy())
        assert float(np.median(distance)) < 0.2  # the room's own points lie 0.2 m apart on its walls


def test_the_least_sharp_pictures_are_left_out() -> None:
    found = [*seen().train, *seen().held_out]
    blurred = found[1].rgb_HW3.float().mean((0, 1)).byte().expand_as(found[1].rgb_HW3).contiguous()
    found[1] = replace(found[1], rgb_HW3=blurred)
    assert sharpness(blurred) == 0 < sharpness(found[2].rgb_HW3)
    none = torch.zeros(0, 3)
    kept = photos.split(found, replace(PICTURES, drop_blurred=0.2), none, none).train
    assert len(kept) == 8 and found[1].name not in [photo.name for photo in kept]


def test_folders_without_poses_and_other_lenses_are_refused_by_name(tmp_path: Path) -> None:
    options = replace(PICTURES, path=str(tmp_path))
    refused("transforms.json .*COLMAP.*ns-process-data", open_photos, options, 0)
    refused("no such folder", open_photos, replace(PICTURES, path=str(tmp_path / "none")), 0)
    views = seen().train
    written(tmp_path, views)
    transforms(tmp_path, views, camera_model="OPENCV_FISHEYE")
    refused("OPENCV_FISHEYE is not read.*image_undistorter", open_photos, options, 0)
    transforms(tmp_path, views[:2])
    refused("2 posed pictures", open_photos, options, 0)
    transforms(tmp_path, views, frames=[{"file_path": "images/000.png"}])
    refused("frame 1: .*transform_matrix", open_photos, options, 0)
    (tmp_path / "transforms.json").unlink()
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    (sparse / "cameras.txt").write_text("1 FOV 48 36 30 30 24 18 0.1\n")
    (sparse / "images.txt").write_text("1 1 0 0 0 0 0 0 1 000.png\n\n")
    refused("camera model FOV", open_photos, options, 0)
    (sparse / "cameras.txt").write_text("1 PINHOLE 48 36 30 30 24 18\n")
    (sparse / "images.txt").write_text("1 1 0 0 0 0 0 0 1 gone.png\n\n")
    refused("gone.png: no such file", open_photos, options, 0)
    (sparse / "images.txt").write_text("1 1 0 0 zero 0 0 0 1 000.png\n\n")
    refused("damaged", open_photos, options, 0)


# Losses and growth


def test_the_similarity_of_the_loss_is_the_exact_one() -> None:
    a, b = torch.rand(20, 26, 3), torch.rand(20, 26, 3)
    wanted = ssim(a.permute(2, 0, 1)[None], b.permute(2, 0, 1)[None])
    assert float(similarity(a, b)) == pytest.approx(float(wanted), abs=1e-5)
    assert float(similarity(a, a)) == pytest.approx(1.0, abs=1e-6)


def test_depths_that_are_unknown_or_far_off_do_not_count() -> None:
    known = torch.tensor([[1.0, 2.0, 0.0, 4.0, 1.0]])
    found = torch.tensor([[1.1, 2.1, 9.0, 9.0, 1.1]], requires_grad=True)
    loss = depth_loss(found, known, outlier=10.0)
    assert float(loss.detach()) == pytest.approx(0.3 / 4, abs=1e-6)  # the fourth is off by 50 medians
    (gradient,) = torch.autograd.grad(loss, found)
    assert (gradient != 0).tolist() == [[True, True, False, False, True]]
    exact = torch.tensor([[1.0, 1.0, 1.0, 3.5]])
    assert float(depth_loss(exact, torch.ones(1, 4), 10.0)) == 0  # a median of 0: below 2 m
    assert float(depth_loss(torch.ones(1, 4), torch.zeros(1, 4), 10.0)) == 0


@pytest.mark.parametrize("copies", [1, 2, 7, 51])
def test_copies_together_have_the_opacity_of_the_one_and_one_copy_is_the_one_itself(copies: int) -> None:
    opacity, scale = torch.tensor([0.3, 0.9, 0.99]), torch.rand(3, 3) + 0.1
    each, width = shared(opacity, scale, torch.full((3,), copies))
    torch.testing.assert_close(1 - (1 - each.double()) ** copies, opacity.double(), atol=1e-6, rtol=0)
    assert bool((width <= scale * (1 + 1e-6)).all()) and bool((width > 0).all())
    if copies == 1:
        torch.testing.assert_close(width, scale)
    more, _ = shared(opacity, scale, torch.full((3,), MOST_COPIES + copies))
    torch.testing.assert_close(more, shared(opacity, scale, torch.full((3,), MOST_COPIES))[0])


def test_draws_follow_the_weights_and_take_nothing_of_no_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    rows = drawn(weights, 4000, torch.Generator().manual_seed(0))
    shares = torch.bincount(rows, minlength=4) / 4000
    assert shares[0] == shares[3] == 0
    assert float(shares[2]) == pytest.approx(0.75, abs=0.03)


def test_faint_gaussians_move_onto_others_and_new_ones_are_born_up_to_the_limit() -> None:
    fitting = Fitting(seen(), CONFIG, None, "cpu")
    fitting._one_step()
    before = {name: value.detach().clone() for name, value in fitting.values.items()}
    with torch.no_grad():
        fitting.values["opacities"][:50] = -20.0
        fitting._relocate(torch.Generator().manual_seed(0))
    values = fitting.values
    assert float(values["opacities"].sigmoid().min()) > CONFIG.growth.faint and len(fitting) == 300
    same = (values["means"][:50, None] == before["means"][None, 50:]).all(2)  # [moved, stayed]
    assert bool(same.any(1).all()) and not bool((values["means"][:50] == before["means"][:50]).any())
    touched = same.any(0).nonzero()[:, 0] + 50
    moments = fitting.moments["scales"]
    assert not moments["exp_avg"][touched].any() and moments["exp_avg"].any()
    with torch.no_grad():
        fitting._bear(60, torch.Generator().manual_seed(1))
    assert len(fitting) == 360 and len(fitting.moments["means"]["exp_avg_sq"]) == 360
    assert torch.equal(fitting.values["colours"][:300], values["colours"])
    fitting.run()
    assert len(fitting) == CONFIG.most


# The fit


def test_a_fit_shows_pictures_that_it_has_not_seen_and_fixed_growth_keeps_the_number() -> None:
    config = replace(CONFIG, steps=60)
    fitting = Fitting(seen(), config, None, "cpu")
    before = fitting.measure()
    fitting.run()
    after = fitting.measure()
    assert after["psnr"] > before["psnr"] + 3 and after["psnr"] > 15
    assert after["ssim"] > before["ssim"] and after["depth_l1"] < before["depth_l1"]
    fixed = Fitting(seen(), replace(CONFIG, growth=GrowthConfig(kind="fixed")), None, "cpu")
    fixed.run()
    assert len(fixed) == CONFIG.first


def test_without_points_the_start_is_random_around_the_cameras_and_points_must_be_there() -> None:
    config = replace(CONFIG, pictures=replace(PICTURES, depth=False))
    without = room_photos(room(), config.pictures, 0)
    scene = start(without, config)
    places = torch.stack([photo.camera.place_3 for photo in without.train])
    assert len(scene) == CONFIG.first and scene.degree == 1
    assert float((scene.means_N3 - places.mean(0)).abs().max()) <= 3 * without.radius
    refused("--start points", start, without, replace(config, start="points"))


def killed_and_gone_on(folder: Path) -> None:
    """A fit in a process of its own, killed by signal 9 after its first checkpoint, then gone on with."""
    child = os.fork()
    if not child:
        fit.main(arguments(folder, steps=24))
        os._exit(0)
    while not (folder / CHECKPOINT).is_file():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (folder / "scene.ply").exists()
    fit.main(arguments(folder))


def arguments(folder: Path, **options: object) -> list[str]:
    given = {"run_dir": folder, "steps": 24, "first": 300, "most": 500, "checkpoint_every": 4, "log_every": 4}
    given |= {"pictures.room": 3, "pictures.density": 60, "pictures.views": 12, "pictures.width": 48}
    given |= {"pictures.test_every": 6, "growth.begin": 0, "growth.every": 6, "growth.births": 0.2}
    given |= {"progress": "false", "device": "cpu", **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_a_fit_that_was_killed_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    whole = fit.main(arguments(tmp_path / "whole"))
    killed_and_gone_on(tmp_path / "killed")
    kept = [torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("whole", "killed")]
    assert torch.equal(kept[0]["losses"], kept[1]["losses"]) and len(kept[0]["losses"]) == 24
    assert all(torch.equal(kept[0]["values"][name], kept[1]["values"][name]) for name in kept[0]["values"])
    scenes = [read_scene(tmp_path / name / "scene.ply") for name in ("whole", "killed")]
    assert torch.equal(scenes[0].means_N3, scenes[1].means_N3) and len(scenes[0]) == whole["gaussians"]
    for name in ("scene.ply", "pictures.png", "metrics.json", "log.csv", "config.yaml"):
        assert (tmp_path / "whole" / name).is_file(), name
    rows = (tmp_path / "killed" / "log.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,l1,ssim,depth,psnr,gaussians,seconds") and len(rows) == 7
    assert math.isfinite(whole["psnr"]) and whole["steps"] == 24
    refused("another configuration", fit.main, arguments(tmp_path / "whole", seed=5))


def test_a_loss_that_is_no_number_ends_the_fit_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    fitting = Fitting(seen(), CONFIG, tmp_path, "cpu")
    fitting.run(8)
    with torch.no_grad():
        fitting.values["scales"][0] = math.nan
    with pytest.raises(UserError, match=r"loss became nan at step 8.*fit\.ckpt.*--rates"):
        fitting.run()
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 8


def test_wrong_options_are_sentences(tmp_path: Path) -> None:
    refused("--first 300: expected at most the 200 of --most", fit.main, arguments(tmp_path / "a", most=200))
    refused("--pictures.views 1", fit.main, arguments(tmp_path / "b", **{"pictures.views": 1}))
    (tmp_path / "c").mkdir()
    torch.save({"step": 3}, tmp_path / "c" / CHECKPOINT)
    refused("no checkpoint of a fit", fit.main, arguments(tmp_path / "c"))


def test_fitted_gaussians_get_the_class_of_the_surface_that_they_are_at() -> None:
    whole = room()
    scene = replace(whole.gaussians, labels_N=None, instances_N=None)
    found = labelled(scene, whole).gaussians
    assert found.labels_N is not None and whole.gaussians.labels_N is not None
    known: Tensor = whole.gaussians.labels_N >= 0
    assert float((found.labels_N == whole.gaussians.labels_N)[known].float().mean()) > 0.9
    away = labelled(scene.moved(torch.tensor([0.0, 0, 50])), whole).gaussians
    assert away.labels_N is not None and bool((away.labels_N == -1).all())


@pytest.mark.usefixtures("own_cache")
def test_fitted_rooms_are_data_like_sampled_ones_and_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from scenesplat import data, fitted
    from scenesplat.data_config import DataConfig
    from scenesplat.text import TextSpace

    monkeypatch.setattr(fitted, "DENSE", 60.0)
    options = DataConfig(rooms=1, eval_rooms=1, density=60, views=2, view_size=32, gaussians="fitted")
    options = replace(options, fit_steps=6, fit_views=6, fit_width=32, fit_most=200)
    text = TextSpace(width=12)
    scene = data.open_scenes(options, "train", text).scenes[0]
    assert 90 < len(scene) <= 200 and scene.labels_N is not None and int((scene.labels_N >= 0).sum()) > 50
    assert scene.features_NF is not None and scene.valid_N is not None and bool(scene.valid_N.any())
    sampled = data.open_scenes(replace(options, gaussians="sampled"), "train", text)
    assert len(sampled.scenes[0]) != len(scene)
    monkeypatch.setattr(fitted.Fitting, "run", lambda self: pytest.fail("fitted again"))
    again = data.open_scenes(options, "train", text)
    assert torch.equal(again.scenes[0].means_N3, scene.means_N3)
    assert torch.equal(again.rooms[0].points_Q3, sampled.rooms[0].points_Q3)
    quality = fitted.fitted_quality(0, "train", options, again.rooms[0])
    assert math.isfinite(quality["psnr"]) and quality["depth_l1"] > 0
    refused("--data.quality 0.5", data.open_scenes, replace(options, quality=0.5), "train", text)


def test_the_demo_fits_and_hands_the_scene_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenesplat import demo
    from scenesplat.query import PUBLISHED

    said: list[list[str]] = []

    def page(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        said.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=page))
    words = ["--steps", "3", "--width", "32", "--most", "200", "--room", "3", "--queries", "a bed", "--output"]
    found = demo.main([*words, str(tmp_path), "--model", str(PUBLISHED)])
    scene = tmp_path / "fit" / "scene.ply"
    assert found == tmp_path / "page.html" and len(read_scene(scene)) > 0
    assert said[0][1].endswith("scenesplat/view.py") and said[0][2] == str(scene)
    assert said[0][3:] == ["--model", str(PUBLISHED), "--queries", "a bed", "--output", str(found)]
    refused("--model .*no config.json", demo.main, ["--model", str(tmp_path), "--output", str(tmp_path)])
