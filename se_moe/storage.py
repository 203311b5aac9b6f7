"""The three tiers that hold experts (section 3.2.1): device arena, host memory, files; each with a hard budget.

An expert travels as one record: its parameters, both Adam moments and its step count, so that an expert that comes back
from a file continues exactly where it left. On disk a record is an ordinary safetensors file, read and written past the
page cache (O_DIRECT), so that "file" never means memory by accident.

Nothing is overwritten: a write-back makes a new version of the file beside the old one, `commit` lists the current
versions in a manifest, and `prune` drops what no kept manifest lists. A process that is killed at any moment leaves
the last manifest and all its files whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_object, sweep, write_json

Value = TypeVar("Value")

BLOCK = 4096  # alignment of direct reads: file offset, length and memory address
MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}


class ExpertKey(NamedTuple):
    """An expert by its MoE layer and its number there (counted over all ranks)."""

    layer: int
    expert: int


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def gigabytes(count: float) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def parameters_of(record: Mapping[str, Value]) -> dict[str, Value]:
    """A record without its step count and moments."""
    return {n: v for n, v in record.items() if n != "step" and not n.startswith(tuple(f"{m}." for m in MOMENTS))}


@dataclass(frozen=True)
class RecordLayout:
    """Where each tensor of a record lies: a safetensors file whose header is padded to whole blocks.

    `fields` maps a name to (dtype, shape), in file order.
    """

    fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @classmethod
    def of_expert(cls, parameters: Mapping[str, Tensor], with_optimizer: bool = True) -> RecordLayout:
        """Step count, parameters and both moments (12 bytes a float32 parameter); serving needs the parameters only."""
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if with_optimizer:
            fields["step"] = (torch.int64, (1,))
        for name, tensor in parameters.items():
            fields[name] = (tensor.dtype, tuple(tensor.shape))
        if with_optimizer:
            for moment in MOMENTS:
                for name, tensor in parameters.items():
                    fields[f"{moment}.{name}"] = (torch.float32, tuple(tensor.shape))
        return cls(fields)

    @property
    def parameter_names(self) -> list[str]:
        return list(parameters_of(self.fields))

    def field_bytes(self, name: str) -> int:
        dtype, shape = self.fields[name]
        return math.prod(shape) * dtype.itemsize

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters alone: what goes to the device."""
        return sum(self.field_bytes(name) for name in self.parameter_names)

    @property
    def data_bytes(self) -> int:
        return sum(self.field_bytes(name) for name in self.fields)

    @property
    def header(self) -> bytes:
        offset, entries = 0, {}
        for name, (dtype, shape) in self.fields.items():
            end = offset + self.field_bytes(name)
            entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = _round_up(8 + len(text), BLOCK) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def slot_bytes(self) -> int:
        """Memory of a record that can be read directly: whole blocks."""
        return _round_up(self.file_bytes, BLOCK)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors of a record inside `buffer` (uint8 [slot_bytes] or longer)."""
        offset, found = len(self.header), {}
        for name, (dtype, shape) in self.fields.items():
            size = self.field_bytes(name)
            found[name] = buffer[offset : offset + size].view(dtype).view(shape)
            offset += size
        return found


@dataclass
class Block:
    """A piece of the arena; `free()` returns it."""

    arena: DeviceArena
    start: int
    size: int
    what: str
    buffer: Tensor
    freed: bool = False

    def tensor(self, shape: Iterable[int], dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        """A view of `shape` that starts `offset` bytes into the block."""
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        if offset + size > self.size:
            raise ValueError(f"{offset + size} bytes do not fit the block of {self.size} ({self.what})")
        return self.buffer[offset : offset + size].view(dtype).view(shape)

    def free(self) -> None:
        self.arena.release(self)


@dataclass
class Charge:
    """Device bytes that live outside the arena's buffer (dense parameters, gradients) but count towards its budget."""

    arena: DeviceArena
    size: int
    what: str
    freed: bool = False

    def free(self) -> None:
        if not self.freed:
            self.freed = True
            self.arena.forget(self)


