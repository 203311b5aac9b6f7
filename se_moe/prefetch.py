"""2D prefetch (section 3.2.2): experts come up the tiers while earlier layers compute, dense slices come sideways.

Vertical: `ExpertStore` brings experts file -> host -> device ahead of their use. Which ones a layer needs is known only
when its gate has run, so they are guessed from the previous step's routing (`RoutePredictor`), or all are taken; what
was not guessed is fetched as soon as the counts are known, and counted, and never changes a result. Horizontal:
`SlicePrefetch` starts the AllGather of the next layer's dense slices.

All decisions (which expert leaves the cache, which slot is refilled) are made by the calling thread in program order;
one background thread carries them out in the same order. Statistics are therefore the same on every run, and a slot is
never refilled before what was asked of it earlier has happened.

`OffloadedExperts` puts the store behind the MoE layers of a model: parameters are on the device only while a layer
computes, gradients go to host memory, and `step` updates the record (parameters and moments) of each expert that had
tokens. Experts without tokens are not touched at all, as by torch.optim.AdamW when a gradient is None.

With the background thread an update waits for the next time that its record comes to host memory, which the next
forward pass asks for anyway: the record is read once for both, and reading, update and write-back hide behind that
pass. Nobody sees a record before its update: every way to a record leads through `ExpertStore._ask`.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError
from se_moe.cache import SparseCache
from se_moe.moe import MoELayer
from se_moe.storage import (
    Block,
    Charge,
    DeviceArena,
    ExpertKey,
    FileTier,
    HostSlot,
    HostTier,
    RecordLayout,
    gigabytes,
)


def adamw_update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One AdamW step in place, operation for operation that of torch.optim.AdamW; `step` counts from 1."""
    beta1, beta2 = betas
    parameter.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = (exp_avg_sq.sqrt() / math.sqrt(correction2)).add_(eps)
    parameter.addcdiv_(exp_avg, denominator, value=-lr / correction1)


@torch.no_grad()
def update_record(fields: Mapping[str, Tensor], gradients: Mapping[str, Tensor], **adam: Any) -> None:
    """AdamW on one expert's record; its step count goes up by one."""
    fields["step"] += 1
    step = int(fields["step"])
    for name, gradient in gradients.items():
        adamw_update(fields[name], gradient, fields[f"exp_avg.{name}"], fields[f"exp_avg_sq.{name}"], step, **adam)


@dataclass
class PrefetchStatistics:
    """Experts: `predicted` ahead of use, of these `unused`; `missed` were needed and not predicted.

    `on_demand`: fetched for layers that nothing was predicted for. `host_only`: predictions that the device had no room
    for. `wait_seconds`: what the calling thread waited for experts; `fetch_seconds`: what moving them took.
    """

    predicted: int = 0
    unused: int = 0
    missed: int = 0
    on_demand: int = 0
    host_only: int = 0
    wait_seconds: float = 0.0
    fetch_seconds: float = 0.0
    gradient_peak_bytes: int = 0

    @property
    def hidden_fraction(self) -> float:
        """Share of the fetch time during which the calling thread computed."""
        return max(0.0, 1 - self.wait_seconds / self.fetch_seconds) if self.fetch_seconds else 0.0


# What happens to an expert's record: `change(key, fields)`, in place.
Change = Callable[[ExpertKey, dict[str, Tensor]], None]


class RoutePredictor:
    """The experts of each layer that had tokens at the last step (the rank's own experts only); first step: all.

    The routing is known from the gate's AlltoAll, so this costs no communication.

    Args:
        experts: the rank's experts.
        rule: "previous" step's routing, or "all".
    """

    def __init__(self, experts: Sequence[int], rule: str = "previous") -> None:
        if rule not in ("previous", "all"):
            raise UserError(f"prediction rule {rule!r} is unknown; expected previous or all")
        self.experts, self.rule = tuple(experts), rule
        self._last: dict[int, tuple[int, ...]] = {}

    def predict(self, layer: int) -> tuple[int, ...]:
        return self.experts if self.rule == "all" else self._last.get(layer, self.experts)

    def observe(self, layer: int, experts: Iterable[int]) -> None:
        self._last[layer] = tuple(sorted(experts))


