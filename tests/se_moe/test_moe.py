"""The MoE layer and the language model around it: one process, several ranks, swapped parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.paths import REPOSITORY
from se_moe import moe
from se_moe.communication import make_groups
from se_moe.config import GateConfig, ModelConfig
from se_moe.model import MoELanguageModel, global_names, initialise
from se_moe.moe import MoELayer, stacked
from tests.golden_case import Case, assert_close, load_case
from tests.se_moe.golden_parallel import _layer_on_rank
from tests.se_moe.ranks import run_ranks

SMALL = ModelConfig(
    vocabulary=50, sequence=12, hidden=16, layers=2, heads=2, dense_hidden=24, experts=4, expert_hidden=20
)


def _layer(top_k: int, experts: int = 4, **options: Any) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(8, 12, experts, GateConfig(top_k), **options)


def _token_by_token(layer: MoELayer, x: Tensor) -> Tensor:
    """The layer's definition without sort, permutation or grouping."""
    probs = torch.softmax(layer.gate.wg(x), dim=-1)
    k = layer.gate.config.top_k
    rows = []
    for token, prob in zip(x, probs):
        weights, chosen = prob.topk(k)
        weights = weights / weights.sum() if k > 1 else weights
        rows.append(sum(w * layer.local_experts[int(e)](token) for w, e in zip(weights, chosen)))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_layer_is_the_weighted_sum_of_each_tokens_experts(top_k: int) -> None:
    layer = _layer(top_k)
    x = torch.randn(3, 7, 8, requires_grad=True)
    upstream = torch.randn(3, 7, 8)
    parameters = [x, *layer.parameters()]
    y = layer(x).y
    expected = _token_by_token(layer, x.view(-1, 8)).view(x.shape)
    assert torch.allclose(y, expected, atol=1e-6)
    ours = torch.autograd.grad(y, parameters, upstream)
    theirs = torch.autograd.grad(expected, parameters, upstream)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-5)


def test_only_rows_that_exist_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer(8, 12, 4, GateConfig(2, capacity_factor=0.5, min_capacity=1, drop_tokens=True))
    seen: list[tuple[int, list[int]]] = []
    run = layer.run_experts

    def watch(rows: Tensor, sizes: Sequence[int]) -> Tensor:
        seen.append((rows.shape[0], list(sizes)))
        return run(rows, sizes)

    monkeypatch.setattr(layer, "run_experts", watch)
    x = torch.randn(40, 8)
    kept = int(layer.gate(x).keep_KT.sum())
    layer(x)
    assert seen[0][0] == sum(seen[0][1]) == kept < 80


def test_dropped_tokens_give_zero_and_no_gradient() -> None:
    layer = MoELayer(8, 12, 4, GateConfig(1, 0.25, min_capacity=1, drop_tokens=True, use_rts=False))
    x = torch.randn(40, 8, requires_grad=True)
    keep = layer.gate(x).keep_KT[0]
    y = layer(x).y
    assert torch.equal(y.abs().sum(1) > 0, keep)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad.abs().sum(1) > 0, keep)


def test_padding_tokens_give_zero() -> None:
    layer = _layer(2)
    used = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = layer(torch.randn(2, 3, 8), used)
    assert torch.equal(found.y.abs().sum(-1) > 0, used.bool())
    assert int(found.requested_E.sum()) == 6


def test_parameter_names_are_deepspeeds() -> None:
    names = {name for name, _ in _layer(1, experts=2).named_parameters()}
    expert = {
        f"deepspeed_moe.experts.deepspeed_experts.{i}.{fc}.{w}"
        for i in (0, 1) for fc in ("fc1", "fc2") for w in ("weight", "bias")
    }  # fmt: skip
    assert names == {"deepspeed_moe.gate.wg.weight", *expert}


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    layer = _layer(1)
    with torch.no_grad():
        layer.gate.wg.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0])[:, None].expand(4, 8))
    layer(torch.rand(6, 8)).y.sum().backward()
    has = [all(p.grad is not None for p in expert.parameters()) for expert in layer.local_experts]
    none = [all(p.grad is None for p in expert.parameters()) for expert in layer.local_experts]
    assert has == [True, False, False, False] and none == [False, True, True, True]


class _Swapper:
    """Keeps expert parameters elsewhere: between uses the layer holds nothing but NaN."""

    def __init__(self, layer: MoELayer) -> None:
        self.log: list[str] = []
        self.store = [[p.detach().clone() for p in expert.parameters()] for expert in layer.local_experts]
        for expert in layer.local_experts:
            self._write(expert.parameters(), None)

    @staticmethod
    def _write(parameters: Any, values: list[Tensor] | None) -> None:
        for i, p in enumerate(parameters):
            p.data = torch.full_like(p, float("nan")) if values is None else values[i]

    def announce(self, layer: MoELayer, experts: Sequence[int]) -> None:
        self.log.append("announce")

    def acquire(self, layer: MoELayer, experts: Sequence[int], backward: bool) -> None:
        self.log.append(f"acquire {backward}")
        for g in experts:
            self._write(layer.local_experts[g].parameters(), self.store[g])

    def release(self, layer: MoELayer, experts: Sequence[int], backward: bool) -> None:
        self.log.append(f"release {backward}")
        for g in experts:
            self._write(layer.local_experts[g].parameters(), None)


