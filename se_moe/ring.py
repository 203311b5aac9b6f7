"""Ring memory offload for serving (section 3.3.2): K sections of device memory for the experts of N layers.

All expert parameters are in host memory; the dense ones stay on the device. Layers 0..K-1 are loaded first. When layer
i is done, its section is refilled with layer i + K on another stream (CUDA) or thread (CPU). Decoding repeats passes,
so after the last layer the ring goes on with layer 0 of the next token.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from se_moe.storage import Block, DeviceArena, Throttle


@dataclass(frozen=True)
class CompletionTimes:
    """`total` of the ring, pure `compute`, `serial` without overlap; copies started during the passes."""

    total: float
    compute: float
    serial: float
    copies_during_pass: int
    layer_ends: tuple[float, ...]


def completion_times(
    layers: int, sections: int, compute: float, copy: float, preloaded: bool = True, passes: int = 1
) -> CompletionTimes:
    """Timetable (library): start_i = max(end_(i-1), copied_i), copied_j = max(copied_(j-1), end_(j-K)) + copy.

    Args:
        compute: time of one layer; copy: time to copy one layer; any unit.
        preloaded: the first `sections` copies are free.
        passes: tokens decoded; layers go round, a ring of at least `layers` sections copies nothing after the start.
    """
    if layers < 1 or sections < 1:
        raise UserError(f"a ring needs at least one layer and one section, got {layers} and {sections}")
    steps = layers * passes
    ends: list[float] = []
    copied, end, late = 0.0, 0.0, 0
    for j in range(steps):
        resident = j >= layers and sections >= layers
        if resident or (preloaded and j < sections):
            ready = 0.0
        else:
            copied = max(copied, ends[j - sections] if j >= sections else 0.0) + copy
            ready = copied
        late += j >= sections and not resident
        end = max(end, ready) + compute
        ends.append(end)
    serial_copies = steps if sections < layers else layers
    return CompletionTimes(end, steps * compute, steps * compute + serial_copies * copy, late, tuple(ends))


@dataclass
class RingStatistics:
    copies: int = 0
    bytes_copied: int = 0
    wait_seconds: float = 0.0
    copy_seconds: float = 0.0


class _Section:
    """One section of device memory and what it holds."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.layer = -1
        self.copied: Future[None] | torch.cuda.Event | None = None
        self.released: torch.cuda.Event | None = None