class _Worker:
    """Runs jobs in the order they were submitted, on one thread, or at once without one."""

    def __init__(self, background: bool) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="expert-fetch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(*job)

    @staticmethod
    def _do(work: Callable[[], None], future: Future[None]) -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # handed to the thread that waits
            future.set_exception(error)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        if self._thread is None:
            self._do(work, future)
        else:
            self._jobs.put((work, future))
        return future

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


@dataclass
class DeviceExperts:
    """Experts of a layer on the device, `parameters[expert][name]`."""

    layer: int
    parameters: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    arrivals: list[Future[None]] = field(default_factory=list)
    copied: list[torch.cuda.Event] = field(default_factory=list)

    def wait(self) -> None:
        """Until the experts have arrived; on CUDA the current stream waits for the copies, not the host.

        Raises:
            UserError: an expert's file could not be read.
        """
        for future in self.arrivals:
            future.result()
        for event in self.copied:
            torch.cuda.current_stream().wait_event(event)

    def free(self) -> None:
        self.parameters = {}
        for block in self.blocks:
            block.free()


class ExpertStore:
    """All experts of a rank behind one door: device arena <- host cache <- files.

    Args:
        files: where every expert lives; `create` fills it.
        host: slots of the cache plus STAGING.
        arena: device memory.
        cache: which experts stay in host memory; None: every use reads the file and every change is written at once.
        background: fetch on a thread of its own (and, on CUDA, copy on a stream of its own).
    """

    STAGING = 3  # slots beside the cache, used in turns: for experts that the cache does not take

    def __init__(
        self,
        files: FileTier,
        host: HostTier,
        arena: DeviceArena,
        cache: SparseCache[ExpertKey] | None,
        background: bool = True,
    ) -> None:
        needed = self.STAGING + (cache.capacity if cache is not None else 0)
        if host.slots < needed:
            raise UserError(
                f"the host budget of {gigabytes(host.budget_bytes)} holds {host.slots} experts, the cache and "
                f"{self.STAGING} spare slots need {needed}; lower the cache capacity to "
                f"{max(0, host.slots - self.STAGING)} or raise the budget"
            )
        self.layout: RecordLayout = files.layout
        self.files, self.host, self.arena, self.cache = files, host, arena, cache
        self.background = background
        self.statistics = PrefetchStatistics()
        self._slots: dict[ExpertKey, tuple[HostSlot, Future[None]]] = {}
        self._staging = [host.take() for _ in range(self.STAGING)]
        self._owed: dict[ExpertKey, Change] = {}
        self._ahead: dict[int, DeviceExperts] = {}
        self._unchecked: list[Future[None]] = []  # changes and write-backs under way
        self._worker = _Worker(background)
        self._stream = torch.cuda.Stream(arena.device) if arena.device.type == "cuda" else None
        if cache is not None:
            cache.on_period = self._write_changed

    def create(self, key: ExpertKey, parameters: Mapping[str, Tensor]) -> None:
        """Put a new expert into the file tier, moments and step count zero."""
        self._worker.submit(lambda: None).result()  # the slot may still be on its way to a file
        slot = self._staging[0]
        with torch.no_grad():
            for name, tensor in slot.fields.items():
                if name in parameters:
                    tensor.copy_(parameters[name])
                else:
                    tensor.zero_()
        self.files.write(key, slot)

    def _timed(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            start = time.monotonic()
            work()
            seconds = time.monotonic() - start
            self.statistics.fetch_seconds += seconds
            if not self.background:
                self.statistics.wait_seconds += seconds  # the caller is doing it itself

        return run

    def _ask(self, key: ExpertKey) -> tuple[HostSlot, Future[None]]:
        """Ask for an expert in host memory, with the change that it is owed: (slot, arrival)."""
        change, kept = self._owed.pop(key, None), False
        slot: HostSlot | None = None
        if self.cache is not None:
            decision = self.cache.request(key)
            if decision.hit:
                slot, arrival = self._slots[key]
                if change is not None:
                    arrival = self._change(key, slot, change, arrival)
                    self._slots[key] = slot, arrival
                    self.cache.mark_dirty(key)
                return slot, arrival
            kept = not decision.bypass
            if decision.victim is not None:
                slot, arrival = self._slots.pop(decision.victim)
                if decision.victim_dirty:
                    self._write(decision.victim, slot, arrival)
            elif kept:
                slot = self.host.take()
        if slot is None:
            self._staging.append(slot := self._staging.pop(0))
        target = slot
        arrival = self._worker.submit(self._timed(lambda: self._read(key, target)))
        if change is not None:
            arrival = self._change(key, slot, change, arrival)
        if kept and self.cache is not None:
            self._slots[key] = slot, arrival
            if change is not None:
                self.cache.mark_dirty(key)
        elif change is not None:
            self._write(key, slot, arrival)
            if self.cache is not None:
                self.cache.statistics.writes += 1
        return slot, arrival

    def _change(self, key: ExpertKey, slot: HostSlot, change: Change, arrival: Future[None]) -> Future[None]:
        """Submit a change of the record that arrives in a slot."""

        def run() -> None:
            arrival.result()  # done, because jobs keep their order; raises what reading raised
            if slot.copied_out is not None:
                slot.copied_out.synchronize()  # an asynchronous copy to the GPU may still read the slot
                slot.copied_out = None
            change(key, slot.fields)

        changed = self._worker.submit(run)
        self._unchecked.append(changed)
        return changed

    def _read(self, key: ExpertKey, slot: HostSlot) -> None:
        if slot.copied_out is not None:
            slot.copied_out.synchronize()  # an asynchronous copy to the GPU may still read the slot
            slot.copied_out = None
        self.files.read(key, slot)

    def _write(self, key: ExpertKey, slot: HostSlot, arrival: Future[None]) -> None:
        def run() -> None:
            if arrival.exception() is None:  # whoever waits for the expert meets the error there
                self.files.write(key, slot)

        self._unchecked.append(self._worker.submit(self._timed(run)))

    def _check(self) -> None:
        """Report a change or a write-back that failed."""
        done = [future for future in self._unchecked if future.done()]
        self._unchecked = [future for future in self._unchecked if not future.done()]
        for future in done:
            future.result()

    def _write_changed(self) -> None:
        """Write changed cache entries back (end of a period of Algorithm 2); they stay in the cache."""
        assert self.cache is not None
        for key in self.cache.dirty_keys():
            self._write(key, *self._slots[key])
            self.cache.mark_written(key)

    def update(self, keys: Sequence[ExpertKey], change: Change) -> None:
        """Change the records of experts in place, `change(key, fields)` for each, at once or when they next come up.

        At the latest `settle` does it. `change` runs on the background thread, if there is one.
        """
        self.drop_prefetched()  # copies on the device that are about to be out of date
        self.settle()
        self._owed = dict.fromkeys(keys, change)
        if not self.background:
            self.settle()

    def settle(self) -> None:
        """Start every change that is still owed."""
        for key in list(self._owed):
            self._ask(key)
        self._check()

    def read_record(self, key: ExpertKey) -> dict[str, Tensor]:
        """A copy of an expert's record, wherever it is."""
        slot, arrival = self._ask(key)
        arrival.result()
        return {name: tensor.clone() for name, tensor in slot.fields.items()}

    def host_buffers(self) -> list[Tensor]:
        """Memory of every slot in use, for measurements."""
        slots = [*self._staging, *(slot for slot, _ in self._slots.values())]
        return [slot.buffer for slot in slots]

    def flush(self) -> None:
        """Make every change that is owed, write every changed expert back and wait until all writes are done."""
        self.settle()
        if self.cache is not None:
            self._write_changed()
        self._worker.submit(lambda: None).result()
        self._check()

    def commit(self, tag: str, extra: Mapping[str, Any] | None = None) -> None:
        """Flush, then make the state of all experts restorable under `tag` (`FileTier.commit`)."""
        self.flush()
        self.files.commit(tag, extra)

    @property
    def _device_stride(self) -> int:
        """Bytes from one expert of a block to the next: constant, so that a block can be seen as stacked tensors."""
        return -(-self.layout.parameter_bytes // DeviceArena.ALIGNMENT) * DeviceArena.ALIGNMENT

    def _room(self, size: int, what: str) -> Block:
        """A block of the arena; what was only prefetched has to make room."""
        block = self.arena.try_allocate(size, what)
        if block is None:
            self.drop_prefetched()
            block = self.arena.allocate(size, what)
        return block

    def _fetch(self, target: DeviceExperts, experts: Sequence[int], block: Block) -> None:
        """Start bringing experts into a block."""
        target.blocks.append(block)
        # Kernels that still read this memory's earlier contents were launched before this moment.
        released = torch.cuda.current_stream(self.arena.device).record_event() if self._stream is not None else None
        for row, expert in enumerate(experts):
            views, offset = {}, row * self._device_stride
            for name in self.layout.parameter_names:
                dtype, shape = self.layout.fields[name]
                # `.data`: what happens elsewhere in the arena is no in-place change of this tensor.
                views[name] = block.tensor(shape, dtype, offset).data
                offset += self.layout.field_bytes(name)
            target.parameters[expert] = views
            slot, arrival = self._ask(ExpertKey(target.layer, expert))
            target.arrivals += [arrival, self._worker.submit(self._copy_job(slot, arrival, views, target, released))]

    def _copy_job(
        self,
        slot: HostSlot,
        arrival: Future[None],
        views: dict[str, Tensor],
        target: DeviceExperts,
        released: torch.cuda.Event | None,
    ) -> Callable[[], None]:
        def copy() -> None:
            for name, tensor in views.items():
                tensor.copy_(slot.fields[name], non_blocking=True)

        def run() -> None:
            if arrival.exception() is not None:
                return  # whoever waits for the experts meets the error there
            with torch.no_grad():
                if self._stream is None:
                    copy()
                    return
                if released is not None:
                    self._stream.wait_event(released)
                with torch.cuda.stream(self._stream):
                    copy()
                    slot.copied_out = self._stream.record_event()
                target.copied.append(slot.copied_out)

        return self._timed(run)

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Start bringing experts to the device for the next `acquire` of this layer.

        Where the device has no room they come to host memory only.
        """
        wanted = sorted(set(experts))
        if not wanted or layer in self._ahead:
            return
        block = self.arena.try_allocate(len(wanted) * self._device_stride, f"prefetched experts of layer {layer}")
        if block is None:
            self.statistics.host_only += len(wanted)
            if self.cache is not None:
                for expert in wanted[: self.cache.capacity]:
                    self._ask(ExpertKey(layer, expert))
            return
        self.statistics.predicted += len(wanted)
        self._ahead[layer] = DeviceExperts(layer)
        self._fetch(self._ahead[layer], wanted, block)

    def need(self, layer: int, experts: Iterable[int]) -> None:
        """Tell what `acquire` will ask for; starts fetching what was not predicted.

        Raises:
            UserError: the experts do not fit the device budget.
        """
        needed = sorted(set(experts))
        ahead = self._ahead.get(layer)
        if ahead is None:
            missing = needed
            self.statistics.on_demand += len(missing)
        else:
            missing = [expert for expert in needed if expert not in ahead.parameters]
            self.statistics.missed += len(missing)
            self.statistics.unused += len(set(ahead.parameters) - set(needed))
            del self._ahead[layer]  # it is needed now: `_room` must not drop it
        target = ahead or DeviceExperts(layer)
        try:
            if missing:
                block = self._room(len(missing) * self._device_stride, f"experts of layer {layer}")
                self._fetch(target, missing, block)
        except UserError:
            target.wait()
            target.free()
            raise
        self._ahead[layer] = target

    def acquire(self, layer: int, experts: Iterable[int], announced: bool = False) -> DeviceExperts:
        """The experts of a layer on the device (more when more were prefetched); `free()` them after use.

        Args:
            announced: `need` has been called for this use.

        Raises:
            UserError: they do not fit the device budget, or a file cannot be read.
        """
        if not announced:
            self.need(layer, experts)
        start = time.monotonic()
        found = self._ahead.pop(layer)
        found.wait()
        self.statistics.wait_seconds += time.monotonic() - start
        return found

    def drop_prefetched(self, keep: int | None = None) -> None:
        """Give back what was fetched ahead and not used (before an update, or for room), except for layer `keep`."""
        for layer in [layer for layer in self._ahead if layer != keep]:
            ahead = self._ahead.pop(layer)
            ahead.wait()
            self.statistics.unused += len(ahead.parameters)
            ahead.free()

    def close(self) -> None:
        """Write what changed and stop the background thread."""
        self.drop_prefetched()
        self.flush()
        self._worker.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OffloadedExperts:
    """The experts of a model's MoE layers, moved into an `ExpertStore` (implements `moe.ExpertHooks`).

    Parameters keep their names and shapes, but own memory only between `acquire` and `release` of their layer. Their
    gradients are taken off the device as soon as they exist and collect in `gradients`, on the host.

    Args:
        store: holds the experts already (resume), or gets them from the model with `create=True`.
        layers: the MoE layers in the order of the forward pass.
        predictor: guesses the next layer's experts; None: no prefetch, everything is fetched when it is needed.
        create: write the model's present parameters into the store.
    """

    def __init__(
        self,
        store: ExpertStore,
        layers: Sequence[MoELayer],
        predictor: RoutePredictor | None = None,
        create: bool = True,
    ) -> None:
        self.store, self.layers, self.predictor = store, list(layers), predictor
        self._index = {id(layer): index for index, layer in enumerate(self.layers)}
        self._device: dict[tuple[int, bool], DeviceExperts] = {}
        self._last_use: dict[int, list[int]] = {}
        self._charges: dict[int, tuple[Charge, set[tuple[int, str]]]] = {}
        self._gradients: dict[ExpertKey, dict[str, Tensor]] = {}
        self._gradient_bytes = 0
        self._copying = False
        self._parameters = [
            [dict(expert.named_parameters()) for expert in layer.local_experts[: layer.num_local]] for layer in layers
        ]
        self._empty: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        for index, layer in enumerate(self.layers):
            for local, named in enumerate(self._parameters[index]):
                if create:
                    store.create(self.key(index, local), {name: p.detach() for name, p in named.items()})
                for name, parameter in named.items():
                    self._give_up(parameter)
                    parameter.register_post_accumulate_grad_hook(self._gradient_hook(index, local, name))
            layer.hooks = self

    def key(self, layer: int, local: int) -> ExpertKey:
        """The store's key of a local expert: experts are counted over all ranks there."""
        moe = self.layers[layer]
        return ExpertKey(layer, moe.groups.expert_rank * moe.num_local + local)

    def keys(self) -> list[ExpertKey]:
        """All experts of this rank."""
        return [self.key(i, local) for i, layer in enumerate(self.layers) for local in range(layer.num_local)]

    def _local(self, key: ExpertKey) -> int:
        return key.expert - self.key(key.layer, 0).expert

    def _give_up(self, parameter: nn.Parameter) -> None:
        """Leave the shape without the memory."""
        kind = parameter.shape, parameter.dtype
        if kind not in self._empty:
            self._empty[kind] = parameter.data.new_zeros(1).expand(parameter.shape)
        parameter.data = self._empty[kind]

    def _keys_of(self, layer: int, experts: Iterable[int]) -> list[int]:
        return [self.key(layer, local).expert for local in experts]

    def announce(self, layer: MoELayer, experts: Sequence[int]) -> None:
        """The counts are known: fetch what was not predicted while the tokens travel."""
        index = self._index[id(layer)]
        self.store.need(index, self._keys_of(index, experts))
        if self.predictor is not None:
            self.predictor.observe(index, experts)

    def acquire(self, layer: MoELayer, experts: Sequence[int], backward: bool) -> None:
        """Point the parameters of `experts` at device memory that holds their values."""
        index = self._index[id(layer)]
        if backward:
            self.store.settle()  # of experts that this step's forward pass did not use: makes room for new gradients
            size = len(experts) * self.store.layout.parameter_bytes
            awaited = {(local, name) for local in experts for name in self._parameters[index][local]}
            if size > self.store.arena.free_bytes:
                self.store.drop_prefetched(keep=index)
            if awaited:
                charge = self.store.arena.charge(size, f"expert gradients of layer {index}")
                self._charges[index] = (charge, awaited)
        device = self.store.acquire(index, self._keys_of(index, experts), announced=not backward)
        self._device[index, backward] = device
        for local in experts:
            values = device.parameters[self.key(index, local).expert]
            for name, parameter in self._parameters[index][local].items():
                parameter.data = values[name]
        self._last_use[index] = list(experts)
        if self.predictor is not None:
            following = index - 1 if backward else index + 1
            if 0 <= following < len(self.layers):
                # Backward needs what forward used, which is known; forward needs a guess.
                guess = self._last_use.get(following, []) if backward else self.predictor.predict(following)
                self.store.prefetch(following, self._keys_of(following, guess))

    def release(self, layer: MoELayer, experts: Sequence[int], backward: bool) -> None:
        """Take the device memory away again."""
        index = self._index[id(layer)]
        for local in experts:
            for parameter in self._parameters[index][local].values():
                self._give_up(parameter)
        self._device.pop((index, backward)).free()
        if not backward and layer.training and self.predictor is not None and index == len(self.layers) - 1:
            self.store.prefetch(index, self._keys_of(index, experts))  # backward starts here

    def begin_pass(self) -> None:
        """Start fetching the first layer's likely experts; to be called before a forward pass."""
        if self.predictor is not None and self.layers:
            self.store.prefetch(0, self._keys_of(0, self.predictor.predict(0)))

    def _gradient_hook(self, layer: int, local: int, name: str) -> Callable[[Tensor], None]:
        key = self.key(layer, local)

        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return  # an expert without tokens
            parameter.grad = None
            held = self._gradients.setdefault(key, {})
            if gradient.is_cuda:
                pinned = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
                gradient = pinned.copy_(gradient, non_blocking=True)
                self._copying = True
            if name in held:
                held[name] = self.gradients[key][name] + gradient
            else:
                held[name] = gradient
                self._gradient_bytes += gradient.nbytes
            statistics = self.store.statistics
            statistics.gradient_peak_bytes = max(statistics.gradient_peak_bytes, self._gradient_bytes)
            if layer in self._charges:
                charge, awaited = self._charges[layer]
                awaited.discard((local, name))
                if not awaited:
                    charge.free()
                    del self._charges[layer]

        return take

    @property
    def gradients(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """Gradients on the host since the last step, for experts that had tokens; scale or clip them in place."""
        if self._copying:
            torch.cuda.synchronize()
            self._copying = False
        return self._gradients

    def update(self, change: Callable[[dict[str, Tensor], dict[str, Tensor]], None]) -> list[ExpertKey]:
        """`change(record, gradients)` for all experts that have gradients, which are forgotten; returns those experts.

        It runs now or when the record is next needed, on another thread (`ExpertStore.update`).
        """
        gradients = dict(self.gradients)
        self._gradients.clear()
        self._gradient_bytes = 0
        touched = sorted(gradients)
        self.store.update(touched, lambda key, fields: change(fields, gradients.pop(key)))
        return touched

    def step(self, lr: float, **adam: Any) -> list[ExpertKey]:
        """AdamW on the records of all experts that have gradients, then forget the gradients. Returns those experts."""
        return self.update(lambda fields, gradients: update_record(fields, gradients, lr=lr, **adam))

    def detach(self) -> None:
        """Bring every parameter back into the model (for export or a check) and leave the layers."""
        for key in self.keys():
            record = self.store.read_record(key)
            for name, parameter in self._parameters[key.layer][self._local(key)].items():
                parameter.data = record[name].to(self.store.arena.device)
        for layer in self.layers:
            layer.hooks = None


class Gather(Protocol):
    """A running AllGather: `wait()` returns the full parameters."""

    def wait(self) -> Any: ...


class SlicePrefetch:
    """The horizontal dimension (Algorithm 1): while layer i computes, gather the dense slices of layer i + 1.

    Args:
        start: starts the gather of a layer and returns its handle.
        layers: number of layers.
        enabled: False gathers each layer when it is asked for.
    """

    def __init__(self, start: Callable[[int], Gather], layers: int, enabled: bool = True) -> None:
        self._start, self.layers, self.enabled = start, layers, enabled
        self._running: dict[int, Gather] = {}
        self.ahead = self.blocking = 0

    def get(self, layer: int, backwards: bool = False) -> Any:
        """Full parameters of `layer`; starts the gather of the layer that comes after it in this direction."""
        handle = self._running.pop(layer, None)
        if handle is None:
            self.blocking += 1
            handle = self._start(layer)
        else:
            self.ahead += 1
        full = handle.wait()
        following = layer + (-1 if backwards else 1)
        if self.enabled and 0 <= following < self.layers and following not in self._running:
            self._running[following] = self._start(following)
        return full

    def clear(self) -> None:
        """Wait for gathers that nobody asked for."""
        for handle in self._running.values():
            handle.wait()
        self._running.clear()
