"""Scenes as files: 3DGS .ply as any tool writes it, packed splats, the folders of .npy arrays of the released code.

What is not a scene of Gaussians is refused with what it seems to be. What can be read is cleaned, and each thing that
was done is said as a warning, never silent.

Shape suffixes: N Gaussians, R coefficients of the higher bands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.files import replace_folder, write_atomically
from scenesplat import foreign
from scenesplat.gaussians import C0, Gaussians

TYPES = {
    **{"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2"},
    **{"uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
LONGEST_HEADER = 2**16
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "inch": 0.0254, "ft": 0.3048}
# Rows: the scene's own axes that become x, y and z.
UPS = {
    "z": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
    "-z": [[1.0, 0, 0], [0, -1, 0], [0, 0, -1]],
    "y": [[1.0, 0, 0], [0, 0, -1], [0, 1, 0]],
    "-y": [[1.0, 0, 0], [0, 0, 1], [0, -1, 0]],
}
FAR = 100.0  # metres from zero, beyond which centres are kept relative to an origin
SMALLEST_THING, LARGEST_ROOM = 0.05, 100.0  # metres; outside it is another unit, or the reader says that it is not
HIGH, WIDE = (1.8, 3.5), 2.5  # metres: heights of rooms, and what they are wider than
LARGEST_SHARE = 0.5  # of the scene's extent: a standard deviation beyond it is a sky or a mistake
FLAT = 1e-6  # metres: the third extent of a Gaussian that has two
# Formats that only splat-transform (PlayCanvas, npm) reads; by ending.
FOREIGN = {".ksplat": "a compressed splat of mkkellogg's viewer", ".lcc": "a splat of XGRIDS"}
PACKED: dict[str, tuple[str, Callable[[bytes], dict[str, NDArray]]]] = {
    ".spz": ("a compressed splat of Niantic's", foreign.spz),
    ".splat": ("antimatter15's 32 bytes a Gaussian", foreign.splat),
    ".sog": ("a compressed splat of PlayCanvas", foreign.sog),
}


@dataclass(frozen=True)
class Reading:
    """How a file is to be read.

    Args:
        unit: of lengths; None: metres, and a scene that is no room in metres is asked about.
        up: the axis of the file that points upwards; None: z, and a scene that lies on its side is asked about.
        scales: log (standard) or values.
        opacity: logit (standard) or values.
    """

    unit: Literal["m", "cm", "mm", "inch", "ft"] | None = None
    up: Literal["z", "-z", "y", "-y"] | None = None
    scales: Literal["log", "values"] = "log"
    opacity: Literal["logit", "values"] = "logit"


def read_scene(path: Path, how: Reading = Reading()) -> Gaussians:
    """The scene of a 3DGS .ply, of a .splat, .spz, .sog or compressed .ply, or of a folder of .npy arrays.

    Packed formats say themselves what their scales and opacities are.

    Raises:
        UserError: it is neither, or its values mean something else; the message says what it seems to be.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a 3DGS .ply, .splat, .spz or .sog, or a folder of .npy arrays")
    kind = _kind_of(path)
    if kind is not None:
        columns = _unpacked(path, *PACKED[kind])
        return _cleaned(_gaussians(columns, path, Reading()), path, replace(how, scales="log", opacity="logit"))
    columns = read_ply(path)
    return _cleaned(_gaussians(columns, path, how), path, how)


def _kind_of(path: Path) -> str | None:
    """The ending of PACKED that a file's first bytes, or else its name, stand for; None for a .ply.

    Raises:
        UserError: it is of a kind that is not read here; the message has the command that converts it.
    """
    with path.open("rb") as file:
        start = file.read(4)
    ending = path.suffix.lower()
    if start[:3] == b"ply":
        return None
    if start == b"NGSP" or (start[:2] == b"\x1f\x8b" and ending not in FOREIGN):
        return ".spz"
    if start[:2] == b"PK" and ending not in FOREIGN:
        return ".sog"
    if ending in PACKED:
        return ending
    if ending in FOREIGN:
        raise UserError(f"{path}: {FOREIGN[ending]}, which is not read here; {_conversion(path)}")
    raise UserError(f"{path}: not a .ply (its first bytes are {start!r}); expected a scene of 3D Gaussians")


