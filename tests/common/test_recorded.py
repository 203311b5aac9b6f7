"""Recorded calls: the same numbers, and only where a recording stands for the network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.recorded import Recorder
from common.unets import RecordedUNet


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.LayerNorm(8)
        self.calls = 0

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.norm(self.first(x) + shift[:, None]).relu())


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().eval()


def plain(network: nn.Module, *inputs: Tensor) -> Tensor:
    return network(*inputs)


def given(rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, generator=generator)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_recording_gives_the_networks_own_numbers(mode: Any, mixed: bool, constant: bool) -> None:
    network = small()
    recorder = Recorder(network, plain, constant, after=3)
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        expected = [network(*given(rows)) for rows in (5, 1, 7)]
        for rows, wanted in zip((5, 1, 7), expected):
            for _ in range(5):
                assert torch.equal(recorder(*given(rows)), wanted)
        before = network.calls
        for rows, wanted in zip((5, 1, 7), expected):
            other, shift = given(rows)[0] * 2, given(rows)[1]
            assert torch.equal(recorder(*given(rows)), wanted)
            found = recorder(other, shift)
            assert network.calls == before  # without the network
            assert torch.equal(found, network(other, shift))
            before = network.calls


def test_shapes_that_come_seldom_are_not_recorded() -> None:
    network = small()
    recorder = Recorder(network, plain, after=3)
    with torch.no_grad():
        for rows in (1, 2, 3, 4, 1, 2, 3, 4):
            recorder(*given(rows))
    assert network.calls == 8


def test_gradients_and_training_go_through_the_network() -> None:
    network = small()
    recorder = Recorder(network, plain, after=1)
    for _ in range(3):
        recorder(*given()).sum().backward()
    assert network.calls == 3 and network.first.weight.grad is not None
    with torch.no_grad():
        network.train()
        for _ in range(3):
            recorder(*given())
        assert network.calls == 6


def test_large_inputs_and_networks_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    for name, limit, expected in (("MOST", 29, 3), ("LARGEST", 10, 3), ("MOST", 30, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"common.recorded.{name}", limit)
            recorder, network.calls = Recorder(network, plain, after=1), 0
            with torch.no_grad():
                recorder(*given())
                before = network.calls
                for _ in range(2):
                    recorder(*given())  # 5 x 6 numbers
            assert network.calls - before + 1 == expected


def test_weights_that_change_in_place_are_seen() -> None:
    network = small()
    recorder = Recorder(network, plain, after=1)
    with torch.no_grad():
        for _ in range(3):
            recorder(*given())
        first = network(*given())
        for change in (lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p.data / 2)):  # averages are swapped so
            for parameter in network.parameters():
                change(parameter)
            before = network.calls
            found = recorder(*given())
            assert network.calls == before
            assert torch.equal(found, network(*given())) and not torch.allclose(found, first)


def test_a_copy_starts_without_recordings() -> None:
    """They hold the weights of the network that was recorded, which the copy's go away from."""
    network = small()
    network.recorder = Recorder(network, plain, after=1)  # as networks do that record themselves
    with torch.no_grad():
        network.recorder(*given())
        other = copy.deepcopy(network)
        assert other.recorder.network is other and other.recorder.after == 1
        for parameter in other.parameters():
            parameter.mul_(1.5)
        for _ in range(3):
            assert torch.equal(other.recorder(*given()), other(*given()))
            assert torch.equal(network.recorder(*given()), network(*given()))


def test_random_numbers_and_failures_leave_the_network_as_it_is() -> None:
    network = small()

    def noisy(network: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
        return network(x + torch.randn(len(x), 1), shift)

    def picky(network: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("cannot be recorded")
        return network(x, shift)

    for call in (noisy, picky):
        recorder = Recorder(network, call, after=1)
        with torch.no_grad():
            for _ in range(2):
                recorder(*given())
            before = network.calls
            recorder(*given())
            assert network.calls == before + 1


def test_a_recorded_unet_draws_what_the_unet_does() -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    kind = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(
        8, 3, 3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
        attention_head_dim=4, time_cond_proj_dim=5, **kind,
    ).eval()  # fmt: skip
    recorded = RecordedUNet(unet)
    recorded.recorder.after = 2
    x, t, states, condition = torch.randn(2, 3, 8, 8), torch.tensor([7, 900]), torch.randn(2, 4, 6), torch.randn(2, 5)
    with torch.no_grad():
        for given in ((x, t, states), (x, t[0], states)):
            for extra in ({}, {"timestep_cond": condition}):
                wanted = unet(*given, **extra, return_dict=False)[0]
                for _ in range(4):
                    assert torch.equal(recorded(*given, **extra, return_dict=False)[0], wanted)
    assert recorded.config.in_channels == 3
