"""The student: a velocity U-Net that starts from the teacher's weights, single or stacked.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.teacher import Teacher
from instaflow.flow import UNetFlow

INITS = ("raw", "negate", "wrapped")
PRUNINGS = ("none", "drop_out_in")


def make_student(teacher: Teacher, init: str = "wrapped") -> UNetFlow:
    """A trainable copy (float32) of the teacher's U-Net as a velocity field.

    Args:
        init: what the copied weights mean at the first step.
            `raw`: the output is taken for the velocity as it is. An epsilon network then starts with the wrong sign,
            since the target X1 - X0 is about -epsilon at the noise end.
            `negate`: the last layer is flipped: -epsilon, or sigma x1 - alpha epsilon for v-prediction.
            `wrapped`: v = x1_hat - eps_hat of the diffusion network at the matched noise level; exactly the 1-flow.

    Raises:
        UserError: an unknown `init`, or `negate` for a network that predicts x0 (which points to the data already).
    """
    if init not in INITS:
        raise UserError(f"init {init!r}: expected one of {', '.join(INITS)}")
    unet = copy.deepcopy(teacher.unet).float()
    unet.requires_grad_(True)
    unet.train()
    time_scale = float(teacher.schedule.steps)
    if init == "wrapped":
        return UNetFlow(unet, teacher.schedule, time_scale)
    if init == "negate":
        if teacher.schedule.prediction_type == "sample":
            raise UserError(
                "init negate: the teacher predicts x0, which points to the data already; use raw or wrapped"
            )
        negate_output(unet)
    return UNetFlow(unet, None, time_scale)


@torch.no_grad()
def negate_output(unet: nn.Module) -> None:
    """Flip the sign of a U-Net's output through its last layer; exact in floating point."""
    last: Any = (unet.second if isinstance(unet, StackedUNet) else unet).conv_out
    last.weight.neg_()
    if last.bias is not None:
        last.bias.neg_()


class StackedUNet(nn.Module):
    """Two U-Nets in series, both conditioned on text and time (appendix B); called like a diffusers U-Net.

    Args:
        first, second: UNet2DConditionModel of equal architecture; taken over, not copied.
        pruning: `drop_out_in` removes the first one's output head and the second one's input convolution, so that the
            full-width feature map is handed over (InstaFlow-1.7B); `none` keeps both (latent -> latent -> latent).
        shared: one set of weights run twice (the same depth at the size of one U-Net); then `second` is not used.
    """

    def __init__(self, first: Any, second: Any = None, pruning: str = "drop_out_in", shared: bool = False) -> None:
        super().__init__()
        if pruning not in PRUNINGS:
            raise UserError(f"stack pruning {pruning!r}: expected one of {', '.join(PRUNINGS)}")
        if second is None and not shared:
            raise UserError("a stack needs two U-Nets, or shared weights")
        widths = first.config.block_out_channels
        if pruning == "drop_out_in" and first.conv_in.out_channels != widths[0]:
            raise UserError("stack pruning drop_out_in: the U-Net's input and output widths differ")
        self.pruning, self.shared = pruning, shared
        self.config = first.config
        tail = first if shared else second
        head = first
        if shared:
            # Two shells over the same sub-modules, so that each can lack another end.
            tail, head = _shell(first), _shell(first)
        if pruning == "drop_out_in":
            head.conv_norm_out = None
            head.conv_act = nn.Identity()
            head.conv_out = nn.Identity()
            tail.conv_in = nn.Identity()
        self.first, self.second = head, tail

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
        """The stack's output [B, C, H, W] for latents, network times and text states, in diffusers' container."""
        hidden = self.first(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return self.second(hidden, timestep, encoder_hidden_states, return_dict=return_dict)


def _shell(unet: Any) -> Any:
    """A module of its own over the same sub-modules and parameters."""
    shell = copy.copy(unet)
    shell._modules = dict(unet._modules)
    return shell


def stack(flow: UNetFlow, pruning: str = "drop_out_in", shared: bool = False) -> UNetFlow:
    """The stacked student of a trained flow (2-RF): both halves start from its weights.

    Raises:
        UserError: the flow is a wrapped diffusion network or a stack already.
    """
    if flow.schedule is not None:
        raise UserError(
            "a stack cannot be wrapped: its second half sees features, not a noisy image; train the flow with init raw "
            "or negate"
        )
    if isinstance(flow.unet, StackedUNet):
        raise UserError("the flow is a stack of two U-Nets already")
    first = copy.deepcopy(flow.unet)
    second = None if shared else copy.deepcopy(flow.unet)
    return UNetFlow(StackedUNet(first, second, pruning, shared), None, flow.time_scale)


def unique_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor under its first name only."""
    seen: set[int] = set()
    result = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result