def _conversion(path: Path) -> str:
    stem = path.name.split(".")[0]
    return f"convert it with `npx @playcanvas/splat-transform {path.name} {stem}-plain.ply`"


def _unpacked(path: Path, kind: str, unpack: Callable[[bytes], dict[str, NDArray]]) -> dict[str, NDArray]:
    """The columns of a packed file.

    Raises:
        UserError: it is damaged, or of another version than is known.
    """
    try:
        return unpack(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: {kind}, but {error}; export it again, or {_conversion(path)}") from None


# .ply files ----------------------------------------------------------------------------------------------------------


def read_ply(path: Path) -> dict[str, NDArray]:
    """The columns [N] of a .ply's vertices by name, ASCII or binary of either byte order.

    Raises:
        UserError: the file is damaged or cut short, or its vertices hold lists.
    """
    with path.open("rb") as file:
        order, elements, length = _header(file.read(LONGEST_HEADER), path)
        file.seek(length)
        packed = "chunk" in elements and "packed_position" in dict(elements.get("vertex", (0, []))[1])
        if "vertex" not in elements:
            raise UserError(f"{path}: no element vertex; it has {', '.join(elements) or 'no elements'}")
        tables: dict[str, dict[str, NDArray]] = {}
        for name, (count, properties) in elements.items():
            lists = [key for key, kind in properties if kind == "list"]
            if lists:
                raise UserError(f"{path}: element {name} has a list ({lists[0]}) before the vertices end; not a splat")
            tables[name] = columns = _table(file, order, name, count, properties, path)
            if name == "vertex" and not packed:
                break
    if not len(next(iter(tables["vertex"].values()), [])):
        raise UserError(f"{path}: no vertices; expected a scene of 3D Gaussians")
    if packed:
        try:
            return foreign.decompressed(tables["chunk"], tables["vertex"], tables.get("sh", {}))
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: a compressed .ply, but damaged ({error}); {_conversion(path)}") from None
    return columns


def _table(
    file: BinaryIO, order: str, name: str, count: int, properties: list[tuple[str, str]], path: Path
) -> dict[str, NDArray]:
    """The columns of the next element."""
    if order == "ascii":
        table = _lines(file, count, len(properties), path, name)
        return {key: table[:, i] for i, (key, _) in enumerate(properties)}
    kind = np.dtype([(key, ORDERS[order] + TYPES[kind]) for key, kind in properties])
    left = path.stat().st_size - file.tell()
    if left < count * kind.itemsize:
        raise UserError(
            f"{path}: cut short: {count:,} of element {name} are declared, {kind.itemsize} bytes each, "
            f"{left // kind.itemsize:,} are there; copy or export it again"
        )
    found = np.frombuffer(file.read(count * kind.itemsize), kind)
    return {key: found[key] for key, _ in properties}


def _header(start: bytes, path: Path) -> tuple[str, dict[str, tuple[int, list[tuple[str, str]]]], int]:
    """Byte order, elements with count and properties, and the header's length."""
    end = start.find(b"end_header")
    newline = start.find(b"\n", end)
    if end < 0 or newline < 0:
        raise UserError(f"{path}: no end_header in its first {LONGEST_HEADER:,} bytes; it is damaged")
    order = ""
    elements: dict[str, tuple[int, list[tuple[str, str]]]] = {}
    properties: list[tuple[str, str]] = []
    for number, line in enumerate(start[:end].decode("latin-1").splitlines(), 1):
        words = line.split()
        try:
            if words[:1] == ["format"]:
                order = words[1]
            elif words[:1] == ["element"]:
                properties = []
                if words[1] in elements or int(words[2]) < 0:
                    raise ValueError
                elements[words[1]] = int(words[2]), properties
            elif words[:1] == ["property"]:
                if (words[1] != "list" and words[1] not in TYPES) or words[-1] in dict(properties):
                    raise ValueError
                properties.append((words[-1], words[1]))
        except (ValueError, IndexError):
            raise UserError(f"{path}: line {number} of its header is {line.strip()!r}; it is damaged") from None
    if order not in ORDERS:
        raise UserError(f"{path}: format {order or '(none)'!r}; expected one of {', '.join(ORDERS)}")
    return order, elements, newline + 1


def _lines(file: BinaryIO, count: int, width: int, path: Path, element: str) -> NDArray:
    """The next `count` lines of numbers [count, width], float64."""
    rows = []
    for number in range(count):
        words = file.readline().split()
        try:
            if len(words) != width:
                raise ValueError
            rows.append([float(word) for word in words])
        except ValueError:
            found = f"{len(words)} values" if words else "the end of the file"
            raise UserError(
                f"{path}: {element} {number + 1} of {count:,}: expected {width} numbers, found {found}"
            ) from None
    return np.array(rows, np.float64).reshape(count, width)


def _numbered(columns: Mapping[str, NDArray], stem: str) -> list[str]:
    """The names stem0, stem1, ... that are there, in the order of their numbers."""
    found = [name for name in columns if name.startswith(stem) and name[len(stem) :].isdecimal()]
    return sorted(found, key=lambda name: int(name[len(stem) :]))


def _gaussians(columns: Mapping[str, NDArray], path: Path, how: Reading) -> Gaussians:
    """Columns to Gaussians, nothing cleaned; in the file's own axes and unit, centres in float64.

    Raises:
        UserError: properties are missing; the message says which, and what the file seems to be.
    """
    scales = _numbered(columns, "scale_")
    rest = _numbered(columns, "f_rest_")
    missing = [name for name in ("x", "y", "z", "opacity") if name not in columns]
    missing += [f"scale_{i}" for i in range(2) if f"scale_{i}" not in columns]
    missing += [f"rot_{i}" for i in range(4) if f"rot_{i}" not in columns]
    shades: tuple[str, ...] = next(
        (
            names
            for names in (("f_dc_0", "f_dc_1", "f_dc_2"), ("red", "green", "blue"), ("r", "g", "b"))
            if all(name in columns for name in names)
        ),
        (),
    )
    if not shades:
        missing.append("f_dc_0 (or red)")
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; {_looks_like(columns)}")
    if len(rest) not in (0, 9, 24, 45):
        raise UserError(f"{path}: {len(rest)} properties f_rest_*; expected 0, 9, 24 or 45 (degree 0 to 3)")

    def stacked(names: list[str] | tuple[str, ...], kind: type = np.float32) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(columns[name]).astype(kind) for name in names], 1))

    means_N3, scales_NS, opacities_N1 = stacked(("x", "y", "z"), np.float64), stacked(scales), stacked(["opacity"])
    _refuse_activated(means_N3, scales_NS, opacities_N1[:, 0], path, how)
    if how.scales == "values":
        scales_NS = scales_NS.clamp(min=FLAT).log()
    if how.opacity == "values":
        opacities_N1 = torch.logit(opacities_N1.double(), eps=1e-7).float()
    if scales_NS.shape[1] == 2:
        flat_N1 = torch.full_like(scales_NS[:, :1], float(np.log(FLAT)))
        scales_NS = torch.cat([scales_NS, flat_N1], 1)
        _say(path, f"two scales a Gaussian (2DGS): the third is taken as {FLAT:g} m")
    colours_N3 = stacked(shades)
    if shades[0] != "f_dc_0":
        whole = np.asarray(columns[shades[0]]).dtype.kind in "ui" or float(colours_N3.max()) > 1
        # a thousandth of a step more, so that cutting off gives back the number that is in the file
        colours_N3 = ((colours_N3 + 1e-3) / 255 if whole else colours_N3) / C0 - 0.5 / C0
    normals = [name for name in ("nx", "ny", "nz") if name in columns]
    normals_N3 = stacked(normals) if len(normals) == 3 else None
    return Gaussians(
        means_N3,
        scales_NS,
        stacked([f"rot_{i}" for i in range(4)]),
        opacities_N1[:, 0],
        torch.cat([colours_N3, stacked(rest)], 1) if rest else colours_N3,
        normals_N3=normals_N3 if normals_N3 is not None and bool((normals_N3 != 0).any()) else None,
    )


