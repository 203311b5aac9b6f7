"""Checks for the recorded cases of scenes: files, grids, augmentation, rendering, lifting, fusion of labels."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scenesplat import lifting as lift
from scenesplat import mcmc, ply, rasterize
from scenesplat.data import axis_turn, centre_shift
from scenesplat.gaussians import ATTRIBUTES, Gaussians, inputs
from scenesplat.rasterize import Camera
from scenesplat.voxels import Grid, fnv_hash, fragments, ravel_hash
from tests.golden_case import Case, Check, assert_close, kind


def files(case: Case) -> None:
    """A .ply to the arrays and the input that the released reader makes of it."""
    wanted = case.group("out")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "scene.ply"
        path.write_bytes(case.group("in")["ply_bytes"].numpy().tobytes())
        patch.setattr(ply, "LARGEST_SHARE", math.inf)  # the released reader takes every row, as it lies
        scene = ply.read_scene(path, ply.Reading(unit="m", up="z"))
    assert len(scene) == case.config["n"] and scene.degree == case.config["sh_degree"]
    seen = scene.attributes()
    assert scene.origin_3 is not None
    assert_close((seen["coord"] + scene.origin_3).float(), wanted["npy/coord"], "coord")
    assert_close(seen["colour"].to(torch.uint8), wanted["npy/color"], "colour")
    assert_close(seen["opacity"][:, 0], wanted["npy/opacity"], "opacity")
    assert_close(seen["quaternion"], wanted["npy/quat"], "quaternion")
    assert_close(seen["scale"], wanted["npy/scale"], "scale")
    names = [name for name in ATTRIBUTES if name != "normal"]
    generic = inputs(seen, names, "generic")
    for column, name in ((slice(3, 4), "opacity"), (slice(8, 11), "scale")):
        assert_close(generic[:, column], wanted[f"genericgs/{name}"], f"generic loader's {name}")
    found = inputs(seen, names)
    assert_close(found[:, 8:], wanted["scannetgs/scale"], "ScanNet loader's scale")
    assert_close(found, wanted["feat11"], "input")
    if "feat14" in wanted:
        assert_close(inputs(seen, list(ATTRIBUTES)), wanted["feat14"], "input with normals")


def cameras(given: dict[str, Tensor], width: int, height: int) -> list[Camera]:
    return [
        Camera(world_44, intrinsics_33, width, height)
        for world_44, intrinsics_33 in zip(given["viewmats"], given["Ks"], strict=True)
    ]


CONSTANTS = {"max_alpha": "LARGEST_ALPHA", "alpha_threshold": "LEAST_ALPHA", "transmittance_stop": "OPAQUE"}


def drawing(case: Case) -> None:
    """Covariances, projection, colours, tiles and every pixel; gsplat's constants are the record's (they differ by
    release)."""
    config = case.config
    for name, only in (("camera_model", "pinhole"), ("radius_clip", 0.0), ("with_ut", False)):
        assert config.get(name, only) == only, f"{name} {config[name]!r}: only {only!r} is here"
    with pytest.MonkeyPatch.context() as patch:
        for name, ours in CONSTANTS.items():
            patch.setattr(rasterize, ours, config.get(name, getattr(rasterize, ours)))
        drawn_as_recorded(case)


def drawn_as_recorded(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    width, height = config["width"], config["height"]
    assert_close(rasterize.covariances(given["quats"], given["scales"]), wanted["covars"], "covariances")
    assert_close(rasterize.covariances(given["quats"], given["scales"], inverse=True), wanted["precis"], "inverses")
    bands = (config["sh_degree"] + 1) ** 2  # a scene may hold more than are drawn
    sh_NC = torch.cat([given["sh"][:, 0], given["sh"][:, 1:bands].transpose(1, 2).flatten(1)], 1)
    logits_N = torch.logit(given["opacities"].double()).float()
    scene = Gaussians(given["means"], given["scales"].log(), given["quats"], logits_N, sh_NC)
    assert scene.degree == config["sh_degree"]
    tiles, drawn = [], []
    for i, camera in enumerate(cameras(given, width, height)):
        seen = rasterize.project(
            given["means"],
            rasterize.covariances(given["quats"], given["scales"]),
            camera,
            config["eps2d"],
            config["near_plane"],
            config.get("far_plane", rasterize.FAR),
        )
        # What is not in the picture has no place in it: the record's values there are never read.
        inside = (wanted["radii"][i] > 0).all(1)
        for name, found in (
            ("means2d", seen.means_N2),
            ("depths", seen.depths_N),
            ("conics", seen.conics_N3),
            ("compensations", seen.compensations_N),
        ):
            assert_close(found[inside], wanted[name][i][inside], f"{name} of view {i}")
        assert_close(seen.radii_N2, wanted["radii"][i], f"radii of view {i}")
        colours_N3 = rasterize.colours_from(scene, camera)
        assert_close(colours_N3, wanted["colors"][i], f"colours of view {i}")
        owner, starts, count = rasterize.tile_pairs(
            seen.means_N2, seen.radii_N2.float(), seen.depths_N, width, height, config["tile_size"]
        )
        assert_close(count, wanted["tiles_per_gauss"][i], f"tiles of view {i}")
        tiles.append((owner + i * len(scene), starts))
        values = torch.cat([colours_N3, given["features"], seen.depths_N[:, None]], 1)
        softer = seen.compensations_N if config.get("rasterize_mode") == "antialiased" else 1.0
        picture, alpha, _ = rasterize.composite(seen, softer * given["opacities"], values, width, height)
        drawn.append((picture, alpha[..., None]))
    assert_close(torch.cat([owner for owner, _ in tiles]), wanted["flatten_ids"], "Gaussians by tile")
    begins = [starts[:-1] + sum(len(owner) for owner, _ in tiles[:i]) for i, (_, starts) in enumerate(tiles)]
    assert_close(torch.stack(begins).view(wanted["isect_offsets"].shape), wanted["isect_offsets"], "tiles' beginnings")
    for i, (picture, alpha) in enumerate(drawn):
        assert_close(alpha, wanted["render_alpha"][i], f"alpha of view {i}")
        rgb = picture[..., :3] + (1 - alpha) * given.get("background", torch.zeros(3))
        assert_close(rgb, wanted["render_rgb"][i], f"rgb of view {i}")
        assert_close(picture[..., 3:-1], wanted["render_features"][i], f"features of view {i}")
        assert_close(picture[..., -1:], wanted["render_depth_accum"][i], f"depth of view {i}")
        expected = picture[..., -1:] / alpha.clamp(min=1e-10)
        assert_close(expected, wanted["render_depth_expected"][i], f"expected depth of view {i}")


def lifting(case: Case) -> None:
    """Significance in each view, and both weighted means over the views."""
    given, wanted, config = case.group("in"), case.group("out"), case.config
    features = given["segment_features"]
    assert features.shape[1:] == (config["n_segments"], config["dim"])
    logits_N = torch.logit(given["opacities"].double()).float()
    plain = torch.zeros(len(given["means"]), 3)
    scene = Gaussians(given["means"], given["scales"].log(), given["quats"], logits_N, plain)
    drawn = cameras(given, config["width"], config["height"])
    views = [lift.View(*each) for each in zip(drawn, given["seg_map"], features, strict=True)]
    for i, camera in enumerate(drawn):
        weight_N, centre_N2 = lift.significance(scene, camera)
        assert_close(weight_N, wanted["significance"][i], f"significance in view {i}")
        shown_N = wanted["significance"][i] > 0
        assert_close(centre_N2[shown_N], wanted["means2d"][i][shown_N], f"centres in view {i}")
        assert_close((weight_N > 0).int(), wanted["activated"][i], f"activated in view {i}")
    found = lift.lift(scene, views)
    assert_close(found.sum_NF, wanted["feature_numerator"], "sum of features")
    assert_close(found.weight_N, wanted["weight_sum"], "sum of weights")
    assert_close(found.features(), wanted["lifted_feature"], "lifted features")
    assert torch.equal(~found.seen_N, wanted["pruned"])
    found = lift.lift(scene, views, "pixels")
    assert_close(found.weight_N, wanted["alpha_weight_sum_all_pixels"], "weights over all pixels")
    assert_close(found.features(), wanted["alpha_weighted_feature_all_pixels"], "features over all pixels")


def fusion(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    assert given["masked"].shape == (config["n_masks"], config["dim"])
    three = given["global"][0], given["local_with_background"], given["masked"]
    for name, found in zip(("global", "local", "masked"), lift.fusion_weights(*three), strict=True):
        assert_close(found, wanted[f"w_{name}"], f"weight of {name}")
    assert_close(lift.fuse(*three), wanted["fused"], "fused")


def grids(case: Case) -> None:
    """Hashes, voxels in their order, one Gaussian of each in training, and fragments that cover all in tests."""
    given, wanted, config = case.group("in"), case.group("out"), case.config
    coord, side = given["coord"], config["grid_size"]
    grid = Grid.of(coord, side, config.get("hash_type", "fnv"))
    assert_close(grid.cells_N3, wanted["grid_coord_all"], "voxels")
    assert_close(fnv_hash(grid.cells_N3), wanted["fnv_hash_as_int64"], "FNV hash")
    assert_close(ravel_hash(grid.cells_N3), wanted["ravel_hash"], "ravelled hash")
    assert_close(grid.voxel_N, wanted["train/inverse"], "voxel of each Gaussian")
    assert_close(grid.count_V, wanted["train/voxel_counts"], "Gaussians of each voxel")
    assert_close((grid.low_3 * side)[None], wanted["train/min_coord"], "lowest voxel")
    assert int(wanted["train/n_voxels"]) == len(grid.count_V)
    rows = grid.one_each(torch.Generator().manual_seed(0))
    assert torch.equal(grid.voxel_N[rows], torch.arange(len(rows)))
    assert_close(grid.cells_N3[rows], wanted["train/grid_coord"], "one of each voxel")
    chosen = (coord[None] == wanted["train/one_valid_choice_coord"][:, None]).all(2).float().argmax(1)
    assert_close(coord[chosen], wanted["train/one_valid_choice_coord"], "the record's own choice")
    assert torch.equal(grid.voxel_N[chosen], torch.arange(len(chosen)))
    apart = coord[chosen].double() / side - grid.low_3 - grid.cells_N3[chosen] - 0.5
    assert_close(apart, wanted["train/displacement"], "displacement", 1e-7)
    passes = list(fragments(grid.voxel_N))
    assert len(passes) == int(wanted["test/n_fragments"])
    assert_close(torch.tensor([len(rows) for rows in passes]), wanted["test/voxels_per_fragment"], "fragments")
    assert torch.equal(torch.cat(passes).unique(), torch.arange(len(coord)))


def augmentation(case: Case) -> None:
    """How rotations, mirrors, scales and centring move Gaussians; options are in the records' names."""
    given = case.group("in")
    scene = Gaussians(
        given["coord"],
        given["scale"].log(),
        given["quat"],
        torch.logit(given["opacity"][:, 0].double(), eps=1e-7).float(),
        given["color"],
    )
    assert_close(scene.covariances(), given["cov"], "covariances")
    moves = {tuple(key.removeprefix("out/").split("/")[:1]) for key in case.tensors if key.startswith("out/")}
    for (move,) in sorted(moves):
        wanted = case.group("out", f"{move}/")
        words = move.split("_")
        if words[:2] == ["center", "shift"]:
            found = scene.moved(centre_shift(scene.means_N3, apply_z=words[-1] == "z"))
        elif words[0] == "scale":
            found = scene.scaled(float(words[1]))
        elif words[0] == "flip":
            found = scene
            for axis in words[1]:
                found = found.mirrored("xyz".index(axis))
        elif words[0] == "rotate" and words[-1] == "center":  # about the middle of the box, by the first angle if none
            axis, angle = next(pair for pair in case.config["angles"] if pair[0] == words[1])
            angle = float(words[2]) if words[2] != "bbox" else angle
            middle = (scene.means_N3.min(0).values + scene.means_N3.max(0).values) / 2
            found = scene.moved(-middle).turned(axis_turn(axis, angle * math.pi)).moved(middle)
        elif words[0] == "rotate":
            found = scene.turned(axis_turn(words[1], float(words[2]) * math.pi))
        else:
            raise AssertionError(f"{move}: a move that is not known")
        for name, value in (("coord", found.means_N3), ("scale", found.scales_N3.exp()), ("cov", found.covariances())):
            if name in wanted:
                assert_close(value, wanted[name], f"{name} after {move}")
        if "quat" in wanted:
            sign = (found.quaternions_N4 * wanted["quat"]).sum(1, keepdim=True).sign()
            assert_close(sign * found.quaternions_N4, wanted["quat"], f"quaternions after {move}")


