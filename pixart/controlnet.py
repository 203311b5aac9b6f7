"""ControlNet-Transformer: a PixArt network steered by a second latent, for instance that of an edge map.

Source: arXiv 2310.00426, appendix A.9; PixArt-alpha/PixArt-alpha, diffusion/model/nets/pixart_controlnet.py.

The authors' released code copies the first 13 blocks: block 0 runs plain, and copy i - 1 feeds block i. The paper
describes copies of all blocks, each added to its frozen block's output; `full=True` builds that form.
Names are those of the authors' code (`base_model.*`, `controlnet.i.*`). Shape suffixes as in model.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.products import Linear
from common.weights import check_weights
from pixart.config import PixArtConfig
from pixart.convert import infer_config, load_weights, read_state_dict
from pixart.model import CaptionContext, CrossAttention, PixArt, token_grid, unpatchify

COPIED_BLOCKS = 13


class ControlBlock(nn.Module):
    """A trainable copy of a block behind a zero Linear, and for copies that get the control itself also in front."""

    def __init__(self, block: nn.Module, width: int, first: bool) -> None:
        super().__init__()
        self.copied_block = copy.deepcopy(block).requires_grad_(True)
        if first:
            self.before_proj = _zero_linear(width)
        self.after_proj = _zero_linear(width)


def _zero_linear(width: int) -> Linear:
    layer = Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ControlPixArt(nn.Module):
    """A frozen PixArt and its trainable control branch; without control, and at the start of training, the PixArt.

    Args:
        base: the network to steer; it is frozen and kept, not copied.
        copied_blocks: copies of its first blocks (the authors': 13 of 28); `full` copies all.
        full: the paper's form, see the module's text.
    """

    def __init__(self, base: PixArt, copied_blocks: int = COPIED_BLOCKS, full: bool = False) -> None:
        super().__init__()
        depth = base.config.depth
        count = depth if full else copied_blocks
        if not full and not 1 <= count < depth:
            raise ValueError(f"copied_blocks must be in 1..{depth - 1} for a network of depth {depth}, got {count}")
        self.full = full
        self.base_model = base.requires_grad_(False)
        self.controlnet = nn.ModuleList(
            ControlBlock(base.blocks[i], base.config.width, first=full or i == 0) for i in range(count)
        )

    @property
    def config(self) -> PixArtConfig:
        return self.base_model.config

    def branches(self) -> Iterator[ControlBlock]:
        """The copies with their zero Linears."""
        return (part for part in self.controlnet.children() if isinstance(part, ControlBlock))

    def encode_caption(
        self, caption_BLC: Tensor, mask_BL: Tensor | None = None, drop_B: Tensor | None = None
    ) -> CaptionContext:
        """As `PixArt.encode_caption`; the keys and values of the copies follow those of the base's blocks."""
        context = self.base_model.project_caption(caption_BLC, mask_BL, drop_B)
        if not torch.is_grad_enabled():
            both = (*self.base_model.blocks.modules(), *self.controlnet.modules())
            context.keys_values = [part.keys_values(context) for part in both if isinstance(part, CrossAttention)]
        return context

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        caption: CaptionContext | Tensor,
        mask_BL: Tensor | None = None,
        *,
        control_BCHW: Tensor | None = None,
        size_B2: Tensor | None = None,
        ratio_B1: Tensor | None = None,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """As `PixArt.forward`; control_BCHW: latents of the control picture, None for none."""
        base = self.base_model
        if isinstance(caption, Tensor):
            caption = base.project_caption(caption, mask_BL, drop_B)
        if control_BCHW is None:
            return base(x_BCHW, t_B, caption, size_B2=size_B2, ratio_B1=ratio_B1)
        if control_BCHW.shape != x_BCHW.shape:
            raise ValueError(
                f"control latents {tuple(control_BCHW.shape)} must have the shape of the latents {tuple(x_BCHW.shape)}"
            )
        condition, final_condition_BD = base.embed_condition(t_B, caption, size_B2, ratio_B1)
        x_BND, control_BND = base.embed_latents(x_BCHW), base.embed_latents(control_BCHW)
        depth, branches = base.config.depth, list(self.branches())

        def copied(i: int, h_BND: Tensor) -> Tensor:
            return base.run_block(branches[i].copied_block, h_BND, condition, caption, depth + i)

        for i, block in enumerate(base.blocks):
            if self.full:
                hint_BND = branches[i].after_proj(copied(i, x_BND + branches[i].before_proj(control_BND)))
                x_BND = base.run_block(block, x_BND, condition, caption, i) + hint_BND
                continue
            if 1 <= i <= len(branches):
                start_BND = x_BND + branches[0].before_proj(control_BND) if i == 1 else control_BND
                control_BND = copied(i - 1, start_BND)
                x_BND = x_BND + branches[i - 1].after_proj(control_BND)
            x_BND = base.run_block(block, x_BND, condition, caption, i)
        rows, columns = token_grid(x_BCHW, base.config)
        return unpatchify(base.final_layer(x_BND, final_condition_BD), rows, columns, base.config.patch_size)


def load_controlnet(path: Path | str, base: PixArt | None = None, *, heads: int | None = None) -> ControlPixArt:
    """A control network from a file with the authors' names, `base_model.*` and `controlnet.*`.

    Args:
        base: the network to steer; None takes the one in the file.

    Raises:
        UserError: no such file, no control branch in it, or one that does not fit the base.
    """
    path = Path(path)
    state = read_state_dict(path)
    branch = {key.removeprefix("controlnet."): value for key, value in state.items() if key.startswith("controlnet.")}
    if not branch:
        raise UserError(f'{path} holds no control branch: expected names that begin with "controlnet."')
    if base is None:
        prefix = "base_model."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not weights:
            raise UserError(f"{path} holds a control branch alone; give the network that it steers")
        base = PixArt(infer_config(weights, str(path), heads))
        load_weights(base, weights, str(path))
    copies = len({key.split(".")[0] for key in branch})
    full = "1.before_proj.weight" in branch
    if copies > base.config.depth or (full and copies != base.config.depth):
        raise UserError(f"{path}: {copies} control blocks do not fit a network of depth {base.config.depth}")
    network = ControlPixArt(base, copies, full)
    check_weights(branch, network.controlnet.state_dict(), f"{path}: controlnet", "the network")
    network.controlnet.load_state_dict(branch)
    return network