def _looks_like(columns: Mapping[str, NDArray]) -> str:
    """What a .ply that is no splat seems to be."""
    coloured = "coloured " if "red" in columns else ""
    if "opacity" not in columns and not _numbered(columns, "scale_"):
        return (
            f"it seems to be a {coloured}point cloud or mesh, without scales and opacity: "
            "fit Gaussians to its pictures first"
        )
    return f"it has {', '.join(list(columns)[:12])}: a splat of another kind"


def _refuse_activated(means_N3: Tensor, scales_NS: Tensor, opacities_N: Tensor, path: Path, how: Reading) -> None:
    """Raise UserError for values that cannot be what they are read as."""
    known = means_N3.isfinite().all(1) & scales_NS.isfinite().all(1) & opacities_N.isfinite()
    means_N3, scales_NS, opacities_N = means_N3[known], scales_NS[known], opacities_N[known]
    if not len(means_N3):
        return
    spread = float(max(_span(axis) for axis in means_N3.unbind(1)))
    if how.scales == "log" and bool((scales_NS > 0).all()) and float(scales_NS.exp().median()) > 0.05 * spread:
        raise UserError(
            f"{path}: every scale is above 0 ({float(scales_NS.min()):.3g} to {float(scales_NS.max()):.3g}): as "
            f"logarithms they would make Gaussians as large as the scene, {spread:.3g}; say --scales values if they "
            "are lengths"
        )
    if how.scales == "values" and bool((scales_NS < 0).any()):
        raise UserError(f"{path}: scales below 0 ({float(scales_NS.min()):.3g}) are no lengths; leave --scales at log")
    inside = bool(((opacities_N >= 0) & (opacities_N <= 1)).all())
    if how.opacity == "logit" and inside and len(opacities_N) > 1:
        raise UserError(
            f"{path}: every opacity lies in 0..1, as no scene's logits do; say --opacity values if they are shares"
        )
    if how.opacity == "values" and not inside:
        low, high = float(opacities_N.min()), float(opacities_N.max())
        raise UserError(f"{path}: opacities from {low:.3g} to {high:.3g} are no shares; leave --opacity at logit")


