"""Experts in tiers train to the same bits as experts that never leave the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from se_moe.cache import SparseCache
from se_moe.config import GateConfig
from se_moe.moe import MoELayer
from se_moe.planner import FLOAT32, Machine, storage_plan
from se_moe.prefetch import ExpertStore, OffloadedExperts, RoutePredictor, SlicePrefetch, adamw_update
from se_moe.storage import DeviceArena, ExpertKey, FileTier, HostTier, RecordLayout, Throttle

HIDDEN, WIDTH, EXPERTS, LAYERS, STEPS = 8, 16, 8, 3, 6
ADAM = {"lr": 1e-2, "weight_decay": 0.01}


class Stack(nn.Module):
    """MoE layers with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(MoELayer(HIDDEN, WIDTH, EXPERTS, GateConfig(top_k=1)) for _ in range(LAYERS))

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD).y
        return x_TD

    def moe_layers(self) -> list[MoELayer]:
        return list(self.layers)  # type: ignore[arg-type]


def batch(step: int) -> Tensor:
    """Few tokens, so that a step leaves experts untouched."""
    return torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return (model(batch(step)) - 1).square().mean()


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "deepspeed_experts" not in name]


def train_resident() -> tuple[list[float], dict[str, Tensor]]:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **ADAM)  # type: ignore[arg-type]
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def layout() -> RecordLayout:
    return RecordLayout.of_expert(
        dict(MoELayer(HIDDEN, WIDTH, 1, GateConfig(top_k=1)).local_experts[0].named_parameters())
    )


