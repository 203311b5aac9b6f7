"""The search network: partial channels, edge normalisation, and the batched form beside the plain one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from common.batch_norm import synchronised_statistics
from common.costs import kept_bytes
from common.errors import UserError
from pc_darts.config import SearchConfig, Stem
from pc_darts.operations import FactorizedReduce, frozen_statistics, rearrange
from pc_darts.search_space import ARCHITECTURE, MixedOp, SearchNetwork


def batch(side: int, count: int = 4, channels: int = 3, height: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, height or side, side, generator=generator)
    return x.double(), torch.randint(0, 10, (count,), generator=generator)


@pytest.mark.parametrize(
    ("config", "side", "height"),
    [
        (SearchConfig(8, 2, nodes=4, partial=4), 8, 0),
        (SearchConfig(8, 2, nodes=2, partial=1), 8, 0),
        (SearchConfig(8, 2, nodes=3, partial=2, sampling="shift"), 9, 7),
        (SearchConfig(8, 2, nodes=2, partial=2, sampling="random", edge_normalisation=False), 8, 0),
        (SearchConfig(16, 1, nodes=2, partial=8, stem="imagenet"), 64, 0),
        (SearchConfig(32, 1, nodes=2, partial=2), 8, 0),
    ],
    ids=["paper", "darts", "shift, odd sides", "random, no betas", "imagenet", "wide"],
)
def test_the_batched_form_has_the_same_output_gradients_and_statistics(
    config: SearchConfig, side: int, height: int
) -> None:
    torch.manual_seed(0)
    plain = SearchNetwork(config, fused=False).double()
    fused = copy.deepcopy(plain).set_fused(True)
    x, y = batch(side, height=height)
    losses = []
    for network in (plain, fused):
        torch.manual_seed(3)  # of random sampling
        losses.append(F.cross_entropy(network(x), y))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, name
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-11 * largest, msg=lambda m: f"{name}: {m}")  # noqa: B023
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_running_statistics_survive_a_change_of_precision_and_loading() -> None:
    torch.manual_seed(0)
    network = SearchNetwork(SearchConfig(8, 1, nodes=2))
    x, _ = batch(8)
    network(x.float())
    before = copy.deepcopy(network.state_dict())
    network.double()(x)
    assert not torch.equal(
        network.state_dict()["cells.0._ops.1._ops.4.op.3.running_mean"].float(),
        before["cells.0._ops.1._ops.4.op.3.running_mean"],
    )
    network.float().load_state_dict(before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    copied = copy.deepcopy(network)
    copied(x.float())
    assert torch.equal(
        network.state_dict()["cells.0._ops.1._ops.4.op.3.running_mean"],
        before["cells.0._ops.1._ops.4.op.3.running_mean"],
    )


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_statistics_do_not_move(fused: bool) -> None:
    network = SearchNetwork(SearchConfig(8, 1, nodes=2), fused)
    before = {name: value.clone() for name, value in network.named_buffers()}
    x = batch(8)[0].float()
    with frozen_statistics():
        network(x)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    network(x)
    assert not any(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_only_one_kth_of_the_channels_is_processed_and_the_others_bypass() -> None:
    op = MixedOp(16, 1, partial=4).eval()
    x = torch.randn(2, 16, 6, 6)
    weights = torch.zeros(8)
    weights[0] = 1.0  # "none"
    y = op(x, weights)
    assert torch.equal(y.view(2, 4, 4, 6, 6)[:, :, 1:].transpose(1, 2).reshape(2, 12, 6, 6), x[:, 4:])
    assert not y[:, ::4].any()


def test_every_channel_is_processed_within_k_edges_of_a_shift_and_spread_by_a_shuffle() -> None:
    x = torch.arange(16.0).view(1, 16, 1, 1)
    seen: set[int] = set()
    for _ in range(4):
        seen |= set(x[0, :4].flatten().int().tolist())
        x = rearrange(x, 4, "shift", None)
    assert seen == set(range(16))
    shuffled = rearrange(torch.arange(16.0).view(1, 16, 1, 1), 4, "shuffle", None)
    assert shuffled[0, :4].flatten().tolist() == [0, 4, 8, 12]
    order = torch.randperm(16)
    assert torch.equal(rearrange(x[:, order], 4, "random", order), x)


def test_without_edge_normalisation_betas_are_not_searched() -> None:
    network = SearchNetwork(SearchConfig(8, 1, nodes=2, edge_normalisation=False))
    assert len(network.architecture()) == 2 and {"betas_normal", "betas_reduce"} <= set(network.state_dict())
    assert torch.equal(network.edge_weights(False), torch.ones(5))
    names = {id(p) for p in network.weights()}
    assert not names & {id(p) for p in (network.alphas_normal, network.betas_normal)}


def test_saved_activations_fall_with_k() -> None:
    x, y = batch(8, count=8)
    sizes = []
    for partial in (1, 2, 4):
        network = SearchNetwork(SearchConfig(8, 2, partial=partial), fused=False).double()
        sizes.append(kept_bytes(lambda: F.cross_entropy(network(x), y), network.parameters()))  # noqa: B023
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 0.45 * sizes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 6, "partial": 4}, "multiple of partial"),
        ({"channels": 4, "partial": 8}, "multiple of partial"),
        ({"sampling": "sorted"}, "shuffle, shift or random"),
        ({"stem": "mnist"}, "cifar or imagenet"),
        ({"cells": 0}, "--search.cells 0: expected a whole number of at least 1"),
    ],
)
def test_impossible_search_networks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SearchConfig(**options)


def test_a_reduction_of_an_odd_number_of_processed_channels_is_refused() -> None:
    FactorizedReduce(2, 2, affine=False)
    with pytest.raises(UserError, match="even number"):
        FactorizedReduce(3, 3, affine=False)


def gradients(x: Tensor, y: Tensor, share: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    network = SearchNetwork(SearchConfig(8, 1, nodes=2)).double()
    (F.cross_entropy(network(x), y) / share).backward()
    parts = [p.grad for p in network.parameters() if p.grad is not None]
    return parts, [value.clone() for value in network.buffers()]


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, y = batch(8)
    with synchronised_statistics():
        found, buffers = gradients(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2], 2)
    for tensor in found:
        dist.all_reduce(tensor)
    torch.save([*found, *buffers], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_synchronised_statistics_compute_what_one_does(tmp_path: Path) -> None:
    mp.spawn(one_process, (str(tmp_path),), nprocs=2)
    x, y = batch(8)
    expected = gradients(x, y, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(found, [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("nodes", "stem"), [(2, "imagenet"), (3, "cifar"), (5, "cifar")])
@pytest.mark.parametrize("fused", [False, True])
def test_architecture_gradients_of_any_number_of_nodes_hold_in_float32(nodes: int, stem: Stem, fused: bool) -> None:
    """Each gradient to 1e-5 of its largest entry in float64, computed operation by operation."""
    torch.manual_seed(1)
    config = SearchConfig(channels=8, cells=3, nodes=nodes, partial=4 if stem == "cifar" else 2, stem=stem)
    network = SearchNetwork(config, fused=False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            affine = parameter.dim() == 1 and name.endswith("weight")
            scale = 1.0 if name in ARCHITECTURE else 0.3 if parameter.dim() > 1 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape) + float(affine))
    side = 16 if stem == "cifar" else 64
    x_BCHW, y_B = torch.randn(4, 3, side, side), torch.randint(10, (4,))
    exact = copy.deepcopy(network).double().train()
    F.cross_entropy(exact(x_BCHW.double()), y_B).backward()
    network.set_fused(fused).train()
    F.cross_entropy(network(x_BCHW), y_B).backward()
    for name in ARCHITECTURE:
        expected, found = exact.get_parameter(name).grad, network.get_parameter(name).grad
        assert expected is not None and found is not None
        wrong = float((found.double() - expected).abs().max() / expected.abs().max())
        assert wrong <= 1e-5, f"{name}: {wrong:.1e} of its largest entry"
    assert network.genotype().nodes == nodes