def _say(path: Path, what: str) -> None:
    warnings.warn(f"{path}: {what}", stacklevel=3)


def _cleaned(scene: Gaussians, path: Path, how: Reading) -> Gaussians:
    """In metres with z up and relative to an origin, without rows that are no Gaussians.

    Raises:
        UserError: the unit or the axis must be asked for, or nothing is left.
    """
    scales_N3 = scene.scales_N3
    known = torch.stack(
        [
            part.isfinite().all(1)
            for part in (scene.means_N3, scales_N3, scene.quaternions_N4, scene.colours_NC, scene.opacities_N[:, None])
        ]
    ).all(0)
    infinite = scene.opacities_N.isinf()  # a logit of 1 or 0
    if bool(infinite.any()):
        scene = replace(scene, opacities_N=scene.opacities_N.clamp(-20, 20))
        known |= infinite & scene.means_N3.isfinite().all(1) & scales_N3.isfinite().all(1)
    if not bool(known.all()):
        _say(path, f"{int((~known).sum()):,} of {len(known):,} Gaussians have values that are no numbers: left out")
        scene = scene.select(known)
    if not len(scene):
        raise UserError(f"{path}: none of its {len(known):,} Gaussians has numbers only")
    length_N = scene.quaternions_N4.norm(dim=1)
    zero = length_N < 1e-9
    if bool(zero.any()):
        _say(path, f"{int(zero.sum()):,} Gaussians have a quaternion of zero: taken as not turned")
    unit_N4 = torch.where(zero[:, None], torch.tensor([1.0, 0, 0, 0]), F.normalize(scene.quaternions_N4, dim=1))
    scene = replace(scene, quaternions_N4=unit_N4)
    if how.up is not None and how.up != "z":
        scene = scene.turned(torch.tensor(UPS[how.up], dtype=torch.float64))
    scene = scene.scaled(UNITS[how.unit or "m"])
    spread = torch.stack([_span(axis) for axis in scene.means_N3.unbind(1)])
    if how.unit is None and not SMALLEST_THING <= float(spread.max()) <= LARGEST_ROOM:
        raise UserError(
            f"{path}: the scene spans {float(spread.max()):.3g} units; a room spans metres. Say --unit cm (or mm, "
            "inch, ft), or --unit m if it is that large"
        )
    lowest = int(spread.argmin())
    low, middle, _ = spread.sort().values.tolist()
    room = HIGH[0] <= low <= HIGH[1] and middle >= max(WIDE, low / 0.75)  # things that were cut out are not asked about
    if how.up is None and lowest != 2 and room:
        raise UserError(
            f"{path}: the scene is lowest along {'xyz'[lowest]} ({float(spread[lowest]):.3g} m), not along z: say "
            "which axis of the file points upwards, --up y or --up=-y (or --up z, if z does)"
        )
    large = scene.scales_N3.exp().amax(1) > LARGEST_SHARE * float(spread.max())
    if bool(large.any()) and not bool(large.all()):
        _say(path, f"{int(large.sum()):,} Gaussians are larger than half of the scene (a sky?): left out")
        scene = scene.select(~large)
    middle_3 = scene.means_N3.median(0).values.round()
    origin_3 = middle_3 if float(middle_3.abs().max()) > FAR else torch.zeros(3, dtype=torch.float64)
    return replace(scene, means_N3=(scene.means_N3 - origin_3).float(), origin_3=origin_3)


