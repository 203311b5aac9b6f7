"""Fused vocabulary head: the op in plain torch and its Triton kernels against float64 torch, interpreted and native.

Also a program, see kernel_process.py: `python -m tests.common.test_vocab_head interpret|compile`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import vocab_head as kernel
from common.kernels.vocab_head import hashed_uniform, vocab_head
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
    rows: int
    vocabulary: int
    width: int
    noise: str = "seeds"  # or uniform, or none
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    disallow: bool = False
    programs: int = 8  # few: one program walks through several tiles
    chunk: int = 2000  # logits in memory at a time: several chunks


CASES = {
    "seeds": Case(21, 300, 24),
    "uniform": Case(21, 300, 24, "uniform"),
    "no_sample": Case(21, 300, 24, "none"),
    "one_row_one_tile": Case(1, 17, 8),
    "several_tiles_of_rows_and_width": Case(70, 513, 72, programs=4),
    "every_tile_its_own_program": Case(5, 700, 16, programs=1000),
    "cold_without_the_target": Case(33, 200, 16, "uniform", temperature=0.7, disallow=True),
    "hot_without_the_target": Case(33, 200, 16, temperature=2.0, disallow=True),
    "float16": Case(21, 300, 24, dtype=torch.float16),
    "bfloat16": Case(21, 300, 24, dtype=torch.bfloat16),
}
# Largest error beside the largest value. The reference has the same rounded inputs; gradients are rounded once more,
# and the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {
        "hidden_ME": torch.randn(case.rows, case.width, generator=generator).to(device, case.dtype),
        "table_VE": (0.5 * torch.randn(case.vocabulary, case.width, generator=generator)).to(device, case.dtype),
        "bias_V": torch.randn(case.vocabulary, generator=generator).to(device),
        "targets_M": torch.randint(case.vocabulary, (case.rows,), generator=generator).to(device),
    }
    if case.noise == "seeds":
        made["seeds_M"] = torch.randint(-(2**63), 2**63 - 1, (case.rows,), generator=generator).to(device)
    elif case.noise == "uniform":
        made["uniform_MV"] = torch.rand(case.rows, case.vocabulary, generator=generator).to(device)
    return made


def _noisy(case: Case, logits_MV: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The scores whose arg-max is the sample, written out as the definition says."""
    scores = logits_MV / case.temperature
    if case.disallow:
        scores = scores - 1000 * F.one_hot(inputs["targets_M"], case.vocabulary)
    if case.noise == "seeds":
        u = hashed_uniform(inputs["seeds_M"], case.vocabulary).double()
        return scores - torch.log(-torch.log(u))
    u = inputs["uniform_MV"].double()
    return scores - torch.log(-torch.log(u + 1e-9) + 1e-9)


def errors(case: Case, device: str) -> dict[str, Any]:
    """Relative errors of loss and gradients against float64, and whether the ids are the expected ones."""
    limits = kernel.PROGRAMS, kernel.CHUNK, kernel.GRADIENT_CHUNK
    kernel.PROGRAMS, kernel.CHUNK, kernel.GRADIENT_CHUNK = case.programs, case.chunk, case.chunk
    inputs = _inputs(case, device)
    leaves = [inputs[name].requires_grad_() for name in ("hidden_ME", "table_VE", "bias_V")]
    weights = torch.randn(case.rows, generator=torch.Generator().manual_seed(1)).to(device)
    try:
        found = vocab_head(**inputs, temperature=case.temperature, disallow_target=case.disallow)
        ours = (found.loss_M, *torch.autograd.grad(found.loss_M, leaves, weights))
    finally:
        kernel.PROGRAMS, kernel.CHUNK, kernel.GRADIENT_CHUNK = limits
    hidden, table, bias = exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = hidden @ table.t() + bias
    loss = F.cross_entropy(logits, inputs["targets_M"], reduction="none")
    expected = (loss, *torch.autograd.grad(loss, exact, weights.double()))
    relative = {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(("loss", "dhidden", "dtable", "dbias"), ours, expected, strict=True)
    }
    sampled = found.sampled_M
    return {
        "errors": relative,
        "argmax_same": bool((found.argmax_M == logits.argmax(1)).all()),
        "sample_same": None if sampled is None else bool((sampled == _noisy(case, logits, inputs).argmax(1)).all()),
        "dtypes": [str(t.dtype) for t in ours],
        "used_kernels": kernel._use_kernels(inputs["hidden_ME"], inputs["table_VE"]),
    }


