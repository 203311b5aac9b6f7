"""Build the emoji archives from their npm packages.

    python -m common.data.build_emoji_archive            # the committed archive of the five permissive styles
    python -m common.data.build_emoji_archive --extra    # the two share-alike styles, into the cache folder

Needs the network and `npm` (only `npm pack`: no package is installed and none of its scripts runs). Every package is
pinned by version and SHA-256, so that the same archive comes out on every machine.

An icon is joined to an emoji of emojibase by, in this order, its name being the emoji's label ("woman-astronaut"), its
code point in the set's `chars.json`, or an alias of its name being the label. Icons the set has retired come last;
every emoji takes one icon per style, and an icon that fits no emoji is left out. Pictures whose pixels are equal at
64 px are merged.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.data.emoji import (
    ARCHIVE,
    EXTRA_ARCHIVE_NAME,
    EXTRA_STYLES,
    PERMISSIVE_STYLES,
    EmojiRecord,
    on_white,
    rasterise,
    read_archive,
    write_archive,
)
from common.errors import UserError, run_main
from common.packages import Package, download
from common.paths import cache_dir

SOURCES = {
    "twemoji": Package(
        "npm",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "noto": Package(
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "fluent-emoji-flat": Package(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "emojione": Package(
        "npm",
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
    ),
    "noto-v1": Package(
        "npm",
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
    ),
    "openmoji": Package(
        "npm",
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
    ),
    "emojione-v1": Package(
        "npm",
        "@iconify-json/emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
    ),
}
EMOJIBASE = Package(
    "npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT"
)
TONES = {"1": "light", "2": "medium-light", "3": "medium", "4": "medium-dark", "5": "dark"}
SYMBOLS_GROUP, ALPHANUMERIC_SUBGROUP = 8, "alphanum"  # emojibase leaves the 26 regional indicators without a group
CANONICAL_SIZE = 64


def read_json(tarball: Path, member: str) -> Any:
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        if file is None:
            raise UserError(f"{tarball.name}: {member} is not a file; the package is not the pinned one")
        return json.load(file)


def slug(label: str) -> str:
    """The name that icon sets give to a label: "Mrs. Claus" -> "mrs-claus"."""
    text = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower().replace("&", "and")
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’.“”!()]", "", text)).strip("-")


def code_point(hexcode: str) -> str:
    """Hexcode in the spelling of `chars.json`: lower case, without the variation selector FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def names_of(icon: str) -> Iterator[str]:
    """Label slugs that an icon's name may stand for."""
    name = re.sub(r"^flag-for-(flag-)?", "flag-", icon)
    name = re.sub(r"-tone([1-5])$", lambda match: f"-{TONES[match[1]]}-skin-tone", name)
    yield name
    if re.search(r"-(light|medium|dark)$", name):
        yield f"{name}-skin-tone"


def emoji_table(emojibase: list[dict[str, Any]], subgroups: dict[str, str]) -> dict[str, dict[str, Any]]:
    """code point -> label, tags, group, subgroup, hexcode, base and tone of every emoji and skin-tone variant."""
    table = {}
    for emoji in emojibase:
        for variant in (emoji, *emoji.get("skins", ())):
            tone = variant.get("tone", ())
            table[code_point(variant["hexcode"])] = {
                "hexcode": variant["hexcode"],
                "base": emoji["hexcode"],
                "concept": variant["label"],
                "tags": tuple(emoji.get("tags", ())),
                "group": emoji.get("group", SYMBOLS_GROUP),
                "subgroup": subgroups.get(str(emoji.get("subgroup")), ALPHANUMERIC_SUBGROUP),
                "tone": tuple(tone) if isinstance(tone, (list, tuple)) else (tone,),
            }
    return table


