"""One attention in four forms: equal to float64 in each of them, chosen once, within memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.choices import Choices
from common.errors import UserError
from common.kernels import attention as module
from common.kernels.attention import FORMS, Form, attention, fixed_form, use_choices

# Relative to 1: rounding of scores and weights to bfloat16's and float16's 8 and 11 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
MASKS = ("none", "keys", "numbers", "scores")


@pytest.fixture(autouse=True)
def _own_choices() -> Iterator[None]:
    use_choices(None)
    yield
    use_choices(None)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Forms are chosen as in use, by a measurement that says "fused"; returns what was measured."""
    calls: list[str] = []

    def measure(candidates: list[str], q: Tensor, *_: object) -> dict[str, float]:
        calls.append(f"{q.shape[2]}")
        return {form: 1.0 if form == "fused" else 2.0 for form in candidates}

    monkeypatch.delenv(module.ENVIRONMENT, raising=False)
    monkeypatch.setattr(module, "_measure", measure)
    monkeypatch.setattr(module, "_SMALL_SCORES", 0)
    with fixed_form("auto"):
        yield calls


def inputs(
    dtype: torch.dtype, queries: int = 12, keys: int = 20, mask: str = "none"
) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v [2, 3, N, 16] with gradients, laid out as projections of tokens are, and a mask."""
    sizes = (queries, keys, keys)
    leaves = [torch.randn(2, n, 3, 16).to(dtype).transpose(1, 2).detach().requires_grad_() for n in sizes]
    if mask == "none":
        return leaves, None
    if mask == "keys":
        return leaves, torch.arange(keys) < torch.tensor([keys, keys // 2])[:, None, None, None]
    if mask == "numbers":
        bias = torch.zeros(2, 1, 1, keys)
        bias[1, ..., keys // 2 :] = -torch.inf
        return leaves, bias
    return leaves, torch.randn(3, queries, keys, requires_grad=True)


def reference(leaves: list[Tensor], mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = (x.double() for x in leaves)
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[3]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [20, 32])
def test_every_form_is_float64s_forward_and_backward(
    dtype: torch.dtype, mask: str, form: Form, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART_SCORES", 300)  # a sample's heads have 720 or more
    leaves, given = inputs(dtype, keys=keys, mask=mask)
    wanted = [*leaves, given] if mask == "scores" and given is not None else leaves
    exact, out = reference(leaves, given, None), attention(*leaves, given, form=form)
    tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        free = attention(*leaves, given, form=form)
    torch.testing.assert_close(free.double(), exact, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(exact)
    gradients, exact_gradients = (torch.autograd.grad(y, wanted, dy.to(y.dtype)) for y in (out, exact))
    for gradient, expected in zip(gradients, exact_gradients):
        scaled = tolerance * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=tolerance, atol=scaled)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_takes_a_scale(form: Form) -> None:
    leaves, _ = inputs(torch.float32)
    out = attention(*leaves, scale=0.7, form=form)
    torch.testing.assert_close(out.double(), reference(leaves, None, 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [1, 2])
def test_every_form_follows_autocast(form: Form, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with keys and values that were stored in another precision before it began."""
    monkeypatch.setattr(module, "_PART_SCORES", samples * 12 * 20 * 3)
    (q, k, v), _ = inputs(torch.float32)
    exact = reference([q, k, v], None, None)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q.bfloat16(), k, v, form=form)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), k)
    (expected,) = torch.autograd.grad(exact.square().sum(), k)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=0.04, atol=0.04)
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_takes_weights_away_and_keeps_the_mean(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a backward pass drops the weights that the forward pass dropped: out is linear in v."""
    monkeypatch.setattr(module, "_PART_SCORES", 300)
    q, k, v = (torch.zeros(1, 1, n, 32).requires_grad_() for n in (400, 64, 64))
    ones = torch.ones_like(v).requires_grad_()
    out = attention(q, k, ones, dropout=0.5, form=form)
    assert out.mean().item() == pytest.approx(1, abs=0.03) and out[..., 0].std() > 0.05
    (gradient,) = torch.autograd.grad(out, ones, torch.ones_like(out))
    torch.testing.assert_close(gradient.sum(), out.sum())
    (q_gradient,) = torch.autograd.grad(attention(q, k, v, dropout=0.5, form=form).sum(), q)
    assert not q_gradient.any()


def test_float16_survives_products_beyond_its_range() -> None:
    q = k = torch.full((1, 1, 4, 16), 200.0, dtype=torch.float16)  # 640,000 a product; float16 ends at 65,504
    v = torch.randn(1, 1, 4, 16).half()
    out = attention(q, k, v)
    torch.testing.assert_close(out[0, 0, 0].float(), v[0, 0].float().mean(0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_code_computes_the_same_gradients(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_SCORES", 300)
    leaves, _ = inputs(torch.float32)
    plain = torch.autograd.grad(attention(*leaves, form=form).square().sum(), leaves)
    again = checkpoint(attention, *leaves, form=form, use_reentrant=False)
    for gradient, expected in zip(torch.autograd.grad(again.square().sum(), leaves), plain):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_compiled_code_computes_the_same(form: str) -> None:
    leaves, given = inputs(torch.bfloat16, mask="numbers")
    with fixed_form(form):
        expected = torch.autograd.grad(attention(*leaves, given).square().sum(), leaves)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        for gradient, plain in zip(torch.autograd.grad(compiled(*leaves, given).square().sum(), leaves), expected):
            torch.testing.assert_close(gradient, plain, rtol=0.02, atol=0.02)


def test_a_choice_is_measured_once_a_class_and_kept_in_the_file(measured: list[str], tmp_path: Path) -> None:
    leaves, _ = inputs(torch.bfloat16, queries=64)
    use_choices(Choices(tmp_path))
    attention(*leaves)
    attention(*leaves)
    attention(leaves[0][:, :, :40], *leaves[1:])  # 64 when rounded up
    assert measured == ["64"]
    attention(leaves[0][:, :, :30], *leaves[1:])
    with torch.no_grad():
        attention(*leaves)
    assert measured == ["64", "30", "64"]
    records = json.loads((tmp_path / "choices.json").read_text())
    assert [record["chosen"] for record in records.values()] == ["fused"] * 3
    use_choices(Choices(tmp_path))  # a later start
    attention(*leaves)
    assert len(measured) == 3


def test_a_record_decides_and_so_another_process_computes_to_the_bit_what_the_first_did(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, _ = inputs(torch.bfloat16, queries=64, keys=32)
    use_choices(Choices(tmp_path))
    out = attention(*leaves)
    (key,) = records = json.loads((tmp_path / "choices.json").read_text())
    monkeypatch.setenv("RANK", "1")
    use_choices(Choices(tmp_path))
    assert torch.equal(attention(*leaves), out) and torch.equal(attention(*leaves, form="fused"), out)
    records[key]["chosen"] = "written_out"
    (tmp_path / "choices.json").write_text(json.dumps(records))
    use_choices(Choices(tmp_path))
    assert torch.equal(attention(*leaves), attention(*leaves, form="written_out"))
    assert not torch.equal(attention(*leaves), out) and len(measured) == 1


def test_a_fixed_form_wins_over_measurement_and_environment(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, _ = inputs(torch.bfloat16, queries=64, keys=32)
    monkeypatch.setenv(module.ENVIRONMENT, "fused_float32")
    for form, taken in (("written_out", "written_out"), ("auto", "fused_float32"), ("unmeasured", "written_out")):
        with fixed_form(form):
            assert torch.equal(attention(*leaves), attention(*leaves, form=taken))
    assert not measured


def test_an_unknown_form_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='attention form "fast": expected one of auto'):
        module.fix_form("fast")
    monkeypatch.setenv(module.ENVIRONMENT, "quick")
    with pytest.raises(UserError, match='REPRO_ATTENTION "quick": expected one of auto'):
        module.fix_form("auto")


def test_small_shapes_and_other_dtypes_are_not_measured(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        attention(*inputs(dtype)[0])
    monkeypatch.setattr(module, "_SMALL_SCORES", 1 << 18)
    attention(*inputs(torch.bfloat16)[0])
    assert not measured


def test_memory_excludes_forms_at_large_shapes() -> None:
    def forms(dtype: torch.dtype, gradients: bool, batch: int, queries: int, keys: int) -> list[Form]:
        q, k = (torch.empty(batch, 6, n, 32, dtype=dtype, device="meta") for n in (queries, keys))
        return module._candidates(q, k, gradients, bare=True)

    for queries, keys in ((512, 512), (4096, 64)):
        assert "written_out" in forms(torch.bfloat16, True, 1, queries, keys)
    assert forms(torch.bfloat16, True, 1, 1024, 1024) == ["fused_float32", "fused", "parts"]
    assert forms(torch.bfloat16, False, 64, 64, 64)[0] == "written_out"
    assert forms(torch.bfloat16, False, 1, 4096, 4096) == ["parts", "fused_float32", "fused"]


@pytest.mark.parametrize("gradients", [False, True])
def test_parts_write_out_no_more_than_their_bound(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    written_out = module._written_out

    def spy(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        sizes.append(q.shape[:3].numel() * k.shape[2])
        return written_out(q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_written_out", spy)
    leaves, _ = inputs(torch.bfloat16)
    with torch.set_grad_enabled(gradients):
        for bound in (1500, 300):
            monkeypatch.setattr(module, "_PART_SCORES", bound)
            attention(*leaves, form="parts")
            assert max(sizes) <= bound and sum(sizes) == 2 * 3 * 12 * 20
            sizes.clear()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_measurement_moves_nothing_of_the_callers(mask: str, gradients: bool) -> None:
    """Neither random state nor what autocast, inference mode or hooks on saved tensors see."""
    leaves, given = inputs(torch.bfloat16, mask=mask)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16), torch.inference_mode(not gradients):
        seconds = module._measure(list(FORMS), *leaves, given, 0.1 if gradients else 0.0, gradients)
    assert set(seconds) == set(FORMS) and all(value > 0 for value in seconds.values())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads and not packed
    assert all(leaf.grad is None for leaf in leaves)


def test_many_scores_are_measured_on_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def compute(form: Form, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        sizes.append(q.shape[:3].numel() * k.shape[2])
        return v

    monkeypatch.setattr(module, "_compute", compute)
    for shape in ((64, 6, 64, 64), (2, 16, 1024, 1024), (1, 1, 16384, 16384)):
        q, k = (torch.empty(shape[0], shape[1], n, 8, dtype=torch.bfloat16, device="meta") for n in shape[2:])
        module._measure(["fused"], q, k, k, None, 0.0, False)
        most = max(1 << 21, 1024 * shape[3])
        assert min(1 << 20, math.prod(shape)) <= max(sizes) <= most
        sizes.clear()