def make_store(
    folder: Path,
    device_experts: int = EXPERTS * 4,
    capacity: int | None = 5,
    rule: str = "repaired",
    background: bool = True,
    throttle: Throttle | None = None,
    period: int = 7,
) -> ExpertStore:
    files = FileTier(folder, layout(), throttle)
    cache: SparseCache[ExpertKey] | None = None
    if capacity is not None:
        cache = SparseCache(capacity, rule, period=period)
    host = HostTier(((capacity or 0) + ExpertStore.STAGING) * files.layout.slot_bytes, files.layout)
    stride = -(-files.layout.parameter_bytes // 256) * 256
    return ExpertStore(files, host, DeviceArena(device_experts * stride), cache, background)


def train_step(offloaded: OffloadedExperts, model: Stack, optimizer: torch.optim.Optimizer, step: int) -> float:
    offloaded.begin_pass()
    loss = loss_of(model, step)
    loss.backward()
    offloaded.step(**ADAM)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train_offloaded(store: ExpertStore, predictor: RoutePredictor | None) -> tuple[list[float], dict[str, Tensor]]:
    model = Stack()
    optimizer = torch.optim.AdamW(dense_parameters(model), foreach=False, **ADAM)  # type: ignore[arg-type]
    offloaded = OffloadedExperts(store, model.moe_layers(), predictor)
    losses = [train_step(offloaded, model, optimizer, step) for step in range(STEPS)]
    assert store.arena.block_bytes == store.arena.charged_bytes == 0 or predictor is not None
    offloaded.detach()
    store.close()
    assert store.arena.used_bytes == 0, store.arena.held()
    return losses, model.state_dict()


ARMS: dict[str, dict[str, Any]] = {
    "on demand": {"capacity": None, "background": False},
    "prefetch": {"capacity": None, "predict": "previous"},
    "cache": {"capacity": 5, "background": False},
    "both": {"capacity": 5, "predict": "previous"},
    "everything predicted": {"capacity": 20, "predict": "all"},
    "tiny cache": {"capacity": 1, "predict": "previous"},
    "frozen cache": {"capacity": 3, "rule": "pseudocode", "predict": "previous"},
    "lru": {"capacity": 4, "rule": "lru", "predict": "previous"},
    "no room to prefetch": {"capacity": 6, "predict": "all", "device_experts": 13},
}


@pytest.fixture(scope="module")
def resident() -> tuple[list[float], dict[str, Tensor]]:
    return train_resident()


@pytest.mark.parametrize("arm", ARMS)
def test_every_switch_gives_the_bits_of_the_resident_run(
    arm: str, tmp_path: Path, resident: tuple[list[float], dict[str, Tensor]]
) -> None:
    options = dict(ARMS[arm])
    rule = options.pop("predict", None)
    predictor = RoutePredictor(range(EXPERTS), str(rule)) if rule else None
    losses, state = train_offloaded(make_store(tmp_path, **options), predictor)  # type: ignore[arg-type]
    assert losses == resident[0]
    for name, tensor in resident[1].items():
        assert torch.equal(state[name], tensor), name


def test_mispredictions_are_counted_and_statistics_do_not_depend_on_timing(tmp_path: Path) -> None:
    seen = []
    for run, throttle in enumerate((None, Throttle(2e7, 1e-3))):
        store = make_store(tmp_path / str(run), throttle=throttle)
        train_offloaded(store, RoutePredictor(range(EXPERTS)))
        statistics = store.statistics
        assert statistics.missed > 0 and statistics.unused > 0 and statistics.predicted > statistics.unused
        assert store.cache is not None
        seen.append((statistics.predicted, statistics.unused, statistics.missed, store.cache.statistics))
    assert seen[0] == seen[1]


def test_all_predicted_means_nothing_missed(tmp_path: Path) -> None:
    store = make_store(tmp_path, capacity=EXPERTS * LAYERS)
    train_offloaded(store, RoutePredictor(range(EXPERTS), "all"))
    assert store.statistics.missed == 0 and store.statistics.unused > 0
    assert store.files.statistics.reads == EXPERTS * LAYERS, "every expert is read once, then it is in host memory"


def test_without_a_background_thread_nothing_is_hidden(tmp_path: Path) -> None:
    store = make_store(tmp_path, background=False, throttle=Throttle(1e8, 1e-3))
    train_offloaded(store, None)
    assert store.statistics.fetch_seconds > 0 and store.statistics.hidden_fraction == 0.0


@pytest.mark.parametrize("tokens", [4, 12, 40])
def test_measured_bytes_of_every_tier_are_the_planners(tmp_path: Path, tokens: int) -> None:
    """Equation (1) in float32, for three values of alpha; the cache holds what a step touches."""
    torch.manual_seed(tokens)
    hidden, width, experts, layers = 64, 128, 16, 3
    stack = [MoELayer(hidden, width, experts, GateConfig(top_k=1)) for _ in range(layers)]
    expert = RecordLayout.of_expert(dict(stack[0].local_experts[0].named_parameters()))
    cache: SparseCache[ExpertKey] = SparseCache(experts * layers, period=0)
    host = HostTier((experts * layers + ExpertStore.STAGING) * expert.slot_bytes, expert)
    store = ExpertStore(FileTier(tmp_path, expert), host, DeviceArena(1 << 24), cache)
    offloaded = OffloadedExperts(store, stack)
    x_TD, counts = torch.randn(tokens, hidden), []
    for layer in stack:
        out = layer(x_TD)
        x_TD = x_TD + out.y
        counts.append(out.requested_E)
    x_TD.square().mean().backward()
    alpha = float((torch.stack(counts) > 0).double().mean())
    sparse = layers * experts * expert.parameter_bytes // 4
    plan = storage_plan(0, sparse, layers, alpha, Machine(1e9, 1e9, 1e9), FLOAT32)
    records = len(cache) * expert.slot_bytes + store.statistics.gradient_peak_bytes
    # The fullest layer decides the device's peak; equation (1) has the mean layer.
    fullest = max(int((c > 0).sum()) for c in counts) / (alpha * experts)
    assert store.arena.peak_bytes == pytest.approx(plan.device_bytes * fullest, rel=0.05)
    assert records == pytest.approx(plan.host_bytes, rel=0.05)
    assert store.files.live_bytes == pytest.approx(plan.file_bytes, rel=0.05)
    offloaded.step(lr=1e-3)
    store.close()


def test_training_stays_within_a_sixth_of_the_resident_bytes(tmp_path: Path) -> None:
    store = make_store(tmp_path, device_experts=13)
    resident = EXPERTS * LAYERS * (layout().data_bytes + layout().parameter_bytes)
    train_offloaded(store, RoutePredictor(range(EXPERTS)))
    assert store.arena.peak_bytes <= store.arena.budget_bytes < resident / 6


def test_a_budget_that_one_layer_exceeds_is_refused_with_its_name(tmp_path: Path) -> None:
    store = make_store(tmp_path, device_experts=2)
    model = Stack()
    OffloadedExperts(store, model.moe_layers())
    with pytest.raises(UserError, match=r"device budget exceeded: experts of layer \d needs"):
        model(batch(0))
    store.close()


def test_the_host_budget_must_hold_the_cache(tmp_path: Path) -> None:
    files = FileTier(tmp_path, layout())
    host = HostTier(4 * files.layout.slot_bytes, files.layout)
    with pytest.raises(UserError, match="lower the cache capacity to 1"):
        ExpertStore(files, host, DeviceArena(1 << 20), SparseCache(6))


def test_untouched_experts_keep_their_bits_and_their_step_count(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    model = Stack()
    optimizer = torch.optim.AdamW(dense_parameters(model), **ADAM)  # type: ignore[arg-type]
    offloaded = OffloadedExperts(store, model.moe_layers())
    before = {key: store.read_record(key) for key in sorted(offloaded.keys())}
    loss_of(model, 0).backward()
    touched = offloaded.step(**ADAM)
    optimizer.zero_grad()
    assert 0 < len(touched) < len(before)
    for key, record in before.items():
        after = store.read_record(key)
        changed = any(not torch.equal(after[name], record[name]) for name in record)
        assert changed == (key in touched) and int(after["step"]) == int(key in touched)
    store.close()


@pytest.mark.parametrize("background", [False, True])
def test_with_prefetch_an_update_waits_for_the_next_fetch_of_its_expert(background: bool, tmp_path: Path) -> None:
    store = make_store(tmp_path, capacity=None, background=background)
    model = Stack()
    offloaded = OffloadedExperts(store, model.moe_layers())
    loss_of(model, 0).backward()
    before = store.files.statistics.reads
    touched = offloaded.step(**ADAM)
    assert store.files.statistics.reads - before == (0 if background else len(touched))
    assert not offloaded.gradients
    for key in touched:
        assert int(store.read_record(key)["step"]) == 1, "whoever asks for a record sees it updated"
    assert store.files.statistics.reads - before == len(touched) * (1 if background else 2)
    store.flush()
    assert store.files.statistics.reads - before == len(touched) * (1 if background else 2), "nothing is owed any more"
    store.close()


def test_an_update_that_fails_is_reported_and_writes_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path, capacity=None)
    model = Stack()
    offloaded = OffloadedExperts(store, model.moe_layers())
    loss_of(model, 0).backward()
    written = store.files.statistics.bytes_written

    def fail(*_: object) -> None:
        raise UserError("no such optimiser")

    offloaded.update(fail)
    with pytest.raises(UserError, match="no such optimiser"):
        store.flush()
    assert store.files.statistics.bytes_written == written


def test_a_restored_store_continues_with_the_same_losses(tmp_path: Path, resident: tuple[list[float], dict]) -> None:
    """Write-backs after the commit, as left behind by a killed process, are ignored."""
    model = Stack()
    optimizer = torch.optim.AdamW(dense_parameters(model), foreach=False, **ADAM)  # type: ignore[arg-type]
    store = make_store(tmp_path)
    offloaded = OffloadedExperts(store, model.moe_layers(), RoutePredictor(range(EXPERTS)))
    losses = [train_step(offloaded, model, optimizer, step) for step in range(3)]
    store.commit("3")
    dense = {name: p.detach().clone() for name, p in model.named_parameters() if "deepspeed_experts" not in name}
    moments = optimizer.state_dict()
    saved = {"state": {k: {n: torch.clone(t) for n, t in v.items()} for k, v in moments["state"].items()}}
    for step in (3, 4):
        train_step(offloaded, model, optimizer, step)
    store.flush()

    again = make_store(tmp_path)
    again.files.restore("3")
    model = Stack()
    optimizer = torch.optim.AdamW(dense_parameters(model), foreach=False, **ADAM)  # type: ignore[arg-type]
    offloaded = OffloadedExperts(again, model.moe_layers(), RoutePredictor(range(EXPERTS)), create=False)
    model.load_state_dict(dense, strict=False)
    optimizer.load_state_dict({**optimizer.state_dict(), **saved})
    losses += [train_step(offloaded, model, optimizer, step) for step in range(3, STEPS)]
    assert losses == resident[0]
    store.close()
    again.close()


def test_a_failed_write_back_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    model = Stack()
    offloaded = OffloadedExperts(store, model.moe_layers())
    loss_of(model, 0).backward()
    offloaded.step(**ADAM)

    def fail(*_: object) -> None:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store.files, "write", fail)
        with pytest.raises(UserError, match="the disk is full"):
            store.flush()
    store.close()


