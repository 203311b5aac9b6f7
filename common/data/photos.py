"""PhotoCollage: photographic cut-outs pasted on photographs, with captions, boxes, masks and label maps for free.

The cut-outs are the photographs among Tux Paint's stamps (GPL-2), the scenes come from MATE's and Lomiri's wallpapers
(GPL-2+, CC-BY, CC-BY-SA, CC0). Nothing of it is part of this repository: `make data-photos` downloads the three Debian
packages without installing them, or install them, or give the folder that holds their `usr/share`.

    python -m common.data.photos fetch            # about 225 MB down, 200 MB kept under the cache
    python -m common.data.photos sheet sheet.png  # a contact sheet

Shape suffixes: K = 4 object slots, H = W = size.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from common.cli import Parser
from common.data.cache import fingerprint_strings
from common.errors import UserError, run_main
from common.files import write_atomically
from common.options import Count
from common.packages import Package, fetch, find_root
from common.paths import cache_dir

PACKAGES = [
    Package("debian", name) for name in ("tuxpaint-stamps-default", "mate-backgrounds", "lomiri-wallpapers-16.04")
]
EXPECTED_CUTOUTS = 245  # of tuxpaint-stamps-default 2022.06.04-1; other versions may differ a little

_STAMPS = Path("usr/share/tuxpaint/stamps")
_BACKGROUNDS = Path("usr/share/backgrounds")
_NOT_PHOTOS = (
    *("alphabets", "money", "cartoon", "symbols", "roadsigns", "flags", "seasonal"),
    *("military", "medical", "faces", "monuments", "houses", "space"),
)
_MIN_COLOURS_PER_PIXEL = 0.08  # drawings reuse few colours, photographs hardly any
_OPAQUE = 200

CATEGORIES = ("animal", "food", "plant", "household", "vehicle", "hobby", "sport")
_CATEGORY_OF_FOLDER = {
    "animals": "animal",
    "food": "food",
    "plants": "plant",
    "household": "household",
    "clothes": "household",
    "people": "household",
    "town": "household",
    "vehicles": "vehicle",
    "hobbies": "hobby",
    "sports": "sport",
}

SCENES = (  # file below usr/share/backgrounds, and how a caption says it
    ("mate/nature/GreenMeadow.jpg", "on green grass"),
    ("mate/nature/Dune.jpg", "on a grassy dune"),
    ("mate/nature/Garden.jpg", "in a flower garden"),
    ("mate/nature/Blinds.jpg", "on a big green leaf"),
    ("mate/nature/Storm.jpg", "under a stormy sky"),
    ("mate/nature/Wood.jpg", "on white wood"),
    ("mate/nature/Aqua.jpg", "in splashing water"),
    ("aitzgorri_by_Aitzol_Berasategi.jpg", "on a mountain meadow"),
    ("picosdeeuropa_by_Aitzol_Berasategi.jpg", "in rocky mountains"),
    ("sunset_by_Aitzol_Berasategi.jpg", "at sunset"),
    ("seeding_by_Clements_Engelhardt.jpg", "among dandelions"),
    ("life_by_Aitzol_Berasategi.jpg", "by a forest stream"),
    ("Bridge_by_Sander_Klootwijk.jpg", "under a blue sky"),
)

# Captions of the package that are jokes, whole sentences or wrong English, said as a noun phrase.
_NOUNS = {
    "albino_peahen": "an albino peahen",
    "peacock": "a peacock",
    "bluegroper": "a blue groper",
    "lionfish": "a lionfish",
    "lobster": "a spiny lobster",
    "hoverfly": "a hoverfly",
    "edward_bear": "a teddy bear",
    "gnu-baby-stand": "a baby gnu",
    "gnu-baby": "a baby gnu",
    "sheep_lamb": "a lamb",
    "hippopotamus": "a hippopotamus",
    "wildboar": "two wild boars",
    "mountaingoat": "a mountain goat",
    "broccoli": "a head of broccoli",
    "corn": "a cob of corn",
    "walnut_shelled": "a whole walnut",
    "pumpkin_small": "a small pumpkin",
    "pitcher_small": "a small pitcher",
    "tomato": "a red tomato",
    "measuring_tape": "a measuring tape",
    "wheelie_bin": "a wheelie bin",
    "grannysmith": "a rag doll",
    "adeenia": "a desert rose",
    "anthoorium": "an anthurium",
    "appooppanthady": "a milkweed plant",
    "bolsom": "a balsam flower",
    "chemparathi": "a hibiscus flower",
    "chuvanna_plastic_poo": "a red plastic flower",
    "lavender": "a lavender plant",
    "cep-2": "a cep",
    "holly_leaves": "a holly twig",
    "rambutan": "a rambutan tree",
    "australian_rules_football": "an Australian football",
    "rugby_goal_posts": "a rugby goal",
    "uk_post_box": "a British post box",
    "dumper": "a dumper",
    "sedan_police": "a set of police emblems",
}

RELATIONS = ("left of", "right of", "above", "below")
_COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "sheep": "sheep",
    "deer": "deer",
    "bison": "bison",
    "fish": "fish",
    "wapiti": "wapiti",
    "caribou": "caribou",
    "chimpanzee": "chimpanzees",
    "scissors": "scissors",
    "tomato": "tomatoes",
    "potato": "potatoes",
}

HELD_OUT_OBJECTS = 20
_HELD_OUT_SHARE = 0.12

Split = Literal["train", "scene", "object", "count", "relation"]
SPLITS: tuple[Split, ...] = ("train", "scene", "object", "count", "relation")
SLOTS = 4  # most objects in one picture


@dataclass(frozen=True)
class Cutout:
    """One photographic stamp: path below the stamps folder, noun phrase with its article, category."""

    path: str
    noun: str
    category: str


def list_cutouts(stamps: Path) -> list[Cutout]:
    """The photographic cut-outs of a Tux Paint stamps folder, in the order of their paths."""
    found = []
    for path in sorted(stamps.rglob("*.png")):
        relative = path.relative_to(stamps).as_posix()
        text = path.with_suffix(".txt")
        if any(word in relative for word in _NOT_PHOTOS) or not text.exists():
            continue
        rgba = np.asarray(_open(path).convert("RGBA"))
        opaque = rgba[rgba[..., 3] > _OPAQUE][:, :3].astype(np.int32) >> 2
        colours = np.unique(opaque[:, 0] << 12 | opaque[:, 1] << 6 | opaque[:, 2])
        if len(colours) <= _MIN_COLOURS_PER_PIXEL * len(opaque):
            continue
        caption = text.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0]
        noun = noun_phrase(caption, path.stem)
        category = _CATEGORY_OF_FOLDER.get(relative.split("/")[0])
        if noun is not None and category is not None:
            found.append(Cutout(relative, noun, category))
    return found


def noun_phrase(caption: str, stem: str) -> str | None:
    """ "A red apple." -> "a red apple"; None for what is neither a short noun phrase nor in the table of `_NOUNS`."""
    if stem in _NOUNS:
        return _NOUNS[stem]
    match = re.fullmatch(r"(An?) (.+?)[.!]?", caption.strip())
    if match is None or len(caption) > 32:
        return None
    rest = re.sub(r"[“”\"]| with fruit$", "", match[2])
    return f"{match[1].lower()} {rest}"


def plural(noun: str, count: int) -> str | None:
    """ "a pair of scissors", 3 -> "three pairs of scissors"; None for a noun that is no single thing."""
    match = re.fullmatch(r"an? (.+)", noun)
    if match is None:
        return None
    head, separator, tail = match[1].partition(" of ")
    words = head.split(" ")
    last = words[-1]
    if last in _IRREGULAR_PLURALS:
        last = _IRREGULAR_PLURALS[last]
    elif last.endswith("fish"):
        pass
    elif re.search(r"(s|x|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{_COUNT_WORDS[count]} {' '.join([*words[:-1], last])}{separator}{tail}"


class PhotoCollage(Dataset[dict[str, Any]]):
    """Photographic scenes of one to four cut-outs. Item i is a pure function of (seed, split, i, size).

    Four kinds of picture: one object, two to four of the same object, two objects in a spatial relation, three or four
    different objects. Splits, drawn from hashes of the strings so that they need no file:
        train     only what no other split holds out
        scene     at least one (object, scene) pair that train never shows (12 % of the pairs)
        object    at least one of 20 objects that train never shows
        count     an (object, count) pair that train never shows (12 %)
        relation  an (object, relation, object) triple that train never shows (12 %)
    Each test split breaks only its own rule, so that it measures one kind of generalisation.

    Args:
        split: see above.
        n: number of items.
        size: side of the square image in pixels.
        seed: of the whole set.
        root: folder that holds `usr/share/tuxpaint` and `usr/share/backgrounds`; default: the fetched packages, then
            the installed ones.

    An item is a dict:
        image       uint8 [3, H, W]
        caption     "a red apple left of a lime on green grass"
        label       int, index into CATEGORIES of the first object
        scene       int, index into SCENES
        count       int, number of objects
        boxes       float32 [K, 4], x0 y0 x1 y1 in [0, 1], zeros where there is no object
        categories  int64 [K], index into CATEGORIES, -1 where there is no object
        objects     int64 [K], index into `nouns`, -1 where there is no object
        masks       bool [K, H, W]
        label_map   uint8 [H, W], 0 for the scene, 1 + category elsewhere
        background  uint8 [3, H, W], the picture without any object

    Raises:
        UserError: the packages are not there (`make data-photos`), or a file of theirs is broken.
    """

    def __init__(
        self, split: Split = "train", n: int = 20_000, size: int = 64, seed: int = 0, root: str | Path | None = None
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"PhotoCollage has no split {split!r}; choose one of {', '.join(SPLITS)}")
        if n < 1 or size < 16:
            raise UserError(f"PhotoCollage needs n >= 1 and size >= 16, got n={n} and size={size}")
        self.split, self.n, self.size, self.seed = split, n, size, seed
        base = find_root(_STAMPS, root, cache_dir("photos"), "data-photos")
        self.sprites, self.fingerprint = _load_sprites(base, size)
        self.nouns = sorted({cutout.noun for cutout in self.sprites.cutouts})
        self.held_out_objects = frozenset(
            sorted(self.nouns, key=lambda noun: _hash01("object", noun))[:HELD_OUT_OBJECTS]
        )
        self._variants: dict[str, list[int]] = {noun: [] for noun in self.nouns}
        for index, cutout in enumerate(self.sprites.cutouts):
            self._variants[cutout.noun].append(index)
        self._noun_index = {noun: index for index, noun in enumerate(self.nouns)}
        self.fingerprint = fingerprint_strings([self.fingerprint, split, str(n), str(size), str(seed)])

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.n <= index < self.n:
            raise IndexError(f"item {index} is outside the {self.n} items of PhotoCollage")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index % self.n])
        kind, nouns, relation, scene = self._plan(rng)
        return self._render(rng, kind, nouns, relation, scene)

    def _plan(self, rng: np.random.Generator) -> tuple[str, list[str], str, int]:
        """Draw what is in the picture until it keeps the rules of the split."""
        for _ in range(10_000):
            kind = str(rng.choice(["one", "count", "relation", "several"], p=[0.3, 0.2, 0.3, 0.2]))
            if self.split in ("count", "relation"):
                kind = self.split
            scene = int(rng.integers(len(SCENES)))
            relation = RELATIONS[rng.integers(len(RELATIONS))] if kind == "relation" else ""
            different = {"one": 1, "count": 1, "relation": 2, "several": int(rng.integers(3, SLOTS + 1))}[kind]
            nouns = [self.nouns[i] for i in rng.choice(len(self.nouns), size=different, replace=False)]
            if kind == "count":
                nouns *= int(rng.integers(2, SLOTS + 1))
                if plural(nouns[0], len(nouns)) is None:
                    continue
            if self.broken_rules(nouns, relation, scene) == ({self.split} - {"train"}):
                return kind, nouns, relation, scene
        raise UserError(f"PhotoCollage: no picture fits the split {self.split!r}; the data root holds too few cut-outs")

    def broken_rules(self, nouns: Sequence[str], relation: str, scene: int) -> set[str]:
        """Which test splits this content belongs to; empty for what train may show."""
        broken: set[str] = set()
        if any(noun in self.held_out_objects for noun in nouns):
            broken.add("object")
        if any(_held_out("scene", noun, SCENES[scene][1]) for noun in nouns):
            broken.add("scene")
        if len(nouns) > 1 and nouns[0] == nouns[1] and _held_out("count", nouns[0], str(len(nouns))):
            broken.add("count")
        if relation and _held_out("relation", *_canonical(nouns[0], relation, nouns[1])):
            broken.add("relation")
        return broken

    def _render(
        self, rng: np.random.Generator, kind: str, nouns: list[str], relation: str, scene: int
    ) -> dict[str, Any]:
        size = self.size
        canvas = self._scene_crop(rng, scene)
        background = canvas.copy()
        masks = np.zeros((SLOTS, size, size), bool)
        label_map = np.zeros((size, size), np.uint8)
        boxes = np.zeros((SLOTS, 4), np.float32)
        categories = np.full(SLOTS, -1, np.int64)
        objects = np.full(SLOTS, -1, np.int64)
        same = self._variants[nouns[0]][rng.integers(len(self._variants[nouns[0]]))] if kind == "count" else None
        for slot, (noun, cell) in enumerate(zip(nouns, _cells(rng, kind, len(nouns), relation))):
            variants = self._variants[noun]
            sprite = same if same is not None else variants[rng.integers(len(variants))]
            rgba, top, left = self._place(rng, sprite, cell, fill=(0.5, 0.95) if kind == "one" else (0.75, 0.98))
            height, width = rgba.shape[:2]
            window = (slice(top, top + height), slice(left, left + width))
            alpha = rgba[..., 3:].astype(np.float32) / 255
            canvas[window] = np.rint(rgba[..., :3] * alpha + canvas[window] * (1 - alpha)).astype(np.uint8)
            masks[slot][window] = alpha[..., 0] > 0.5
            category = CATEGORIES.index(self.sprites.cutouts[sprite].category)
            label_map[masks[slot]] = 1 + category
            boxes[slot] = _mask_box(masks[slot]) if masks[slot].any() else (left, top, left + width, top + height)
            categories[slot], objects[slot] = category, self._noun_index[noun]
        return {
            "image": _chw(canvas),
            "caption": _caption(kind, nouns, relation, SCENES[scene][1]),
            "label": int(categories[0]),
            "scene": scene,
            "count": len(nouns),
            "boxes": torch.from_numpy(boxes / size),
            "categories": torch.from_numpy(categories),
            "objects": torch.from_numpy(objects),
            "masks": torch.from_numpy(masks),
            "label_map": torch.from_numpy(label_map),
            "background": _chw(background),
        }

    def _scene_crop(self, rng: np.random.Generator, scene: int) -> np.ndarray:
        """A random square of the scene, mirrored half of the time, scaled to the image: uint8 [H, W, 3]."""
        picture = self.sprites.scenes[scene]
        height, width = picture.shape[:2]
        side = int(rng.integers(self.size, height + 1))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = picture[top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        scaled = Image.fromarray(np.ascontiguousarray(crop)).resize((self.size, self.size), Image.Resampling.LANCZOS)
        return np.array(scaled)

    def _place(
        self, rng: np.random.Generator, sprite: int, cell: tuple[float, float, float, float], fill: tuple[float, float]
    ) -> tuple[np.ndarray, int, int]:
        """Scale a cut-out into a cell (x0, y0, x1, y1 as shares of the side), standing on the cell's bottom."""
        x0, y0, x1, y1 = (share * self.size for share in cell)
        picture = self.sprites.pictures[sprite]
        height, width = picture.shape[:2]
        scale = min((x1 - x0) / width, (y1 - y0) / height) * rng.uniform(*fill)
        # Small photographs are not blown up past 1.6 times their native size: they would only blur.
        scale = min(scale, 1.6 * self.sprites.native_scale[sprite])
        w, h = max(1, int(width * scale)), max(1, int(height * scale))
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        scaled = Image.fromarray(np.ascontiguousarray(picture)).resize((w, h), Image.Resampling.LANCZOS)
        left = int(x0 + rng.random() * max(0.0, x1 - x0 - w))
        top = int(y1) - h
        return np.asarray(scaled), max(top, 0), min(left, self.size - w)


