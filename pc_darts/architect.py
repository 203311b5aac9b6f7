"""The architecture step: alphas and betas follow the loss on the validation half of the images.

Source: arXiv 1907.05737 section 4.2 (first order, Adam); second order: arXiv 1806.09055 equations 6 to 8;
yuhuixu1993/PC-DARTS, architect.py.

Shape suffixes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pc_darts.operations import frozen_statistics
from pc_darts.search_space import SearchNetwork
from pc_darts.training import Machine

RADIUS = 0.01  # of the finite difference, over the norm of the direction (arXiv 1806.09055 section 2.3)


class Architect:
    """Updates the architecture of a search network; its weights and running statistics are as before after a step.

    Args:
        weight_optimiser: the SGD of the weights; the second order reads its momentum, weight decay and buffers.
        clip: largest norm of the architecture gradient; 0 is off (ImageNet: 5).
        machine: on N processes every gradient is averaged before it is used.
    """

    def __init__(
        self,
        network: SearchNetwork,
        weight_optimiser: torch.optim.Optimizer,
        learning_rate: float = 6e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
        clip: float = 0.0,
        machine: Machine | None = None,
    ) -> None:
        self.network, self.weight_optimiser, self.clip = network, weight_optimiser, clip
        self.machine = machine or Machine()
        self.optimiser = torch.optim.Adam(
            network.architecture(), lr=learning_rate, betas=betas, weight_decay=weight_decay
        )

    def step(
        self,
        x_train_BCHW: Tensor | None,
        y_train_B: Tensor | None,
        x_val_BCHW: Tensor,
        y_val_B: Tensor,
        lr: float | None = None,
        unrolled: bool = False,
    ) -> Tensor:
        """One Adam step on the architecture; returns the validation loss.

        Args:
            x_train_BCHW, y_train_B: a batch of the training half, read by the second order only.
            lr: the weights' learning rate (eta of the unrolled step); None: that of `weight_optimiser`.
            unrolled: second order.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen_statistics())
            if unrolled and self.machine.world > 1:
                # The unrolled step and the direction of the finite difference are functions of the whole batch's
                # gradient. The architecture's own gradients are averaged once, in `apply`.
                for weight in self.network.weights():
                    stack.callback(weight.register_hook(self._averaged).remove)
            if unrolled:
                assert x_train_BCHW is not None and y_train_B is not None
                lr = float(self.weight_optimiser.param_groups[0]["lr"]) if lr is None else lr
                loss, gradients = self._second_order(x_train_BCHW, y_train_B, x_val_BCHW, y_val_B, lr)
            else:
                loss = self._loss(x_val_BCHW, y_val_B)
                # A network of one or two cells has no normal cell: its gradient is then zero.
                parameters = self.network.architecture()
                gradients = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
        self.apply(gradients)
        return loss.detach()

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One Adam step with given gradients, in the order of `network.architecture()`."""
        parameters = self.network.architecture()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        self.machine.average_gradients(parameters)
        if self.clip > 0:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimiser.step()

    def _averaged(self, gradient: Tensor) -> Tensor:
        mean = gradient.clone()
        self.machine.average([mean])
        return mean

    def _loss(self, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x_BCHW), y_B)

    def _second_order(
        self, x_train_BCHW: Tensor, y_train_B: Tensor, x_val_BCHW: Tensor, y_val_B: Tensor, lr: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradient of L_val(w'(alpha), alpha), where w' is one step of SGD with momentum from w on L_train."""
        weights, architecture = self.network.weights(), self.network.architecture()
        kept = [weight.detach().clone() for weight in weights]
        random_state = torch.get_rng_state()  # all passes of one step see the same random channels
        try:
            gradients = torch.autograd.grad(self._loss(x_train_BCHW, y_train_B), weights)
            self._set(weights, self._virtual_step(kept, gradients, weights, lr))
            torch.set_rng_state(random_state)
            loss = self._loss(x_val_BCHW, y_val_B)
            both = torch.autograd.grad(loss, [*architecture, *weights], materialize_grads=True)
            direct, direction = both[: len(architecture)], both[len(architecture) :]
            radius = RADIUS / float(torch.stack([v.square().sum() for v in direction]).sum().sqrt())
            differences: list[Tensor] = []
            for sign in (1.0, -1.0):
                self._set(weights, [w + sign * radius * v for w, v in zip(kept, direction, strict=True)])
                torch.set_rng_state(random_state)
                at_loss = self._loss(x_train_BCHW, y_train_B)
                at = torch.autograd.grad(at_loss, architecture, materialize_grads=True)
                differences = list(at) if sign > 0 else [p - n for p, n in zip(differences, at, strict=True)]
        finally:
            self._set(weights, kept)
        implicit = [difference / (2 * radius) for difference in differences]
        return loss, [d - lr * i for d, i in zip(direct, implicit, strict=True)]

    def _virtual_step(
        self, kept: Sequence[Tensor], gradients: Sequence[Tensor], weights: Sequence[nn.Parameter], lr: float
    ) -> list[Tensor]:
        """w - eta * (momentum * buffer + gradient + weight_decay * w)."""
        group = self.weight_optimiser.param_groups[0]
        moved = []
        for value, gradient, weight in zip(kept, gradients, weights, strict=True):
            change = gradient + group.get("weight_decay", 0.0) * value
            buffer = self.weight_optimiser.state.get(weight, {}).get("momentum_buffer")
            if buffer is not None:
                change = change + group["momentum"] * buffer
            moved.append(value - lr * change)
        return moved

    @staticmethod
    @torch.no_grad()
    def _set(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(list(weights), list(values))
