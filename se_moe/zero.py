"""Dense parameters in slices over the data-parallel ranks, as in ZeRO stage 3 (paper §3.2.1, §3.2.2, Algorithm 1).

A unit (a transformer layer without its experts) lives as one slice per rank, with gradient and optimizer state of that
slice alone. Its whole tensors exist only around their use: gathered before the layer runs, freed after it, gathered
again in backward, freed when their gradients have been reduced to slices. While a unit computes, the AllGather of the
next one is already under way: the horizontal dimension of 2D prefetch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from se_moe.communication import (
    Group,
    Layout,
    all_gather_flat,
    group_rank,
    group_size,
    reduce_scatter_flat,
)
from se_moe.model import MoELanguageModel, is_expert


@dataclass
class _Buffer:
    """Tensors that are gathered and reduced by one collective: a layer's (fused), or a single one."""

    parameters: list[nn.Parameter]
    layout: Layout
    shard: nn.Parameter  # this rank's part of the flat, padded tensors
    full: Tensor  # all parts; its storage is empty while nobody computes with them
    gradient: Tensor | None = None  # of all parts, while backward fills it
    waiting: set[int] = field(default_factory=set)
    gathering: Any = None
    reducing: Any = None

    @property
    def resident(self) -> bool:
        return self.full.untyped_storage().nbytes() > 0


@dataclass
class _Unit:
    name: str
    module: nn.Module
    buffers: list[_Buffer]
    keep: bool  # stays whole between forward and backward