class DeviceArena:
    """Device memory with a hard byte budget: one buffer, first fit, neighbours merged when freed.

    On a CPU the "device" is this budget and nothing else: what does not fit is refused, exactly as on a GPU.

    Args:
        budget_bytes: everything that is allocated or charged, at any moment.
        device: where the buffer lies.
        buffer_bytes: size of the buffer for `allocate`; default: what the budget leaves at the first allocation.
    """

    ALIGNMENT = 256

    def __init__(self, budget_bytes: int, device: torch.device | str = "cpu", buffer_bytes: int | None = None) -> None:
        if budget_bytes <= 0:
            raise UserError(f"the device budget must be positive, got {budget_bytes} bytes")
        self.budget_bytes = int(budget_bytes)
        self.device = torch.device(device)
        self.charged_bytes = self.block_bytes = self.peak_bytes = 0
        self._buffer_bytes = buffer_bytes
        self._buffer: Tensor | None = None
        self._holes: list[tuple[int, int]] = []  # (start, size), sorted
        self._held: dict[str, int] = {}
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        return self.charged_bytes + self.block_bytes

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def held(self) -> dict[str, int]:
        """Bytes by owner, for messages and reports."""
        return {what: size for what, size in self._held.items() if size}

    def _refuse(self, size: int, what: str, largest: int | None = None) -> UserError:
        owners = ", ".join(f"{name}: {gigabytes(n)}" for name, n in sorted(self.held().items())) or "nothing"
        pieces = "" if largest is None else f" in pieces of at most {gigabytes(largest)}"
        return UserError(
            f"device budget exceeded: {what} needs {size} bytes, {max(0, self.free_bytes)} of {self.budget_bytes} are "
            f"free{pieces} (held by {owners}); raise the device budget, or use fewer experts, sections or tokens"
        )

    def _hold(self, size: int, what: str) -> None:
        self._held[what] = self._held.get(what, 0) + size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def charge(self, size: int, what: str) -> Charge:
        """Count bytes that another allocator holds.

        Raises:
            UserError: they do not fit the budget.
        """
        with self._lock:
            if size > self.free_bytes:
                raise self._refuse(size, what)
            self.charged_bytes += size
            self._hold(size, what)
            return Charge(self, size, what)

    def forget(self, charge: Charge) -> None:
        with self._lock:
            self.charged_bytes -= charge.size
            self._held[charge.what] -= charge.size

    def try_allocate(self, size: int, what: str) -> Block | None:
        """As `allocate`, but None instead of an error."""
        with self._lock:
            size = _round_up(max(1, size), self.ALIGNMENT)
            if size > self.free_bytes:
                return None
            if self._buffer is None:
                room = self._buffer_bytes or self.free_bytes
                self._buffer = torch.empty(room, dtype=torch.uint8, device=self.device)
                self._holes = [(0, room)]
            for index, (start, room) in enumerate(self._holes):
                if room >= size:
                    self._holes[index : index + 1] = [(start + size, room - size)] if room > size else []
                    self.block_bytes += size
                    self._hold(size, what)
                    return Block(self, start, size, what, self._buffer[start : start + size])
            return None

    def allocate(self, size: int, what: str) -> Block:
        """A block of at least `size` bytes.

        Raises:
            UserError: the budget would be exceeded, or no hole is large enough. Names who holds the memory.
        """
        with self._lock:
            block = self.try_allocate(size, what)
            if block is None:
                largest = max((room for _, room in self._holes), default=None)
                raise self._refuse(size, what, largest if size <= self.free_bytes else None)
            return block

    def release(self, block: Block) -> None:
        with self._lock:
            if block.freed:
                return
            block.freed = True
            self.block_bytes -= block.size
            self._held[block.what] -= block.size
            merged: list[tuple[int, int]] = []
            for start, size in sorted([*self._holes, (block.start, block.size)]):
                if merged and sum(merged[-1]) == start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + size)
                else:
                    merged.append((start, size))
            self._holes = merged


