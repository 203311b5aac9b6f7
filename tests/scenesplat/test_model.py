"""The encoder: sparse convolution, attention over patches, and what its answers may depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from scenesplat.model import PointTransformer, SparseConv, grouped
from scenesplat.serialization import ORDERS
from scenesplat.structure import Structure
from tests.scenesplat.golden_cases import tiny_network
from tests.scenesplat.test_structure import cube, some_voxels


@pytest.mark.parametrize("size", [3, 5])
def test_on_a_full_grid_the_sparse_convolution_is_the_dense_one(size: int) -> None:
    grid = cube(2)
    module = SparseConv(3, 5, size, True)
    x = torch.randn(len(grid), 3, requires_grad=True)
    level = Structure.of(grid, torch.tensor([len(grid)]), ORDERS, []).levels[0]
    found = module(x, level)
    image = x.t().reshape(1, 3, 4, 4, 4)
    dense = F.conv3d(image, module.weight.permute(0, 4, 1, 2, 3), module.bias, padding=size // 2)
    wanted = dense.flatten(2)[0].t()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), [x, *module.parameters()])
    for a, b in zip(gradients, torch.autograd.grad(wanted.square().sum(), [x, *module.parameters()])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_convolutions_gradient_is_that_of_finite_differences() -> None:
    level = Structure.of(some_voxels(12, 3), torch.tensor([7, 12]), ORDERS, []).levels[0]
    module = SparseConv(2, 3, 3, False).double()
    x = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x, level))

    assert torch.autograd.gradcheck(call, (x, module.weight))


def test_spconv_gives_the_same_where_it_is_installed() -> None:
    pytest.importorskip("spconv")
    level = Structure.of(some_voxels(200, 9), torch.tensor([120, 200]), ORDERS, []).levels[0]
    ours = SparseConv(6, 7, 3, True)
    theirs = SparseConv(6, 7, 3, True, "spconv")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(200, 6)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, level), ours(x, level), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_groups_are_reduced_one_by_one(reduce: str) -> None:
    x, cluster = torch.randn(9, 4), torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])
    wanted = [x[cluster == group] for group in range(3)]
    rows = [part.mean(0) if reduce == "mean" else part.max(0).values for part in wanted]
    torch.testing.assert_close(grouped(x, cluster, 3, reduce), torch.stack(rows))


@pytest.fixture(scope="module")
def network() -> PointTransformer:
    torch.manual_seed(1)
    return PointTransformer(tiny_network()).eval()


def test_a_clouds_features_do_not_depend_on_the_others_of_its_batch(network: PointTransformer) -> None:
    first, second = some_voxels(90, 7), some_voxels(40, 30, seed=2)
    x = torch.randn(130, 11)
    with torch.no_grad():
        together = network(x, network.structure(torch.cat([first, second]), torch.tensor([90, 130]), depth=5))
        alone = network(x[:90], network.structure(first, torch.tensor([90]), depth=5))
    torch.testing.assert_close(together[:90], alone, rtol=1e-5, atol=1e-5)


def test_the_order_in_which_voxels_are_given_is_without_effect(network: PointTransformer) -> None:
    grid, x = some_voxels(90, 7), torch.randn(90, 11)
    mixed = torch.randperm(90)
    with torch.no_grad():
        a = network(x, network.structure(grid, torch.tensor([90])))
        b = network(x[mixed], network.structure(grid[mixed], torch.tensor([90])))
    torch.testing.assert_close(a[mixed], b, rtol=1e-5, atol=1e-5)


def test_permuted_orders_are_the_network_with_its_orders_in_that_order(network: PointTransformer) -> None:
    """In every stage the same permutation: as if the options had named the curves so."""
    grid, x, permutation = some_voxels(90, 7), torch.randn(90, 11), torch.tensor([2, 0, 3, 1])
    renamed = PointTransformer(replace(network.options, orders=[ORDERS[i] for i in permutation])).eval()
    renamed.load_state_dict(network.state_dict())
    same = torch.arange(4)
    with torch.no_grad():
        a = network(x, network.structure(grid, torch.tensor([90]), [permutation, same]))
        b = renamed(x, renamed.structure(grid, torch.tensor([90])))
        c = network(x, network.structure(grid, torch.tensor([90])))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a, c, rtol=1e-3, atol=1e-3)


def test_inference_is_equal_to_the_bit_and_training_draws_stochastic_depth(network: PointTransformer) -> None:
    grid, x = some_voxels(90, 7), torch.randn(90, 11)
    structure = network.structure(grid, torch.tensor([90]))
    with torch.no_grad():
        assert torch.equal(network(x, structure), network(x, structure))
        training = PointTransformer(replace(network.options, drop_path=0.9)).train()
        assert not torch.equal(training(x, structure), training(x, structure))


def test_features_and_gradients_stay_finite_where_attributes_are_large(network: PointTransformer) -> None:
    grid, x = some_voxels(90, 7), 1e4 * torch.randn(90, 11)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, network.structure(grid, torch.tensor([90])))
    assert bool(torch.isfinite(found).all())
