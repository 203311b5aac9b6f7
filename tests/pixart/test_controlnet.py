"""ControlNet-Transformer beyond the recorded case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pixart.controlnet import ControlPixArt, load_controlnet
from pixart.model import PixArt
from tests.pixart.test_model import TINY, batch, filled

DEEP = replace(TINY, depth=4)


def base() -> PixArt:
    net = filled(PixArt(DEEP))
    return net


@pytest.mark.parametrize("full", [False, True])
def test_a_fresh_branch_changes_nothing_and_only_it_is_trained(full: bool) -> None:
    net = ControlPixArt(base(), copied_blocks=2, full=full)
    x, t, caption, mask = batch(DEEP)
    out = net(x, t, caption, mask, control_BCHW=torch.randn_like(x))
    torch.testing.assert_close(out, base()(x, t, caption, mask))
    out.square().mean().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} <= {
        f"controlnet.{name}" for name, _ in net.controlnet.named_parameters()
    }
    # The zero Linears behind the copies move first.
    for branch in net.branches():
        gradient = branch.after_proj.weight.grad
        assert gradient is not None and gradient.any()
    assert [p for p in net.parameters() if p.requires_grad] == list(net.controlnet.parameters())


@pytest.mark.parametrize("full", [False, True])
def test_control_steers_once_the_branch_is_trained(full: bool) -> None:
    net = ControlPixArt(base(), copied_blocks=2, full=full)
    filled(net.controlnet, seed=7)
    x, t, caption, mask = batch(DEEP)
    with torch.no_grad():
        plain = net(x, t, caption, mask)
        one, other = (net(x, t, caption, mask, control_BCHW=c) for c in (torch.randn_like(x), torch.randn_like(x)))
    assert (one - plain).abs().max() > 1e-3 and (one - other).abs().max() > 1e-3


def test_the_full_form_copies_every_block() -> None:
    assert len(ControlPixArt(base(), full=True).controlnet) == DEEP.depth
    with pytest.raises(ValueError, match=r"1\.\.3"):
        ControlPixArt(base(), copied_blocks=4)


@pytest.mark.parametrize("full", [False, True])
def test_files_load_with_and_without_their_base(tmp_path: Path, full: bool) -> None:
    net = ControlPixArt(base(), copied_blocks=2, full=full)
    filled(net.controlnet, seed=7)
    x, t, caption, mask = batch(DEEP)
    control = torch.randn_like(x)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "whole.pth")
    branch = {key: value for key, value in net.state_dict().items() if key.startswith("controlnet.")}
    torch.save({"state_dict": branch}, tmp_path / "branch.pth")
    with torch.no_grad():
        expected = net(x, t, caption, mask, control_BCHW=control)
        for loaded in (
            load_controlnet(tmp_path / "whole.pth", heads=2),
            load_controlnet(tmp_path / "branch.pth", base()),
        ):
            assert torch.equal(loaded(x, t, caption, mask, control_BCHW=control), expected)
    with pytest.raises(UserError, match="control branch alone"):
        load_controlnet(tmp_path / "branch.pth")
    with pytest.raises(UserError, match="do not fit a network of depth 1"):
        load_controlnet(tmp_path / "branch.pth", PixArt(replace(TINY, depth=1)))
    torch.save({"state_dict": base().state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="holds no control branch"):
        load_controlnet(tmp_path / "plain.pth")


def test_control_of_another_size_is_refused() -> None:
    x, t, caption, mask = batch(DEEP)
    with pytest.raises(ValueError, match="must have the shape"):
        ControlPixArt(base(), 2)(x, t, caption, mask, control_BCHW=x[..., :4])
