"""GEGLU keeps its input alone in training on CPUs, with the gradients of the plain expression."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.geglu import geglu


def plain(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (5, 8), (2, 3, 10)])
def test_output_and_gradient_are_those_of_the_plain_expression(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        found = geglu(x)
    assert kept == [x.data_ptr()]
    wanted, dout = plain(x), torch.randn_like(found)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found, x, dout)[0], torch.autograd.grad(wanted, x, dout)[0])


def test_layouts_and_second_derivatives() -> None:
    x = torch.randn(4, 3, 6).transpose(0, 1).requires_grad_()
    dout = torch.randn(3, 3, 4).permute(2, 0, 1).transpose(0, 1)
    assert torch.equal(*(torch.autograd.grad(call(x), x, dout)[0] for call in (geglu, plain)))
    second = []
    for call in (geglu, plain):
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*second)


def test_without_gradients_nothing_is_kept() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with torch.no_grad():
        assert geglu(x).grad_fn is None
    assert geglu(x.detach()).grad_fn is None
