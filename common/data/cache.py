"""Caches of what a frozen encoder makes of a data set: latents, text features.

A cache is a folder of `shard-00000.safetensors`, ... and one `manifest.json` that records which encoder and which data
set made it. A build that was stopped goes on where it was; a cache made by another encoder or from other data is
refused, never used silently.

Shape suffixes: N = number of items asked for, in the order asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import file_sha256, locked, read_object, sweep, write_atomically, write_json
from common.paths import cache_dir
from common.processes import is_main_process, process_place

FORMAT = 1
_MANIFEST = "manifest.json"
REMEMBERED = 2**28  # bytes: checksums of the files of larger sets are kept, so that they are read once
WHOLE = 2**36  # bytes: of the files of larger sets both ends stand for what lies between
END = 2**16  # bytes of each end
MODEL = (".json", ".safetensors", ".bin", ".txt", ".model")  # files of a model's folder beside pictures and logs


def fingerprint_module(module: nn.Module) -> str:
    """SHA-256 of a module's state dict: names, dtypes, shapes and values (32 hexadecimal digits).

    Two modules agree exactly when their state dicts do, on whatever device they are. What is not in the state dict
    (a latent scale factor, the token count) belongs into the fingerprint too: see `fingerprint_strings`.
    """
    return fingerprint_tensors(module.state_dict())


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name: dtypes, shapes and values, on whatever device (32 hexadecimal digits)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(f"{name}|{values.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def fingerprint_strings(strings: Sequence[str]) -> str:
    """SHA-256 of a sequence of strings, order and borders included (32 hexadecimal digits)."""
    digest = hashlib.sha256()
    for text in strings:
        data = text.encode("utf-8", "surrogatepass")  # names of files may be no text
        digest.update(struct.pack("<q", len(data)))
        digest.update(data)
    return digest.hexdigest()[:32]


def names_of(classes: Sequence[str]) -> str:
    """Names of classes in their order, for people to read; of many the fingerprint."""
    text = ", ".join(classes)
    return text if len(text) < 400 else f"{len(classes)} ({fingerprint_strings(classes)})"


def fingerprint_files(paths: Sequence[Path], root: Path) -> str:
    """SHA-256 of the files' names relative to `root` and of their bytes (32 hexadecimal digits)."""
    digest = hashlib.sha256()
    for path, checksum in sorted(file_checksums(paths).items()):
        name = path.relative_to(root).as_posix().encode("utf-8", "surrogatepass")
        digest.update(name + f"|{checksum}|".encode())
    return digest.hexdigest()[:32]


def fingerprint_path(path: Path, suffixes: Collection[str] = ()) -> str:
    """`fingerprint_files` of one file, whatever its name, or of the files below a folder but hidden ones.

    Args:
        suffixes: of the files that count in a folder; () for all. MODEL for what makes up a model.
    """
    if path.is_file():
        return file_checksums([path])[path][:32]
    files = [file for file in path.rglob("*") if file.is_file() and (not suffixes or file.suffix in suffixes)]
    return fingerprint_files([f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)], path)


