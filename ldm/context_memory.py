"""What cross-attention remembers of its context during one sampling call: the condition does not change from step to
step, so its keys and values need to be computed once. Shape suffixes: B batch, L tokens, D token width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass
class ContextMemory:
    """Keys and values of the context tensor that a layer saw last; `samplers.reused_context` hands them out."""

    context_BLD: Tensor | None = None
    version: int | None = None
    keys_values: KeysValues | None = None

    def recall(self, context_BLD: Tensor, project: Callable[[Tensor], KeysValues]) -> KeysValues:
        """The kept keys and values if this is the same tensor with the same content, else newly projected ones."""
        version = None if context_BLD.is_inference() else context_BLD._version
        if self.keys_values is None or self.context_BLD is not context_BLD or self.version != version:
            self.context_BLD, self.version, self.keys_values = context_BLD, version, project(context_BLD)
        return self.keys_values
