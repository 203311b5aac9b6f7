"""Scenes in files: what other tools write is read to the number; what is no splat is refused with what it seems."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from scenesplat.gaussians import Gaussians
from scenesplat.ply import Reading, read_ply, read_scene, write_ply, write_scene
from tests import refusals

NUMBERS = torch.Generator().manual_seed(0)


STANDARD = Reading()


def refused(path: Path, *words: str, how: Reading = STANDARD) -> None:
    """Reading it ends in one sentence with these words."""
    said = refusals.refused(".", read_scene, path, how)
    assert all(word in said for word in words), said


def scene(count: int = 300, degree: int = 0) -> Gaussians:
    """A room of 5 x 4 x 2.5 metres."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        torch.rand(count, 3, generator=generator) * torch.tensor([5.0, 4.0, 2.5]),
        normal(count, 3) * 0.5 - 3,
        F.normalize(normal(count, 4), dim=1),
        normal(count),
        normal(count, 3 * (degree + 1) ** 2) * 0.4,
    )


def columns_of(given: Gaussians) -> dict[str, Tensor]:
    names = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2"]
    values = [*given.means_N3.t(), *given.colours_NC[:, :3].t()]
    names += [f"f_rest_{i}" for i in range(given.colours_NC.shape[1] - 3)]
    values += list(given.colours_NC[:, 3:].t())
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    values += [given.opacities_N, *given.scales_N3.t(), *given.quaternions_N4.t()]
    return dict(zip(names, values, strict=True))


def equal(found: Gaussians, wanted: Gaussians) -> None:
    for name in ("means_N3", "scales_N3", "quaternions_N4", "opacities_N", "colours_NC"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_scene_comes_back_as_it_was_written(tmp_path: Path, degree: int) -> None:
    wanted = scene(degree=degree)
    write_scene(tmp_path / "a.ply", wanted)
    found = read_scene(tmp_path / "a.ply")
    assert found.degree == degree
    equal(found, wanted)


@pytest.mark.parametrize("order", ["ascii", "binary_big_endian"])
def test_other_orders_of_bytes_and_of_properties_and_surplus_ones_change_nothing(tmp_path: Path, order: str) -> None:
    wanted = scene(degree=1)
    columns = columns_of(wanted)
    columns |= {"nxx": torch.zeros(300), "segment": torch.arange(300.0)}
    names = sorted(columns, reverse=True)
    table = np.stack([columns[name].double().numpy() for name in names], 1)
    lines = ["ply", f"format {order} 1.0", "comment made by a test", "element vertex 300"]
    lines += [f"property {'double' if name == 'x' else 'float'} {name}" for name in names]
    lines += ["element face 0", "property list uchar int vertex_indices", "end_header", ""]
    if order == "ascii":
        body = "\n".join(" ".join(repr(float(value)) for value in row) for row in table).encode()
    else:
        kind = np.dtype([(name, ">f8" if name == "x" else ">f4") for name in names])
        body = np.array([tuple(row) for row in table], kind).tobytes()
    (tmp_path / "a.ply").write_bytes(
        "\r\n".join(lines[:-1]).encode() + b"\n" + body if order == "ascii" else "\n".join(lines).encode() + body
    )
    equal(read_scene(tmp_path / "a.ply"), wanted)


def test_a_folder_of_arrays_keeps_labels_and_features(tmp_path: Path) -> None:
    wanted = scene()
    wanted = replace(
        wanted,
        labels_N=torch.arange(300) % 5 - 1,
        instances_N=torch.arange(300) // 10,
        features_NF=F.normalize(torch.randn(300, 8), dim=1),
        valid_N=torch.arange(300) % 2 == 0,
        normals_N3=F.normalize(torch.randn(300, 3), dim=1),
    )
    write_scene(tmp_path / "room", wanted)
    found = read_scene(tmp_path / "room")
    for name in ("labels_N", "instances_N", "valid_N", "features_NF", "normals_N3", "means_N3"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), msg=name)
    for name, value in wanted.attributes().items():
        torch.testing.assert_close(found.attributes()[name], value, atol=2e-6, rtol=2e-6, msg=name)
    assert torch.equal(found.attributes()["colour"], wanted.attributes()["colour"])


def test_red_green_and_blue_in_place_of_harmonics_give_back_the_very_bytes(tmp_path: Path) -> None:
    columns = columns_of(scene(256))
    for i, name in enumerate(("red", "green", "blue")):
        del columns[f"f_dc_{i}"]
        columns[name] = ((torch.arange(256) * (i + 1)) % 256).to(torch.uint8)
    write_ply(tmp_path / "a.ply", columns)
    found = read_scene(tmp_path / "a.ply").attributes()["colour"]
    wanted = torch.stack([columns[name] for name in ("red", "green", "blue")], 1).float()
    assert torch.equal(found, wanted)


