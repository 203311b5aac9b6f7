"""The elastic network: what is extracted is what was active, and batch norms get the statistics of given pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eeea_net.counting import measured
from eeea_net.once_for_all import DEPTHS, EXPANDS, KERNELS, RESOLUTIONS, Design, Subnet, on_meta, published_subnet
from eeea_net.supernet import Elastic, Population, Supernet, member_count, middle, phases, recalibrate, resized

DESIGN = Design(8, (8, 16), (2, 2), (False, True), (False, True), final=24, mix=32, classes=5, first_stride=1)
ELASTIC = Elastic(KERNELS, EXPANDS, (1, 2, 3), (16, 20, 24))


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    network = Supernet(ELASTIC, DESIGN)
    for name, value in network.state_dict().items():  # no weight, matrix or statistic at its neutral start
        if value.is_floating_point():
            noise = 0.2 * torch.rand_like(value)
            value.add_(noise if "running_var" in name else noise - 0.1)
    return network


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(12, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_an_extracted_member_equals_the_active_one(supernet: Supernet, pictures: Tensor) -> None:
    random = np.random.default_rng(0)
    outputs = []
    for _ in range(6):
        choice = ELASTIC.draw(2, random)
        x = resized(pictures, choice.resolution)
        for training in (False, True):
            before = {name: value.clone() for name, value in supernet.state_dict().items()}
            active = supernet.train(training)(pictures, choice)
            supernet.load_state_dict(before)
            alone = supernet.extract(choice).train(training)(x)
            assert float((active - alone).detach().abs().max()) <= 1e-5 * max(1.0, float(alone.detach().abs().max()))
        outputs.append(alone)
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])  # members differ


def test_a_small_kernel_is_the_middle_of_the_next_larger_one_through_its_matrix(supernet: Supernet) -> None:
    choice = replace(supernet.full, kernels=(3,) * 6)
    weight = supernet.largest.blocks[1].mobile_inverted_conv["depth_conv"].conv.weight
    matrices = supernet.transforms[0]
    five = (middle(weight, 5).reshape(-1, 25) @ matrices["7to5"].T).view(-1, 1, 5, 5)
    three = (middle(five, 3).reshape(-1, 9) @ matrices["5to3"].T).view(-1, 1, 3, 3)
    found = supernet.state_of(choice)["blocks.1.mobile_inverted_conv.depth_conv.conv.weight"]
    torch.testing.assert_close(found, three)


def test_gradients_reach_exactly_the_channels_kernels_and_blocks_of_the_member(
    supernet: Supernet, pictures: Tensor
) -> None:
    choice = replace(supernet.full, kernels=(7,) * 3, expands=(3,) * 3, depths=(1, 2), resolution=16)
    supernet.zero_grad()
    supernet.train()(pictures, choice).sum().backward()
    wide = supernet.largest.blocks[1].mobile_inverted_conv["inverted_bottleneck"].conv.weight.grad
    assert wide is not None and bool(wide[:24].any()) and not bool(wide[24:].any())  # 8 x 3 of 8 x 6 channels
    unused = supernet.largest.blocks[2].mobile_inverted_conv["point_linear"].conv.weight.grad
    used = supernet.largest.blocks[5].mobile_inverted_conv["point_linear"].conv.weight.grad
    assert unused is None or not bool(unused.any())
    assert used is not None and bool(used.any())
    assert all(p.grad is None or not bool(p.grad.any()) for p in supernet.transforms.parameters())
    supernet.zero_grad()


def test_sorting_channels_keeps_the_largest_members_output(supernet: Supernet, pictures: Tensor) -> None:
    supernet.eval()
    before = supernet(pictures)
    supernet.sort_channels()
    torch.testing.assert_close(supernet(pictures), before, rtol=1e-4, atol=1e-5)
    weights = supernet.largest.blocks[2].mobile_inverted_conv["point_linear"].conv.weight.abs().sum((0, 2, 3))
    assert (weights[:-1] >= weights[1:]).all()


def test_recalibration_is_exact_free_of_order_and_leaves_the_supernet_alone(
    supernet: Supernet, pictures: Tensor
) -> None:
    choice = ELASTIC.draw(2, np.random.default_rng(3))
    kept = {name: value.clone() for name, value in supernet.state_dict().items()}
    x = resized(pictures, choice.resolution)
    whole = recalibrate(supernet.extract(choice), [x])
    parts = recalibrate(supernet.extract(choice), [x[7:], x[:3], x[3:7]])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    by_batch = supernet.extract(choice).train()(x)  # normalised by the statistics of these very pictures
    torch.testing.assert_close(whole(x), by_batch, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, kept[name]) for name, value in supernet.state_dict().items())
    assert not torch.allclose(supernet.extract(choice).eval()(x), by_batch, atol=1e-2)


@pytest.mark.parametrize("memory", [0, 20_000, 2**30])
def test_members_of_a_population_answer_as_they_would_alone(supernet: Supernet, pictures: Tensor, memory: int) -> None:
    random = np.random.default_rng(5)
    first = ELASTIC.draw(2, random)
    last = replace(first, kernels=(*first.kernels[:-1], 3 if first.kernels[-1] != 3 else 5))  # differs in one block
    choices = [first, ELASTIC.draw(2, random), last, replace(first, depths=first.depths), ELASTIC.draw(2, random)]
    kept = {name: value.clone() for name, value in supernet.state_dict().items()}
    found = dict(Population(supernet, pictures[:6], [pictures[6:9], pictures[9:]], memory).logits(choices))
    assert sorted(found) == [*range(5)]
    for number, choice in enumerate(choices):
        alone = recalibrate(supernet.extract(choice), [resized(pictures[:6], choice.resolution)])
        wanted = alone(resized(pictures[6:], choice.resolution))
        torch.testing.assert_close(torch.cat(found[number]), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cat(found[0]), torch.cat(found[2]))
    assert all(torch.equal(value, kept[name]) for name, value in supernet.state_dict().items())


def test_shrinking_goes_from_the_largest_to_all_members() -> None:
    found = phases(ELASTIC)
    assert [name for name, _ in found] == ["largest", "kernel", "depth 1", "depth 2", "width 1", "width 2"]
    first, last = found[0][1], found[-1][1]
    assert (first.kernels, first.expands, first.depths) == ((7,), (6,), (3,))
    assert {*last.kernels} == {*KERNELS} and {*last.expands} == {*EXPANDS} and {*last.depths} == {1, 2, 3}
    assert all(phase.resolutions == ELASTIC.resolutions for _, phase in found)


def test_the_papers_space_and_its_published_members_have_their_sizes() -> None:
    full = Elastic(KERNELS, EXPANDS, DEPTHS, RESOLUTIONS)
    assert member_count(Elastic(KERNELS, EXPANDS, DEPTHS, (224,)), 5) == (9**2 + 9**3 + 9**4) ** 5  # 2 x 10^19
    sizes = {name: measured(on_meta(published_subnet(name)), 192) for name in ("EEEA_C1", "EEEA_C2")}
    assert sizes == {"EEEA_C1": (5_068_128, 135_518_720), "EEEA_C2": (5_995_904, 215_040_256)}
    with torch.device("meta"):
        network = Supernet(full, Design())
    assert network.place(published_subnet("EEEA_C1"), 12) == 20  # the last stage's fourth block
    state = network.state_of(published_subnet("EEEA_C2"))
    wanted = on_meta(published_subnet("EEEA_C2")).state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in wanted.items()}


def test_taps_of_a_subnet_have_the_strides_of_section_4_3() -> None:
    choice = published_subnet("EEEA_C1")
    with torch.device("meta"):
        network: nn.Module = Subnet.of(choice)
        maps = network.features(torch.empty(1, 3, 320, 320), (sum(choice.depths[:2]), sum(choice.depths[:4])))  # type: ignore[operator]
    assert [tuple(one.shape[1:]) for one in maps] == [(40, 40, 40), (112, 20, 20), (960, 10, 10)]