class RingOffload:
    """Serves the parameters of layers 0, 1, ..., N-1, 0, 1, ... out of K device sections.

    Args:
        layers: per layer its parameters in host memory (pinned for overlap on CUDA).
        sections: K; with K >= N everything is loaded once and stays.
        arena: device memory with its budget; K sections of the largest layer are allocated there.
        overlap: False copies each layer when it is asked for (the "serial offload" to compare with).
        throttle: pretend that the link to the device is slower (tests; the same for all arms).
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        sections: int,
        arena: DeviceArena,
        overlap: bool = True,
        throttle: Throttle | None = None,
    ) -> None:
        if sections < 1 or not layers:
            raise UserError(f"ring offload needs at least one section and one layer, got {sections} and {len(layers)}")
        self.layers = list(layers)
        self.sections = min(sections, len(self.layers))
        self.arena, self.overlap, self.throttle = arena, overlap, throttle
        self.statistics = RingStatistics()
        self._offsets = [self._layout(layer) for layer in self.layers]
        size = max(total for _, total in self._offsets)
        self._ring: list[_Section] = []
        try:
            for index in range(self.sections):
                self._ring.append(_Section(arena.allocate(size, f"ring section {index}")))
        except UserError:
            for section in self._ring:
                section.block.free()
            raise
        self._position = 0
        self._in_use = False
        self._cuda = arena.device.type == "cuda"
        self._stream = torch.cuda.Stream(arena.device) if self._cuda else None
        self._jobs: queue.SimpleQueue[tuple[_Section, int, Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if overlap and not self._cuda:
            self._thread = threading.Thread(target=self._work, name="ring-copy", daemon=True)
            self._thread.start()
        if overlap:
            for index in range(self.sections):
                self._fill(self._ring[index], index)

    @staticmethod
    def _layout(layer: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
        offsets, offset = {}, 0
        for name, tensor in layer.items():
            offsets[name] = offset
            offset += -(-tensor.nbytes // DeviceArena.ALIGNMENT) * DeviceArena.ALIGNMENT
        return offsets, offset

    @property
    def device_bytes(self) -> int:
        return sum(section.block.size for section in self._ring)

    def views(self, section: _Section, layer: int) -> dict[str, Tensor]:
        offsets, _ = self._offsets[layer]
        return {
            name: section.block.tensor(tensor.shape, tensor.dtype, offsets[name])
            for name, tensor in self.layers[layer].items()
        }

    def _copy(self, section: _Section, layer: int) -> None:
        start = time.monotonic()
        targets = self.views(section, layer)
        with torch.no_grad():
            for name, tensor in self.layers[layer].items():
                targets[name].copy_(tensor, non_blocking=True)
        size = sum(tensor.nbytes for tensor in self.layers[layer].values())
        if self.throttle is not None:
            self.throttle.access(size, start)
        self.statistics.copies += 1
        self.statistics.bytes_copied += size
        self.statistics.copy_seconds += time.monotonic() - start

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            section, layer, future = job
            try:
                self._copy(section, layer)
                future.set_result(None)
            except BaseException as error:  # handed to the thread that waits for the copy
                future.set_exception(error)

    def _fill(self, section: _Section, layer: int) -> None:
        """Start copying a layer into a section that nobody reads any more."""
        section.layer = layer
        if self._stream is not None:
            if section.released is not None:
                # Without this event the copy could overwrite weights that a running kernel still reads.
                self._stream.wait_event(section.released)
            with torch.cuda.stream(self._stream):
                self._copy(section, layer)
                section.copied = self._stream.record_event()
        elif self._thread is not None:
            future: Future[None] = Future()
            section.copied = future
            self._jobs.put((section, layer, future))
        else:
            self._copy(section, layer)

    @contextmanager
    def layer(self, index: int) -> Iterator[dict[str, Tensor]]:
        """The parameters of layer `index` on the device, valid inside the `with` block only.

        Raises:
            UserError: layers asked for out of order.
        """
        expected = self._position % len(self.layers)
        if index != expected or self._in_use:
            raise UserError(
                f"the ring serves layers in order: layer {expected} comes next, layer {index} was asked for"
            )
        section = self._ring[self._position % self.sections]
        start = time.monotonic()
        if section.layer != index:
            self._fill(section, index)  # only without overlap
        if isinstance(section.copied, Future):
            section.copied.result()
        elif section.copied is not None:
            torch.cuda.current_stream(self.arena.device).wait_event(section.copied)
        self.statistics.wait_seconds += time.monotonic() - start
        self._in_use = True
        try:
            yield self.views(section, index)
        finally:
            self._in_use = False
            if self._stream is not None:
                section.released = torch.cuda.current_stream(self.arena.device).record_event()
            following = (index + self.sections) % len(self.layers)
            self._position += 1
            if self.overlap and section.layer != following:
                self._fill(section, following)
            elif not self.overlap and self.sections < len(self.layers):
                section.layer = -1

    def restart(self) -> None:
        """Go back to layer 0, e.g. after an error inside a pass."""
        self._position = 0
        if self.overlap:
            for index, section in enumerate(self._ring):
                if section.layer != index:
                    self._fill(section, index)

    def close(self) -> None:
        """Wait for running copies and give the sections back to the arena."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        if self._stream is not None:
            self._stream.synchronize()
        for section in self._ring:
            section.block.free()
        self._ring = []

    def __enter__(self) -> RingOffload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
