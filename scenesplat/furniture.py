"""Real furniture as coloured surface points: CC0 and CC-BY models of the Sweet Home 3D libraries.

Points of the models that rooms are furnished with travel in the repository as one file,
`scenesplat/archive/furniture.safetensors.xz` (credits in NOTICE). The models themselves, 820 of them, come as a Debian
package:

    python -m scenesplat.furniture fetch          # about 120 MB; `make data-furniture`
    python -m scenesplat.furniture archive        # the file in the repository, made anew from what was fetched

A model's axes here: x to its right, y to its back, z up; its front looks along -y, it stands on z = 0, in metres.

Shape suffixes: V vertices, T triangles, P points.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from safetensors.numpy import load, save

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import checked_file, write_atomically
from common.packages import Package, fetch, find_root
from common.paths import REPOSITORY, cache_dir

ARCHIVE = REPOSITORY / "scenesplat" / "archive" / "furniture.safetensors.xz"
PACKAGE = Package("debian", "sweethome3d-furniture", licence="CC0 and CC-BY-3.0")
LIBRARIES = Path("usr/share/sweethome3d/furniture")
ARCHIVED, FETCHED = 4000, 20_000  # points of a model
STEPS = 1023  # of a model's box, per axis, that points in the archive lie on
MOST_FACES = 200_000
HELD_OUT = 4  # every fourth model of a class is for test rooms only

# Class: names of its models, in the libraries. The last five are in no training room (open vocabulary).
NAMES: dict[str, tuple[str, ...]] = {
    "bed": ("Bed", "Iron bed", "Child bed", "Baby bed", "Crib", "Hospital bed", "Captain's bed", "Day bed", "Bunk bed"),
    "chair": (
        *("Chair", "Oak chair", "Chair with cushion", "Osaka chair", "Folding chair", "Child chair", "Children chair"),
        *("Plastic chair", "Teck chair", "Cafe chair", "Ryokan chair", "Class seat"),
    ),
    "sofa": (
        *("Sofa", "Couch", "Corner sofa", "Winchester sofa", "Clear sofa", "Sofa 2 seats", "Sofa 3 seats"),
        *("Burlap sofa", "Futon couch", "Rattan sofa", "Convertible sofa BZ"),
    ),
    "table": (
        *("Table", "Oak table", "Round table", "Black table", "Glass table", "Wooden table", "Wooden alder table"),
        *("Wooden teak table", "Table with tablecloth", "Table on trestles", "Cafe table", "Rattan table"),
        *("Folding table", "Coffee table"),
    ),
    "desk": ("Desk", "Wooden desk", "Desk table", "Technical table"),
    "cabinet": (
        *("Drawers cabinet", "Glass door cabinet", "High cabinet", "Island", "Lower cabinet", "Small lower cabinet"),
        *("Small upper cabinet", "Upper cabinet", "Upper shelves cabinet", "Television cabinet", "TV stand"),
        *("Dresser with drawers", "Filing cabinet"),
    ),
    "bookshelf": ("Bookcase", "Full bookcase", "Shelves", "Vertical shelves"),
    "lamp": (
        *("Lamp", "Desk lamp", "Little lamp", "Pedestal vase lamp", "Pendant lamp", "Hanging light"),
        *("Chandelier lamp", "Ceiling lamp"),
    ),
    "plant": (
        *("Plant", "Little plant", "Decorative plant", "Cactus", "Orchids", "Bamboo", "Indoor plant", "Spathiphyllum"),
        *("Yucca", "Spider plant", "Succulent plant", "Tulips", "White lily", "Flowers", "Ficus", "Bonsai tree"),
    ),
    "tv": ("TV", "TV 16:9", "Wall flat TV", "Screen"),
    "radiator": ("Radiator",),
    "stove": ("Stove", "Large stove", "Cooker", "Oven", "Double oven"),
    "refrigerator": ("Refrigerator", "Large fridge", "Fridge"),
    "sink": ("Washbasin", "Sink", "Sink cabinet", "Vanity", "Double vanity"),
    "toilet": ("Toilets unit",),
    "bathtub": ("Bath", "Corner bathtub", "Island bath"),
    "door": ("Door", "Exterior door", "Double door", "Double door with panes", "Glass door"),
    "window": (
        *("Turn window", "Double-hung window", "Double window with large pane", "Sliding window"),
        *("Double window 3 panes", "Double window 4 panes"),
    ),
    "armchair": ("Armchair", "Modern armchair", "Winchester armchair", "Rattan armchair"),
    "wardrobe": ("Wardrobe", "Cupboard"),
    "nightstand": ("Bedside table",),
    "stool": ("Stool", "Bar stool"),
    "vase": ("Vase",),
}
UNSEEN = ("armchair", "wardrobe", "nightstand", "stool", "vase")


@dataclass
class Furniture:
    """Points of one model.

    Args:
        key: its library and number of catalogue; maker: whom to credit.
        size_3: width, depth and height in metres.
        elevation: of its foot above the floor; top: height above its foot on which things can stand, 0 for none.
        points_P3, normals_P3, colours_P3: colours in 0..1; clear_P: 0 (opaque) to 1 (glass).
    """

    key: str
    name: str
    label: str
    maker: str
    licence: str
    size_3: tuple[float, float, float]
    elevation: float
    top: float
    area: float
    held_out: bool
    points_P3: NDArray
    normals_P3: NDArray
    colours_P3: NDArray
    clear_P: NDArray


# The libraries ------------------------------------------------------------------------------------------------------


def label_of(name: str) -> str | None:
    """The class of a model by its name."""
    return next((label for label, names in NAMES.items() if name in names), None)


def catalogue(library: zipfile.ZipFile) -> list[dict[str, str]]:
    """The entries of a library, as property to value."""
    entries: dict[int, dict[str, str]] = {}
    for line in library.read("PluginFurnitureCatalog.properties").decode("latin-1").splitlines():
        found = re.fullmatch(r"(\w+)#(\d+)=(.*)", line.strip())
        if found:
            value = found[3].encode("latin-1").decode("unicode_escape") if "\\u" in found[3] else found[3]
            entries.setdefault(int(found[2]), {})[found[1]] = value
    return [entries[number] for number in sorted(entries)]


def read_models(root: Path, points: int) -> Iterator[Furniture]:
    """Every model of a class of ours, sampled; those that are damaged or too large are left out.

    Args:
        root: folder with usr/share/sweethome3d.
    """
    for path in sorted((root / LIBRARIES).glob("*.sh3f")):
        licence = "CC0" if path.stem == "BlendSwap-CC-0" else "CC-BY-3.0"
        with zipfile.ZipFile(path) as library:
            for entry in catalogue(library):
                label = label_of(entry.get("name", ""))
                if label is None:
                    continue
                found = _sampled(library, entry, points)
                if found is None:
                    continue
                width, depth, height = (float(entry[side]) / 100 for side in ("width", "depth", "height"))
                top = float(entry.get("dropOnTopElevation", height * 100)) / 100
                yield Furniture(
                    f"{path.stem}/{entry['model'].strip('/').split('/', 1)[1].rsplit('/', 1)[-1]}",
                    entry["name"],
                    label,
                    entry.get("creator", path.stem),
                    licence,
                    (width, depth, height),
                    float(entry.get("elevation", 0)) / 100,
                    max(0.0, min(top, height)),
                    found[4],
                    False,
                    *found[:4],
                )


def _sampled(library: zipfile.ZipFile, entry: dict[str, str], count: int) -> tuple[Any, ...] | None:
    """Points, normals, colours, clearness and area of a model, in metres; None where there is no surface."""
    inside = entry["model"].strip("/")
    names = {name.lower(): name for name in library.namelist()}
    text = library.read(names[inside.lower()]).decode("latin-1")
    folder = inside.rsplit("/", 1)[0]
    vertices_V3, coordinates, triangles_T3, texels_T3, materials_T = _mesh(text)
    if not len(triangles_T3) or len(triangles_T3) > MOST_FACES:
        return None
    if "modelRotation" in entry:
        vertices_V3 = vertices_V3 @ np.array(entry["modelRotation"].split(), float).reshape(3, 3).T
    used = vertices_V3[np.unique(triangles_T3)]
    low, high = used.min(0), used.max(0)
    if not (high > low).all():
        return None
    size = np.array([float(entry[side]) / 100 for side in ("width", "height", "depth")])
    vertices_V3 = (vertices_V3 - (low + high) / 2) / (high - low) * size
    vertices_V3[:, 1] += size[1] / 2
    vertices_V3 = np.stack([vertices_V3[:, 0], -vertices_V3[:, 2], vertices_V3[:, 1]], 1)  # y up to z up
    corners_T33 = vertices_V3[triangles_T3]
    cross_T3 = np.cross(corners_T33[:, 1] - corners_T33[:, 0], corners_T33[:, 2] - corners_T33[:, 0])
    doubled_T = np.linalg.norm(cross_T3, axis=1)
    area = float(doubled_T.sum() / 2)
    if area <= 0:
        return None
    rng = np.random.default_rng(int(hashlib.sha256(inside.encode()).hexdigest()[:15], 16))
    chosen_P = np.sort(rng.choice(len(doubled_T), count, p=doubled_T / doubled_T.sum()))
    u, v = rng.random((2, count))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    shares_P3 = np.stack([1 - u - v, u, v], 1)
    points_P3 = (corners_T33[chosen_P] * shares_P3[..., None]).sum(1)
    normals_P3 = cross_T3[chosen_P] / doubled_T[chosen_P, None]
    colours_P3, clear_P = np.full((count, 3), 0.7), np.zeros(count)
    palette = _materials(library, names, folder, text)
    for number, name in enumerate(materials_T[1]):
        here = materials_T[0][chosen_P] == number
        colour, clear, picture = palette.get(name.lower(), (np.full(3, 0.7), 0.0, None))
        colours_P3[here], clear_P[here] = colour, clear
        with_texels = here & (texels_T3[chosen_P] >= 0).all(1)
        if picture is not None and with_texels.any():
            at = (coordinates[texels_T3[chosen_P[with_texels]]] * shares_P3[with_texels, :, None]).sum(1) % 1
            rows = ((1 - at[:, 1]) * picture.shape[0]).astype(int) % picture.shape[0]
            columns = (at[:, 0] * picture.shape[1]).astype(int) % picture.shape[1]
            colours_P3[with_texels] = picture[rows, columns]
    return (*(part.astype(np.float32) for part in (points_P3, normals_P3, colours_P3, clear_P)), area)


def _mesh(text: str) -> tuple[NDArray, NDArray, NDArray, NDArray, tuple[NDArray, list[str]]]:
    """Vertices, texture coordinates, triangles of each by number (-1 for none), and materials by triangle."""
    vertices, coordinates, triangles, texels, materials, names = [], [], [], [], [], [""]
    current = 0
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            vertices.append([float(word) for word in words[1:4]])
        elif words[0] == "vt":
            coordinates.append([float(word) for word in words[1:3]])
        elif words[0] == "usemtl":
            name = " ".join(words[1:])
            if name not in names:
                names.append(name)
            current = names.index(name)
        elif words[0] == "f":
            corners = [[*word.split("/"), "", ""][:2] for word in words[1:]]
            places = [_number(corner[0], len(vertices)) for corner in corners]
            spots = [_number(corner[1], len(coordinates)) for corner in corners]
            for i in range(1, len(corners) - 1):  # a fan
                triangles.append([places[0], places[i], places[i + 1]])
                texels.append([spots[0], spots[i], spots[i + 1]])
                materials.append(current)
    return (
        np.array(vertices, float).reshape(-1, 3),
        np.array(coordinates, float).reshape(-1, 2),
        np.array(triangles, int).reshape(-1, 3),
        np.array(texels, int).reshape(-1, 3),
        (np.array(materials, int), names),
    )


def _number(word: str, count: int) -> int:
    """OBJ counts from 1, and from the end where negative."""
    if not word:
        return -1
    value = int(word)
    return value - 1 if value > 0 else count + value


def _materials(
    library: zipfile.ZipFile, names: dict[str, str], folder: str, text: str
) -> dict[str, tuple[NDArray, float, NDArray | None]]:
    """Colour, clearness and picture of each material, by lower-case name."""
    found: dict[str, tuple[NDArray, float, NDArray | None]] = {}
    for file in re.findall(r"^mtllib\s+(.+?)\s*$", text, re.MULTILINE):
        inside = names.get(f"{folder}/{file}".lower())
        name = ""
        for line in library.read(inside).decode("latin-1").splitlines() if inside else ():
            words = line.split()
            if words[:1] == ["newmtl"]:
                name = " ".join(words[1:]).lower()
                found[name] = np.full(3, 0.7), 0.0, None
            elif words[:1] == ["Kd"] and name:
                found[name] = np.array(words[1:4], float).clip(0, 1), found[name][1], found[name][2]
            elif words[:1] == ["d"] and name:
                found[name] = found[name][0], 1 - float(words[-1]), found[name][2]
            elif words[:1] == ["map_Kd"] and name:
                picture = _picture(library, names.get(f"{folder}/{line.split(None, 1)[1].strip()}".lower()))
                found[name] = found[name][0], found[name][1], picture
    return found


def _picture(library: zipfile.ZipFile, inside: str | None) -> NDArray | None:
    if inside is None:
        return None
    try:
        with Image.open(io.BytesIO(library.read(inside))) as picture:
            return np.asarray(picture.convert("RGB"), np.float32) / 255
    except (UnidentifiedImageError, OSError):
        return None


# The archive --------------------------------------------------------------------------------------------------------


def pack(models: list[Furniture], preset: int = 9 | lzma.PRESET_EXTREME) -> bytes:
    """Models as one compressed file: positions in STEPS of their box, normals and colours in bytes."""
    parts: dict[str, list[NDArray]] = {"points": [], "normals": [], "colours": [], "clear": []}
    cards = []
    for model in models:
        low, high = model.points_P3.min(0), model.points_P3.max(0)
        span = np.maximum(high - low, 1e-6)
        parts["points"].append(((model.points_P3 - low) / span * STEPS).round().astype(np.uint16))
        parts["normals"].append((model.normals_P3 * 31).round().astype(np.int8))
        parts["colours"].append((model.colours_P3 * 255).round().astype(np.uint8) & 0xFC)
        parts["clear"].append((model.clear_P * 15).round().astype(np.uint8))
        cards.append(
            {
                **{key: getattr(model, key) for key in ("key", "name", "label", "maker", "licence")},
                "size": model.size_3,
                **{key: round(float(getattr(model, key)), 4) for key in ("elevation", "top", "area")},
                "low": [round(float(v), 5) for v in low],
                "span": [round(float(v), 5) for v in span],
                "points": len(model.points_P3),
            }
        )
    columns = {}
    for name, arrays in parts.items():
        array = np.concatenate(arrays)
        if array.ndim == 1:
            columns[name] = array
        else:  # a column each: values of one axis resemble each other
            columns |= {f"{name}.{axis}": np.ascontiguousarray(array[:, axis]) for axis in range(3)}
    content = save(columns, {"models": json.dumps(cards)})
    return lzma.compress(content, preset=preset)


def unpack(content: bytes) -> list[Furniture]:
    """What `pack` wrote; which models are held out is told from their names."""
    raw = lzma.decompress(content)
    columns = load(raw)
    length = int.from_bytes(raw[:8], "little")
    cards = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["models"])
    points, normals, colours = (
        np.stack([columns[f"{name}.{axis}"] for axis in range(3)], 1) for name in ("points", "normals", "colours")
    )
    models, start = [], 0
    for card in cards:
        rows = slice(start, start + card["points"])
        normal = normals[rows].astype(np.float32)
        models.append(
            Furniture(
                **{key: card[key] for key in ("key", "name", "label", "maker", "licence", "elevation", "top", "area")},
                size_3=tuple(card["size"]),
                held_out=False,
                points_P3=(points[rows] / STEPS * card["span"] + card["low"]).astype(np.float32),
                normals_P3=normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6),
                colours_P3=(colours[rows].astype(np.float32) + 1.5) / 255,
                clear_P=columns["clear"][rows].astype(np.float32) / 15,
            )
        )
        start += card["points"]
    return split(models)


def split(models: list[Furniture]) -> list[Furniture]:
    """Say of every model whether it is held out: in each class the first of HELD_OUT by a hash of their names."""
    for label in NAMES:
        mine = sorted(
            (model for model in models if model.label == label),
            key=lambda model: hashlib.sha256(model.key.encode()).hexdigest(),
        )
        for place, model in enumerate(mine):
            model.held_out = place % HELD_OUT == 0
    return models


@cache
def furniture(which: str = "archive") -> list[Furniture]:
    """The models that rooms are furnished with.

    Args:
        which: archive (in the repository) or all (of what was fetched, with five times the points of each model).

    Raises:
        UserError: all, and nothing was fetched; or the archive is damaged.
    """
    if which == "archive":
        path = ARCHIVE
    else:
        root = find_root(LIBRARIES, None, cache_dir("furniture"), "data-furniture")
        path = checked_file(
            cache_dir("furniture") / f"points-{FETCHED}.xz",
            lambda place: place.write_bytes(pack(list(read_models(root, FETCHED)), preset=0)),
        )
    try:
        return unpack(path.read_bytes())
    except (OSError, lzma.LZMAError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); take it anew from the repository") from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("action", choices=("fetch", "archive"), help="download the models, or make the archive of them")
    action = parser.parse_args(argv).action
    if action == "fetch":
        fetch([PACKAGE], cache_dir("furniture"))
        print(f"{PACKAGE} is in {cache_dir('furniture')}")
        return
    root = find_root(LIBRARIES, None, cache_dir("furniture"), "data-furniture")
    models = list(read_models(root, ARCHIVED))
    write_atomically(ARCHIVE, lambda place: place.write_bytes(pack(models)))
    print(f"{ARCHIVE}: {len(models)} models, {ARCHIVE.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_main(main)
