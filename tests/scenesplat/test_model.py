"""The encoder: sparse convolution, attention over patches, and what its answers may depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from scenesplat.config import check_network
from scenesplat.model import PointTransformer, SerializedAttention, SparseConv, grouped
from scenesplat.serialization import ORDERS
from scenesplat.structure import Structure
from tests.refusals import refused
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


@pytest.mark.parametrize("reduce", ["mean", "max", "min", "sum"])
def test_groups_are_reduced_one_by_one(reduce: str) -> None:
    x, cluster = torch.randn(9, 4), torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])
    wanted = [x[cluster == group] for group in range(3)]
    rows = [getattr(part, {"max": "amax", "min": "amin"}.get(reduce, reduce))(0) for part in wanted]
    torch.testing.assert_close(grouped(x, cluster, 3, reduce), torch.stack(rows))


@pytest.mark.parametrize(("bias", "scale"), [(True, None), (False, 0.7)])
def test_attention_is_the_softmax_of_scaled_scores_within_a_patch(bias: bool, scale: float | None) -> None:
    options = tiny_network(qkv_bias=bias, qk_scale=scale, attn_drop=0.5, proj_drop=0.5)
    module, x = SerializedAttention(8, 2, 16, 0, options), torch.randn(12, 8)
    assert (module.qkv.bias is not None) == bias
    level = Structure.of(some_voxels(12, 4), torch.tensor([12]), ORDERS, []).levels[0]
    q, k, v = module.qkv(x).unflatten(1, (3, 2, 4)).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) * (4**-0.5 if scale is None else scale)).softmax(2)
    wanted = module.proj((weights @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(module.eval()(x, level), wanted, rtol=1e-5, atol=1e-5)
    dropped = module.train()(x, level)
    assert 0.2 < float((dropped == 0).float().mean()) < 0.8


def test_what_is_dropped_in_training_is_made_up_for_on_average() -> None:
    level = Structure.of(some_voxels(12, 4), torch.tensor([12]), ORDERS, []).levels[0]
    module, x = SerializedAttention(8, 2, 16, 0, tiny_network(attn_drop=0.3)), torch.randn(12, 8)
    with torch.no_grad():
        found = torch.stack([module.train()(x, level) for _ in range(2000)])
        torch.testing.assert_close(found.mean(0), module.eval()(x, level), rtol=0, atol=0.05)
    assert float(found.std(0).max()) > 0.01


def test_without_a_decoder_the_answer_is_the_last_stages() -> None:
    options = tiny_network(dec_depths=[], dec_channels=[], dec_heads=[], dec_patch=[])
    network, grid, x = PointTransformer(options).eval(), some_voxels(90, 7), torch.randn(90, 11)
    assert not [name for name in network.state_dict() if name.startswith("dec")]
    structure = network.structure(grid, torch.tensor([90]))
    with torch.no_grad():
        found = network(x, structure)
        assert torch.equal(found, network.encode(x, structure)[-1])
    assert found.shape == (len(structure.levels[-1].grid_N3), 16)


def test_a_single_voxel_has_features_and_gradients() -> None:
    network, x = PointTransformer(tiny_network(drop_path=0.0)).eval(), torch.randn(1, 11, requires_grad=True)
    found = network(x, network.structure(torch.zeros(1, 3, dtype=torch.long), torch.tensor([1])))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert found.shape == (1, 12) and bool(torch.isfinite(gradient).all()) and bool(gradient.any())


def test_strides_that_are_no_power_of_two_are_refused() -> None:
    refused(
        "--network.strides 3: voxels are joined along each axis by 1, 2, 4", check_network, tiny_network(strides=[3])
    )


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