def _span(values_N: Tensor) -> Tensor:
    """The extent of a coordinate without the outermost hundredth at each end."""
    ordered_N = values_N.sort().values
    edge = len(ordered_N) // 100
    return ordered_N[len(ordered_N) - 1 - edge] - ordered_N[edge]


def write_scene(path: Path, scene: Gaussians) -> None:
    """Write a standard 3DGS .ply, binary little endian, or, where `path` does not end in .ply, a folder of .npy arrays.

    Centres far from zero are written as doubles, as 32 bits would move them.

    Raises:
        UserError: it cannot be written.
    """
    if path.suffix.lower() != ".ply":
        replace_folder(path, lambda place: _write_folder(place, scene))
        return
    means_N3 = _places(scene)
    normals_N3 = scene.normals_N3 if scene.normals_N3 is not None else torch.zeros_like(scene.means_N3)
    parts = {
        ("x", "y", "z"): means_N3,
        ("nx", "ny", "nz"): normals_N3,
        ("f_dc_0", "f_dc_1", "f_dc_2"): scene.colours_NC[:, :3],
        tuple(f"f_rest_{i}" for i in range(scene.colours_NC.shape[1] - 3)): scene.colours_NC[:, 3:],
        ("opacity",): scene.opacities_N[:, None],
        ("scale_0", "scale_1", "scale_2"): scene.scales_N3,
        ("rot_0", "rot_1", "rot_2", "rot_3"): scene.quaternions_N4,
    }
    write_ply(path, {name: part[:, i] for names, part in parts.items() for i, name in enumerate(names)})


def _places(scene: Gaussians) -> Tensor:
    """Centres from zero on; in 64 bits where they are far from it."""
    if scene.origin_3 is None or not bool((scene.origin_3 != 0).any()):
        return scene.means_N3
    return scene.means_N3.double() + scene.origin_3