def test_two_scales_are_flat_discs_and_said_so(tmp_path: Path) -> None:
    columns = columns_of(scene())
    del columns["scale_2"]
    write_ply(tmp_path / "a.ply", columns)
    with pytest.warns(UserWarning, match="2DGS"):
        found = read_scene(tmp_path / "a.ply")
    assert float(found.scales_N3.exp()[:, 2].max()) == pytest.approx(1e-6)


def test_values_in_place_of_logarithms_are_named_and_read_when_told(tmp_path: Path) -> None:
    wanted = scene()
    columns = columns_of(wanted)
    columns |= {f"scale_{i}": wanted.scales_N3[:, i].exp() for i in range(3)}
    write_ply(tmp_path / "scales.ply", columns)
    refused(tmp_path / "scales.ply", "--scales values")
    equal(read_scene(tmp_path / "scales.ply", Reading(scales="values")), wanted)
    columns = columns_of(wanted) | {"opacity": wanted.opacities_N.sigmoid()}
    write_ply(tmp_path / "opacity.ply", columns)
    refused(tmp_path / "opacity.ply", "--opacity values")
    torch.testing.assert_close(
        read_scene(tmp_path / "opacity.ply", Reading(opacity="values")).opacities_N,
        wanted.opacities_N,
        atol=1e-4,
        rtol=1e-4,
    )
    write_scene(tmp_path / "right.ply", wanted)
    refused(tmp_path / "right.ply", "no shares", how=Reading(opacity="values"))
    refused(tmp_path / "right.ply", "no lengths", how=Reading(scales="values"))


def test_what_is_no_splat_is_refused_with_what_it_seems_to_be(tmp_path: Path) -> None:
    points = {name: torch.rand(20) for name in ("x", "y", "z")}
    points |= {name: torch.full((20,), 7, dtype=torch.uint8) for name in ("red", "green", "blue")}
    write_ply(tmp_path / "points.ply", points)
    refused(tmp_path / "points.ply", "coloured point cloud", "opacity", "scale_0")
    without = columns_of(scene())
    del without["rot_2"]
    write_ply(tmp_path / "rot.ply", without)
    refused(tmp_path / "rot.ply", "rot_2 missing")
    odd = columns_of(scene()) | {f"f_rest_{i}": torch.zeros(300) for i in range(7)}
    write_ply(tmp_path / "odd.ply", odd)
    refused(tmp_path / "odd.ply", "7 properties f_rest", "0, 9, 24 or 45")
    packed = b"ply\nformat binary_little_endian 1.0\nelement chunk 1\nproperty float min_x\nelement vertex 256\n"
    (tmp_path / "a.compressed.ply").write_bytes(packed + b"property uint packed_position\nend_header\n" + bytes(2000))
    refused(tmp_path / "a.compressed.ply", "compressed .ply, but damaged", "splat-transform")
    for name, start in (("a.spz", b"\x1f\x8b"), ("b.bin", b"\x1f\x8b"), ("a.splat", b"0000"), ("a.sog", b"PK")):
        (tmp_path / name).write_bytes(start + bytes(50))
        refused(tmp_path / name, "splat-transform")
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", "not a .ply")
    refused(tmp_path / "none.ply", "no such file")
    refused(tmp_path, "coord.npy")