class HostSlot:
    """Memory of one record, aligned for direct reads, with the file header in place."""

    def __init__(self, layout: RecordLayout, pinned: bool) -> None:
        raw = torch.empty(layout.slot_bytes + BLOCK, dtype=torch.uint8, pin_memory=pinned)
        shift = -raw.data_ptr() % BLOCK
        self.buffer = raw[shift : shift + layout.slot_bytes]
        self.buffer.zero_()
        header = layout.header
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self.fields = layout.views(self.buffer)
        # Recorded after an asynchronous copy out of this slot; whoever refills the slot waits for it.
        self.copied_out: torch.cuda.Event | None = None

    def memory(self) -> memoryview:
        return self.buffer.numpy().data


class HostTier:
    """Host memory as slots of one record each, never more than the budget holds.

    Args:
        pinned: page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, budget_bytes: int, layout: RecordLayout, pinned: bool = False, least_slots: int = 1) -> None:
        self.budget_bytes, self.layout, self.pinned = int(budget_bytes), layout, pinned
        self.slots = self.budget_bytes // layout.slot_bytes
        if self.slots < least_slots:
            raise UserError(
                f"the host budget of {gigabytes(budget_bytes)} holds {self.slots} experts of "
                f"{gigabytes(layout.slot_bytes)} (with moments), at least {least_slots} are needed; raise the budget"
            )
        self._free: list[HostSlot] = []
        self.made = 0

    @property
    def used_bytes(self) -> int:
        return (self.made - len(self._free)) * self.layout.slot_bytes

    @property
    def peak_bytes(self) -> int:
        return self.made * self.layout.slot_bytes

    def take(self) -> HostSlot:
        """A free slot; memory is made on demand.

        Raises:
            UserError: the budget is used up.
        """
        if self._free:
            return self._free.pop()
        if self.made >= self.slots:
            raise UserError(
                f"host budget exceeded: all {self.slots} slots of {gigabytes(self.layout.slot_bytes)} are taken "
                f"(budget {gigabytes(self.budget_bytes)}); raise it or lower the cache capacity"
            )
        self.made += 1
        return HostSlot(self.layout, self.pinned)

    def give(self, slot: HostSlot) -> None:
        self._free.append(slot)


class Throttle:
    """A slower drive than this machine's, the same on every run: latency per access and bytes per second.

    Accesses queue up as on one drive: each starts when the one before has ended.
    """

    def __init__(self, bytes_per_second: float, latency: float = 0.0) -> None:
        if bytes_per_second <= 0 or latency < 0:
            raise UserError(f"a throttle needs a positive rate and no negative latency, got {bytes_per_second} B/s")
        self.bytes_per_second, self.latency = bytes_per_second, latency
        self._free_at = 0.0
        self._lock = threading.Lock()

    def duration(self, size: int) -> float:
        return self.latency + size / self.bytes_per_second

    def book(self, size: int, start: float) -> float:
        """Reserve the drive from `start` (time.monotonic) on; returns when the access ends."""
        with self._lock:
            self._free_at = max(self._free_at, start) + self.duration(size)
            return self._free_at

    def access(self, size: int, start: float) -> None:
        """Sleep until an access of `size` bytes that began at `start` would have ended."""
        time.sleep(max(0.0, self.book(size, start) - time.monotonic()))


@dataclass
class FileStatistics:
    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


_FILE = re.compile(r"layer(\d+)\.expert(\d+)\.v(\d+)\.safetensors")
_MANIFEST = re.compile(r"manifest-(.+)\.json")


@dataclass
class FileTier:
    """Records as versioned files in a folder. See the module's text for what survives a kill.

    Args:
        folder: one per rank.
        throttle: pretend that the drive is slower.
        durable: fsync every write-back (`commit` does it in any case): survives a power cut, not only a kill.
        budget_bytes: refuse to hold more (live versions; during a step the old versions come on top).
    """

    folder: Path
    layout: RecordLayout
    throttle: Throttle | None = None
    durable: bool = False
    budget_bytes: int | None = None
    versions: dict[ExpertKey, int] = field(default_factory=dict)
    statistics: FileStatistics = field(default_factory=FileStatistics)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unsynced: set[Path] = set()
        self._retained: dict[ExpertKey, set[int]] = {}
        for tag in self.tags():
            self._retain(self._manifest(tag)["experts"])
        self._highest: dict[ExpertKey, int] = {}
        for path in self.folder.iterdir():
            if match := _FILE.fullmatch(path.name):
                key = ExpertKey(int(match[1]), int(match[2]))
                self._highest[key] = max(self._highest.get(key, 0), int(match[3]))
        self.direct = self._direct_io_works()

    def _direct_io_works(self) -> bool:
        """Whether this file system reads past the page cache (tmpfs, for one, does not)."""
        flag = getattr(os, "O_DIRECT", 0)
        probe = self.folder / ".direct-io"
        try:
            os.close(os.open(probe, os.O_RDWR | os.O_CREAT | flag, 0o644))
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
        return bool(flag)

    @property
    def live_bytes(self) -> int:
        """Bytes of the current version of every record."""
        return len(self.versions) * self.layout.file_bytes

    def path(self, key: ExpertKey, version: int | None = None) -> Path:
        version = self.versions[key] if version is None else version
        return self.folder / f"layer{key.layer:03d}.expert{key.expert:04d}.v{version:06d}.safetensors"

    def read(self, key: ExpertKey, slot: HostSlot) -> None:
        """Fill `slot` with the record, past the page cache.

        Raises:
            UserError: the file is missing, too short or has another layout.
        """
        if key not in self.versions:
            raise UserError(f"{self.folder}: there is no expert {key.expert} of layer {key.layer}")
        path, size = self.path(key), self.layout.file_bytes
        start = time.monotonic()
        memory = slot.memory()
        try:
            handle = os.open(path, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if self.direct else 0))
            try:
                if not self.direct:
                    self._drop_pages(handle, path)
                done = 0
                while done < size:
                    count = os.preadv(handle, [memory[done:]], done)
                    if count == 0:
                        break
                    done += count
                if not self.direct:
                    self._drop_pages(handle, path)
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{path}: cannot read the expert ({error.strerror}); is the run folder complete?") from None
        if done != size:
            raise UserError(f"{path}: {done} bytes, expected {size}; the file is damaged, restore it from a checkpoint")
        header = self.layout.header
        if bytes(memory[: len(header)]) != header:
            memory[: len(header)] = header
            raise UserError(f"{path}: written for another model (its header lists other tensors or shapes)")
        if self.throttle is not None:
            self.throttle.access(size, start)
        self.statistics.reads += 1
        self.statistics.bytes_read += size
        self.statistics.read_seconds += time.monotonic() - start

    def write(self, key: ExpertKey, slot: HostSlot) -> None:
        """Write the record as a new version: whole or not at all. The old version stays if a manifest lists it.

        Raises:
            UserError: the disk is full, the folder read-only or the budget used up; the old version stays current.
        """
        size = self.layout.file_bytes
        if key not in self.versions and self.budget_bytes is not None and self.live_bytes + size > self.budget_bytes:
            raise UserError(
                f"file budget exceeded: expert {key.expert} of layer {key.layer} needs {size} bytes, {self.live_bytes} "
                f"of {self.budget_bytes} are used in {self.folder}; raise the budget or use fewer experts"
            )
        old = self.versions.get(key)
        version = self._highest.get(key, 0) + 1
        path = self.path(key, version)
        part = path.with_name(f".{path.name}.part")
        start = time.monotonic()
        flag = getattr(os, "O_DIRECT", 0) if self.direct else 0
        memory = slot.memory()
        length = self.layout.slot_bytes if self.direct else size
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o644)
            try:
                done = 0
                while done < length:
                    done += os.pwritev(handle, [memory[done:length]], done)
                if length != size:
                    os.ftruncate(handle, size)
                if self.durable or not self.direct:
                    os.fsync(handle)
                if not self.direct:
                    self._drop_pages(handle, part)
            finally:
                os.close(handle)
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot write the expert back ({error.strerror}); its last version is kept"
            ) from None
        self._highest[key] = self.versions[key] = version
        if not self.durable:
            self._unsynced.add(path)
        if old is not None and old not in self._retained.get(key, ()):
            stale = self.path(key, old)
            self._unsynced.discard(stale)
            stale.unlink(missing_ok=True)
        if self.throttle is not None:
            self.throttle.access(size, start)
        self.statistics.writes += 1
        self.statistics.bytes_written += size
        self.statistics.write_seconds += time.monotonic() - start

    @staticmethod
    def _drop_pages(handle: int, path: Path) -> None:
        """Ask the kernel to forget the cached pages of a file (systems without the call keep them)."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def _manifest_path(self, tag: str) -> Path:
        return self.folder / f"manifest-{tag}.json"

    def tags(self) -> list[str]:
        """Committed tags in this folder."""
        return sorted(m[1] for path in self.folder.iterdir() if (m := _MANIFEST.fullmatch(path.name)))

    def _manifest(self, tag: str) -> dict[str, Any]:
        path = self._manifest_path(tag)
        missing = f"{self.folder}: nothing was committed as {tag!r}; committed: {', '.join(self.tags()) or 'none'}"
        return read_object(path, missing, {"experts": list}, "not a manifest of experts; take another checkpoint")

    def _retain(self, experts: Iterable[list[int]]) -> None:
        for layer, expert, version in experts:
            self._retained.setdefault(ExpertKey(layer, expert), set()).add(version)

    def commit(self, tag: str, extra: Mapping[str, Any] | None = None) -> Path:
        """Make the current versions a restorable state named `tag`. Changed cache entries must have been written.

        With several ranks: every rank commits, all wait for each other, then the checkpoint's own file names the tag.
        """
        for path in sorted(self._unsynced):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        experts = [[*key, version] for key, version in sorted(self.versions.items())]
        write_json(self._manifest_path(tag), {"experts": experts, "extra": dict(extra or {})})
        self._retain(experts)
        return self._manifest_path(tag)

    def restore(self, tag: str) -> dict[str, Any]:
        """Go back to the committed state `tag`; returns the `extra` that was saved with it.

        Raises:
            UserError: no such tag, or a file that it lists is missing or has another size.
        """
        manifest = self._manifest(tag)
        versions = {ExpertKey(layer, expert): version for layer, expert, version in manifest["experts"]}
        for key, version in versions.items():
            path = self.path(key, version)
            found = path.stat().st_size if path.exists() else None
            if found != self.layout.file_bytes:
                state = "is missing" if found is None else f"has {found} bytes, expected {self.layout.file_bytes}"
                raise UserError(f"{path}: listed in {self._manifest_path(tag).name}, but it {state}")
        self.versions = versions
        return manifest["extra"]

    def prune(self, keep: Collection[str]) -> None:
        """Remove manifests other than `keep`, and files that are neither current nor in a kept manifest."""
        for tag in self.tags():
            if tag not in keep:
                self._manifest_path(tag).unlink()
        self._retained = {}
        for tag in self.tags():
            self._retain(self._manifest(tag)["experts"])
        for path in list(self.folder.iterdir()):
            if match := _FILE.fullmatch(path.name):
                key, version = ExpertKey(int(match[1]), int(match[2])), int(match[3])
                if version != self.versions.get(key) and version not in self._retained.get(key, ()):
                    path.unlink()
            elif path.name.endswith(".part") and path.is_file():
                path.unlink()
        sweep(self.folder)  # what a killed process has left unfinished