def write_ply(path: Path, columns: Mapping[str, Tensor]) -> None:
    """A binary .ply of vertices with these columns [N], as 32-bit floats (doubles stay doubles, bytes bytes)."""
    kinds = {torch.float64: ("<f8", "double"), torch.uint8: ("u1", "uchar")}
    chosen = {name: kinds.get(column.dtype, ("<f4", "float")) for name, column in columns.items()}
    count = len(next(iter(columns.values())))
    table = np.empty(count, np.dtype([(name, kind) for name, (kind, _) in chosen.items()]))
    for name, column in columns.items():
        table[name] = column.detach().cpu().numpy()
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    lines += [f"property {word} {name}" for name, (_, word) in chosen.items()]
    header = "\n".join([*lines, "end_header", ""]).encode()
    write_atomically(path, lambda place: place.write_bytes(header + table.tobytes()))


# Folders of .npy arrays ----------------------------------------------------------------------------------------------

# What the released preprocessing writes: activated values, one file an attribute.
_REQUIRED = {"coord": 3, "color": 3, "opacity": 1, "quat": 4, "scale": 3}
_OTHERS = ("normal", "segment", "instance", "lang_feat", "valid_feat_mask")


def _read_folder(path: Path) -> Gaussians:
    arrays: dict[str, Tensor] = {}
    for name in (*_REQUIRED, *_OTHERS):
        file = path / f"{name}.npy"
        if not file.is_file():
            continue
        try:
            arrays[name] = torch.from_numpy(np.load(file, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise UserError(f"{file}: not an array of numbers ({error}); write it with numpy.save") from None
    missing = [f"{name}.npy" for name in _REQUIRED if name not in arrays]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; expected a .ply, or a folder of .npy arrays of a scene")
    count = len(arrays["coord"])
    for name, array in arrays.items():
        width = _REQUIRED.get(name, 3 if name == "normal" else None)
        if len(array) != count or (width is not None and array.numel() != count * width):
            raise UserError(
                f"{path / (name + '.npy')}: shape {tuple(array.shape)}; coord.npy has {count:,} Gaussians"
                + (f", expected {width} values each" if width else "")
            )

    def floats(name: str) -> Tensor:
        return arrays[name].float().view(count, -1)

    whole = arrays["color"].dtype == torch.uint8 or float(arrays["color"].max()) > 1
    colours_N3 = (floats("color") + 1e-3) / 255 if whole else floats("color")
    scene = Gaussians(
        arrays["coord"].double(),
        floats("scale").clamp(min=FLAT).log(),
        floats("quat"),
        torch.logit(floats("opacity").double()[:, 0], eps=1e-7).float(),
        (colours_N3 - 0.5) / C0,
        labels_N=arrays["segment"].reshape(-1).long() if "segment" in arrays else None,
        instances_N=arrays["instance"].reshape(-1).long() if "instance" in arrays else None,
        features_NF=arrays.get("lang_feat"),
        valid_N=arrays["valid_feat_mask"].reshape(-1).bool() if "valid_feat_mask" in arrays else None,
        normals_N3=floats("normal") if "normal" in arrays else None,
    )
    return _cleaned(scene, path, Reading(unit="m", up="z"))


def _write_folder(place: Path, scene: Gaussians) -> None:
    place.mkdir(parents=True, exist_ok=True)
    seen = scene.attributes()
    found = {
        "coord": _places(scene),
        "color": seen["colour"].to(torch.uint8),
        "opacity": seen["opacity"][:, 0],
        "quat": seen["quaternion"],
        "scale": seen["scale"],
        "normal": scene.normals_N3,
        "segment": scene.labels_N,
        "instance": scene.instances_N,
        "lang_feat": scene.features_NF,
        "valid_feat_mask": scene.valid_N,
    }
    for name, value in found.items():
        if value is not None:
            np.save(place / f"{name}.npy", value.detach().cpu().numpy())