def test_our_adamw_is_torchs_bit_by_bit() -> None:
    theirs = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    ours, m, v = theirs.detach().clone(), torch.zeros(50), torch.zeros(50)
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
    for step in range(1, 6):
        theirs.grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        adamw_update(ours, theirs.grad, m, v, step, 3e-3, (0.8, 0.95), 1e-8, 0.1)
    assert torch.equal(ours, theirs.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", ["on demand", "both", "tiny cache"])
def test_tiers_on_a_gpu_give_the_resident_losses(arm: str, tmp_path: Path) -> None:
    """Moments are updated on the host there, so equality is up to rounding."""
    device = torch.device("cuda")
    options = dict(ARMS[arm])
    rule = options.pop("predict", None)
    capacity = options.get("capacity")
    results = []
    for tiered in (False, True):
        model = Stack().to(device)
        parameters = dense_parameters(model) if tiered else list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, foreach=False, **ADAM)  # type: ignore[arg-type]
        offloaded = None
        if tiered:
            files = FileTier(tmp_path, layout())
            cache = None if capacity is None else SparseCache[ExpertKey](capacity, period=7)
            host = HostTier(
                ((capacity or 0) + ExpertStore.STAGING) * files.layout.slot_bytes, files.layout, pinned=True
            )
            store = ExpertStore(files, host, DeviceArena(1 << 20, device), cache, background=bool(rule))
            predictor = RoutePredictor(range(EXPERTS), rule) if rule else None
            offloaded = OffloadedExperts(store, model.moe_layers(), predictor)
        losses = []
        for step in range(STEPS):
            if offloaded is not None:
                offloaded.begin_pass()
            loss = (model(batch(step).to(device)) - 1).square().mean()
            loss.backward()
            if offloaded is not None:
                offloaded.step(**ADAM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


class Handle:
    def __init__(self, layer: int, log: list[str]) -> None:
        self.layer, self.log = layer, log
        log.append(f"start {layer}")

    def wait(self) -> int:
        self.log.append(f"wait {self.layer}")
        return self.layer


def test_slices_of_the_next_layer_are_gathered_before_they_are_needed() -> None:
    log: list[str] = []
    slices = SlicePrefetch(lambda layer: Handle(layer, log), layers=3)
    assert [slices.get(i) for i in range(3)] == [0, 1, 2]
    assert log == ["start 0", "wait 0", "start 1", "wait 1", "start 2", "wait 2"]
    assert (slices.ahead, slices.blocking) == (2, 1)
    assert [slices.get(i, backwards=True) for i in (2, 1, 0)] == [2, 1, 0]
    off = SlicePrefetch(lambda layer: Handle(layer, []), layers=3, enabled=False)
    assert [off.get(i) for i in range(3)] == [0, 1, 2] and off.ahead == 0
