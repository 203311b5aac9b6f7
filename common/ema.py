"""Moving averages of a network's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError


class Ema(nn.Module):
    """Exponential moving average of a module's trainable parameters: decay min(decay, (1 + n) / (10 + n)) at update n.

    Saved under the names of LDM's authors (the parameter's name without dots, `decay`, `num_updates`); the averages
    are buffers, so checkpoints carry them.

    Args:
        module: the module to follow; parameters that are not trained are left out.
        decay: the final decay.
        warmup: False uses `decay` from the first update on.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"ema decay must lie in [0, 1], got {decay}")
        self._decay = decay
        self._updates = 0 if warmup else -1
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(self._updates, dtype=torch.int))
        self.buffer_of: dict[str, str] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.buffer_of[name] = name.replace(".", "")
                self.register_buffer(self.buffer_of[name], parameter.detach().clone())
        self.register_load_state_dict_post_hook(Ema._restore_counters)

    @staticmethod
    def _restore_counters(module: nn.Module, _: Any) -> None:
        assert isinstance(module, Ema)
        # The buffer has the decay in float32 only: equal to that, the exact one stays, so that going on is exact.
        if not torch.equal(torch.tensor(module._decay, dtype=torch.float32), module.decay.cpu()):
            module._decay = float(module.decay)
        module._updates = int(module.num_updates)

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(module.named_parameters())
        return [self.get_buffer(buffer) for buffer in self.buffer_of.values()], [
            parameters[name].data for name in self.buffer_of
        ]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the averages towards the module's present parameters; call once after each optimiser step."""
        decay = self._decay
        if self._updates >= 0:
            self._updates += 1
            self.num_updates.fill_(self._updates)
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        shadows, parameters = self._pairs(module)
        torch._foreach_lerp_(shadows, parameters, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters by their averages."""
        shadows, parameters = self._pairs(module)
        torch._foreach_copy_(parameters, shadows)

    @contextlib.contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Inside the block the module has the averaged parameters (the authors' `ema_scope`); afterwards its own."""
        _, parameters = self._pairs(module)
        own = [parameter.clone() for parameter in parameters]
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._pairs(module)[1], own)