def test_a_damaged_file_is_told_by_where(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.ply", scene())
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(content[:-100])
    refused(tmp_path / "cut.ply", "cut short", "300 of element vertex", "298 are there")
    for name, old, new, words in (
        ("type", b"property float x", b"property flaot x", "line 4"),
        ("format", b"little_endian", b"middle_endian", "binary_middle_endian"),
        ("count", b"vertex 300", b"vertex many", "line 3"),
        ("twice", b"property float y", b"property float x", "line 5"),
        ("none", b"vertex 300", b"vertex 0", "no vertices"),
        ("huge", b"vertex 300", b"vertex 999999999999999", "cut short"),
    ):
        (tmp_path / f"{name}.ply").write_bytes(content.replace(old, new))
        refused(tmp_path / f"{name}.ply", words)


def test_rows_that_are_no_gaussians_are_left_out_and_counted(tmp_path: Path) -> None:
    wanted = scene()
    broken = replace(wanted, means_N3=wanted.means_N3.clone(), quaternions_N4=wanted.quaternions_N4 * 7)
    broken.means_N3[3, 1] = float("nan")
    broken.means_N3[9, 0] = float("inf")
    broken.quaternions_N4[5] = 0
    broken.scales_N3[20] = 3.0  # a standard deviation of 20 metres
    write_scene(tmp_path / "a.ply", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_scene(tmp_path / "a.ply")
    said = " ".join(str(warning.message) for warning in caught)
    assert "2 of 300" in said and "1 Gaussians have a quaternion of zero" in said and "1 Gaussians are larger" in said
    kept = [i for i in range(300) if i not in (3, 9, 20)]
    torch.testing.assert_close(found.means_N3, wanted.means_N3[kept])
    assert torch.equal(found.quaternions_N4[4], torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(found.quaternions_N4[6:], wanted.quaternions_N4[kept][6:])


def test_a_scene_far_from_zero_loses_nothing(tmp_path: Path) -> None:
    near = scene()
    exact = replace(near, means_N3=(near.means_N3 * 1024).round() / 1024)
    columns = columns_of(exact)
    far = {name: columns[name].double() + shift for name, shift in (("x", 4e6), ("y", -3e5), ("z", 120.0))}
    write_ply(tmp_path / "far.ply", columns | far)
    write_ply(tmp_path / "near.ply", columns)
    found, wanted = read_scene(tmp_path / "far.ply"), read_scene(tmp_path / "near.ply")
    assert found.origin_3 is not None and wanted.origin_3 is not None
    assert torch.equal(found.means_N3 - found.means_N3.min(0).values, wanted.means_N3 - wanted.means_N3.min(0).values)
    write_scene(tmp_path / "again.ply", found)
    assert np.array_equal(read_ply(tmp_path / "again.ply")["x"], far["x"].numpy())


def test_units_and_the_upward_axis_are_asked_for_and_obeyed(tmp_path: Path) -> None:
    wanted = scene()
    write_scene(tmp_path / "cm.ply", wanted.scaled(100.0))
    refused(tmp_path / "cm.ply", "--unit cm")
    equal(read_scene(tmp_path / "cm.ply", Reading(unit="cm")), wanted)
    lying = wanted.turned(torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]))  # y up
    write_scene(tmp_path / "y.ply", lying)
    refused(tmp_path / "y.ply", "lowest along y", "--up")
    found = read_scene(tmp_path / "y.ply", Reading(up="y"))
    torch.testing.assert_close(found.means_N3, wanted.means_N3)
    torch.testing.assert_close(found.covariances(), wanted.covariances())


def test_turning_a_scene_turns_its_colours_with_it() -> None:
    from scenesplat.gaussians import harmonics

    before = scene(50, degree=3)
    axis = F.normalize(torch.randn(3, generator=NUMBERS), dim=0)
    skew = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = torch.matrix_exp(1.1 * skew)
    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    for matrix, after in ((turn, before.turned(turn)), (mirror, before.mirrored(1))):
        seen_from = F.normalize(torch.randn(50, 3, generator=NUMBERS), dim=1)
        old = torch.einsum("nk,nkc->nc", harmonics(seen_from, 3), before.harmonics_NK3)
        new = torch.einsum("nk,nkc->nc", harmonics(seen_from @ matrix.t(), 3), after.harmonics_NK3)
        torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)
        wanted = matrix @ before.covariances() @ matrix.t()
        torch.testing.assert_close(after.covariances(), wanted, atol=1e-6, rtol=1e-5)


def test_a_quaternion_without_a_real_part_is_kept() -> None:
    """The released reader multiplies by sign(w), which makes it zero."""
    given = replace(
        scene(4), quaternions_N4=torch.tensor([[0.0, 1, 0, 0], [0, 0, -1, 0], [-0.6, 0.8, 0, 0], [1, 0, 0, 0]])
    )
    found = given.attributes()["quaternion"]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(found[2], torch.tensor([0.6, -0.8, 0, 0]))


def test_a_folder_whose_arrays_do_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    write_scene(tmp_path / "a", scene())
    np.save(tmp_path / "a" / "scale.npy", np.ones((7, 3)))
    refused(tmp_path / "a", "scale.npy", "(7, 3)")
    (tmp_path / "a" / "scale.npy").write_bytes(b"no array")
    refused(tmp_path / "a", "scale.npy")
    (tmp_path / "a" / "scale.npy").unlink()
    with pytest.raises(UserError, match=r"scale\.npy missing"):
        read_scene(tmp_path / "a")
