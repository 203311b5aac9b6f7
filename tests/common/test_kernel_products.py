"""Products with weights in two equal forms: held to float64, chosen once, torch's own function for everything else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from common.choices import Choices
from common.kernels import products as module
from common.kernels.products import (
    FORMS,
    Linear,
    by_onednn,
    fixed_form,
    form,
    linear,
    plain_products,
    product,
    quicken_products,
    use_choices,
)
from common.recorded import Recorder
from tests.refusals import refused

pytestmark = pytest.mark.skipif(not module._POSSIBLE, reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def _own_choices() -> Iterator[None]:
    use_choices(None)
    yield
    use_choices(None)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """oneDNN's form at every size; returns the number of its calls."""
    calls: list[int] = []
    called = module._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(len(x))
        return called(x, weight, bias)

    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_SMALL_TRAINED", 0)
    monkeypatch.setattr(module, "_onednn", counted)
    with fixed_form("onednn"):
        yield calls


def leaves(*shape: int, inputs: int = 24, outputs: int = 40, bias: bool = True) -> list[Tensor]:
    """x [*shape, K], weight [N, K] and bias [N], all with gradients."""
    made = [torch.randn(*shape, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    return [x.requires_grad_() for x in made[: 2 + bias]]


def gradients(call: Any, given: list[Tensor], dout: Tensor) -> list[Tensor]:
    out = call(*given)
    return [out, *torch.autograd.grad(out, given, dout)]


@pytest.mark.parametrize("layout", ["rows", "columns", "every other", "transposed", "expanded"])
def test_slices_of_wider_tensors_are_multiplied_right_by_fast_code(
    layout: str, everything: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN has but reference code for weights with gaps, and torch's operator takes no notice of a bias' gaps."""

    def of(rows: int, columns: int) -> Tensor:
        if layout == "rows":
            return torch.randn(2 * rows, columns)[::2]
        if layout == "columns":
            return torch.randn(rows, 3 * columns)[:, columns : 2 * columns]
        if layout == "every other":
            return torch.randn(rows, 2 * columns)[:, ::2]
        if layout == "transposed":
            return torch.randn(columns, 3 * rows)[:, rows : 2 * rows].t()
        return torch.randn(columns).expand(rows, columns)

    seen: list[Tensor] = []
    laid_out, operator = module._laid_out, torch.ops.mkldnn._linear_pointwise

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        seen.extend(part for part in (weight, bias) if part is not None)
        return operator(x, weight, bias, *rest)

    x, weight, bias, dout = of(33, 24), of(40, 24), of(1, 40)[0], of(33, 40)
    monkeypatch.setattr(module, "_NARROW", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    out = laid_out(x, weight, bias)
    torch.testing.assert_close(out, F.linear(x.double(), weight.double(), bias.double()).float())
    assert len(seen) == 2
    assert all(part.is_contiguous() or part.t().is_contiguous() for part in seen)

    given = [part.detach().requires_grad_() for part in (x, weight, bias)]
    expected = gradients(F.linear, [part.double().detach().requires_grad_() for part in given], dout.double())
    for mine, true in zip(gradients(linear, given, dout), expected, strict=True):
        torch.testing.assert_close(mine, true.float())
    assert len(everything) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (1, 7), (130, 12), (12, 130)])
@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 3, 4), (1,)])
def test_forward_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], inputs: int, outputs: int, bias: bool, everything: list[int]
) -> None:
    given = leaves(*shape, inputs=inputs, outputs=outputs, bias=bias)
    dout = torch.randn(*shape, outputs)
    wanted = gradients(F.linear, [x.detach().double().requires_grad_() for x in given], dout.double())
    for found, exact in zip(gradients(linear, given, dout), wanted, strict=True):
        assert found.dtype is torch.float32 and found.shape == exact.shape
        assert found.is_contiguous()  # what DDP wants of gradients
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(everything) == (3 if max(inputs, outputs) > 128 else 2)  # a narrow weight's gradient is BLAS's


def test_rows_laid_out_in_another_order(everything: list[int]) -> None:
    x, weight, bias = leaves(6, 5)
    turned = x.transpose(0, 1)
    dout = torch.randn(40, 6, 5).permute(2, 1, 0)
    found, wanted = (gradients(call, [turned, weight, bias], dout) for call in (linear, F.linear))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_kept_and_computed(everything: list[int]) -> None:
    """A frozen layer keeps no input, a first layer no weight."""
    x, weight, bias = leaves(8)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        through = linear(x, weight.detach(), bias.detach())
        assert kept == [weight.data_ptr()]
        first = linear(x.detach(), weight, bias)
        assert kept[1:] == [x.data_ptr()]
    everything.clear()
    through.sum().backward()
    first.sum().backward()
    assert len(everything) == 1
    assert x.grad is not None and weight.grad is not None and bias.grad is not None


def test_everything_else_is_torchs_own_function(everything: list[int]) -> None:
    x, weight, bias = leaves(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    assert linear(x.double(), weight.double(), bias.double()).dtype is torch.float64
    assert linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype is torch.bfloat16
    assert linear(x[0], weight, bias).shape == (40,)
    each = torch.func.vmap(lambda row: linear(row, weight, bias))(x[:, None])
    torch.testing.assert_close(each[:, 0], F.linear(x, weight, bias))
    _, along = torch.func.jvp(lambda y: linear(y, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along[0], weight.sum(1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias)).tangent is not None
    meta = linear(x.to("meta"), weight.to("meta"), bias.to("meta"))
    assert meta.is_meta and not everything
    for wrong in ((x, weight[:, :5], bias), (x, weight, bias[:3])):
        with pytest.raises(RuntimeError, match=r"shape|size"):
            linear(*wrong)


def test_gradients_of_gradients(everything: list[int]) -> None:
    """A penalty on gradients trains through the layer."""
    found = []
    for call in (linear, F.linear):
        torch.manual_seed(0)
        x, weight, bias = leaves(6)
        (dx,) = torch.autograd.grad(call(x, weight, bias).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([x.grad, weight.grad, bias.grad])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(module, "_onednn", lambda x, weight, bias: calls.append(len(x)) or F.linear(x, weight, bias))  # type: ignore[func-returns-value]
    weight = torch.randn(128, 128)
    with fixed_form("onednn"):
        for rows in (64, 65):
            linear(torch.randn(rows, 128), weight)
        for rows in (128, 129):
            linear(torch.randn(rows, 128, requires_grad=True), weight)
            product(torch.randn(rows // 2, 128), weight)
    assert calls == [65, 129]


def test_products_outside_of_autograd(everything: list[int]) -> None:
    a, b, bias = torch.randn(9, 24), torch.randn(24, 40), torch.randn(40)
    torch.testing.assert_close(product(a, b, bias), torch.addmm(bias, a, b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(a.T.contiguous().T, b.T.contiguous().T), a @ b, rtol=1e-5, atol=1e-5)
    assert len(everything) == 2
    assert product(a[:0], b, bias).shape == (0, 40) and product(a.double(), b.double()).dtype is torch.float64
    assert len(everything) == 2


def test_layers_keep_parameters_names_and_kind(everything: list[int]) -> None:
    network = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(8, 24)
    wanted = network(x)
    assert quicken_products(network) is network and all(isinstance(network[i], Linear) for i in (0, 2))
    torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-5)
    assert len(everything) == 2
    plain_products(network)
    assert type(network[0]) is nn.Linear and torch.equal(network(x), wanted)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert isinstance(Linear(2, 3), nn.Linear)


def test_compiled_and_recorded_networks_take_the_form_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_SMALL_TRAINED", 0)
    network = nn.Sequential(Linear(24, 40), nn.GELU(), Linear(40, 24))
    given, dout = torch.randn(8, 24), torch.ones(8, 24)
    graphs: list[str] = []

    def kept(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    with fixed_form("onednn"):
        wanted = gradients(network, [x := given.clone().requires_grad_()], dout)
        compiled = torch.compile(network, backend=aot_autograd(fw_compiler=kept), fullgraph=True)
        for a, b in zip(gradients(compiled, [x], dout), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert [code.count("less_compute.onednn_linear") for code in graphs] == [2, 2]
        recorder = Recorder(network.eval().requires_grad_(False), lambda net, x: net(x), after=1)
        with torch.no_grad():
            first = recorder(given)
            assert torch.equal(recorder(given), first)
        (recorded,) = recorder._recorded.values()
        assert str(recorded.inlined_graph).count("less_compute::onednn_linear") == 2  # type: ignore[union-attr]


def test_their_arithmetic_is_counted(everything: list[int]) -> None:
    counts = []
    for name in FORMS:
        with fixed_form(name), FlopCounterMode(display=False) as counter:
            x, weight, bias = leaves(8)
            linear(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 8 * 24 * 40] * 2


def test_the_form_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"blas": 2.0, "onednn": 1.0}
    measured: list[int] = []
    monkeypatch.delenv(module.ENVIRONMENT, raising=False)
    monkeypatch.setattr(module, "_measure", lambda: measured.append(1) or dict(times))  # type: ignore[func-returns-value]
    with fixed_form("auto"):
        use_choices(Choices(tmp_path))
        assert form() == "onednn" and form() == "onednn" and len(measured) == 1
        assert json.loads((tmp_path / "choices.json").read_text())[module.KEY]["chosen"] == "onednn"
        assert by_onednn(torch.float32) and not by_onednn(torch.float64)
        times["onednn"] = 3.0
        use_choices(Choices(tmp_path))  # a run that goes on
        assert form() == "onednn" and len(measured) == 1
        use_choices(None)
        assert form() == "blas" and len(measured) == 2
        times["onednn"] = 1.6  # it wins, but by less than equal machines differ
        use_choices(None)
        assert form() == "blas" and not by_onednn(torch.float32)
    assert by_onednn(torch.bfloat16)


def test_a_measurement_leaves_modes_and_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.ENVIRONMENT, raising=False)
    state = torch.random.get_rng_state()
    with fixed_form("auto"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert form() in FORMS
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(module._measure()) == set(FORMS)


def test_the_environment_fixes_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.ENVIRONMENT, "blas")
    with fixed_form("auto"):
        assert form() == "blas"
    monkeypatch.setenv(module.ENVIRONMENT, "cublas")
    refused('REPRO_PRODUCTS "cublas": expected one of auto, unmeasured, blas, onednn', module.fix_form, "auto")
    refused('form of products "cublas"', module.fix_form, "cublas")
