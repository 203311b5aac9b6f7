"""A quickened U-Net computes what diffusers' own does."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from common.kernels.attention import fixed_form
from common.stable_diffusion import stable_diffusion_unet
from common.unets import AttentionForm, as_diffusers_has_it, quicken


def small_unet() -> torch.nn.Module:
    torch.manual_seed(0)
    unet = stable_diffusion_unet(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return unet.eval().requires_grad_(False)


def test_every_form_gives_the_stock_answer_with_and_without_masked_text() -> None:
    stock = small_unet()
    ours = quicken(copy.deepcopy(stock))
    x_BCHW, states_BLD, t_B = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.tensor([3, 900])
    mask_BL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for given in (None, mask_BL):
        want = stock(x_BCHW, t_B, states_BLD, encoder_attention_mask=given).sample
        got = ours(x_BCHW, t_B, states_BLD, encoder_attention_mask=given).sample
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        with fixed_form("written_out"):
            got = ours(x_BCHW, t_B, states_BLD, encoder_attention_mask=given).sample
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_attention_that_is_not_a_plain_sequence_stays_as_it_is() -> None:
    unet = small_unet()
    name = next(iter(unet.attn_processors))
    unet.get_submodule(name.removesuffix(".processor")).residual_connection = True
    kinds = {n: type(p) for n, p in quicken(unet).attn_processors.items()}
    assert kinds.pop(name) is AttnProcessor2_0 and set(kinds.values()) == {AttentionForm}


def test_a_quickened_network_is_copied_and_takes_another_processor() -> None:
    x_BCHW, states_BLD, t_B = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.tensor([3])
    stock = small_unet()
    ours = copy.deepcopy(quicken(copy.deepcopy(stock)))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    called: list[str] = []

    class Doubling(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, attn: Any, *args: Any, strength: float = 1.0, **options: Any) -> Any:
            called.append(f"{strength:g}")
            return strength * super().__call__(attn, *args, **options)

    for network in (stock, ours):
        network.set_attn_processor(Doubling())
    given = {"cross_attention_kwargs": {"strength": 2.0}}
    torch.testing.assert_close(
        ours(x_BCHW, t_B, states_BLD, **given).sample, stock(x_BCHW, t_B, states_BLD, **given).sample, rtol=0, atol=0
    )
    assert set(called) == {"2"} and len(called) % 2 == 0


def test_gradients_are_the_stock_ones_and_nothing_stays_of_it_afterwards() -> None:
    stock = small_unet().train().requires_grad_(True)
    ours = quicken(copy.deepcopy(stock))
    kinds = {type(module) for module in ours.modules()}
    x_BCHW, states_BLD, t_B = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.tensor([3, 900])
    for network in (stock, ours):
        network(x_BCHW, t_B, states_BLD).sample.square().sum().backward()
    for (name, wanted), found in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5, msg=name)
    back = as_diffusers_has_it(ours)
    assert kinds != {type(module) for module in back.modules()} == {type(module) for module in stock.modules()}