def match_icons(
    icons: dict[str, Any], aliases: dict[str, Any], chars: dict[str, str], table: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """code point -> icon name, by the rules of the module's docstring."""
    by_label: dict[str, str | None] = {}
    for code, entry in table.items():
        name = slug(entry["concept"])
        by_label[name] = None if name in by_label else code  # "keycap: #" and "keycap: *" share a slug: neither counts
    codes_of: dict[str, list[str]] = {}
    for spelled, icon in chars.items():
        codes_of.setdefault(icon, []).append(code_point(spelled))
    aliases_of: dict[str, list[str]] = {}
    for alias, entry in aliases.items():
        if set(entry) == {"parent"}:  # others are mirrored or rotated
            aliases_of.setdefault(entry["parent"], []).append(alias)

    def candidates(icon: str, rule: str) -> Iterable[str | None]:
        if rule == "code point":
            return (code for code in codes_of.get(icon, ()) if code in table)
        spellings = [icon] if rule == "label" else aliases_of.get(icon, [])
        return (by_label.get(name) for spelling in spellings for name in names_of(spelling))

    taken: dict[str, str] = {}
    used: set[str] = set()
    for retired in (False, True):
        for rule in ("label", "code point", "alias"):
            for icon, entry in icons.items():
                if bool(entry.get("hidden")) != retired or icon in used:
                    continue
                free = [code for code in candidates(icon, rule) if code is not None and code not in taken]
                if free:
                    taken[free[0]] = icon
                    used.add(icon)
    return taken


def square_view_box(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The icon's viewBox, widened to a centred square."""
    left, top, width, height = (
        icon.get(key, defaults.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    return " ".join(f"{value:g}" for value in (left - (side - width) / 2, top - (side - height) / 2, side, side))


def records_of_style(style: str, tarball: Path, table: dict[str, dict[str, Any]]) -> list[EmojiRecord]:
    icon_set = read_json(tarball, "icons.json")
    matched = match_icons(icon_set["icons"], icon_set.get("aliases", {}), read_json(tarball, "chars.json"), table)
    records = []
    for code, name in matched.items():
        icon = icon_set["icons"][name]
        records.append(
            EmojiRecord(style=style, view_box=square_view_box(icon, icon_set), body=icon["body"], **table[code])
        )
    return records


def without_duplicates(records: list[EmojiRecord], known: set[bytes]) -> list[EmojiRecord]:
    """Drop pictures whose pixels are in `known` or equal an earlier one's; `known` grows.

    Of equal pictures the one without skin tone stays, then the shortest label: the flag of Australia is called so, not
    "flag: Heard & McDonald Islands".
    """
    rgb_NHWC = on_white(rasterise(records, CANONICAL_SIZE))
    order = sorted(range(len(records)), key=lambda i: (records[i].tone, len(records[i].concept), records[i].hexcode))
    keep = []
    for index in order:
        digest = hashlib.sha256(rgb_NHWC[index].tobytes()).digest()
        if digest not in known:
            known.add(digest)
            keep.append(records[index])
    return keep


def _credit(package: Package) -> dict[str, str | None]:
    return {
        "package": package.name,
        "version": package.version,
        "sha256": package.sha256,
        "licence": package.licence,
    }


def build(styles: tuple[str, ...], output: Path, committed: Path | None = None) -> None:
    """Fetch, join and write `styles`; pictures already in the archive `committed` are left out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tarball = download(EMOJIBASE, folder)
        table = emoji_table(read_json(tarball, "en/data.json"), read_json(tarball, "meta/groups.json")["subgroups"])
        sources = [_credit(EMOJIBASE)]
        known: set[bytes] = set()
        if committed is not None:
            without_duplicates(read_archive(committed)[1], known)
        kept: list[EmojiRecord] = []
        counts = {}
        for style in styles:
            package = SOURCES[style]
            tarball = download(package, folder)
            info = read_json(tarball, "info.json")
            if info["license"]["spdx"] != package.licence:
                raise UserError(f"{package}: licence is {info['license']['spdx']}, expected {package.licence}")
            records = records_of_style(style, tarball, table)
            distinct = without_duplicates(records, known)
            counts[style] = {"matched": len(records), "distinct": len(distinct)}
            sources.append({**_credit(package), "author": info["author"]["name"], "url": info["author"]["url"]})
            kept += distinct
            print(f"{style}: {len(records)} icons joined to captions, {len(distinct)} distinct")
    write_archive(output, {"sources": sources, "styles": counts}, kept)
    print(f"{output}: {len(kept)} pictures, {output.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = Parser(description="Build the captioned-emoji archive from its npm packages.")
    parser.add_argument(
        "--extra", action="store_true", help="fetch the share-alike styles into the cache folder instead"
    )
    if parser.parse_args().extra:
        build(EXTRA_STYLES, cache_dir("emoji") / EXTRA_ARCHIVE_NAME, committed=ARCHIVE)
    else:
        build(PERMISSIVE_STYLES, ARCHIVE)


if __name__ == "__main__":
    run_main(main)