def test_results_with_swapped_experts_are_bit_equal() -> None:
    x, upstream = torch.randn(30, 8), torch.randn(30, 8)
    results = []
    for swap in (False, True):
        layer = _layer(2)
        swapper = _Swapper(layer) if swap else None
        layer.hooks = swapper
        given = x.clone().requires_grad_()
        y = layer(given).y
        y.backward(upstream)
        results.append([y.detach(), given.grad, *(p.grad for p in layer.parameters())])
        if swapper is not None:
            passes = ["acquire False", "release False", "acquire True", "release True"]
            assert swapper.log == ["announce", *passes]
            assert all(p.isnan().all() for expert in layer.local_experts for p in expert.parameters())
    for a, b in zip(*results):
        assert a is not None and b is not None and torch.equal(a, b)


def test_packed_parameters_are_stacked_without_a_copy() -> None:
    layer = _layer(2)
    x = torch.randn(20, 8)
    before = layer(x).y
    weights = [expert.fc1.weight for expert in layer.local_experts]
    copied = stacked(weights)
    layer.pack()
    view = stacked([expert.fc1.weight for expert in layer.local_experts])
    assert torch.equal(copied, view) and torch.equal(layer(x).y, before)
    assert view.data_ptr() == layer.local_experts[0].fc1.weight.data_ptr() != copied.data_ptr()
    assert stacked(weights[1:3]).data_ptr() == weights[1].data_ptr()
    assert torch.equal(stacked([weights[0], weights[2]]), copied[[0, 2]])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_grouped_products_equal_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch, swap: bool, idle: bool) -> None:
    x, upstream = torch.randn(30, 8).abs(), torch.randn(30, 8)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(moe, "_grouped", lambda rows, grouped=grouped: grouped)
        layer = _layer(2)
        if idle:
            with torch.no_grad():
                layer.gate.wg.weight[1] = -9.0
        layer.hooks = _Swapper(layer) if swap else None
        given = x.clone().requires_grad_()
        y = layer(given).y
        y.backward(upstream)
        results.append([y.detach(), given.grad, *(p.grad for p in layer.parameters())])
    assert any(grad is None for grad in results[0]) == idle
    for a, b in zip(*results):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, atol=1e-5)


def test_the_residual_layer_mixes_a_dense_expert() -> None:
    layer = _layer(1, residual=True)
    assert layer.mlp is not None and layer.coefficient is not None
    x = torch.randn(9, 8)
    share = torch.softmax(layer.coefficient(x), dim=-1)
    expected = _token_by_token(layer, x) * share[:, :1] + layer.mlp(x) * share[:, 1:]
    assert torch.allclose(layer(x).y, expected, atol=1e-6)


def test_autocast_keeps_gradients_in_the_parameters_dtype() -> None:
    layer = _layer(2)
    x = torch.randn(20, 8)
    exact = layer(x).y
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16()).y
    assert torch.allclose(y.float(), exact, atol=0.1)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="must be a multiple of heads"):
        ModelConfig(hidden=10, heads=4)


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 50, (3, 13), generator=torch.Generator().manual_seed(rank))
    return ids[:, :-1], ids[:, 1:]