def file_checksums(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of the bytes of every file.

    Those of large sets (more than REMEMBERED) are kept in the cache, one file a set, and read again only where `_told`
    of a file has changed. Of very large sets (more than WHOLE) size and both ends of a file stand for the whole: those
    of a parquet file hold the sizes and extremes of all its columns, and a picture that changed has another length.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    try:
        stats = {path: path.stat() for path in paths}
        total = sum(stat.st_size for stat in stats.values())
        read = file_sha256 if total <= WHOLE else _sha256_of_ends
        if total <= REMEMBERED:
            return {path: read(path) for path in stats}
        set_name = fingerprint_strings([str(total <= WHOLE), os.path.realpath(min(stats))])
        kept = cache_dir("checksums") / f"{set_name}.json"
        known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = dict(json.loads(kept.read_text(encoding="utf-8")))
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            found = dict(zip(stats, pool.map(lambda path: known.get(_told(stats[path])) or read(path), stats)))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    settled = {_told(stat): found[path] for path, stat in stats.items() if _settled(stat)}
    if settled.keys() - known.keys():
        with contextlib.suppress(UserError):  # a cache that cannot be written only costs time
            write_json(kept, settled)
    return found


def _told(stat: os.stat_result) -> str:
    """What the operating system says of a file's content: `touch` and `cp -p` cannot set back the last of the times."""
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _settled(stat: os.stat_result) -> bool:
    """Whether a file that changes from now on will have other times."""
    return max(stat.st_mtime, stat.st_ctime) < time.time() - 2


def remembered(files: Sequence[Path], key: str, compute: Callable[[], str]) -> str:
    """A checksum that follows from some files; where these are large it is read from the cache while `_told` of them is
    the same.

    Args:
        key: what else it depends on.
    """
    stats = [path.stat() for path in files]
    if sum(stat.st_size for stat in stats) <= REMEMBERED:
        return compute()
    kept = cache_dir("checksums") / fingerprint_strings([key, *map(_told, stats)])
    try:
        return kept.read_text(encoding="ascii")
    except OSError:
        found = compute()
    if all(map(_settled, stats)):
        with contextlib.suppress(UserError):
            write_atomically(kept, lambda temporary: temporary.write_text(found, encoding="ascii"))
    return found


def _sha256_of_ends(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}|".encode())
    with path.open("rb") as file:
        digest.update(file.read(END))
        file.seek(max(0, size - END))
        digest.update(file.read(END))
    return digest.hexdigest()


class FeatureCache:
    """A finished cache: `cache[[3, 1, 2]]` is a dict of tensors [N, ...], `cache[3]` a dict of tensors [...].

    Make one with `FeatureCache.open_or_build` (builds or resumes) or `FeatureCache.open` (reads only). It can be
    pickled, so DataLoader workers may hold it; with `reading="mapped"` they share the pages of the operating system.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], reading: Literal["mapped", "loaded"]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.reading = reading
        self._shards: dict[int, dict[str, torch.Tensor]] = {}
        if reading == "loaded":
            for number in range(_shard_count(manifest)):
                self._load_shard(number)

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        n: int,
        encoder_fingerprint: str,
        data_fingerprint: str,
        compute: Callable[[list[int]], dict[str, torch.Tensor]],
        shard_size: int = 1024,
        progress: bool = True,
        reading: Literal["mapped", "loaded"] = "mapped",
        rebuild: bool = False,
    ) -> FeatureCache:
        """Open the cache in `folder`; compute whatever shard is missing or damaged (by its checksum) first.

        Several processes, those of torchrun for example, share the shards out; all return when all are there.

        Args:
            folder: the cache's own folder.
            n: number of items of the data set.
            encoder_fingerprint: of everything that `compute` depends on besides the data.
            data_fingerprint: of the data set, in its order.
            compute: maps a list of indices to a dict of tensors [len(indices), ...]; the same names, dtypes and
                trailing shapes every time. Called once per missing shard.
            shard_size: items per file.
            progress: show a progress bar.
            reading: "mapped" leaves the values on disk, "loaded" reads all into memory.
            rebuild: throw away a cache that is there.

        Raises:
            UserError: the cache there is stale (other encoder, data, count or shard size), or the disk is full.
        """
        folder = Path(folder)
        if n <= 0 or shard_size <= 0:
            raise UserError(
                f"{folder}: a cache needs at least one item and a positive shard size, got {n}, {shard_size}"
            )
        wanted = {
            "format": FORMAT,
            "encoder": encoder_fingerprint,
            "data": data_fingerprint,
            "count": n,
            "shard_size": shard_size,
        }
        with _locked(folder):
            if rebuild:
                _clear(folder)
            manifest = _read_manifest(folder)
            if manifest is None:
                manifest = {**wanted, "tensors": {}, "shards": {}}
                write_json(folder / _MANIFEST, manifest)
            _refuse_stale(folder, manifest, wanted)
            missing = _missing(folder, manifest)
        if missing:
            manifest = _build(folder, manifest, missing, compute, progress)
        return cls(folder, manifest, reading)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        encoder_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
        reading: Literal["mapped", "loaded"] = "mapped",
    ) -> FeatureCache:
        """Open a finished cache without computing anything; fingerprints that are given must match.

        Raises:
            UserError: no cache there, an unfinished one, a stale one, or a shard that is missing or truncated.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: there is no feature cache here ({_MANIFEST} is missing); build it first")
        wanted = {"format": FORMAT}
        if encoder_fingerprint is not None:
            wanted["encoder"] = encoder_fingerprint  # type: ignore[assignment]
        if data_fingerprint is not None:
            wanted["data"] = data_fingerprint  # type: ignore[assignment]
        _refuse_stale(folder, manifest, wanted)
        for number in range(_shard_count(manifest)):
            fault = _shard_fault(folder, manifest, number)
            if fault is not None:
                raise UserError(f"{fault}; run the program that built this cache again to complete it")
        return cls(folder, manifest, reading)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def names(self) -> list[str]:
        """Names of the tensors every item has."""
        return sorted(self.manifest["tensors"])

    def __getitem__(self, indices: int | slice | Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(indices, int):
            return {name: values[0] for name, values in self[[indices]].items()}
        wanted = self._checked(indices)
        size = self.manifest["shard_size"]
        out: dict[str, torch.Tensor] = {}
        for name, form in self.manifest["tensors"].items():
            out[name] = torch.empty((len(wanted), *form["shape"]), dtype=getattr(torch, form["dtype"]))
        index_N = torch.tensor(wanted, dtype=torch.int64)
        for number in (index_N // size).unique().tolist():
            rows = torch.nonzero(index_N // size == number).squeeze(1)
            shard = self._load_shard(number)
            for name, values in out.items():
                values[rows] = shard[name][index_N[rows] - number * size]
        return out

    def verify(self) -> None:
        """Compare the checksum of every shard with the manifest; raises UserError naming the first that differs."""
        for number in range(_shard_count(self.manifest)):
            _check_sha256(self.folder, self.manifest, number)

    def _checked(self, indices: slice | Sequence[int] | torch.Tensor) -> list[int]:
        if isinstance(indices, slice):
            return list(range(*indices.indices(len(self))))
        values = [int(index) for index in indices]
        for index in values:
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is outside the {len(self)} items of {self.folder}")
        return [index % len(self) for index in values]

    def _load_shard(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._shards:
            from safetensors.torch import load_file

            fault = _shard_fault(self.folder, self.manifest, number)
            if fault is not None:
                raise UserError(f"{fault}; run the program that built this cache again to complete it")
            path = _shard_path(self.folder, number)
            if self.reading == "loaded":
                _check_sha256(self.folder, self.manifest, number)
                self._shards[number] = {name: values.clone() for name, values in load_file(path).items()}
            else:
                self._shards[number] = _map_file(path)
        return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:
        # A mapping cannot travel to another process, but the file behind it can be mapped there again.
        return {**self.__dict__, "_shards": self._shards if self.reading == "loaded" else {}}


def _missing(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Numbers of the shards that must be computed; damaged ones are struck from the manifest."""
    # Every shard is read once at each start of a program: by the process that makes the damaged ones anew.
    fault_of = _shard_damage if is_main_process() else _shard_fault
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda number: fault_of(folder, manifest, number), range(_shard_count(manifest))))
    missing = [number for number, fault in enumerate(faults) if fault is not None]
    damaged = [number for number in missing if manifest["shards"].pop(str(number), None) is not None]
    for number in damaged:
        warnings.warn(f"{faults[number]}; it is computed again", stacklevel=3)
    if damaged:
        write_json(folder / _MANIFEST, manifest)
    return missing


def _build(
    folder: Path,
    manifest: dict[str, Any],
    missing: Sequence[int],
    compute: Callable[[list[int]], dict[str, torch.Tensor]],
    progress: bool,
) -> dict[str, Any]:
    """Compute what is missing, every process its share and then what others have not begun; returns the manifest."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    rank, world = process_place()
    own = missing[rank::world]
    theirs = [number for number in reversed(missing) if number not in own]
    shards = _shard_count(manifest)
    for number in tqdm(
        [*own, *theirs],
        desc=f"caching {folder.name}",
        unit="shard",
        initial=shards - len(missing),
        total=shards,
        disable=not progress,
    ):
        path = _shard_path(folder, number)
        with locked(path):
            manifest = _read_manifest(folder) or manifest
            if str(number) in manifest["shards"]:  # another process was faster
                continue
            start = number * manifest["shard_size"]
            indices = list(range(start, min(start + manifest["shard_size"], manifest["count"])))
            tensors = {name: values.detach().to("cpu").contiguous() for name, values in compute(indices).items()}
            forms = _forms(tensors, len(indices))
            write_atomically(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))  # type: ignore[misc]
            # The shard is in place before the manifest knows it: a kill between the two only costs this shard again.
            with _locked(folder):
                manifest = _read_manifest(folder) or manifest
                if forms != (manifest["tensors"] or forms):
                    raise ValueError(f"compute() returned {forms} for shard {number}, but {manifest['tensors']} before")
                manifest["tensors"] = forms
                manifest["shards"][str(number)] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                write_json(folder / _MANIFEST, manifest)
    return _read_manifest(folder) or manifest


def _forms(tensors: dict[str, torch.Tensor], count: int) -> dict[str, Any]:
    if not tensors:
        raise ValueError("compute() returned no tensor")
    for name, values in tensors.items():
        if values.ndim == 0 or len(values) != count:
            raise ValueError(f"compute() returned {name} of shape {tuple(values.shape)} for {count} indices")
    return {
        name: {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape[1:])}
        for name, values in sorted(tensors.items())
    }


def _refuse_stale(folder: Path, manifest: dict[str, Any], wanted: dict[str, Any]) -> None:
    meaning = {
        "format": "is of another format version",
        "encoder": "was made by another encoder",
        "data": "was made from other data",
        "count": "has another number of items",
        "shard_size": "has another shard size",
    }
    for key, value in wanted.items():
        if manifest.get(key) != value:
            raise UserError(
                f"{folder}: this cache {meaning[key]} ({manifest.get(key)} in its {_MANIFEST}, {value} now); "
                "delete that folder to build it anew, or choose another cache folder"
            )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    if not path.exists():
        return None
    kinds = {"shards": dict, "tensors": dict, "count": int, "shard_size": int}
    return read_object(path, kinds=kinds, advice="not a cache manifest; delete that folder to build the cache anew")


def _shard_count(manifest: dict[str, Any]) -> int:
    return -(-int(manifest["count"]) // int(manifest["shard_size"]))


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _shard_fault(folder: Path, manifest: dict[str, Any], number: int) -> str | None:
    """What is wrong with a shard, seen without reading its values; None when it is whole."""
    path = _shard_path(folder, number)
    record = manifest["shards"].get(str(number))
    if record is None:
        return f"{path}: this shard was never finished"
    if not path.exists():
        return f"{path}: this shard is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"{path}: this shard is truncated ({size} bytes, expected {record['bytes']})"
    return None


def _shard_damage(folder: Path, manifest: dict[str, Any], number: int) -> str | None:
    """`_shard_fault`, or that the values are not those that were written."""
    fault, path = _shard_fault(folder, manifest, number), _shard_path(folder, number)
    if fault is None and file_sha256(path) != manifest["shards"][str(number)]["sha256"]:
        return f"{path}: this shard is damaged (its checksum differs from {_MANIFEST})"
    return fault


def _check_sha256(folder: Path, manifest: dict[str, Any], number: int) -> None:
    fault = _shard_damage(folder, manifest, number)
    if fault is not None:
        raise UserError(f"{fault}; run the program that built this cache again to compute it anew")


def _map_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on a private, lazily read mapping of it."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            flat = whole[start:end].view(_SAFETENSORS_DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _clear(folder: Path) -> None:
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("shard-*.safetensors"):
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time reads and writes the manifest."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another cache folder") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(folder)
        yield
