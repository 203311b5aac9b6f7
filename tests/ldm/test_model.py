"""The second stage's networks: facts that the recorded cases do not cover."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.model import AttentionBlock, ConditionedUNet, ResBlock, timestep_embedding
from ldm.norm import group_count
from ldm.official import classifier_of, unet_of
from tests.ldm.networks import CROSS_UNET, UNET


def randomised(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def latents() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([0, 500]), torch.randn(2, 4, 12)


def test_timestep_features_are_cosines_then_sines() -> None:
    features = timestep_embedding(torch.tensor([0.0, 1.0]), 7)
    assert features[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert features[1, 0] == pytest.approx(0.5403023)
    assert features[1, 3] == pytest.approx(0.8414710)
    assert features[1, 4] == pytest.approx(torch.sin(torch.tensor(10000 ** (-1 / 3))).item())


def test_group_count_is_32_where_it_divides_the_width() -> None:
    assert [group_count(c) for c in (224, 320, 96, 48, 30, 16, 7, 34)] == [32, 32, 32, 24, 30, 16, 7, 17]


def test_fresh_network_predicts_zero_and_its_residual_branches_are_identities() -> None:
    x, t, context = latents()
    net = unet_of(CROSS_UNET)
    assert not net(x, t, context).any()
    block = ResBlock(32, 32, 128)
    h = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(h, torch.randn(2, 128)), h)
    assert torch.equal(AttentionBlock(32, 2)(h), h)


def test_head_width_follows_the_legacy_rule() -> None:
    # 64 channels in heads of 24: two heads; the authors' legacy rule widens them to 32.
    options = {**CROSS_UNET, "num_head_channels": 24}
    legacy, exact = unet_of(options), unet_of({**options, "legacy": False})
    assert legacy.state_dict()["middle_block.1.proj_in.weight"].shape[0] == 64
    assert exact.state_dict()["middle_block.1.proj_in.weight"].shape[0] == 48


def test_context_label_and_time_change_the_prediction() -> None:
    x, t, context = latents()
    net = randomised(unet_of({**CROSS_UNET, "num_classes": 3})).eval()
    y = torch.tensor([0, 1])
    base = net(x, t, context, y)
    assert not torch.allclose(base, net(x, t, context + 1, y))
    assert not torch.allclose(base, net(x, t, context, 2 - y))
    assert not torch.allclose(base, net(x, t + 100, context, y))
    # Attention has no order of its own: permuted context tokens give the same prediction.
    torch.testing.assert_close(base, net(x, t, context[:, [2, 0, 3, 1]], y))


def test_checkpointing_changes_neither_prediction_nor_gradients() -> None:
    x, t, context = latents()
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        net = randomised(unet_of({**CROSS_UNET, "use_checkpoint": use_checkpoint})).train()
        net(x, t, context).square().mean().backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_every_parameter_receives_a_gradient() -> None:
    x, t, context = latents()
    for options, extra in (
        (CROSS_UNET, context),
        ({**UNET, "resblock_updown": True, "use_scale_shift_norm": True}, None),
    ):
        net = randomised(unet_of(options))
        net(x, t, extra).square().mean().backward()
        silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []


def test_channels_last_and_bf16_autocast_give_the_same_prediction() -> None:
    x, t, context = latents()
    net = randomised(unet_of(CROSS_UNET)).eval()
    with torch.no_grad():
        expected = net(x, t, context)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, context)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(x, t, context)
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("key", "options", "channels"),
    [
        (None, UNET, 3),
        ("concat", {**UNET, "in_channels": 5}, 3),
        ("crossattn", CROSS_UNET, 3),
        ("adm", {**UNET, "num_classes": 4}, 3),
    ],
)
def test_conditions_reach_the_network_by_their_key(key: str | None, options: dict[str, Any], channels: int) -> None:
    x, t, context = latents()
    extra = torch.randn(2, 2, 8, 8)
    y = torch.tensor([0, 3])
    net = randomised(ConditionedUNet(unet_of(options), key)).eval()
    unet = net.diffusion_model
    expected = {
        None: lambda: unet(x, t),
        "concat": lambda: unet(torch.cat([x, extra], 1), t),
        "crossattn": lambda: unet(x, t, context),
        "adm": lambda: unet(x, t, y_B=y),
    }[key]()
    tokens = [y] if key == "adm" else [context[:, :1], context[:, 1:]]
    assert torch.equal(net(x, t, [extra], tokens), expected)
    if key is not None:
        with pytest.raises(ValueError, match="needs c_"):
            net(x, t)


def test_contradictory_options_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads or num_head_channels"):
        unet_of({**UNET, "num_head_channels": -1})
    with pytest.raises(ValueError, match="use_spatial_transformer"):
        unet_of({**UNET, "context_dim": 12})
    with pytest.raises(ValueError, match="class labels"):
        unet_of({**UNET, "num_classes": 3})(*latents()[:2])
    with pytest.raises(ValueError, match="conditioning_key"):
        ConditionedUNet(unet_of(UNET), "film")
    with pytest.raises(ValueError, match="pool"):
        classifier_of({**{**UNET, "out_channels": 5}, "image_size": 8, "pool": "max"})  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier_gives_a_gradient_on_the_latent_for_every_pooling(pool: Any) -> None:
    x, t, _ = latents()
    net = randomised(classifier_of({**{**UNET, "out_channels": 5}, "image_size": 8, "pool": pool}))
    x.requires_grad_()
    logits = net(x, t)
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), x)
    assert gradient.abs().sum(dim=(1, 2, 3)).min() > 0
