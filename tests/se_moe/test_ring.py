"""Ring offload: its timetable, its bits, its budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from se_moe.ring import RingOffload, completion_times
from se_moe.storage import DeviceArena, Throttle

N = 5


def host_layers(count: int = N) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(16, 16, generator=generator), "b": torch.randn(16 + i, generator=generator)}
        for i in range(count)
    ]


def run(layers: list[dict[str, Tensor]], ring: RingOffload, passes: int) -> list[Tensor]:
    out, x = [], torch.ones(16)
    for _ in range(passes):
        for index in range(len(layers)):
            with ring.layer(index) as views:
                x = torch.tanh(views["w"] @ x + views["b"][:16])
        out.append(x)
    return out


def resident(layers: list[dict[str, Tensor]], passes: int) -> list[Tensor]:
    out, x = [], torch.ones(16)
    for _ in range(passes):
        for layer in layers:
            x = torch.tanh(layer["w"] @ x + layer["b"][:16])
        out.append(x)
    return out


@pytest.mark.parametrize("sections", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("overlap", [True, False])
def test_decoding_passes_give_the_resident_bits_also_across_the_wrap(sections: int, overlap: bool) -> None:
    layers = host_layers()
    arena = DeviceArena(1 << 20)
    with RingOffload(layers, sections, arena, overlap, Throttle(5e6, 1e-4)) as ring:
        found = run(layers, ring, passes=4)
    for ours, theirs in zip(found, resident(layers, 4), strict=True):
        assert torch.equal(ours, theirs)
    assert arena.used_bytes == 0


def test_k_sections_of_n_layers_take_k_nths_of_the_memory() -> None:
    layers = host_layers(12)
    arena = DeviceArena(1 << 20)
    with RingOffload(layers, 4, arena) as ring:
        full = 12 * ring.device_bytes / 4
        run(layers, ring, 2)
        assert arena.peak_bytes == ring.device_bytes < 0.4 * full


def test_a_ring_as_long_as_the_model_copies_every_layer_once() -> None:
    layers = host_layers()
    with RingOffload(layers, N, DeviceArena(1 << 20)) as ring:
        run(layers, ring, 3)
        assert ring.statistics.copies == N
    with RingOffload(layers, 2, DeviceArena(1 << 20), overlap=False) as ring:
        run(layers, ring, 3)
        assert ring.statistics.copies == 3 * N


def test_a_budget_too_small_for_the_sections_is_refused_and_nothing_stays_allocated() -> None:
    arena = DeviceArena(3000)
    with pytest.raises(UserError, match="device budget exceeded: ring section 2"):
        RingOffload(host_layers(), 3, arena)
    assert arena.used_bytes == 0


def test_layers_out_of_order_are_refused_and_restart_goes_back() -> None:
    layers = host_layers()
    with RingOffload(layers, 2, DeviceArena(1 << 20)) as ring:
        with pytest.raises(UserError, match="layer 0 comes next, layer 3 was asked for"), ring.layer(3):
            pass
        with ring.layer(0), pytest.raises(UserError, match="in order"), ring.layer(1):
            pass
        with ring.layer(1):
            pass
        ring.restart()
        assert torch.equal(run(layers, ring, 1)[0], resident(layers, 1)[0])


def test_copies_hide_behind_compute_from_two_sections_on() -> None:
    hidden = completion_times(12, 2, compute=1.0, copy=1.0)
    assert hidden.total == hidden.compute == 12 and hidden.serial == 24
    assert completion_times(12, 1, 1.0, 1.0).total > 20
    assert completion_times(12, 2, 1.0, 3.0, preloaded=False).total == pytest.approx(12 * 3 + 1)


def test_the_timetable_of_many_tokens_wraps() -> None:
    one = completion_times(4, 2, 1.0, 0.5)
    many = completion_times(4, 2, 1.0, 0.5, passes=10)
    assert many.total == 10 * one.total and many.copies_during_pass == 40 - 2
    assert completion_times(4, 4, 1.0, 9.0, passes=10).copies_during_pass == 0
    with pytest.raises(UserError, match="at least one layer"):
        completion_times(0, 1, 1.0, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sections", [1, 2, 3])
def test_the_second_event_keeps_weights_from_being_overwritten(sections: int) -> None:
    """Kernels much longer than copies: without the event of the last use, a copy would overwrite running weights."""
    device = torch.device("cuda")
    layers = [{"w": (torch.randn(2048, 2048) / 45).pin_memory()} for _ in range(6)]
    x = torch.randn(4096, 2048, device=device)

    def compute(w: Tensor, y: Tensor) -> Tensor:
        for _ in range(20):
            y = torch.tanh(y @ w)
        return y

    expected, y = [], x
    for _ in range(3):
        for layer in layers:
            y = compute(layer["w"].to(device), y)
        expected.append(y)
    with RingOffload(layers, sections, DeviceArena(1 << 28, device)) as ring:
        y = x
        for n in range(3):
            for index in range(len(layers)):
                with ring.layer(index) as views:
                    y = compute(views["w"], y)
            assert torch.equal(y, expected[n])