def _opcheck(device: str) -> dict[str, str]:
    calls = {}
    for name in ("seeds", "uniform", "bfloat16"):
        inputs = _inputs(CASES[name], device)
        leaves = (inputs[key].requires_grad_() for key in ("hidden_ME", "table_VE", "bias_V"))
        noise = inputs.get("seeds_M"), inputs.get("uniform_MV")
        args = (*leaves, inputs["targets_M"], *noise, 1.0, False, torch.float32)
        calls[name] = kernel._op, args
    return opcheck(calls)


def _compiles_without_graph_break(device: str) -> float:
    inputs = _inputs(CASES["seeds"], device)

    def mean(inputs: dict[str, Any]) -> Tensor:
        return vocab_head(**inputs).loss_M.mean()

    return compile_difference(mean, inputs)


def _interpret() -> dict[str, Any]:
    """Everything the interpreter can tell; runs with TRITON_INTERPRET=1."""
    return {
        "cases": {name: errors(case, "cpu") for name, case in CASES.items()},
        "opcheck": _opcheck("cpu"),
        "compile_difference": _compiles_without_graph_break("cpu"),
    }


def _compile_for_hopper() -> dict[str, dict[str, Any]]:
    """Ahead-of-time compilation of both kernels for sm_90, as the launches specialise them; needs no GPU."""
    compiled = {}
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for width in (128, 768):
            for function in (kernel._forward_kernel, kernel._gradient_kernel):
                _, constants = kernel._constants(2432, width, dtype)
                options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
                if function is kernel._forward_kernel:
                    constants |= {"SAMPLE": 1, "DISALLOW": False}
                aligned = [name for name in function.arg_names if name.endswith("_ptr")]
                built = compile_for_hopper(function, partial(_aot_type, pointer), constants, options, aligned)
                compiled[f"{function.__name__} {pointer} {width}"] = {
                    "shared": built.metadata.shared,
                    "cubin_bytes": len(built.asm["cubin"]),
                    "tensor_cores": "wgmma" in built.asm["ptx"],
                    "half_precision": dtype is torch.bfloat16,
                }
    return compiled


def _aot_type(pointer: str, argument: str) -> str:
    if argument in ("hidden_ptr", "table_ptr", "dlogits_ptr"):
        return pointer
    if argument in ("target_ptr", "seed_ptr"):
        return "*i64"
    if argument == "ids_ptr":
        return "*i32"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "fp32" if argument == "inverse_temperature" else "i32"


def _assert_matches(found: dict[str, Any], case: Case, kernels: bool) -> None:
    assert found["used_kernels"] is kernels
    for tensor, error in found["errors"].items():
        assert error < TOLERANCE[case.dtype], f"{tensor}: relative error {error:.1e}"
    assert found["argmax_same"]
    assert found["sample_same"] is (None if case.noise == "none" else True)
    assert found["dtypes"] == ["torch.float32", str(case.dtype), str(case.dtype), "torch.float32"]


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_match_float64_forward_and_backward(interpreted: dict[str, Any], name: str) -> None:
    _assert_matches(interpreted["cases"][name], CASES[name], kernels=True)


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_matches_float64_forward_and_backward(name: str) -> None:
    _assert_matches(errors(CASES[name], "cpu"), CASES[name], kernels=False)


def test_the_op_obeys_the_rules_of_torch_library(interpreted: dict[str, Any]) -> None:
    assert_obeys_torch_library(interpreted["opcheck"])


def test_torch_compile_sees_one_graph(interpreted: dict[str, Any]) -> None:
    assert interpreted["compile_difference"] < 1e-6


