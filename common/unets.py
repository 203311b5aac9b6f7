"""diffusers' networks at the speed of this machine: layout of tensors, attention in the fastest of its equal forms.

Shape suffixes: B batch, A heads, N queries, L keys, K width of a head, D width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.attention import attention
from common.kernels.geglu import geglu
from common.kernels.group_norm_silu import group_norm_silu
from common.kernels.products import plain_products, quicken_products
from common.recorded import Recorder


class AttentionForm:
    """`AttnProcessor2_0` of diffusers by `common.kernels.attention`, for token sequences in a U-Net's transformers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        source_BLD = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source_BLD = attn.norm_encoder_hidden_states(source_BLD)
        projected = (attn.to_q(hidden_states), attn.to_k(source_BLD), attn.to_v(source_BLD))
        q_BANK, k_BALK, v_BALK = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        if attn.norm_q is not None:
            q_BANK = attn.norm_q(q_BANK)
        if attn.norm_k is not None:
            k_BALK = attn.norm_k(k_BALK)
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, source_BLD.shape[1], len(source_BLD))
            mask = mask.view(len(source_BLD), attn.heads, -1, mask.shape[-1])
        out_BND = attention(q_BANK, k_BALK, v_BALK, mask).transpose(1, 2).flatten(2)
        out_BND = attn.to_out[1](attn.to_out[0](out_BND))
        return out_BND if attn.rescale_output_factor == 1 else out_BND / attn.rescale_output_factor


@cache
def _quick_parts() -> dict[type, type]:
    """diffusers' GEGLU and residual block, which keep less for the backward pass, and divide by no factor of one."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D

    class QuickGeglu(GEGLU):
        def forward(self, hidden_states: Tensor, *args: Any, **others: Any) -> Any:
            if args or others:
                return super().forward(hidden_states, *args, **others)
            return geglu(self.proj(hidden_states))

    class QuickResnetBlock(ResnetBlock2D):
        def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **others: Any) -> Any:
            plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default"
            if args or others or not plain or not isinstance(self.nonlinearity, nn.SiLU) or self.dropout.p:
                return super().forward(input_tensor, temb, *args, **others)
            hidden = self.conv1(_norm_silu(self.norm1, input_tensor))
            if self.time_emb_proj is not None and temb is not None:
                temb = temb if self.skip_time_act else self.nonlinearity(temb)
                temb = self.time_emb_proj(temb)[:, :, None, None]
            if temb is not None:
                hidden = hidden + temb
            hidden = self.conv2(_norm_silu(self.norm2, hidden))
            if self.conv_shortcut is not None:
                input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
            out = input_tensor + hidden
            return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    return {GEGLU: QuickGeglu, ResnetBlock2D: QuickResnetBlock}


def _norm_silu(norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
    if x_BCHW.dtype is torch.float32 and not torch.is_autocast_enabled(x_BCHW.device.type):
        return group_norm_silu(x_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(norm(x_BCHW))  # in bfloat16 the norm takes longer than what it would save


@cache
def _quick_attention() -> type:
    """diffusers' attention block, which asks Python for the signature of its processor in every call: a twentieth of a
    small U-Net's time."""
    from diffusers.models.attention_processor import Attention

    class QuickAttention(Attention):
        def forward(
            self,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **others: Any,
        ) -> Any:
            if isinstance(self.processor, AttentionForm):  # it has been given no other since
                return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **others)

    return QuickAttention


def quicken(unet: Any) -> Any:
    """The same U-Net, computing the same: attention by `AttentionForm`, products by `common.kernels.products`, channels
    last where a GPU is.

    On CPUs diffusers' group norms are three times slower channels last, which costs more than the convolutions gain.
    Attention that is more than a sequence of tokens (diffusers' own norms, residuals or adapters in it) stays as it is.
    """
    plain = "AttnProcessor2_0"
    processors = unet.attn_processors
    for name, processor in processors.items():
        attn = unet.get_submodule(name.removesuffix(".processor"))
        own = attn.spatial_norm is not None or attn.group_norm is not None or attn.residual_connection
        if type(processor).__name__ == plain and not own:
            processors[name] = AttentionForm()
            attn.__class__ = _quick_attention()
    unet.set_attn_processor(processors)
    quicken_products(unet)
    if not torch.cuda.is_available():
        for module in unet.modules():
            module.__class__ = _quick_parts().get(type(module), module.__class__)
    layout = torch.channels_last if torch.cuda.is_available() else torch.contiguous_format
    return unet.to(memory_format=layout)


def as_diffusers_has_it(unet: Any) -> Any:
    """The same U-Net without anything of `quicken` but its layout: what others would run."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    original = {quick: plain for plain, quick in _quick_parts().items()} | {_quick_attention(): Attention}
    for module in unet.modules():
        module.__class__ = original.get(type(module), module.__class__)
    unet.set_attn_processor(AttnProcessor2_0())
    return plain_products(unet)


@cache
def _plain_layout() -> type:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class PlainLayout(AttnProcessor2_0):
        """Attention whose output goes on in the layout that is fastest for what follows.

        Attention over pixels hands its picture on channels last, and every convolution after it keeps that. Group norms
        in bfloat16 go back through such a picture ten times slower on CPUs; all else is level or faster with it.
        """

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            temb: Tensor | None = None,
        ) -> Tensor:
            out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            slow = out.device.type == "cpu" and out.dtype is torch.bfloat16 and out.requires_grad
            return out.contiguous() if slow else out

    return PlainLayout


def quicken_decoder(vae: Any) -> Any:
    """The same autoencoder, computing the same, with `PlainLayout` where its decoder has diffusers' plain attention."""
    for module in vae.decoder.modules():
        if type(getattr(module, "processor", None)).__name__ == "AttnProcessor2_0":
            module.set_processor(_plain_layout()())
    return vae


class RecordedUNet(nn.Module):
    """A U-Net for passes without gradients, called as diffusers' are; often repeated calls are recorded (`Recorder`).

    Args:
        constant: the weights never change.
    """

    def __init__(self, unet: Any, constant: bool = False) -> None:
        super().__init__()
        self.unet, self.recorder = unet, Recorder(unet, _output, constant)

    @property
    def config(self) -> Any:
        return self.unet.config

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        condition = () if timestep_cond is None else (timestep_cond,)
        return (self.recorder(sample, timestep, encoder_hidden_states, *condition),)


def _output(unet: Any, x_BCHW: Tensor, time: Tensor, states_BLD: Tensor, condition_BE: Tensor | None = None) -> Tensor:
    more = {} if condition_BE is None else {"timestep_cond": condition_BE}
    return unet(x_BCHW, time, states_BLD, **more, return_dict=False)[0]