@dataclass
class _Sprites:
    cutouts: list[Cutout]
    pictures: list[np.ndarray]  # uint8 [h, w, 4], longest side at most the image's
    native_scale: list[float]  # native side / cached side, >= 1
    scenes: np.ndarray  # uint8 [S, h, w, 3]


def _load_sprites(base: Path, size: int) -> tuple[_Sprites, str]:
    """Cut-outs and scenes pre-scaled for one image size, from the cache or made now (seconds)."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    fingerprint = _source_fingerprint(base)
    path = cache_dir("photos", "sprites") / f"{size}-{fingerprint}.safetensors"
    if not path.exists():
        sprites = _make_sprites(base, size)
        tensors = {
            "pixels": np.concatenate([picture.reshape(-1) for picture in sprites.pictures]),
            "shapes": np.array([picture.shape[:2] for picture in sprites.pictures], np.int64),
            "native_scale": np.array(sprites.native_scale, np.float64),
            "scenes": sprites.scenes,
        }
        metadata = {"cutouts": json.dumps([asdict(cutout) for cutout in sprites.cutouts])}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    with safe_open(path, framework="numpy") as file:
        cutouts = [Cutout(**record) for record in json.loads(file.metadata()["cutouts"])]
        pixels, shapes = file.get_tensor("pixels"), file.get_tensor("shapes")
        native_scale, scenes = file.get_tensor("native_scale").tolist(), file.get_tensor("scenes")
    pictures, start = [], 0
    for height, width in shapes:
        end = start + int(height) * int(width) * 4
        pictures.append(pixels[start:end].reshape(height, width, 4))
        start = end
    return _Sprites(cutouts, pictures, native_scale, scenes), fingerprint


def _make_sprites(base: Path, size: int) -> _Sprites:
    cutouts = list_cutouts(base / _STAMPS)
    if len(cutouts) < HELD_OUT_OBJECTS + SLOTS:
        raise UserError(
            f"{base / _STAMPS}: only {len(cutouts)} photographic cut-outs with captions; run `make data-photos`"
        )
    if abs(len(cutouts) - EXPECTED_CUTOUTS) > 12:
        warnings.warn(f"{len(cutouts)} photographic cut-outs, {EXPECTED_CUTOUTS} were expected", stacklevel=4)
    pictures, native_scale = [], []
    for cutout in cutouts:
        picture = _open(base / _STAMPS / cutout.path).convert("RGBA")
        picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())
        longest = max(picture.size)
        scale = min(1.0, size / longest)
        native_scale.append(1 / scale)
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture))
    height = round(size * 200 / 128)  # room for random crops: 200 of 320 x 200 for 128 pixels
    scenes = []
    for name, _ in SCENES:
        scene = _open(base / _BACKGROUNDS / name).convert("RGB")
        width = round(height * 1.6)
        scale = max(width / scene.width, height / scene.height)
        box_width, box_height = width / scale, height / scale
        left, top = (scene.width - box_width) / 2, (scene.height - box_height) / 2
        box = (left, top, left + box_width, top + box_height)
        scenes.append(np.asarray(scene.resize((width, height), Image.Resampling.LANCZOS, box=box)))
    return _Sprites(cutouts, pictures, native_scale, np.stack(scenes))


def _source_fingerprint(base: Path) -> str:
    files = sorted((base / _STAMPS).rglob("*.png")) + [base / _BACKGROUNDS / name for name, _ in SCENES]
    missing = [path for path in files if not path.exists()]
    if missing:
        names = ", ".join(package.name for package in PACKAGES)
        raise UserError(f"{missing[0]}: missing; run `make data-photos` (packages {names})")
    rules = [repr((_NOUNS, _NOT_PHOTOS, _MIN_COLOURS_PER_PIXEL, _OPAQUE, _CATEGORY_OF_FOLDER))]
    return fingerprint_strings(rules + [f"{path.relative_to(base)}:{path.stat().st_size}" for path in files])


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); run `make data-photos` again") from error


def _cells(rng: np.random.Generator, kind: str, count: int, relation: str) -> list[tuple[float, float, float, float]]:
    """One cell per object, disjoint, as shares of the side: x0, y0, x1, y1."""
    if kind == "one":
        return [(0.03, 0.1, 0.97, float(rng.uniform(0.8, 0.97)))]
    if relation in ("above", "below"):
        cells = [(0.05, 0.02, 0.95, 0.49), (0.05, 0.51, 0.95, 0.98)]
        return cells if relation == "above" else cells[::-1]
    if count == 4:
        return [(x, y, x + 0.46, y + 0.46) for y in (0.03, 0.51) for x in (0.03, 0.51)]
    width = 0.94 / count
    ground = float(rng.uniform(0.7, 0.95))
    cells = []
    for slot in range(count):
        bottom = min(0.97, ground + float(rng.uniform(-0.05, 0.05)))
        cells.append((0.03 + slot * width, 0.05, 0.03 + (slot + 1) * width - 0.01, bottom))
    return cells[::-1] if relation == "right of" else cells


def _caption(kind: str, nouns: Sequence[str], relation: str, scene: str) -> str:
    if kind == "one":
        return f"{nouns[0]} {scene}"
    if kind == "count":
        return f"{plural(nouns[0], len(nouns))} {scene}"
    if kind == "relation":
        return f"{nouns[0]} {relation} {nouns[1]} {scene}"
    return f"{', '.join(nouns[:-1])} and {nouns[-1]} {scene}"


def _canonical(first: str, relation: str, second: str) -> tuple[str, str, str]:
    """ "b right of a" is "a left of b": both wordings of one arrangement fall in the same split."""
    if relation == "right of":
        return second, "left of", first
    if relation == "below":
        return second, "above", first
    return first, relation, second


def _hash01(*strings: str) -> float:
    return int.from_bytes(hashlib.sha1("|".join(strings).encode()).digest()[:8], "big") / 2**64


def _held_out(*strings: str) -> bool:
    return _hash01(*strings) < _HELD_OUT_SHARE


def _mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _chw(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def contact_sheet(data: Dataset[dict[str, Any]], rows: int, columns: int) -> Image.Image:
    """The first rows x columns pictures of a data set whose items have an `image`."""
    tiles = [data[i]["image"].permute(1, 2, 0).numpy() for i in range(rows * columns)]
    lines = [np.concatenate(tiles[r * columns : (r + 1) * columns], 1) for r in range(rows)]
    return Image.fromarray(np.concatenate(lines, 0))


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="download and unpack the three Debian packages")
    sheet = commands.add_parser("sheet", help="write a contact sheet")
    sheet.add_argument("path", type=Path, help="PNG file to write")
    sheet.add_argument("--split", choices=SPLITS, default="train", help="which of the collages")
    sheet.add_argument("--size", type=Count, default=128, help="side of a collage in pixels")
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        fetch(PACKAGES, cache_dir("photos"), drop=["*.ogg", "*.wav"])
        print(f"{len(list_cutouts(cache_dir('photos') / _STAMPS))} photographic cut-outs in {cache_dir('photos')}")
    else:
        data = PhotoCollage(arguments.split, n=40, size=arguments.size)
        contact_sheet(data, 5, 8).save(arguments.path)
        for i in range(40):
            print(data[i]["caption"])


if __name__ == "__main__":
    run_main(main)
