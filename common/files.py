"""Files that are whole or absent, never half written; records that are read with care."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line

LARGEST, DEEPEST, MOST = 2**28, 64, 10**7  # bytes, levels and values of a record or config
AGAIN = "restore it, or delete it to have it made again"


@contextlib.contextmanager
def unfinished(path: Path, folder: bool = False) -> Iterator[Path]:
    """A temporary place for a file or folder, to be moved to `path`; gone afterwards, by `sweep` after signal 9."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    handle = claim(fresh)
    temporary = fresh.with_suffix(".part")  # it has this name only while it is claimed
    fresh.rename(temporary)
    temporary.chmod(0o755)  # mkdtemp makes folders private
    try:
        # A file lies in a folder, since libraries put another file in its place, which nobody has claimed.
        yield temporary if folder else temporary / path.name
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def claim(place: Path) -> int:
    """Keep `sweep` from a folder while the returned handle is open: as long as its process lives."""
    handle = os.open(place, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def sweep(folder: Path) -> None:
    """Remove what processes that were killed have left unfinished below a folder."""
    # Not rglob: it fails where a folder goes while it is being searched, as those of processes at work do.
    found = [Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)]
    for place in sorted(place for place in found if place.match(".*.part")):
        with contextlib.suppress(OSError):  # of a process that lives
            handle = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(place)
            finally:
                os.close(handle)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, flush it to disk, then move it there.

    Raises:
        UserError: the disk is full or the folder cannot be written; what stood at `path` before is kept.
    """
    try:
        with unfinished(path) as temporary:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError ("PytorchStreamWriter failed writing file").
        kept = f"; the earlier {path.name} is kept" if path.exists() else ""
        raise UserError(
            f"cannot write {path}: {error} (is the disk full, or the folder read-only? REPRO_CACHE and --run_dir move "
            f"what the programs write){kept}"
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is inside for the same path; a process that dies lets go.

    The lock is a hidden file beside `path`, which goes afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # The one who held it may have removed the file meanwhile: then this lock is on a file that nobody else finds.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Pretty JSON, written atomically; NaN and infinity become null."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(entry) for entry in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    text = json.dumps(clean(value), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """`fill(temporary)` writes the folder, which then takes its name; an existing one of ours is replaced."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    try:
        with unfinished(path, folder=True) as temporary:
            fill(temporary)
            if path.is_dir():
                # Other files of the folder (model card, sample grids) stay.
                for item in temporary.iterdir():
                    target = path / item.name
                    if target.is_dir():
                        shutil.rmtree(target)
                    os.replace(item, target)
            else:
                os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def reading(path: Path, advice: str = AGAIN) -> Iterator[None]:
    """What the block finds wrong with the content of a file is said of the file.

    Raises:
        UserError: it is no text, has another shape, or lacks something.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}): {advice}") from None


def read_object(
    path: Path,
    what: str = "a part is missing",
    kinds: Mapping[str, type | tuple[type, ...]] | None = None,
    advice: str = AGAIN,
) -> dict[str, Any]:
    """The JSON object in a file: a record of a run, a config of a model.

    Args:
        what: it means that there is no such file, for messages.
        kinds: entries that must be there, and what they are.
        advice: what the user should do with a damaged file.

    Raises:
        UserError: there is none, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"{what}: {path} does not exist")
    try:
        content = json.loads(text_of(path, advice))
        refuse_deep(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not valid JSON ({first_line(error)}); {advice}") from None
    return _checked(content, path, "a JSON object", kinds or {}, advice)


def read_yaml(path: Path, what: str = "", advice: str = AGAIN) -> dict[str, Any]:
    """The mapping in a YAML file: a configuration, claims.

    Args:
        what: names the file, for messages ("--config x.yaml"). advice: what the user should do with a damaged one.

    Raises:
        UserError: there is none, or it is something else.
    """
    import yaml

    name = what or str(path)
    if not path.is_file():
        raise UserError(f"{name} cannot be read: no such file")
    try:
        content = yaml.safe_load(text_of(path, advice))
        refuse_deep(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())[:300]}; {advice}") from None
    return _checked(content, name, "options by name", {}, advice)


def text_of(path: Path, advice: str) -> str:
    """The text of a small file, a record or a configuration; `advice` ends the refusal of a large one."""
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, no more than {LARGEST:,} were expected: {advice}")
    return path.read_text(encoding="utf-8-sig")


def refuse_deep(content: Any) -> None:
    """Raise ValueError for lists in lists in lists, and for few lines of YAML that stand for very many values."""
    level, count = [content], 0
    for _ in range(DEEPEST):
        level = [
            item
            for node in level
            if isinstance(node, (dict, list))
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        count += len(level)
        if not level:
            return
        if count > MOST:
            raise ValueError(f"more than {MOST:,} values")
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def _checked(
    content: Any, path: Path | str, wanted: str, kinds: Mapping[str, type | tuple[type, ...]], advice: str
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected {wanted}, found {type(content).__name__}; {advice}")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} is damaged: {key!r} is {content.get(key)!r:.40}; {advice}")
    return content


def file_sha256(path: Path) -> str:
    """Checksum of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_file(path: Path, make: Callable[[Path], object]) -> Path:
    """A file of the cache that is whole: made by `make` where it is missing, and anew where its bytes are not those
    that were written (NAME.sha256 beside it says which they were).

    Raises:
        UserError: it cannot be written.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if path.is_file() and beside.is_file():
        if beside.read_bytes().strip() == file_sha256(path).encode():
            return path
        warnings.warn(f"{path}: damaged (its checksum differs from {beside.name}); it is made again", stacklevel=2)
    known = path.is_file() and not beside.is_file()  # made before there were checksums
    try:
        write_atomically(path, make)
        write_atomically(beside, lambda temporary: temporary.write_text(f"{file_sha256(path)}\n", encoding="ascii"))
    except UserError:
        if not known:
            raise
    return path


def is_text(name: str) -> bool:
    """Whether a string is Unicode text: names of files may hold bytes that are not, as halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted by path. Hidden files and folders (`.name`, the `._*` of other systems) and
    folders like `__MACOSX` do not count; links are followed, each folder is read once."""
    found: list[Path] = []
    seen: set[str] = set()

    def walk(path: str) -> None:
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{path}: the folder cannot be read ({error.strerror})") from error
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith((".", "__")):
                walk(entry.path)
            elif entry.is_file() and not entry.name.startswith("."):
                found.append(Path(entry.path))

    walk(str(folder))
    return sorted(found)