class DenseSharding:
    """Slices the dense parameters of a model over a group, gathers and frees them as the model runs.

    Call `finish` after backward and step an optimizer over `shards()`. Results equal those of replicated parameters;
    gathering only copies.

    Args:
        units: (name, module) in the order in which the modules run; a unit owns the parameters of its module that
            `owns` accepts and that no earlier unit has taken.
        group: the data-parallel ranks; every rank must hold the same values when this is built.
        root: module whose remaining parameters (embeddings, final norm) stay whole from its start until their
            gradients are reduced; None: there are none.
        owns: which parameters (by name within `root` or the unit) are dense; experts and split tables are not.
        divisor: what summed gradients are divided by.
        prefetch: gather the next unit while one computes.
        fused: one collective per unit instead of one per tensor (§2.3).
    """

    def __init__(
        self,
        units: Sequence[tuple[str, nn.Module]],
        group: Group,
        divisor: int,
        root: nn.Module | None = None,
        owns: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True,
        prefetch: bool = True,
        fused: bool = True,
    ) -> None:
        self.group, self.divisor, self.prefetch = group, divisor, prefetch
        self._handles: list[Any] = []
        self.prefetched = 0  # gathers that had been started before they were needed
        self.peak_full_bytes = 0
        taken: set[int] = set()
        self._units: list[_Unit] = []
        for name, module in (*units, *([("root", root)] if root is not None else [])):
            own = [p for n, p in module.named_parameters() if id(p) not in taken and owns(n, p)]
            taken.update(id(p) for p in own)
            if own:
                parts = [own] if fused else [[p] for p in own]
                self._units.append(_Unit(name, module, [self._slice(part) for part in parts], module is root))
        self._place = {
            id(p): (unit, buffer, i)
            for unit in self._units
            for buffer in unit.buffers
            for i, p in enumerate(buffer.parameters)
        }
        for index, unit in enumerate(self._units):
            self._attach(index, unit)

    def _slice(self, parameters: list[nn.Parameter]) -> _Buffer:
        ranks, own = group_size(self.group), group_rank(self.group)
        layout = Layout.of(parameters)
        length = -(-layout.size // ranks)
        full = parameters[0].detach().new_zeros(length * ranks)
        layout.pack([p.detach() for p in parameters], full)
        shard = nn.Parameter(full[own * length : (own + 1) * length].clone())
        for parameter, view in zip(parameters, layout.views(full)):
            parameter.data = view
        buffer = _Buffer(parameters, layout, shard, full, waiting=set(range(len(parameters))))
        full.untyped_storage().resize_(0)
        return buffer

    def _attach(self, index: int, unit: _Unit) -> None:
        def before_forward(module: nn.Module, arguments: Any) -> None:
            self._gather(unit)
            if self.prefetch:
                following = 0 if unit.keep else index + 1
                if following < len(self._units) and not self._units[following].keep:
                    self._start(self._units[following])

        def after_forward(module: nn.Module, arguments: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(before_backward)
                if not unit.keep:
                    self._free(unit)
            else:
                self._free(unit)

        def before_backward(gradient: Tensor) -> None:
            self._gather(unit)
            if self.prefetch and not unit.keep and index > 0:
                self._start(self._units[index - 1])

        self._handles.append(unit.module.register_forward_pre_hook(before_forward))
        self._handles.append(unit.module.register_forward_hook(after_forward))
        for buffer in unit.buffers:
            for parameter in buffer.parameters:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived))

    def shards(self) -> list[nn.Parameter]:
        """This rank's slices: what the optimizer steps and what clipping counts as parts over the group."""
        return [buffer.shard for unit in self._units for buffer in unit.buffers]

    @property
    def full_bytes(self) -> int:
        """Bytes of whole parameters and whole gradients that exist now."""
        buffers = [buffer for unit in self._units for buffer in unit.buffers]
        held = sum(b.full.untyped_storage().nbytes() for b in buffers)
        return held + sum(b.gradient.nbytes for b in buffers if b.gradient is not None)

    def _start(self, unit: _Unit) -> None:
        """Begin to gather a unit, unless it is there or on its way."""
        for buffer in unit.buffers:
            if buffer.resident:
                continue
            storage = buffer.full.untyped_storage()
            storage.resize_(buffer.full.numel() * buffer.full.element_size())
            with torch.no_grad():
                if group_size(self.group) == 1:
                    buffer.full.copy_(buffer.shard)
                else:
                    buffer.gathering = all_gather_flat(
                        buffer.full, buffer.shard.detach(), group=self.group, async_op=True
                    )
        self.peak_full_bytes = max(self.peak_full_bytes, self.full_bytes)

    def _gather(self, unit: _Unit) -> None:
        """Make a unit's parameters readable."""
        self.prefetched += any(buffer.gathering is not None for buffer in unit.buffers)
        self._start(unit)
        for buffer in unit.buffers:
            if buffer.gathering is not None:
                buffer.gathering.wait()
                buffer.gathering = None

    def _free(self, unit: _Unit) -> None:
        for buffer in unit.buffers:
            self._free_buffer(buffer)

    @staticmethod
    def _free_buffer(buffer: _Buffer) -> None:
        if buffer.gathering is not None:
            buffer.gathering.wait()
            buffer.gathering = None
        # The storage shrinks but stays the same object, so what autograd saved sees the next gather.
        buffer.full.untyped_storage().resize_(0)

    def _arrived(self, parameter: Tensor) -> None:
        _, buffer, i = self._place[id(parameter)]
        if buffer.gradient is None:
            buffer.gradient = torch.zeros_like(buffer.full, device=buffer.shard.device)
            self.peak_full_bytes = max(self.peak_full_bytes, self.full_bytes)
        if parameter.grad is not None:
            a, b = buffer.layout.starts[i : i + 2]
            buffer.gradient[a:b].view(parameter.shape).copy_(parameter.grad)
            parameter.grad = None
        buffer.waiting.discard(i)
        if not buffer.waiting:
            self._reduce(buffer)
            self._free_buffer(buffer)

    def _reduce(self, buffer: _Buffer) -> None:
        """Sum the whole gradient over the ranks into slices, on another thread or stream."""
        assert buffer.gradient is not None
        buffer.waiting = set(range(len(buffer.parameters)))
        shard = buffer.shard
        if group_size(self.group) == 1:
            summed, buffer.reducing = buffer.gradient, None
        else:
            summed = torch.empty_like(shard)
            buffer.reducing = (
                reduce_scatter_flat(summed, buffer.gradient, group=self.group, async_op=True),
                buffer.gradient,
                summed,
            )
        if buffer.reducing is None:
            self._add(shard, summed)
        buffer.gradient = None

    def _add(self, shard: nn.Parameter, summed: Tensor) -> None:
        summed = summed.div_(self.divisor) if self.divisor != 1 else summed
        shard.grad = summed if shard.grad is None else shard.grad.add_(summed)

    def finish(self) -> None:
        """Reduce what is left, wait for all reductions and free all whole parameters. Gradients are on `shards()`.

        Several backward passes may come before the optimizer's step: their gradients add up.
        """
        for unit in self._units:
            for buffer in unit.buffers:
                if buffer.gradient is not None:
                    self._reduce(buffer)
                if buffer.reducing is not None:
                    work, _, summed = buffer.reducing
                    work.wait()
                    buffer.reducing = None
                    self._add(buffer.shard, summed)
                self._free_buffer(buffer)

    @contextmanager
    def whole(self, write: bool = False) -> Iterator[None]:
        """Whole parameters for reading, for example to save them; with `write`, changes go back to the slices.

        A collective call.
        """
        for unit in self._units:
            self._gather(unit)
        try:
            yield
        finally:
            own = group_rank(self.group)
            for unit in self._units:
                for buffer in unit.buffers:
                    if write:
                        length = buffer.shard.numel()
                        with torch.no_grad():
                            buffer.shard.copy_(buffer.full[own * length : (own + 1) * length])
                    self._free_buffer(buffer)

    def remove(self) -> None:
        """Give the model its whole parameters back and take the hooks off it; a collective call."""
        for unit in self._units:
            self._gather(unit)
        for handle in self._handles:
            handle.remove()


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def shard_model(
    model: MoELanguageModel, group: Group, divisor: int, prefetch: bool = True, fused: bool = True
) -> DenseSharding:
    """`DenseSharding` of the language model: one unit per transformer layer, embeddings and final norm as root."""
    split = {id(p) for p in model.partitioned_parameters()}
    units = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    return DenseSharding(
        units,
        group,
        divisor,
        root=model,
        owns=lambda name, parameter: not is_expert(name) and id(parameter) not in split,
        prefetch=prefetch,
        fused=fused,
    )
