"""Fused GroupNorm+SiLU: the Triton kernels against float64 torch, interpreted on CPU and native on a GPU.

Also a program, see kernel_process.py: `python -m tests.common.test_kernel_group_norm_silu interpret|compile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import group_norm_silu as kernel
from common.kernels.group_norm_silu import group_norm_silu
from tests.common.kernel_process import (
    answer,
    assert_obeys_torch_library,
    compile_difference,
    compile_for_hopper,
    compiled_for_hopper,
    on_gpu,
    opcheck,
)


class Case(NamedTuple):
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    tile: int | None = None  # cut groups into tiles this small, so that a small tensor takes the multi-program path
    offset: float = 0.0  # mean of the input in units of its spread


CASES = {
    "one_tile": Case((2, 12, 5, 7), 4),
    "one_tile_channels_last": Case((2, 12, 5, 7), 4, channels_last=True),
    "odd_size_in_many_tiles": Case((2, 12, 9, 7), 3, tile=16),
    "odd_size_in_many_tiles_channels_last": Case((2, 12, 9, 7), 3, channels_last=True, tile=16),
    "several_splits_of_several_tiles": Case((1, 4, 37, 29), 2, tile=16),
    "one_channel_per_group": Case((2, 3, 6, 6), 3),
    "one_group": Case((1, 5, 4, 3), 1, tile=32),
    "no_spatial_dimension": Case((3, 8), 2),
    "sequence": Case((2, 6, 11), 3),
    "volume": Case((1, 4, 3, 3, 5), 2, channels_last=True),
    "mean_far_above_spread": Case((1, 4, 8, 8), 2, tile=32, offset=300.0),
    "float16": Case((2, 12, 5, 7), 4, torch.float16),
    "float16_many_tiles": Case((2, 12, 9, 7), 3, torch.float16, tile=64),
    "bfloat16": Case((2, 12, 5, 7), 4, torch.bfloat16),
    "bfloat16_many_tiles": Case((2, 12, 9, 7), 3, torch.bfloat16, tile=64),
}
# Largest error beside the largest value; the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator) + case.offset
    dy = torch.randn(case.shape, generator=generator)
    weight = 1 + 0.5 * torch.randn(case.shape[1], generator=generator)
    bias = torch.randn(case.shape[1], generator=generator)
    if case.channels_last:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x = x.contiguous(memory_format=layout)
    return x.to(device, case.dtype), weight.to(device), bias.to(device), dy.to(device, case.dtype)


def errors(case: Case, device: str) -> dict[str, Any]:
    """Relative errors of output and gradients against float64, and whether the layout was kept."""
    limits = kernel.WHOLE_GROUP_LIMIT, kernel.TILE
    if case.tile is not None:
        kernel.WHOLE_GROUP_LIMIT, kernel.TILE = case.tile, case.tile
    try:
        *inputs, dy = _inputs(case, device)
        x, weight, bias = (t.requires_grad_() for t in inputs)
        y = group_norm_silu(x, case.groups, weight, bias)
        ours = (y, *torch.autograd.grad(y, (x, weight, bias), dy))
    finally:
        kernel.WHOLE_GROUP_LIMIT, kernel.TILE = limits
    x, weight, bias = (t.detach().double().requires_grad_() for t in inputs)
    exact = F.silu(F.group_norm(x, case.groups, weight, bias))
    expected = (exact, *torch.autograd.grad(exact, (x, weight, bias), dy.double()))
    found = {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(("y", "dx", "dweight", "dbias"), ours, expected, strict=True)
    }
    return {
        "errors": found,
        "strides_kept": y.stride() == inputs[0].stride() == ours[1].stride(),
        "dtypes": [str(t.dtype) for t in ours],
        "used_kernels": "GroupNormSilu" in type(y.grad_fn).__name__ or "group_norm_silu" in y.grad_fn.name(),
    }


def _opcheck(device: str) -> dict[str, str]:
    calls = {}
    for name in ("one_tile_channels_last", "bfloat16"):
        x, weight, bias, _ = _inputs(CASES[name], device)
        args = (x.requires_grad_(), CASES[name].groups, weight.requires_grad_(), bias.requires_grad_(), 1e-5)
        calls[name] = kernel._op, args
    return opcheck(calls)


def _compiles_without_graph_break(device: str) -> float:
    case = CASES["one_tile"]
    x, weight, bias, _ = _inputs(case, device)

    def double(x: Tensor) -> Tensor:
        return 2 * group_norm_silu(x, case.groups, weight, bias)

    return compile_difference(double, x)


def _interpret() -> dict[str, Any]:
    """Everything the interpreter can tell; runs with TRITON_INTERPRET=1."""
    strided = torch.randn(2, 6, 4, 8)[..., ::2]
    weight, bias = torch.randn(6), torch.randn(6)
    return {
        "cases": {name: errors(case, "cpu") for name, case in CASES.items()},
        "opcheck": _opcheck("cpu"),
        "compile_difference": _compiles_without_graph_break("cpu"),
        "strided_error": (group_norm_silu(strided, 3, weight, bias) - F.silu(F.group_norm(strided, 3, weight, bias)))
        .abs()
        .max()
        .item(),
    }


def _compile_for_hopper() -> dict[str, dict[str, Any]]:
    """Ahead-of-time compilation of every kernel for sm_90, as the launches specialise it; needs no GPU."""
    import triton

    whole = kernel.geometry(128, 128, False)  # the largest group that is one tile
    vae = kernel.geometry(4, 512 * 512, False)
    last = kernel.geometry(10, 64 * 64, True)
    assert whole.whole and not vae.whole and not last.whole
    builds = {
        "_forward_whole": (kernel._forward_whole, whole, False),
        "_backward_whole": (kernel._backward_whole, whole, False),
        "_forward_sums": (kernel._forward_sums, vae, False),
        "_forward_split": (kernel._forward_split, vae, False),
        "_backward_sums": (kernel._backward_sums, last, True),
        "_backward_split": (kernel._backward_split, last, True),
    }
    compiled = {}
    for name, (function, geo, channels_last) in builds.items():
        parts = triton.next_power_of_2(geo.c_tiles * geo.splits)
        constants = {
            "BLOCK_C": geo.block_c,
            "BLOCK_HW": geo.block_hw,
            "PARTS": parts,
            "GROUP_C": 16,
            "SPLITS": triton.next_power_of_2(geo.splits),
            "stride_c" if channels_last else "stride_hw": 1,
        }
        constants = {key: value for key, value in constants.items() if key in function.arg_names}
        # What a launch at such a shape promises: pointers and strides that are multiples of 16.
        aligned = [
            key for key in function.arg_names if key.endswith("_ptr") or key in ("positions", "stride_c", "stride_hw")
        ]
        built = compile_for_hopper(function, _aot_type, constants, {"num_warps": geo.warps}, aligned)
        compiled[name] = {
            "channels_last": channels_last,
            "shared": built.metadata.shared,
            "cubin_bytes": len(built.asm["cubin"]),
            "wide_loads": "ld.global.v4.b32" in built.asm["ptx"],
        }
    return compiled


def _aot_type(argument: str) -> str:
    if argument in ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"):
        return "*bf16"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "fp32" if argument == "eps" else "i32"


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_match_float64_forward_and_backward(interpreted: dict[str, Any], name: str) -> None:
    _assert_matches(interpreted["cases"][name], CASES[name])


def _assert_matches(found: dict[str, Any], case: Case) -> None:
    assert found["used_kernels"], "the plain torch path ran instead of the kernels"
    # float32 itself loses `offset` times its precision when the mean is subtracted
    tolerance = TOLERANCE[case.dtype] * max(1.0, case.offset / 10)
    for tensor, error in found["errors"].items():
        assert error < tolerance, f"{tensor}: relative error {error:.1e} >= {tolerance:.1e}"
    assert found["strides_kept"]
    assert found["dtypes"] == [str(case.dtype), str(case.dtype), "torch.float32", "torch.float32"]


def test_the_op_obeys_the_rules_of_torch_library(interpreted: dict[str, Any]) -> None:
    assert_obeys_torch_library(interpreted["opcheck"])


def test_torch_compile_sees_one_graph(interpreted: dict[str, Any]) -> None:
    assert interpreted["compile_difference"] < 1e-6


def test_strided_input_is_read_correctly(interpreted: dict[str, Any]) -> None:
    assert interpreted["strided_error"] < 1e-5


def test_every_kernel_compiles_for_hopper_within_a_blocks_shared_memory() -> None:
    for name, found in compiled_for_hopper(__name__, 6).items():
        assert found["wide_loads"] or found["channels_last"], f"{name} does not read 16 bytes a thread from NCHW"


def test_on_cpu_the_public_function_is_the_plain_torch_expression() -> None:
    x, weight, bias, _ = _inputs(Case((2, 8, 3, 5), 4, torch.float32), "cpu")
    y = group_norm_silu(x.requires_grad_(), 4, weight, bias, eps=1e-3)
    assert torch.equal(y, F.silu(F.group_norm(x, 4, weight, bias, 1e-3)))
    with torch.no_grad():
        assert torch.equal(y, group_norm_silu(x, 4, weight, bias, eps=1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["nothing", "x", "weights"])
def test_on_cpu_training_keeps_the_input_alone_and_has_the_same_gradients(dtype: torch.dtype, frozen: str) -> None:
    x, weight, bias, dy = _inputs(Case((2, 8, 3, 5), 4, dtype), "cpu")
    given = [x, weight.to(dtype), bias.to(dtype)]
    trained = {"nothing": given, "x": given[1:], "weights": given[:1]}[frozen]
    for leaf in trained:
        leaf.requires_grad_()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = group_norm_silu(given[0], 4, given[1], given[2])
    assert kept == [t.shape for t in given]
    wide = [t.float() for t in given]
    plain = F.silu(F.group_norm(wide[0], 4, wide[1], wide[2])).to(dtype)
    for found, wanted in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(plain, trained, dy), strict=True):
        assert torch.equal(found, wanted)


def test_on_cpu_it_can_be_differentiated_twice() -> None:
    x, weight, bias, _ = _inputs(Case((2, 4, 3), 2, torch.float32), "cpu")
    found = []
    for call in (group_norm_silu, lambda *a: F.silu(F.group_norm(*a))):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(call(leaf, 2, weight, bias, 1e-5).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


def test_on_cpu_bfloat16_is_the_rounded_float32_result() -> None:
    x, weight, bias, _ = _inputs(Case((2, 8, 3, 5), 4, torch.bfloat16), "cpu")
    y = group_norm_silu(x, 4, weight.to(x.dtype), bias.to(x.dtype), eps=1e-3)
    exact = group_norm_silu(x.float(), 4, weight.to(x.dtype).float(), bias.to(x.dtype).float(), eps=1e-3)
    assert y.dtype == torch.bfloat16 and torch.equal(y, exact.to(torch.bfloat16))


def test_on_cpu_second_derivatives_exist() -> None:
    x, weight, bias, _ = _inputs(Case((1, 4, 3, 3), 2), "cpu")
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *t: group_norm_silu(t[0], 2, t[1], t[2]), (x, weight, bias))


@pytest.mark.parametrize("shape", [(2, 6, 3, 2), (3, 4), (1, 4, 5)])
def test_closed_form_gradient_passes_gradcheck_in_float64(shape: tuple[int, ...]) -> None:
    x, weight, bias, _ = _inputs(Case(shape, 2), "cpu")
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: kernel._op(t[0], 2, t[1], t[2], 1e-5)[0], (x, weight, bias))


def test_cpu_autocast_keeps_the_input_dtype() -> None:
    x, weight, bias, _ = _inputs(Case((2, 8, 3, 5), 4, torch.bfloat16), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert group_norm_silu(x, 4, weight, bias).dtype == torch.bfloat16


def test_geometry_covers_every_element_once() -> None:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    for channels, positions in [(4, 512 * 512), (10, 4096), (40, 64), (60, 1024), (7, 4099), (1, 2**20), (4096, 9)]:
        for channels_last in (False, True):
            geo = kernel.geometry(channels, positions, channels_last)
            assert (geo.c_tiles - 1) * geo.block_c < channels <= geo.c_tiles * geo.block_c
            step = geo.tiles_per_split * geo.block_hw
            assert (geo.splits - 1) * step < positions <= geo.splits * step
            assert geo.block_c * geo.block_hw <= (kernel.WHOLE_GROUP_LIMIT if geo.whole else kernel.TILE)


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_native_kernels_match_float64_forward_and_backward(name: str) -> None:
    _assert_matches(errors(CASES[name], "cuda"), CASES[name])


@on_gpu
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (2, 1280, 8, 8), (1, 128, 512, 512), (2, 1920, 16, 16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_native_kernels_match_float64_at_stable_diffusions_shapes(shape: tuple[int, ...], channels_last: bool) -> None:
    case = Case(shape, 32, torch.bfloat16, channels_last)
    _assert_matches(errors(case, "cuda"), case)


@on_gpu
def test_native_op_obeys_the_rules_of_torch_library() -> None:
    assert_obeys_torch_library(_opcheck("cuda"))


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile_for_hopper})
