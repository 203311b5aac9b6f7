"""Captioned emoji: real vector artwork with captions, the embedded image-and-text data set of every generator here.

**Content.** Five permissively licensed drawing styles of the Unicode emoji travel in the repository as SVG sources in
one file, `emoji_archive/emoji.jsonl.xz` (credits in `NOTICE`; `build_emoji_archive.py` makes it). Two share-alike
styles join after `make data-emoji-extra`, which leaves a second archive of the same format in the cache folder:

| style               | style word  | licence         | what it looks like                                      |
|---------------------|-------------|-----------------|---------------------------------------------------------|
| `twemoji`           | flat        | CC-BY-4.0       | plain flat areas                                        |
| `noto`              | shaded      | Apache-2.0      | gradients and soft shadows                              |
| `fluent-emoji-flat` | rounded     | MIT             | saturated colours, round geometry                       |
| `emojione`          | simple      | CC-BY-4.0       | few large areas, hairline detail                        |
| `noto-v1`           | blob        | Apache-2.0      | gum-drop faces, matte two-tone shading                  |
| `openmoji`          | outlined    | CC-BY-SA-4.0    | thick black outlines (extra)                            |
| `emojione-v1`       | classic     | CC-BY-SA-4.0    | the first EmojiOne drawings (extra)                     |

**Captions.** `"{label}, {style word} style"` with labels and tags from emojibase: "woman astronaut: dark skin tone,
flat style".

**Rasterising.** At any size on first use (two processes, about 15 s at 64 px), straight-alpha RGBA kept in
`cache_dir("emoji")` under the archive's checksum and the size.

**Duplicates** (equal pixels at 64 px, within or across styles) are removed when the archive is built, so that splits do
not depend on the image size; a tone variant that looks like its neighbour is a duplicate too.

**Splits** are fixed by hashes of code points; they depend on neither size, styles asked for, tones nor seed.
- `combo`: every emoji (tone-less code point) drawn in at least 4 of the committed styles gives one of them,
  `sha1(code point) mod n_styles`, to test with all its skin tones: seen concept, seen style, unseen pair. Of a
  share-alike style the pairs with `sha1(code point + "/" + style) mod 5 == 0` are test.
- `concept`: 8 % of the emoji families are test in every style, for zero-shot tests and for training scorers. A family
  is the code point without skin tone, gender and direction, so that "man pilot" never helps to draw a held-out "woman
  pilot".

| pictures                   | combo train | combo test | concept train | concept test |
|----------------------------|-------------|------------|---------------|--------------|
| `skin_tones="balanced"`    | 6,524       | 1,182      | 7,109         | 597          |
| `skin_tones="all"`         | 12,271      | 2,156      | 13,185        | 1,242        |
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import write_atomically
from common.paths import REPOSITORY, cache_dir

# Shape suffixes: N pictures, H height, W width, C = 3 (RGB) or 4 (RGBA).

ARCHIVE = Path(__file__).parent / "emoji_archive" / "emoji.jsonl.xz"
EXTRA_ARCHIVE_NAME = "emoji-extra.jsonl.xz"
ARCHIVE_FORMAT = "captioned-emoji/1"

STYLE_WORDS = {
    "twemoji": "flat",
    "noto": "shaded",
    "fluent-emoji-flat": "rounded",
    "emojione": "simple",
    "noto-v1": "blob",
    "openmoji": "outlined",
    "emojione-v1": "classic",
}
PERMISSIVE_STYLES = ("twemoji", "noto", "fluent-emoji-flat", "emojione", "noto-v1")
EXTRA_STYLES = ("openmoji", "emojione-v1")

_HELPER_FROM = 500  # pictures; below, a second interpreter takes longer to start than it saves

GROUPS = (
    "smileys-emotion",
    "people-body",
    "component",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
COMPONENT_GROUP = 2  # skin-tone patches and hair pieces: nine emoji, no class of their own in EmojiGroups

Split = Literal["train", "test"]
Protocol = Literal["combo", "concept"]
SkinTones = Literal["none", "balanced", "all"]


@dataclass(frozen=True)
class EmojiRecord:
    """One picture: the drawing of one emoji in one style."""

    hexcode: str  # Unicode code points, e.g. "1F469-1F3FF-200D-1F680"
    base: str  # the same without skin tone: "1F469-200D-1F680"
    concept: str  # emojibase label: "woman astronaut: dark skin tone"
    tags: tuple[str, ...]
    group: int  # index into GROUPS
    subgroup: str
    tone: tuple[int, ...]  # () none, (1..5) light to dark, two entries for two people
    style: str  # key of STYLE_WORDS
    view_box: str  # square SVG viewBox "left top side side"
    body: str  # inner SVG markup

    @property
    def family(self) -> str:
        """Code points without skin tone, gender and direction: the unit of the `concept` split."""
        return family(self.base)

    @property
    def svg(self) -> str:
        return svg_document(self.body, self.view_box)

    @property
    def caption(self) -> str:
        return f"{self.concept}, {STYLE_WORDS[self.style]} style"


# Emoji that Unicode encodes once per gender without a common code point: neutral form, then the gendered ones.
_GENDERED = (
    ("1F9D3", "1F474", "1F475"),  # older person
    ("1FAC5", "1F934", "1F478"),  # person with crown, prince, princess
    ("1F9D1-200D-1F384", "1F385", "1F936"),  # Mx, Santa and Mrs. Claus
    ("1FAC4", "1FAC3", "1F930"),  # pregnant
    ("1F57A", "1F483"),  # dancing
    ("1F9D1-200D-1F91D-200D-1F9D1", "1F46B", "1F46C", "1F46D"),  # holding hands
    ("1F9D1-200D-2764-200D-1F48B-200D-1F9D1", "1F48F"),  # kiss
    ("1F9D1-200D-2764-200D-1F9D1", "1F491"),  # couple with heart
)
_NEUTRAL = {code: neutral for neutral, *gendered in _GENDERED for code in gendered}
_NEUTRAL |= {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}  # man, woman; boy, girl
_FAMILY = "1F46A"
_JOINER = "200D"
_GENDER_OR_DIRECTION = ("2640", "2642", "27A1")


def family(base_hexcode: str) -> str:
    """`base_hexcode` without gender and direction: "1F469-200D-1F680" (woman astronaut) -> "1F9D1-200D-1F680"."""
    code = base_hexcode.replace("-FE0F", "")
    head, *rest = code.split(f"-{_JOINER}-")
    parts = [_NEUTRAL.get(part, part) for part in (head, *(part for part in rest if part not in _GENDER_OR_DIRECTION))]
    if len(parts) > 1 and set(parts) <= {"1F9D1", "1F9D2"}:
        return _FAMILY  # "family: man, woman, girl" and its like
    return f"-{_JOINER}-".join(parts)


def svg_document(body: str, view_box: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view_box}">{body}</svg>'
    )


def render(svg: str, size: int) -> NDArray[np.uint8]:
    """Rasterise an SVG document to straight-alpha RGBA uint8 [size, size, 4]."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGBA"), dtype=np.uint8)


