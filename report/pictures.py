"""Pictures of the page: files beside it that are asked for when they come into view, at their own shape."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.errors import UserError
from common.figures import CAPTIONS

SUFFIXES = (".png", ".svg")
STRIP, WIDE = 4.0, 1.9  # times as wide as high: a strip has a row of its own; on a telephone both scroll in a box
SHEET = (1000, 500)  # pixels from which a picture is a sheet of many: a row of its own


@dataclass(frozen=True)
class Picture:
    """A picture of results/figures and what it shows."""

    path: Path
    caption: str

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels; (4, 3) of a file that holds no picture, which the page then says."""
        if self.path.suffix == ".svg":
            text = self.path.read_text(encoding="utf-8")
            box = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+) ([\d.]+)"', text)
            box = box or re.search(r'<svg [^>]*width="([\d.]+)" height="([\d.]+)"', text)
            return (round(float(box[1])), round(float(box[2]))) if box else (4, 3)
        try:
            with Image.open(self.path) as image:
                return image.size
        except UnidentifiedImageError:
            return (4, 3)


def read_pictures(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Picture]:
    """The pictures of a folder that have a caption, in the order of its captions; others are named and left out.

    Args:
        suffixes: of what is looked for; a page of its own is no picture, but is captioned and kept like one.

    Raises:
        UserError: the captions cannot be read, or name a picture that is not there.
    """
    listing = folder / CAPTIONS
    captions: dict[str, str] = {}
    if listing.exists():
        try:
            captions = json.loads(listing.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{folder.name}/{CAPTIONS} cannot be read as JSON: {error}") from None
        if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
            raise UserError(f'{folder.name}/{CAPTIONS}: expected {{"file name": "caption"}}')
        absent = [name for name in captions if not (folder / name).exists()]
        if absent:
            raise UserError(f"{folder.name}/{CAPTIONS} names {absent[0]}, which is not in that folder")
    for path in sorted(folder.iterdir()):
        if path.suffix in suffixes and path.name not in captions:
            print(f"left out {folder.name}/{path.name}: it has no caption (common.figures.keep_captions)")
    return [Picture(folder / name, text) for name, text in captions.items() if Path(name).suffix in suffixes]


def with_code(text: str) -> str:
    """Plain text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def strongest_first(pictures: Sequence[Picture], strongest: Collection[str]) -> tuple[list[Picture], list[Picture]]:
    """(those that `strongest` names, in its order; the rest). Without names the first four lead."""
    known = {picture.path.name: picture for picture in pictures}
    lead = [known[name] for name in strongest if name in known] or list(pictures[:4])
    return lead, [picture for picture in pictures if picture not in lead]


class Album:
    """Copies pictures, or pages of their own, into a folder beside the page, and drops what no page shows any more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shown: list[Path] = []

    def gallery(self, pictures: Iterable[Picture]) -> str:
        """Their figures as HTML, each in its own shape."""
        return f'<div class="gallery">{"".join(map(self._figure, pictures))}</div>'

    def keep(self, picture: Picture) -> str:
        """Copy a file beside the page; returns the link to it."""
        place = Path(picture.path.parent.name) / picture.path.name
        self.shown.append(place)
        target, source = self.folder / place, picture.path.stat()
        if not target.is_file() or (target.stat().st_size, target.stat().st_mtime) != (source.st_size, source.st_mtime):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(picture.path, target)
        return f"{self.folder.name}/{place.as_posix()}"

    def _figure(self, picture: Picture) -> str:
        link = self.keep(picture)
        width, height = picture.size()
        shape, caption = width / height, escape(picture.caption)
        # A drawing has no pixels to keep to.
        natural = width if picture.path.suffix == ".png" else max(width, 640)
        kind = "strip" if shape >= STRIP else "wide" if shape >= WIDE else "picture"
        kind = "wide sheet" if width >= SHEET[0] and height >= SHEET[1] else kind
        return (
            f'<figure class="{kind}" style="--shape:{shape:.3f};--natural:{natural}px">'
            f'<a class="zoom" href="{link}"><img src="{link}" width="{width}" height="{height}" loading="lazy" '
            f'alt="{caption}"></a><figcaption>{with_code(picture.caption)}</figcaption></figure>'
        )

    def tidy(self) -> None:
        """Remove pictures of earlier pages."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.relative_to(self.folder) not in self.shown:
                path.unlink()
