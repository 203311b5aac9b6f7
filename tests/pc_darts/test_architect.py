"""The architecture step: what it moves, what it leaves, and that the second order is the gradient it claims to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pc_darts.architect import Architect
from pc_darts.config import SearchConfig
from pc_darts.search_space import SearchNetwork


def setup(sampling: str = "shuffle", fused: bool = True, **options: float) -> tuple:
    torch.manual_seed(0)
    network = SearchNetwork(SearchConfig(4, 1, nodes=2, partial=2, sampling=sampling, classes=3), fused).double()  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(network.weights(), 0.1, momentum=0.9, weight_decay=3e-4)
    x, y = torch.randn(2, 6, 3, 8, 8).double(), torch.randint(0, 3, (2, 6))
    F.cross_entropy(network(x[0]), y[0]).backward()
    optimiser.step()  # momentum buffers
    optimiser.zero_grad()
    return network, optimiser, Architect(network, optimiser, **options), x, y  # type: ignore[arg-type]


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_weights_and_statistics_are_as_before(unrolled: bool, sampling: str) -> None:
    network, _, architect, x, y = setup(sampling)
    names = ("alphas", "betas")
    before = {n: v.clone() for n, v in network.state_dict().items()}
    architect.step(x[0], y[0], x[1], y[1], 0.1, unrolled)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(names), name
    assert all(weight.grad is None for weight in network.weights())


def test_the_second_order_gradient_is_that_of_the_unrolled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the exact total derivative by autograd, through the plain form, which can be differentiated twice."""
    monkeypatch.setattr("pc_darts.architect.RADIUS", 1e-6)  # the finite difference becomes exact in float64
    network, optimiser, architect, x, y = setup(fused=False)
    weights = [(n, p) for n, p in network.named_parameters() if not n.startswith(("alphas", "betas"))]
    architecture = network.architecture()
    at_weights = torch.autograd.grad(F.cross_entropy(network(x[0]), y[0]), [p for _, p in weights], create_graph=True)
    moved = {}
    for (name, parameter), gradient in zip(weights, at_weights, strict=True):
        change = gradient + 3e-4 * parameter + 0.9 * optimiser.state[parameter]["momentum_buffer"]
        moved[name] = parameter - 0.1 * change
    loss = F.cross_entropy(torch.func.functional_call(network, moved, (x[1],)), y[1])
    exact = torch.autograd.grad(loss, architecture, materialize_grads=True)
    constant = {name: value.detach() for name, value in moved.items()}
    ahead = F.cross_entropy(torch.func.functional_call(network, constant, (x[1],)), y[1])
    direct = torch.autograd.grad(ahead, architecture, materialize_grads=True)  # without the second-order term
    architect.step(x[0], y[0], x[1], y[1], 0.1, unrolled=True)
    errors = []
    for parameter, expected in zip(architecture, exact, strict=True):
        assert parameter.grad is not None
        errors.append(parameter.grad - expected)
    second = torch.cat([error.flatten() for error in errors]).norm()
    first = torch.cat([(a - b).flatten() for a, b in zip(direct, exact, strict=True)]).norm()
    assert float(second) < 1e-3 * float(first), (float(second), float(first))
    assert max(float(expected.norm()) for expected in exact) > 1e-4


def test_the_clip_bounds_the_gradient() -> None:
    _, _, architect, x, y = setup(clip=1e-3)
    architect.step(None, None, x[1], y[1])
    norm = torch.stack([p.grad.norm() for p in architect.network.architecture()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
