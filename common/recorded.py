"""Calls of a network that is not being trained, recorded once they have come often and replayed without Python.

At the sizes of this repository half of a small network's time goes into Python between the products, and some of the
rest into tensors that Python holds longer than they are needed. A recording (`torch.jit.trace`) makes the same calls of
the same kernels in the same order, so the numbers are the same to the bit; unlike compiling it takes half a second.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.costs import parameter_count
from common.kernels.products import standing_for

AFTER = 64  # calls with equal shapes before recording pays: it takes as long as 50 to 200 of them save
# What is larger is left as it is: products take all the time there, and while it is being recorded a network keeps
# every tensor on the way.
LARGEST = 50_000_000  # parameters
MOST, PLACES = 2**16, 2**8  # numbers of the first input, and its places (all dimensions after samples and channels)
Call = Callable[..., Tensor]


class _Pure(nn.Module):
    """A call through a network as a module, which is what can be recorded with the network's own weights in place."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.network, *inputs)


class Recorder:
    """call(network, *inputs), recorded for each combination of input shapes and types that comes often.

    Calls with gradients, of a network in training mode, of large networks or inputs, on another device than the CPU or
    with anything but tensors go to the network as they are; so do those whose recording fails or does not give the
    network's own numbers.

    Args:
        call: a function of the network and of tensors alone: no random numbers, nothing decided by their values.
        constant: the weights never change, so that what is computed from them alone (their copies in the precision of
            autocast) is computed once.

    Weights may change in place unless `constant`; what the network is made of (adaptors, layers) may not.
    """

    def __init__(self, network: nn.Module, call: Call, constant: bool = False, after: int | None = None) -> None:
        self.network, self.call, self.constant, self.after = network, call, constant, after or AFTER
        self.small = parameter_count(network) <= LARGEST
        self._calls: dict[Any, int] = {}
        self._recorded: dict[Any, Callable[..., Tensor] | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """Of the copied network, without recordings: these hold the weights of the one that was recorded."""
        made = memo[id(self)] = copy.copy(self)
        made.network, made._calls, made._recorded = copy.deepcopy(self.network, memo), {}, {}
        return made

    def __call__(self, *inputs: Any) -> Tensor:
        plain = torch.is_grad_enabled() or self.network.training or torch.compiler.is_compiling() or not self.small
        if plain or not all(isinstance(x, Tensor) and x.device.type == "cpu" for x in inputs):
            return self.call(self.network, *inputs)
        if inputs[0].numel() > MOST or math.prod(inputs[0].shape[2:]) > PLACES:
            return self.call(self.network, *inputs)
        mixed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        key = (mixed, *((x.shape, x.dtype, x.stride()) for x in inputs))
        if recorded := self._recorded.get(key):
            with torch.autocast("cpu", enabled=False):  # its casts are part of the recording
                return recorded(*inputs)
        output = self.call(self.network, *inputs)
        seen = self._calls[key] = self._calls.get(key, 0) + 1
        if seen == self.after:
            self._recorded[key] = self._record(inputs, output, mixed)
        return output

    def _record(
        self, inputs: tuple[Tensor, ...], output: Tensor, mixed: torch.dtype | None
    ) -> Callable[..., Tensor] | None:
        """The recording, if it gives this output."""
        if any(module._compiled_call_impl for module in self.network.modules()):
            return None
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # of shapes that become constants: a recording is for one set of them
            given = tuple(x.clone(memory_format=torch.preserve_format) for x in inputs)
            for few in _with_fewer_rows(given):
                try:
                    cast = torch.autocast(
                        "cpu", mixed or torch.bfloat16, enabled=mixed is not None, cache_enabled=False
                    )
                    with cast, standing_for(_rows(given) / max(1, _rows(few))):
                        recorded = torch.jit.trace(_Pure(self.network, self.call).eval(), few, check_trace=False)
                    with torch.autocast("cpu", enabled=False):
                        if self.constant:
                            recorded = torch.jit.freeze(recorded)
                        if all(torch.equal(recorded(*given), output) for _ in range(3)):  # the first two are optimised
                            return recorded
                except (RuntimeError, TypeError, ValueError, AttributeError):
                    continue
        return None


def _rows(inputs: tuple[Tensor, ...]) -> int:
    return len(inputs[0]) if inputs[0].dim() else 1


def _with_fewer_rows(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The inputs' first two samples, then all."""
    rows = {len(x) if x.dim() else 0 for x in inputs}
    if len(rows) == 1 and rows.pop() > 2:
        yield tuple(x[:2] for x in inputs)
    yield inputs
