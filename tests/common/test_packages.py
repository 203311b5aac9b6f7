"""Packages are fetched by the registry's client and unpacked where they may be; the clients here are small scripts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from common import packages
from common.errors import UserError
from common.packages import Package, download, fetch, find_root, unpack
from tests.refusals import refused


def tar_file(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


@pytest.fixture(autouse=True, params=[True, False], ids=["this Python", "before 3.11.4"])
def tarfile_filters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12 has 3.11.2, whose tarfile has no filters."""
    if not request.param:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put scripts of these names first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def add(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return add


def test_pinned_package_is_fetched_recorded_and_replaces_the_earlier_one(tmp_path: Path, client) -> None:
    archive = tar_file(tmp_path / "corpus-1.0.tgz", {"package/a": b"one", "package/sound.ogg": b"noise"})
    client("npm", f'test "$4" = corpus@1.0 && cp {archive} .')
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    target = tmp_path / "cache"
    (target / "package").mkdir(parents=True)
    (target / "package" / "old").write_text("old")
    fetch([Package("npm", "corpus", "1.0", digest)], target, drop=["*.ogg"])
    assert sorted(path.name for path in (target / "package").iterdir()) == ["a"]
    assert json.loads((target / "packages.json").read_text()) == {"corpus-1.0.tgz": digest}
    assert sorted(path.name for path in target.iterdir()) == ["package", "packages.json"]


def test_another_content_than_the_pinned_one_changes_nothing(tmp_path: Path, client) -> None:
    archive = tar_file(tmp_path / "corpus-1.0.tgz", {"package/a": b"other"})
    client("npm", f"cp {archive} .")
    target = tmp_path / "cache"
    (target / "package").mkdir(parents=True)
    with pytest.raises(UserError, match=r"npm package corpus 1\.0: SHA-256 is .*, expected 00; it is not the pinned"):
        fetch([Package("npm", "corpus", "1.0", "00")], target)
    assert [path.name for path in target.iterdir()] == ["package"]


def test_debian_package_is_unpacked_without_links_that_lead_out(tmp_path: Path, client) -> None:
    links = {"./usr/share/set/default": "/etc/alternatives/set", "./usr/share/set/same": "a"}
    data = tar_file(tmp_path / "data.tar", {"./usr/share/set/a": b"one"}, links, "w")
    client("apt-get", "touch set_1_all.deb")
    client("dpkg-deb", f"cat {data}")
    fetch([Package("debian", "set")], tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache/usr/share/set").iterdir()) == ["a", "same"]


@pytest.mark.parametrize("name", ["../outside", "package/../../outside"])
def test_file_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    archive = tar_file(tmp_path / "bad.tgz", {name: b"x"})
    refused(r"bad\.tgz: damaged, or not safe to unpack", unpack, archive, tmp_path / "in" / "here")
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr(name, "x")
    refused(r"bad\.whl: damaged, or not safe to unpack", unpack, tmp_path / "bad.whl", tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("outside"))


def test_files_do_not_go_through_a_link_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    archive = tmp_path / "bad.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("package")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        tar.addfile(link)
        member = tarfile.TarInfo("package/a")
        tar.addfile(member, io.BytesIO())
    unpack(archive, tmp_path / "here")
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "here/package/a").is_file()


def test_what_is_unpacked_is_ours_and_no_device(tmp_path: Path) -> None:
    def member(name: str, **about: object) -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        for key, value in about.items():
            setattr(made, key, value)
        return made

    fifo, mode = tmp_path / "fifo.tgz", tmp_path / "mode.tgz"
    with tarfile.open(fifo, "w:gz") as tar:
        tar.addfile(member("pipe", type=tarfile.FIFOTYPE))
    refused(r"fifo\.tgz: damaged, or not safe to unpack", unpack, fifo, tmp_path / "a")
    with tarfile.open(mode, "w:gz") as tar:
        tar.addfile(member("folder", type=tarfile.DIRTYPE, mode=0o000))
        tar.addfile(member("folder/inner"), io.BytesIO())
        tar.addfile(member("run", mode=0o4777, uid=12345), io.BytesIO())
        tar.addfile(member("read", mode=0o000, uid=12345), io.BytesIO())
        tar.addfile(member("same", type=tarfile.LNKTYPE, linkname="run", mode=0o4777))
        tar.addfile(member("out", type=tarfile.LNKTYPE, linkname="../fifo.tgz"))
    unpack(mode, tmp_path / "b")
    folder = tmp_path / "b" / "folder"
    assert (folder / "inner").is_file() and folder.stat().st_mode & 0o700 == 0o700
    files = [path for path in (tmp_path / "b").iterdir() if path.is_file()]
    found = {path.name: (path.stat().st_mode & 0o7777, path.stat().st_uid) for path in files}
    assert found == {name: (bits, os.getuid()) for name, bits in {"run": 0o755, "read": 0o600, "same": 0o755}.items()}


def test_only_the_named_members_are_unpacked_and_missing_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "set.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("set/data/a", "set/code.py"):
            wheel.writestr(name, "x")
    unpack(path, tmp_path / "here", ["set/data/a"])
    assert [p.name for p in (tmp_path / "here").rglob("*") if p.is_file()] == ["a"]
    refused(r"set\.whl: set/data/b is not in it", unpack, path, tmp_path / "here", ["set/data/b"])
    path.write_bytes(path.read_bytes()[:-30])
    refused(r"set\.whl: damaged", unpack, path, tmp_path / "here")


def test_missing_clients_and_a_missing_network_say_what_to_do(
    tmp_path: Path, client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client("npm", "echo getaddrinfo EAI_AGAIN >&2; exit 1")
    with pytest.raises(UserError, match=r"npm could not fetch it \(getaddrinfo EAI_AGAIN\); check the network"):
        download(Package("npm", "corpus"), tmp_path)
    client("npm", "exec sleep 9")
    monkeypatch.setattr(packages, "_PATIENCE", 0.1)
    refused(r"no answer within .* minutes; check the network", download, Package("npm", "corpus"), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"apt-get is not on this machine.*dpkg -x", download, Package("debian", "set"), tmp_path)
    refused(r"npm is not on this machine; install Node\.js", download, Package("npm", "corpus"), tmp_path)


def test_root_is_the_given_the_fetched_or_the_system_one(tmp_path: Path) -> None:
    fetched, given = tmp_path / "fetched", tmp_path / "given"
    refused(r"no/such/set was not found; run `make data-set`", find_root, "no/such/set", None, fetched, "data-set")
    (fetched / "no/such/set").mkdir(parents=True)
    assert find_root("no/such/set", None, fetched, "data-set") == fetched
    assert find_root("usr", None, fetched, "data-set") == Path("/")
    refused(r"given: no/such/set is not in it", find_root, "no/such/set", given, fetched, "data-set")
