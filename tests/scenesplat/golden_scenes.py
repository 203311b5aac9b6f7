"""Checks for the recorded cases of scenes: files, grids, augmentation, rendering, lifting, fusion of labels."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from scenesplat.gaussians import ATTRIBUTES, inputs
from scenesplat.ply import read_scene
from tests.golden_case import Case, Check, assert_close, kind


def files(case: Case) -> None:
    """A .ply to the arrays and the input that the released reader makes of it."""
    wanted = case.group("out")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.ply"
        path.write_bytes(case.group("in")["ply_bytes"].numpy().tobytes())
        scene = read_scene(path)
    assert len(scene) == case.config["n"] and scene.degree == case.config["sh_degree"]
    seen = scene.attributes()
    assert_close(seen["coord"], wanted["npy/coord"], "coord")
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


SCENE_CHECKS = [
    Check("files", kind("gs_ply", "preprocess_gs"), files),
]