def on_white(rgba_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite straight-alpha RGBA [..., 4] on white: RGB uint8 [..., 3]."""
    flat = rgba_NHWC.reshape(-1, *rgba_NHWC.shape[-3:])
    rgb = np.empty((*flat.shape[:-1], 3), dtype=np.uint8)
    for start in range(0, len(flat), 512):  # in pieces: the 16-bit intermediate of a whole set would be 0.5 GB
        part = flat[start : start + 512].astype(np.uint16)
        colour, alpha = part[..., :3], part[..., 3:]
        rgb[start : start + 512] = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return rgb.reshape(*rgba_NHWC.shape[:-1], 3)


def write_archive(path: Path, header: dict[str, Any], records: Sequence[EmojiRecord]) -> None:
    """Write `records` as xz-compressed JSON lines; equal input gives equal bytes.

    Line 1: the header; then one line per concept with its captions; then one line per picture. Pictures are sorted by
    style and code point, which puts the skin tones of one drawing side by side for the compressor.
    """
    concepts: dict[str, dict[str, Any]] = {}
    for record in records:
        concepts[record.hexcode] = {
            "hexcode": record.hexcode,
            "base": record.base,
            "label": record.concept,
            "tags": list(record.tags),
            "group": record.group,
            "subgroup": record.subgroup,
            "tone": list(record.tone),
        }
    ordered = sorted(records, key=lambda r: (list(STYLE_WORDS).index(r.style), r.base, r.tone, r.hexcode))
    head = {"format": ARCHIVE_FORMAT, "concepts": len(concepts), "pictures": len(ordered), **header}
    lines = [head, *(concepts[key] for key in sorted(concepts))]
    lines += [{"style": r.style, "hexcode": r.hexcode, "viewBox": r.view_box, "body": r.body} for r in ordered]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    # The whole text fits the window, so that a drawing can refer back to any other.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    packed = lzma.compress(text.encode(), format=lzma.FORMAT_XZ, filters=filters)
    write_atomically(path, lambda temporary: temporary.write_bytes(packed))


def read_archive(path: Path = ARCHIVE) -> tuple[dict[str, Any], list[EmojiRecord]]:
    """The header and the records of an archive, without any pixels.

    Raises:
        UserError: the file is missing or damaged.
    """
    remedy = "restore it from version control or run `python -m common.data.build_emoji_archive`"
    if path.name == EXTRA_ARCHIVE_NAME:
        remedy = "run `make data-emoji-extra`"
    try:
        return _read_archive(path, path.stat().st_mtime_ns, remedy)
    except FileNotFoundError:
        raise UserError(f"{path}: the emoji archive is missing; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: the emoji archive cannot be read ({error.strerror}); {remedy}") from None


@functools.lru_cache(maxsize=4)
def _read_archive(path: Path, modified_ns: int, remedy: str) -> tuple[dict[str, Any], list[EmojiRecord]]:
    try:
        text = lzma.decompress(path.read_bytes()).decode()
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the emoji archive is damaged ({error}); {remedy}") from None
    try:
        header, *lines = (json.loads(line) for line in text.removesuffix("\n").split("\n"))
        if header["format"] != ARCHIVE_FORMAT:
            raise UserError(f"{path}: expected format {ARCHIVE_FORMAT!r}, found {header['format']!r}; {remedy}")
        concepts = {line["hexcode"]: line for line in lines[: header["concepts"]]}
        records = [_record(concepts[line["hexcode"]], line) for line in lines[header["concepts"] :]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the emoji archive is damaged ({error!r}); {remedy}") from None
    if len(records) != header["pictures"] or len(concepts) != header["concepts"]:
        raise UserError(f"{path}: the emoji archive holds {len(records)} of {header['pictures']} pictures; {remedy}")
    return header, records


def _record(concept: dict[str, Any], picture: dict[str, Any]) -> EmojiRecord:
    return EmojiRecord(
        concept=concept["label"],
        tags=tuple(concept["tags"]),
        tone=tuple(concept["tone"]),
        view_box=picture["viewBox"],
        **{name: concept[name] for name in ("hexcode", "base", "group", "subgroup")},
        **{name: picture[name] for name in ("style", "body")},
    )


def rasterise(
    records: Sequence[EmojiRecord], size: int, progress: bool = True, description: str = "rasterising emoji"
) -> NDArray[np.uint8]:
    """Straight-alpha RGBA uint8 [N, size, size, 4] of `records`, in this process."""
    from tqdm import tqdm

    rgba_NHWC = np.empty((len(records), size, size, 4), dtype=np.uint8)
    for row, record in enumerate(tqdm(records, desc=description, unit="icon", mininterval=1, disable=not progress)):
        rgba_NHWC[row] = render(record.svg, size)
    return rgba_NHWC


@functools.lru_cache(maxsize=4)
def _checksum(path: Path, modified_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def pixels(archive: Path, size: int) -> NDArray[np.uint8]:
    """RGBA uint8 [N, size, size, 4], read-only, of all records of `archive`: from the cache or rasterised now."""
    header, _ = read_archive(archive)
    checksum = _checksum(archive, archive.stat().st_mtime_ns)
    return _pixels(
        cache_dir("emoji") / f"{archive.name.split('.')[0]}-{checksum}-{size}.npz", archive, header["pictures"], size
    )


@functools.lru_cache(maxsize=2)  # the train and the test split share one copy
def _pixels(file: Path, archive: Path, count: int, size: int) -> NDArray[np.uint8]:
    rgba_NHWC = _load_pixels(file, (count, size, size, 4))
    if rgba_NHWC is None:
        rgba_NHWC = _make_pixels(file, archive, size)
    rgba_NHWC.setflags(write=False)
    return rgba_NHWC


def _load_pixels(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The cached array, or None when there is none or it is damaged."""
    try:
        with np.load(file) as stored:
            rgba_NHWC = stored["rgba"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return rgba_NHWC if rgba_NHWC.shape == shape and rgba_NHWC.dtype == np.uint8 else None


def _make_pixels(file: Path, archive: Path, size: int) -> NDArray[np.uint8]:
    _, records = read_archive(archive)
    # Every second picture goes to a second interpreter: resvg holds the GIL, and forking a process in which torch
    # already runs threads is not safe.
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            other, temporary = Path(folder) / "odd.npy", Path(folder) / "all.npz"
            description = f"rasterising emoji at {size} px (once)"
            if len(records) < _HELPER_FROM:
                rgba_NHWC = rasterise(records, size, description=description)
            else:
                command = [sys.executable, "-m", "common.data.emoji", str(archive.resolve()), str(size), str(other)]
                with subprocess.Popen(command, cwd=REPOSITORY) as helper:
                    try:
                        even = rasterise(records[0::2], size, description=description)
                    except BaseException:
                        helper.kill()
                        raise
                    status = helper.wait()
                rgba_NHWC = np.empty((len(records), size, size, 4), dtype=np.uint8)
                rgba_NHWC[0::2] = even
                rgba_NHWC[1::2] = np.load(other) if status == 0 else rasterise(records[1::2], size)
            np.savez_compressed(temporary, rgba=rgba_NHWC)
            os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot write the rasterised emoji ({error}); free space or set REPRO_CACHE") from None
    return rgba_NHWC


def sha1_int(text: str) -> int:
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest(), "big")


def held_out_concept(record: EmojiRecord) -> bool:
    """`concept` protocol: 8 % of the families, in every style."""
    return sha1_int(record.family) % 100 < 8


def held_out_styles(records: Iterable[EmojiRecord]) -> dict[str, str]:
    """`combo` protocol: base code point -> the committed style that is test, for emoji in at least 4 of them."""
    styles: dict[str, set[str]] = {}
    for record in records:
        if record.style in PERMISSIVE_STYLES:
            styles.setdefault(record.base, set()).add(record.style)
    return {base: sorted(s)[sha1_int(base) % len(s)] for base, s in styles.items() if len(s) >= 4}


def _held_out_combo(record: EmojiRecord, held_out: dict[str, str]) -> bool:
    if record.style in EXTRA_STYLES:
        return record.base in held_out and sha1_int(f"{record.base}/{record.style}") % 5 == 0
    return held_out.get(record.base) == record.style


def split_rows(records: Sequence[EmojiRecord], split: Split, protocol: Protocol) -> list[int]:
    """Rows of `records` (whole archives: the rule counts styles) that belong to `split`."""
    if split not in ("train", "test"):
        raise UserError(f'split: expected "train" or "test", got {split!r}')
    if protocol == "combo":
        held_out = held_out_styles(records)
        is_test = [_held_out_combo(record, held_out) for record in records]
    elif protocol == "concept":
        is_test = [held_out_concept(record) for record in records]
    else:
        raise UserError(f'protocol: expected "combo" or "concept", got {protocol!r}')
    return [row for row, test in enumerate(is_test) if test == (split == "test")]


def _archives(styles: Sequence[str]) -> list[Path]:
    unknown = sorted(set(styles) - set(STYLE_WORDS))
    if unknown or not styles:
        raise UserError(f"styles: {unknown or 'nothing'} given; choose from {', '.join(STYLE_WORDS)}")
    archives = [ARCHIVE]  # always: the splits count its styles
    if set(styles) & set(EXTRA_STYLES):
        archives.append(cache_dir("emoji") / EXTRA_ARCHIVE_NAME)
    return archives


class _EmojiPictures(Dataset[dict[str, Any]]):
    """Some rows of the archives that hold `styles`, on white and as cut-outs."""

    records: list[EmojiRecord]
    captions: list[str]

    def __init__(self, size: int, styles: Sequence[str] | None) -> None:
        self.size = size
        self.styles = tuple(styles) if styles is not None else PERMISSIVE_STYLES
        self._archives = _archives(self.styles)
        self._all_records = [record for archive in self._archives for record in read_archive(archive)[1]]

    def _choose(self, rows: Sequence[int]) -> None:
        """Show these rows, which count through the archives."""
        self._rows = np.asarray(rows, dtype=np.int64)
        self.records = [self._all_records[row] for row in rows]
        self.captions = [record.caption for record in self.records]
        self._images: NDArray[np.uint8] | None = None

    @property
    def rgba(self) -> NDArray[np.uint8]:
        """Straight-alpha RGBA uint8 [N, H, W, 4]."""
        parts = [pixels(archive, self.size) for archive in self._archives]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[self._rows]

    @property
    def images(self) -> NDArray[np.uint8]:
        """RGB on white, uint8 [N, H, W, 3]."""
        if self._images is None:
            self._images = on_white(self.rgba)
        return self._images

    def __len__(self) -> int:
        return len(self._rows)

    def _label(self, index: int) -> int:
        return self.records[index].group

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": torch.from_numpy(self.images[index]).permute(2, 0, 1).contiguous(),
            "caption": self.captions[index],
            "label": self._label(index),
            "style": self.styles.index(self.records[index].style),
        }


