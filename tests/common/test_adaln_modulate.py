"""Fused adaLN and gated residual: the Triton kernels against float64 torch, interpreted on CPU and native on a GPU.

Also a program, see kernel_process.py: `python -m tests.common.test_adaln_modulate interpret|compile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import adaln_modulate as kernel
from common.kernels.adaln_modulate import adaln_modulate, gated_residual
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
    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    branch_dtype: torch.dtype | None = None  # of y, shift, scale and gate; None: as x
    slices: bool = False  # shift, scale and gate are slices of one tensor, as a network makes them
    programs: int | None = None  # so few programs that each takes several tokens
    offset: float = 0.0  # mean of the input in units of its spread


CASES = {
    "power_of_two": Case((2, 6, 64)),
    "odd_width": Case((3, 5, 37), slices=True),
    "one_token": Case((4, 1, 24)),
    "several_tokens_a_program": Case((2, 11, 48), programs=4, slices=True),
    "last_program_has_fewer_tokens": Case((1, 10, 33), programs=3),
    "mean_far_above_spread": Case((2, 3, 96), offset=300.0),
    "float16": Case((2, 7, 40), torch.float16),
    "bfloat16": Case((2, 7, 40), torch.bfloat16, programs=3),
    "float32_residual_of_bfloat16_branches": Case((2, 7, 40), torch.float32, torch.bfloat16, slices=True),
}
# Largest error beside the largest value; the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, _, width = case.shape
    other = case.branch_dtype or case.dtype
    x = torch.randn(case.shape, generator=generator) + case.offset
    y = torch.randn(case.shape, generator=generator)
    dout = torch.randn(case.shape, generator=generator)
    rows = torch.randn(batch, 3, width, generator=generator).to(device, other)
    parts = rows.unbind(1) if case.slices else [row.contiguous() for row in rows.unbind(1)]
    found = {"x": x.to(device, case.dtype), "y": y.to(device, other), "dout": dout.to(device, case.dtype)}
    return found | dict(zip(("shift", "scale", "gate"), parts))


def _exact_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _exact_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


FUNCTIONS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "adaln_modulate": (adaln_modulate, _exact_modulate, ("x", "shift", "scale")),
    "gated_residual": (gated_residual, _exact_gate, ("x", "y", "gate")),
}


def errors(case: Case, device: str) -> dict[str, Any]:
    """Relative errors of outputs and gradients of both functions against float64."""
    programs = kernel.BACKWARD_PROGRAMS
    kernel.BACKWARD_PROGRAMS = case.programs or programs
    given = _inputs(case, device)
    found: dict[str, Any] = {"errors": {}, "dtypes": {}, "used_kernels": True}
    try:
        for name, (function, exact, arguments) in FUNCTIONS.items():
            ours = [given[a].detach().requires_grad_() for a in arguments]
            out = function(*ours)
            gradients = torch.autograd.grad(out, ours, given["dout"].to(out.dtype))
            theirs = [given[a].detach().double().requires_grad_() for a in arguments]
            expected = exact(*theirs)
            exact_gradients = torch.autograd.grad(expected, theirs, given["dout"].double())
            labels = ("out", *(f"d{a}" for a in arguments))
            for label, a, b in zip(labels, (out, *gradients), (expected, *exact_gradients), strict=True):
                found["errors"][f"{name}.{label}"] = ((a.double() - b).abs().max() / b.abs().max()).item()
                found["dtypes"][f"{name}.{label}"] = str(a.dtype)
            found["used_kernels"] &= name in out.grad_fn.name()
    finally:
        kernel.BACKWARD_PROGRAMS = programs
    return found


def _opcheck(device: str) -> dict[str, str]:
    calls = {}
    for name in ("odd_width", "float32_residual_of_bfloat16_branches"):
        given = {key: value.detach().requires_grad_() for key, value in _inputs(CASES[name], device).items()}
        modulated = given["x"], given["shift"], given["scale"], 1e-6, given["y"].dtype
        calls[f"{name}.modulate"] = kernel._modulate_op, modulated
        calls[f"{name}.gate"] = kernel._gate_op, (given["x"], given["y"], given["gate"])
    return opcheck(calls)


def _compiles_without_graph_break(device: str) -> float:
    given = _inputs(CASES["odd_width"], device)

    def block(x: Tensor) -> Tensor:
        h = adaln_modulate(x, given["shift"], given["scale"])
        return gated_residual(x, torch.tanh(h), given["gate"])

    return compile_difference(block, given["x"])


def _interpret() -> dict[str, Any]:
    """Everything the interpreter can tell; runs with TRITON_INTERPRET=1."""
    given = _inputs(CASES["power_of_two"], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        autocast = adaln_modulate(given["x"], given["shift"], given["scale"])
        residual = gated_residual(given["x"], given["y"].bfloat16(), given["gate"])
    strided = torch.randn(2, 8, 6).transpose(1, 2)
    return {
        "cases": {name: errors(case, "cpu") for name, case in CASES.items()},
        "opcheck": _opcheck("cpu"),
        "compile_difference": _compiles_without_graph_break("cpu"),
        "autocast_dtypes": [str(autocast.dtype), str(residual.dtype)],
        "strided_error": (
            adaln_modulate(strided, given["shift"][:, :8], given["scale"][:, :8])
            - _exact_modulate(strided, given["shift"][:, :8], given["scale"][:, :8])
        )
        .abs()
        .max()
        .item(),
    }


def _compile_for_hopper() -> dict[str, dict[str, int]]:
    """Ahead-of-time compilation of every kernel for sm_90 at the width of PixArt-XL; needs no GPU."""
    blocks = kernel._blocks(1152)
    compiled = {}
    for function in (
        kernel._modulate_kernel,
        kernel._modulate_backward_kernel,
        kernel._gate_kernel,
        kernel._gate_backward_kernel,
    ):
        constants = {"BLOCK": blocks["BLOCK"]}
        built = compile_for_hopper(function, _aot_type, constants, {"num_warps": blocks["num_warps"]})
        compiled[function.fn.__name__] = {"shared": built.metadata.shared, "cubin_bytes": len(built.asm["cubin"])}
    return compiled


def _aot_type(argument: str) -> str:
    if argument in ("y_ptr", "dy_ptr"):
        return "*bf16"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "fp32" if argument == "eps" else "i32"


def _assert_matches(found: dict[str, Any], case: Case) -> None:
    assert found["used_kernels"], "the plain torch path ran instead of the kernels"
    other = case.branch_dtype or case.dtype
    # float32 itself loses `offset` times its precision when the mean is subtracted
    for tensor, error in found["errors"].items():
        of_branch = tensor.rpartition(".")[2] in ("dy", "dshift", "dscale", "dgate")
        tolerance = TOLERANCE[other if of_branch else case.dtype] * max(1.0, case.offset / 10)
        assert error < tolerance, f"{tensor}: relative error {error:.1e} >= {tolerance:.1e}"
        assert found["dtypes"][tensor] == str(other if of_branch else case.dtype), tensor


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_match_float64_forward_and_backward(interpreted: dict[str, Any], name: str) -> None:
    _assert_matches(interpreted["cases"][name], CASES[name])


def test_the_ops_obey_the_rules_of_torch_library(interpreted: dict[str, Any]) -> None:
    assert_obeys_torch_library(interpreted["opcheck"])


def test_torch_compile_sees_one_graph(interpreted: dict[str, Any]) -> None:
    assert interpreted["compile_difference"] < 1e-6


def test_under_autocast_the_norm_feeds_linear_layers_and_the_residual_keeps_its_precision(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["autocast_dtypes"] == ["torch.bfloat16", "torch.float32"]


def test_strided_input_is_read_correctly(interpreted: dict[str, Any]) -> None:
    assert interpreted["strided_error"] < 1e-5


def test_every_kernel_compiles_for_hopper_within_a_blocks_shared_memory() -> None:
    compiled_for_hopper(__name__, 4)


def test_on_cpu_the_public_functions_are_the_plain_torch_expressions() -> None:
    given = _inputs(Case((2, 3, 5), slices=True), "cpu")
    for name, (function, exact, arguments) in FUNCTIONS.items():
        inputs = [given[a].double().requires_grad_() for a in arguments]
        torch.testing.assert_close(function(*inputs), exact(*inputs))
        assert name not in function(*inputs).grad_fn.name()
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 6)])
def test_closed_form_gradients_pass_gradcheck_in_float64(shape: tuple[int, int, int]) -> None:
    given = {k: v.double().requires_grad_() for k, v in _inputs(Case(shape), "cpu").items()}
    assert torch.autograd.gradcheck(
        lambda *t: kernel._modulate_op(*t, 1e-6, torch.float64)[0], (given["x"], given["shift"], given["scale"])
    )
    assert torch.autograd.gradcheck(kernel._gate_op, (given["x"], given["y"], given["gate"]))


def test_programs_of_the_backward_pass_cover_every_token_once() -> None:
    for batch, tokens in [(1, 1), (64, 256), (2, 4096), (178, 256), (1, 16384), (4096, 16)]:
        each = kernel.tokens_per_program(batch, tokens)
        splits = -(-tokens // each)
        assert (splits - 1) * each < tokens <= splits * each
        assert each <= kernel.MOST_TOKENS


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_native_kernels_match_float64_forward_and_backward(name: str) -> None:
    _assert_matches(errors(CASES[name], "cuda"), CASES[name])


@on_gpu
@pytest.mark.parametrize("shape", [(8, 256, 1152), (1, 4096, 1152), (64, 64, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_match_float64_at_pixarts_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype, torch.bfloat16, slices=True)
    _assert_matches(errors(case, "cuda"), case)


@on_gpu
def test_native_ops_obey_the_rules_of_torch_library() -> None:
    assert_obeys_torch_library(_opcheck("cuda"))


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile_for_hopper})
