"""Depthwise convolutions and joints of cells: equal to torch's, forward and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels import depthwise as kernel
from common.kernels.cells import concatenate, factorized_reduce
from common.kernels.depthwise import DepthwiseConv2d, depthwise
from tests.golden_case import assert_close

# samples, channels, height, width, kernel, stride, padding, dilation
CASES = [
    (2, 8, 16, 16, 3, 1, 1, 1),
    (2, 8, 16, 16, 5, 1, 2, 1),
    (2, 8, 16, 16, 7, 1, 3, 1),
    (2, 8, 16, 16, 9, 1, 4, 1),
    (2, 8, 16, 16, 3, 1, 2, 2),
    (2, 8, 16, 16, 5, 1, 4, 2),
    (2, 8, 16, 16, 5, 1, 6, 3),
    (2, 6, 15, 13, 5, 1, 4, 2),  # odd sides
    (3, 5, 3, 4, 5, 1, 2, 1),  # few pixels
    (3, 5, 1, 1, 3, 1, 2, 2),
    (130, 9, 9, 9, 5, 1, 2, 1),  # many groups
    (2, 8, 16, 16, 3, 2, 1, 1),
    (2, 8, 16, 16, 5, 2, 2, 1),
    (2, 8, 16, 16, 3, 2, 2, 2),
    (2, 8, 15, 13, 5, 2, 4, 2),
    (2, 8, 16, 16, 3, 2, 1, 2),  # sees the odd pixels
    (2, 8, 16, 16, 3, 1, 0, 1),  # sides shrink
]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    return made.to(memory_format=layout).requires_grad_()


def gradients(y_BCHW: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y_BCHW.numel(), dtype=y_BCHW.dtype).view_as(y_BCHW)
    return torch.autograd.grad((y_BCHW * weights).sum(), of)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_depthwise_is_torchs(case: tuple[int, ...]) -> None:
    B, C, H, W, side, stride, padding, dilation = case
    x, w = draw(B, C, H, W), draw(C, 1, side, side)
    expected = F.conv2d(x, w, None, stride, padding, dilation, C)
    found = depthwise(x, w, stride, padding, dilation)
    assert_close(found, expected, "maps", 1e-12)
    for name, ours, torchs in zip("xw", gradients(found, x, w), gradients(expected, x, w), strict=True):
        assert_close(ours, torchs, f"gradient of {name}", 1e-11)


@pytest.mark.parametrize("case", CASES[:9], ids=str)
def test_depthwise_in_float32_rounds_only(case: tuple[int, ...]) -> None:
    B, C, H, W, side, stride, padding, dilation = case
    x, w = draw(B, C, H, W, dtype=torch.float32), draw(C, 1, side, side, dtype=torch.float32)
    found = gradients(depthwise(x, w, stride, padding, dilation), x, w)
    expected = gradients(F.conv2d(x, w, None, stride, padding, dilation, C), x, w)
    for ours, torchs in zip(found, expected, strict=True):
        assert float((ours - torchs).norm()) <= 1e-5 * float(torchs.norm())


def test_gradients_of_gradients() -> None:
    x, w = draw(2, 3, 5, 5), draw(3, 1, 5, 5)
    assert torch.autograd.gradgradcheck(lambda x, w: depthwise(x, w, 1, 2), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: depthwise(x, w, 1, 4, 2), (x, w))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("nobody asked for it")

    x, w = draw(2, 8, 16, 16), draw(8, 1, 5, 5)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "kernel_gradient", fail)
        depthwise(x, w.detach(), 1, 2).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "input_gradient", fail)
        depthwise(x.detach(), w, 1, 2).sum().backward()


def test_other_inputs_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernel, "_SameSides")  # what takes our way fails
    x, w = draw(2, 8, 16, 16, dtype=torch.float32), draw(8, 1, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        depthwise(x, w, 1, 2)
    depthwise(x.contiguous(), w, 1, 2)
    depthwise(x.bfloat16(), w.bfloat16(), 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise(x, w, 1, 2).dtype == torch.bfloat16
    depthwise(x.to("meta"), w.to("meta"), 1, 2)
    with pytest.raises(NameError):
        depthwise(x, w, 1, 2)


def test_the_module_has_torchs_names_and_weights() -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv2d(8, 5, stride=2, padding=4, dilation=2).double()
    torch.manual_seed(0)
    torchs = nn.Conv2d(8, 8, 5, 2, 4, 2, groups=8, bias=False).double()
    assert_close(ours.weight, torchs.weight, "weights", 0.0)
    torchs.load_state_dict(ours.state_dict())
    x = draw(2, 8, 9, 12)
    assert_close(ours(x), torchs(x), "maps", 1e-12)


@pytest.mark.parametrize("sides", [(8, 8), (7, 5), (6, 9)], ids=str)
def test_half_the_sides(sides: tuple[int, int]) -> None:
    x, even, odd = draw(2, 6, *sides), draw(4, 6, 1, 1), draw(3, 6, 1, 1)
    shifted = F.pad(x, (0, sides[1] % 2, 0, sides[0] % 2))[:, :, 1:, 1:]
    expected = torch.cat([F.conv2d(x, even, stride=2), F.conv2d(shifted, odd, stride=2)], dim=1)
    found = factorized_reduce(x, even, odd)
    assert_close(found, expected, "maps", 1e-12)
    for ours, torchs in zip(gradients(found, x, even, odd), gradients(expected, x, even, odd), strict=True):
        assert_close(ours, torchs, "gradients", 1e-12)


def test_gradients_of_what_is_concatenated_are_maps_of_their_own() -> None:
    parts = [draw(2, width, 4, 4) for width in (3, 5, 2)]
    seen: list[bool] = []

    def see(gradient: Tensor) -> None:
        seen.append(gradient.is_contiguous(memory_format=torch.channels_last))

    copies = [part * 1 for part in parts]
    for part in copies:
        part.register_hook(see)
    found = concatenate(copies)
    assert_close(found, torch.cat(parts, dim=1), "maps", 0.0)
    for ours, torchs in zip(gradients(found, *parts), gradients(torch.cat(parts, dim=1), *parts), strict=True):
        assert_close(ours, torchs, "gradients", 0.0)
    assert seen == [True] * 3
