"""Files that are whole or absent, never half written; configs that name no code to run."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, flush it to disk, then move it there.

    Raises:
        UserError: the disk is full or the folder cannot be written; what stood at `path` before is kept.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files private
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError ("PytorchStreamWriter failed writing file").
        kept = f"; the earlier {path.name} is kept" if path.exists() else ""
        raise UserError(
            f"cannot write {path}: {error} (is the disk full, or the folder read-only? REPRO_CACHE and --run_dir move "
            f"what the programs write){kept}"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
    temporary = path.with_name(f"{path.name}.part{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_object(path: Path, what: str = "a part is missing") -> dict[str, Any]:
    """The JSON object in a file, a config of a model for example.

    Args:
        what: it means that there is no such file, for messages.

    Raises:
        UserError: there is none, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"{what}: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
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


def refuse_code(part: Path) -> None:
    """Raise UserError where the configs of a part name Python code to load it with (`auto_map`), which is never run."""
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (part / name).is_file() and "auto_map" in read_object(part / name):
            raise UserError(
                f"{part / name}: auto_map asks to run Python code that comes with the files, which is never done here; "
                "expected a model whose code is in diffusers or transformers"
            )