def _model_on_rank(rank: int, expert_size: int | None, per_node: int | None) -> dict[str, Any]:
    groups = make_groups(expert_size, per_node)
    model = MoELanguageModel(SMALL, groups)
    initialise(model, 5)
    found = model(*_batch(rank))
    found.loss.backward()
    names = global_names(model)
    return {
        "loss": found.loss.detach(),
        "requested": found.requested_ME,
        "weights": {names[n]: p.detach() for n, p in model.named_parameters()},
        "grads": {names[n]: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Four batches through one process."""
    model = MoELanguageModel(SMALL)
    initialise(model, 5)
    losses = []
    for rank in range(4):
        found = model(*_batch(rank))
        found.loss.backward()
        losses.append(found.loss.detach())
    return {
        "losses": losses,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "grads": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def _assert_same_training(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, found in enumerate(results):
        assert torch.allclose(found["loss"], alone["losses"][rank], atol=1e-6)
        assert all(torch.equal(value, alone["weights"][name]) for name, value in found["weights"].items())
    for name, expected in alone["grads"].items():
        summed = sum(found["grads"][name] for found in results if name in found["grads"])
        assert torch.allclose(summed, expected, atol=1e-6), name


def test_experts_over_ranks_train_like_one_process(alone: dict[str, Any]) -> None:
    flat = run_ranks(4, _model_on_rank, None, None)
    _assert_same_training(flat, alone)
    phased = run_ranks(4, _model_on_rank, None, 2)
    for a, b in zip(flat, phased):
        assert torch.equal(a["loss"], b["loss"])
        assert all(torch.equal(grad, b["grads"][name]) for name, grad in a["grads"].items())


def test_expert_groups_with_data_parallel_copies_train_like_one_process(alone: dict[str, Any]) -> None:
    _assert_same_training(run_ranks(4, _model_on_rank, 2, None), alone)


def test_cached_generation_equals_a_whole_forward_pass() -> None:
    model = MoELanguageModel(SMALL)
    initialise(model, 2)
    model.eval()
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    text = model.generate(ids, 6, temperature=0)
    for length in range(3, 9):
        logits, _ = model.next_logits(text[:, :length])
        assert torch.equal(logits.argmax(-1), text[:, length])


def test_loss_is_cross_entropy_plus_weighted_gate_losses() -> None:
    model = MoELanguageModel(SMALL)
    initialise(model, 2)
    ids, targets = _batch(0)
    found = model(ids, targets)
    x = model.embed(ids)
    for block in model.blocks:
        x = block(x).x
    expected = F.cross_entropy((model.ln_f(x) @ model.wte.weight.T).flatten(0, 1), targets.flatten())
    assert torch.allclose(found.lm_loss, expected, atol=1e-6)
    assert torch.allclose(found.loss, found.lm_loss + 0.01 * found.aux_loss)
    assert found.requested_ME.shape == (1, 4) and int(found.requested_ME.sum()) == 2 * ids.numel()


def test_too_long_a_text_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match="13 tokens are more than the model's sequence of 12"):
        MoELanguageModel(SMALL).embed(torch.zeros(1, 13, dtype=torch.int64))


def test_the_lean_feed_forward_has_the_gradients_of_the_plain_one() -> None:
    from se_moe.model import FeedForward

    torch.manual_seed(0)
    layer = FeedForward(6, 10).double()
    x_BLD = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        return layer.fc2(F.gelu(layer.fc1(x)))

    given = (x_BLD, *layer.parameters())
    weight = torch.randn(2, 3, 6, dtype=torch.float64)
    wanted = torch.autograd.grad((plain(x_BLD) * weight).sum(), given)
    found = torch.autograd.grad((layer(x_BLD) * weight).sum(), given)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_BLD), plain(x_BLD))


def test_the_residual_layer_has_deepspeeds_output_and_gradients() -> None:
    """DeepSpeed's recorded mixture, mixed with a dense expert as its layer does; gradients by autograd and by parts."""
    case = load_case(REPOSITORY / "tests" / "golden" / "se_moe" / "ds_moe_layer_top1_1rank.safetensors")
    plain, out = case.group("param"), case.group("out")
    generator = torch.Generator().manual_seed(7)
    shapes = {"mlp.fc1.weight": (20, 12), "mlp.fc1.bias": (20,), "mlp.fc2.weight": (12, 20), "mlp.fc2.bias": (12,)}
    shapes |= {"coefficient.weight": (2, 12), "coefficient.bias": (2,)}
    dense = {n: (torch.randn(s, generator=generator) / 3).requires_grad_() for n, s in shapes.items()}
    x, upstream = case.tensors["in/rank0.x"], case.tensors["in/rank0.upstream"]
    share = F.linear(x, dense["coefficient.weight"], dense["coefficient.bias"]).softmax(-1)
    hidden = F.gelu(F.linear(x, dense["mlp.fc1.weight"], dense["mlp.fc1.bias"]))
    y = out["rank0.y"] * share[:, :1] + F.linear(hidden, dense["mlp.fc2.weight"], dense["mlp.fc2.bias"]) * share[:, 1:]
    (y * upstream).sum().backward()
    tensors = {name: value for name, value in case.tensors.items() if name.startswith("in/")}
    tensors |= {f"param/{name}": value for name, value in plain.items()}
    tensors |= {f"param/{name}": value.detach() for name, value in dense.items()}
    tensors |= {f"out/rank0.grad.{name}": value.grad for name, value in dense.items() if value.grad is not None}
    tensors |= {"out/rank0.y": y.detach(), "out/rank0.l_aux": out["rank0.l_aux"]}
    residual = Case(case.path, case.stem, case.source, config={**case.config, "residual": True}, tensors=tensors)
    mixed = _layer_on_rank(0, residual)
    for name, value in residual.group("out").items():
        assert_close(mixed[name], value, name)
    # The experts see what reaches them through their share, in the layer that is recorded without a dense expert.
    scaled = {**case.tensors, "in/rank0.upstream": upstream * share[:, :1].detach()}
    alone = _layer_on_rank(0, Case(case.path, case.stem, case.source, config=case.config, tensors=scaled))
    for name in (name for name in alone if name.startswith("grad.experts")):
        assert_close(mixed[name], alone[name], name)
    with pytest.raises(AssertionError, match="option use_tutel is True: missing here"):
        residual.config["use_tutel"] = True
        _layer_on_rank(0, residual)