def test_both_kernels_compile_for_hopper_within_a_blocks_shared_memory() -> None:
    for name, found in compiled_for_hopper(__name__, 8).items():
        assert found["tensor_cores"] is found["half_precision"], f"{name}: tensor cores are for half precision"


def test_the_first_largest_is_found_like_by_argmax() -> None:
    x = torch.randint(0, 5, (200, 7)).float()
    x[3], x[4] = float("-inf"), float("nan")
    found = kernel._first_largest(x)
    assert torch.equal(found[[i for i in range(200) if i != 4]], x.argmax(1)[[i for i in range(200) if i != 4]])
    assert 0 <= found[4] < 7


def test_gradient_passes_gradcheck_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK", 20)  # two rows a chunk
    inputs = _inputs(Case(5, 9, 4, "none"), "cpu")
    leaves = [inputs[name].double().requires_grad_() for name in ("hidden_ME", "table_VE", "bias_V")]

    def loss(hidden: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        return vocab_head(hidden, table, bias, inputs["targets_M"]).loss_M

    assert torch.autograd.gradcheck(loss, leaves)


def test_samples_follow_the_softmax_at_the_given_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    rows, temperature = 40_000, 0.7
    seeds = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(3))
    zeros = torch.zeros(rows, 1)
    sampled = vocab_head(zeros, torch.zeros(5, 1), logits, torch.zeros(rows).long(), seeds, None, temperature).sampled_M
    assert sampled is not None
    share = torch.bincount(sampled, minlength=5) / rows
    expected = torch.softmax(logits / temperature, 0)
    # Four standard deviations of a share.
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt()).all()


def test_hashed_numbers_are_uniform_and_unrelated_between_neighbouring_seeds_and_ids() -> None:
    u = hashed_uniform(torch.arange(1000) + (1 << 40), 1000).double()
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u.float(), 64, 0, 1)
    expected = u.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi-squared
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[256:], u[:-256])):
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs() < 0.005
    other = hashed_uniform(torch.tensor([1, 1 + (1 << 32)]), 1000).double()  # both halves of the seed count
    assert torch.corrcoef(other)[0, 1].abs() < 0.15


def test_a_rows_sample_depends_on_its_own_seed_alone() -> None:
    inputs = _inputs(Case(12, 50, 8), "cpu")
    whole = vocab_head(**inputs).sampled_M
    rows = ("hidden_ME", "targets_M", "seeds_M")
    half = vocab_head(**{name: value[5:] if name in rows else value for name, value in inputs.items()}).sampled_M
    assert whole is not None and half is not None and torch.equal(whole[5:], half)


def test_no_rows_give_zero_gradients() -> None:
    table = torch.randn(7, 3, requires_grad=True)
    found = vocab_head(torch.zeros(0, 3), table, torch.zeros(7), torch.zeros(0).long(), torch.zeros(0).long())
    found.loss_M.sum().backward()
    assert table.grad is not None and not table.grad.any() and found.loss_M.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uniform_MV": torch.rand(3, 7)}, "not both"),
        ({"temperature": 0.0}, "must be positive"),
        ({"bias_V": torch.zeros(6)}, r"bias \[6\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = _inputs(Case(3, 7, 2), "cpu")
    with pytest.raises(ValueError, match=message):
        vocab_head(**(inputs | change))


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_native_kernels_match_float64_forward_and_backward(name: str) -> None:
    _assert_matches(errors(CASES[name], "cuda"), CASES[name], kernels=True)


@on_gpu
@pytest.mark.parametrize("width", [128, 768])
def test_native_kernels_match_float64_at_the_published_sizes(width: int) -> None:
    case = Case(600, 30522, width, dtype=torch.bfloat16, programs=528, chunk=1 << 22)
    found = errors(case, "cuda")
    assert found["argmax_same"] and max(found["errors"].values()) < TOLERANCE[torch.bfloat16]


@on_gpu
def test_native_op_obeys_the_rules_of_torch_library() -> None:
    assert_obeys_torch_library(_opcheck("cuda"))


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile_for_hopper})