def growth(case: Case) -> None:
    """What Gaussians become that are split among copies, and how far they wander."""
    given, wanted, config = case.group("in", "relocate/"), case.group("out", "relocate/"), case.config
    gate = config["op_sigmoid"]
    opacities_N, scales_N3 = mcmc.shared(given["opacities"], given["scales"], given["ratios"])
    assert_close(opacities_N, wanted["opacities"], "opacities after relocation")
    assert_close(scales_N3, wanted["scales"], "scales after relocation")
    given, wanted = case.group("in", "noise/"), case.group("out", "noise/")
    moved_N3 = mcmc.wandering(
        given["quats"],
        given["scales"].exp(),
        given["opacities"].sigmoid(),
        given["noise"],
        config["noise_scaler"],
        gate["k"],
        gate["x0"],
    )
    assert_close(given["means"] + moved_N3, wanted["means"], "places after the noise")


SCENE_CHECKS = [
    Check("files", kind("gs_ply", "preprocess_gs"), files),
    Check("grids", kind("grid_sample", "GridSample"), grids),
    Check("augmentation", kind("gs_augment", "RandomRotateTargetAngle"), augmentation),
    Check("drawing", kind("gsplat_render", "gsplat"), drawing),
    Check("lifting", kind("uplift", "OccamLGS"), lifting),
    Check("growth", kind("mcmc", "relocation"), growth),
    Check("fusion of labels", kind("label_fusion", "preprocess_siglip2_sam2"), fusion),
]
