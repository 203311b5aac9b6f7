"""MoE dispatch, combine and grouped products: the Triton kernels against float64 torch, interpreted and native.

Also a program, see kernel_process.py: `python -m tests.common.test_moe_dispatch interpret|compile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from common.kernels import moe_dispatch as kernel
from common.kernels.moe_dispatch import combine_rows, grouped_linear, permute_rows
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
    tokens: int
    choices: int
    sizes: tuple[int, ...]  # kept routes of every expert; the rest of the routes is dropped
    width: int
    hidden: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    tile: tuple[int, int, int] = (16, 16, 16)


CASES = {
    "all_routes_kept": Case(16, 2, (9, 16, 7), 24, 40),
    "dropped_routes": Case(15, 2, (8, 11, 3), 32, 16),
    "experts_without_tokens": Case(10, 2, (0, 13, 0, 5, 0), 17, 21),
    "one_expert": Case(12, 1, (12,), 16, 33, bias=False),
    "three_choices": Case(9, 3, (5, 4, 6, 2), 20, 18),
    "nothing_kept": Case(4, 1, (0, 0), 16, 16),
    "float16": Case(16, 2, (9, 14, 7), 24, 40, torch.float16),
    "bfloat16": Case(16, 2, (9, 14, 7), 24, 40, torch.bfloat16),
}
# Largest error beside the largest value; the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Given(NamedTuple):
    x: Tensor
    weight_TK: Tensor
    route_N: Tensor
    row_TK: Tensor
    weight_GFD: Tensor
    bias_GF: Tensor | None
    starts_G1: Tensor
    dy: Tensor


def _given(case: Case, device: str) -> Given:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = sum(case.sizes)
    route_N = torch.randperm(case.tokens * case.choices, generator=generator)[:rows]
    row = torch.full((case.tokens * case.choices,), -1)
    row[route_N] = torch.arange(rows)
    starts = torch.tensor([0, *case.sizes]).cumsum(0)
    groups = len(case.sizes)
    return Given(
        normal(case.tokens, case.width).to(device, case.dtype),
        torch.rand((case.tokens, case.choices), generator=generator).to(device),
        route_N.to(device),
        row.view(case.tokens, case.choices).to(device),
        (normal(groups, case.hidden, case.width) / case.width**0.5).to(device, case.dtype),
        normal(groups, case.hidden).to(device) if case.bias else None,
        starts.to(device),
        normal(case.tokens, case.hidden).to(device, case.dtype),
    )


def _exact(given: Given, x: Tensor, weight_TK: Tensor, weight_GFD: Tensor, bias_GF: Tensor | None) -> Tensor:
    """The whole chain with a loop over routes, nothing shared with the code under test."""
    choices = weight_TK.shape[1]
    y = x.new_zeros((x.shape[0], weight_GFD.shape[1]))
    for n, route in enumerate(given.route_N.tolist()):
        group = int((given.starts_G1[1:] <= n).sum())
        out = weight_GFD[group] @ x[route // choices]
        if bias_GF is not None:
            out = out + bias_GF[group]
        token = torch.zeros(x.shape[0], 1, dtype=x.dtype, device=x.device)
        token[route // choices] = 1
        y = y + token * weight_TK.reshape(-1)[route] * out
    return y


def errors(case: Case, device: str) -> dict[str, Any]:
    """Relative errors of the chain permute, grouped product, combine and of all its gradients against float64."""
    limits = kernel.FLOAT_TILES, kernel.TILE_ROWS, kernel.TILE_COLUMNS, kernel.TILE_INNER, kernel.COPY_TILE
    kernel.FLOAT_TILES = case.tile
    kernel.TILE_ROWS, kernel.TILE_COLUMNS, kernel.TILE_INNER = case.tile
    kernel.COPY_TILE = 16
    given = _given(case, device)
    try:
        leaves = [given.x, given.weight_TK, given.weight_GFD, *([given.bias_GF] if given.bias_GF is not None else [])]
        ours = [leaf.detach().requires_grad_() for leaf in leaves]
        bias = ours[3] if case.bias else None
        rows = permute_rows(ours[0], given.route_N, given.row_TK)
        out = grouped_linear(rows, ours[2], bias, given.starts_G1)
        y = combine_rows(out, ours[1], given.route_N, given.row_TK)
        gradients = torch.autograd.grad(y, ours, given.dy)
    finally:
        (kernel.FLOAT_TILES, kernel.TILE_ROWS, kernel.TILE_COLUMNS, kernel.TILE_INNER, kernel.COPY_TILE) = limits
    theirs = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = _exact(given, theirs[0], theirs[1], theirs[2], theirs[3] if case.bias else None)
    if expected.requires_grad:
        exact_gradients = torch.autograd.grad(expected, theirs, given.dy.double())
    else:
        exact_gradients = tuple(torch.zeros_like(leaf) for leaf in theirs)
    labels = ("y", "dx", "dcombine", "dweight", "dbias")
    found = {
        label: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for label, a, b in zip(labels, (y, *gradients), (expected, *exact_gradients))
    }
    names = [t.grad_fn.name() for t in (rows, out, y) if t.grad_fn is not None]
    return {"errors": found, "dtypes": [str(y.dtype), *(str(g.dtype) for g in gradients)], "nodes": names}


def _opcheck(device: str) -> dict[str, str]:
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name in ("dropped_routes", "bfloat16"):
        given = _given(CASES[name], device)
        x, weight_TK, weight_GFD = (t.clone().requires_grad_() for t in (given.x, given.weight_TK, given.weight_GFD))
        rows = permute_rows(given.x, given.route_N, given.row_TK).clone().requires_grad_()
        calls[f"{name}.permute"] = kernel._permute_op, (x, given.route_N, given.row_TK)
        calls[f"{name}.combine"] = kernel._combine_op, (rows, weight_TK, given.route_N, given.row_TK)
        calls[f"{name}.linear"] = kernel._linear_op, (rows, weight_GFD, given.bias_GF, given.starts_G1)
    return opcheck(calls)


def _compiles_without_graph_break(device: str) -> float:
    given = _given(CASES["dropped_routes"], device)

    def chain(x: Tensor) -> Tensor:
        rows = permute_rows(x, given.route_N, given.row_TK)
        out = grouped_linear(rows, given.weight_GFD, given.bias_GF, given.starts_G1)
        return combine_rows(torch.tanh(out), given.weight_TK, given.route_N, given.row_TK)

    return compile_difference(chain, given.x)


def _interpret() -> dict[str, Any]:
    """Everything the interpreter can tell; runs with TRITON_INTERPRET=1."""
    return {
        "cases": {name: errors(case, "cpu") for name, case in CASES.items()},
        "opcheck": _opcheck("cpu"),
        "compile_difference": _compiles_without_graph_break("cpu"),
    }


def _compile_for_hopper() -> dict[str, dict[str, Any]]:
    """Ahead-of-time compilation of every kernel for sm_90 in bfloat16 and float32; needs no GPU."""
    compiled: dict[str, dict[str, Any]] = {}
    functions = (
        kernel._permute_kernel,
        kernel._gather_sum_kernel,
        kernel._combine_backward_kernel,
        kernel._grouped_linear_kernel,
        kernel._weight_gradient_kernel,
    )
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        cut = kernel.tiles(dtype)
        for function in functions:
            weight_gradient = function is kernel._weight_gradient_kernel
            constants: dict[str, Any] = {
                "BLOCK": kernel.COPY_TILE,
                "CHOICES": 2,
                "WEIGHTED": True,
                "HAS_BIAS": True,
                "GROUPS": 8,
                "TILE_N": cut.inner if weight_gradient else cut.rows,
                "TILE_F": cut.rows if weight_gradient else cut.columns,
                "TILE_D": cut.columns if weight_gradient else cut.inner,
                "PRECISION": "ieee",
                "UPCAST": False,
                "stride_wd": 1,
            }
            constants = {key: value for key, value in constants.items() if key in function.arg_names}
            types = {"route_ptr": "*i64", "row_ptr": "*i64", "starts_ptr": "*i64", "weight_ptr": pointer}
            types |= {name: "*fp32" for name in ("bias_ptr", "dbias_ptr", "dweight_ptr") if not weight_gradient}
            types |= {"dbias_ptr": "*fp32"}
            if function in (kernel._gather_sum_kernel, kernel._combine_backward_kernel):
                types["weight_ptr"] = "*fp32"
            aligned = [n for n in function.arg_names if n.endswith("_ptr") or n in ("width", "columns", "inner")]
            aligned += [n for n in ("stride_wg", "stride_wf") if n in function.arg_names]
            built = compile_for_hopper(
                function,
                lambda name, types=types, pointer=pointer: types.get(name, pointer if name.endswith("_ptr") else "i32"),
                constants,
                {"num_warps": cut.warps, "num_stages": cut.stages},
                aligned,
            )
            compiled[f"{function.__name__}.{pointer[1:]}"] = {
                "shared": built.metadata.shared,
                "cubin_bytes": len(built.asm["cubin"]),
                "tensor_cores": "wgmma" in built.asm["ptx"],
            }
    return compiled


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_match_float64_forward_and_backward(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted["cases"][name]
    assert all("less_compute" in node for node in found["nodes"]), "the plain torch path ran instead of the kernels"
    _assert_matches(found, CASES[name])


def _assert_matches(found: dict[str, Any], case: Case) -> None:
    for tensor, error in found["errors"].items():
        assert error < TOLERANCE[case.dtype], f"{tensor}: relative error {error:.1e}"
    expected = [case.dtype, case.dtype, torch.float32, case.dtype, *([torch.float32] if case.bias else [])]
    assert found["dtypes"] == [str(dtype) for dtype in expected]


def test_the_ops_obey_the_rules_of_torch_library(interpreted: dict[str, Any]) -> None:
    assert_obeys_torch_library(interpreted["opcheck"])


def test_torch_compile_sees_one_graph(interpreted: dict[str, Any]) -> None:
    assert interpreted["compile_difference"] < 1e-6


def test_every_kernel_compiles_for_hopper_within_a_blocks_shared_memory() -> None:
    compiled = compiled_for_hopper(__name__, 10)
    for name in ("_grouped_linear_kernel.bf16", "_weight_gradient_kernel.bf16"):
        assert compiled[name]["tensor_cores"], f"{name} does not use Hopper's tensor cores"


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_matches_float64_forward_and_backward(name: str) -> None:
    _assert_matches(errors(CASES[name], "cpu"), CASES[name])


def test_closed_form_gradients_pass_gradcheck_in_float64() -> None:
    given = _given(CASES["dropped_routes"], "cpu")
    x, weight_TK = given.x[:, :5].double().requires_grad_(), given.weight_TK.double().requires_grad_()
    rows = permute_rows(x, given.route_N, given.row_TK).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: permute_rows(t, given.route_N, given.row_TK), x)
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, w, given.route_N, given.row_TK), (rows, weight_TK))


def test_cpu_autocast_multiplies_in_the_autocast_dtype() -> None:
    given = _given(CASES["dropped_routes"], "cpu")
    rows = permute_rows(given.x, given.route_N, given.row_TK)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(rows, given.weight_GFD, given.bias_GF, given.starts_G1).dtype == torch.bfloat16


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_native_kernels_match_float64_forward_and_backward(name: str) -> None:
    _assert_matches(errors(CASES[name], "cuda"), CASES[name])


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_match_float64_with_whole_tiles(dtype: torch.dtype) -> None:
    case = Case(300, 2, (150, 0, 257, 193), 256, 384, dtype, tile=(64, 64, 32))
    _assert_matches(errors(case, "cuda"), case)


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile_for_hopper})