class EmojiCap(_EmojiPictures):
    """Emoji pictures on white with captions; see the module's docstring for content and splits.

    Args:
        split: "train" or "test".
        protocol: "combo" (unseen concept-style pairs are test) or "concept" (unseen emoji families are test).
        size: side in pixels.
        styles: keys of STYLE_WORDS; default the five committed ones. Share-alike styles need `make data-emoji-extra`.
        skin_tones: "none": pictures without skin-tone modifier only; "all": every variant, 43 % of all pictures;
            "balanced": one variant (tone-less included) per emoji and style, drawn anew by `set_epoch`.
        seed: of the "balanced" draw. The draw of a test split ignores seed and epoch: reference sets stay the same.

    Attributes (aligned with the index, in the current epoch's draw for "balanced"):
        images: uint8 [N, H, W, 3], composited on white.
        rgba: uint8 [N, H, W, 4], straight alpha (cut-outs).
        captions: "{label}, {style word} style".
        records: EmojiRecord of each picture.

    Items: {"image": uint8 [3, H, W], "caption": str, "label": group 0..9, "style": index into `self.styles`}.
    """

    def __init__(
        self,
        split: Split = "train",
        protocol: Protocol = "combo",
        size: int = 64,
        styles: Sequence[str] | None = None,
        skin_tones: SkinTones = "balanced",
        seed: int = 0,
    ) -> None:
        if skin_tones not in ("none", "balanced", "all"):
            raise UserError(f'skin_tones: expected "none", "balanced" or "all", got {skin_tones!r}')
        if not 8 <= size <= 1024:
            raise UserError(f"size: expected 8 to 1024 pixels, got {size}")
        super().__init__(size, styles)
        self.split, self.skin_tones, self.seed = split, skin_tones, seed
        rows = split_rows(self._all_records, split, protocol)
        rows = [row for row in rows if self._all_records[row].style in self.styles]
        if skin_tones == "none":
            rows = [row for row in rows if not self._all_records[row].tone]
        if skin_tones == "balanced":
            variants: dict[tuple[str, str], list[int]] = {}
            for row in rows:
                record = self._all_records[row]
                variants.setdefault((record.base, record.style), []).append(row)
            self._variants = list(variants.values())
        else:
            self._variants = [[row] for row in rows]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the "balanced" skin tones of `epoch`: a function of (seed, epoch) alone, equal in every process."""
        draw = "0/0" if self.split == "test" else f"{self.seed}/{epoch}"
        rows = []
        for variants in self._variants:
            first = self._all_records[variants[0]]
            choice = sha1_int(f"{draw}/{first.base}/{first.style}") % len(variants) if len(variants) > 1 else 0
            rows.append(variants[choice])
        self._choose(rows)

    def caption_for(self, index: int, generator: torch.Generator | None = None) -> str:
        """A training caption: with p = 0.3 one tag is appended, with p = 0.1 the style is dropped.

        Dropping the whole caption for classifier-free guidance is the trainer's business.
        """
        record = self.records[index]
        tag_draw, tag_choice, style_draw = torch.rand(3, generator=generator).tolist()
        parts = [record.concept]
        if style_draw >= 0.1:
            parts.append(f"{STYLE_WORDS[record.style]} style")
        if tag_draw < 0.3 and record.tags:
            parts.append(record.tags[int(tag_choice * len(record.tags))])
        return ", ".join(parts)


class EmojiGroups(_EmojiPictures):
    """Nine-class image classification: which Unicode group an emoji belongs to, on emoji never seen in training.

    No skin-tone variants, no `component` group; a family (see the module's docstring) is test in all styles when its
    sha1 mod 6 is 0. Classes are `class_names`, the label of every picture is in `labels` (int64 [N], 0..8); items,
    `images`, `rgba`, `captions` and `records` are as in EmojiCap.
    """

    class_names = tuple(name for group, name in enumerate(GROUPS) if group != COMPONENT_GROUP)

    def __init__(self, split: Split = "train", size: int = 32, styles: Sequence[str] | None = None) -> None:
        if split not in ("train", "test"):
            raise UserError(f'split: expected "train" or "test", got {split!r}')
        super().__init__(size, styles)
        rows = [
            row
            for row, record in enumerate(self._all_records)
            if record.style in self.styles
            and not record.tone
            and record.group != COMPONENT_GROUP
            and (sha1_int(record.family) % 6 == 0) == (split == "test")
        ]
        self._choose(rows)
        self.labels = np.asarray([self.class_names.index(GROUPS[r.group]) for r in self.records], dtype=np.int64)

    def _label(self, index: int) -> int:
        return int(self.labels[index])


def _rasterise_odd_rows(archive: str, size: str, output: str) -> None:
    """The second process of `pixels`."""
    np.save(output, rasterise(read_archive(Path(archive))[1][1::2], int(size), progress=False))


if __name__ == "__main__":
    _rasterise_odd_rows(*sys.argv[1:4])
