"""Facts about frequencies, the adaptation loss and frozen convolutions that hold for any picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.metrics.perceptual import perceptual_distance
from hipa.analyse import Exchange, compare
from hipa.config import LossConfig
from hipa.dists import C1, C2, L2Pool, _Similarity, dists
from hipa.frequency import coherence, exchanged, high_pass, low_pass, relative_error
from hipa.frozen import FrozenConv2d, spare_memory
from hipa.losses import AdaptationLoss, fourier_loss
from tests.refusals import refused

X, Y = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EDGES = [0.5, 2.0, 4.0, 12.0]


def loss_of(**options: object) -> AdaptationLoss:
    return AdaptationLoss(LossConfig(**options), lambda z: 2 * z - 1, torch.device("cpu"))  # type: ignore[arg-type]


def test_the_fourier_loss_is_the_squared_difference_of_high_pass_pictures() -> None:
    for width in (16, 15):
        x, y = X[..., :width], Y[..., :width]
        wanted = (high_pass(x, 2) - high_pass(y, 2)).square().mean()
        torch.testing.assert_close(fourier_loss(x, y, 2), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(low_pass(X, 3) + high_pass(X, 3), X)
    wide = high_pass(X, 3, gaussian=True)
    assert fourier_loss(X, torch.zeros_like(X), 3, gaussian=True) == wide.square().mean()


def test_a_share_of_an_odd_height_is_a_whole_number_of_cycles() -> None:
    x, y = torch.rand(2, 1, 3, 45, 31)
    for cycles in (13, 15):
        found = loss_of(radius=cycles / 45, spatial="mse").of_pictures(x, y)["fourier"]
        assert found == fourier_loss(x, y, cycles) != fourier_loss(x, y, cycles - 1e-6)
    alone = X[:1, :, :15, :11]  # a batch of one, no side even
    assert all(bool(torch.isfinite(part)) for part in loss_of()(alone, Y[:1, :, :15, :11]).values())


def test_low_frequencies_of_one_and_high_ones_of_the_other_make_either_picture_at_the_ends() -> None:
    torch.testing.assert_close(exchanged(X, Y, 100), X, rtol=1e-5, atol=1e-5)
    mixed = exchanged(X, Y, 4)
    torch.testing.assert_close(low_pass(mixed, 4), low_pass(X, 4), rtol=1e-4, atol=1e-5)


def test_coherence_is_one_for_equal_pictures_and_nothing_for_noise_of_any_energy() -> None:
    torch.testing.assert_close(coherence(X, X, EDGES), torch.ones(3))
    torch.testing.assert_close(coherence(3 * X, X, EDGES), torch.ones(3))
    many = torch.randn(2, 400, 3, 8, 8)
    assert float(coherence(10 * many[0], many[1], [0.5, 3.0, 6.0]).abs().max()) < 0.03
    torch.testing.assert_close(relative_error(X, X, EDGES), torch.zeros(3))


def test_each_switch_leaves_out_or_changes_its_part_alone() -> None:
    whole = loss_of()(X, Y)
    assert set(whole) == {"loss", "spatial", "fourier", "edge"}
    assert float(whole["loss"]) == pytest.approx(float(whole["spatial"] + whole["fourier"] + whole["edge"]))
    assert loss_of(weight=0.0)(X, Y)["loss"] == whole["spatial"]
    ten = loss_of(weight=10.0)(X, Y)
    assert float(ten["loss"] - ten["spatial"]) == pytest.approx(10 * float(whole["loss"] - whole["spatial"]), rel=1e-4)
    assert set(loss_of(fourier="none", edge="none")(X, Y)) == {"loss", "spatial"}
    assert loss_of(spatial="mse")(X, Y)["spatial"] == pytest.approx(float((X - Y).square().mean()))
    for options in ({"edge": "dists"}, {"fourier": "l1_complex"}, {"fourier": "l1_amplitude"}, {"spatial": "lpips"}):
        changed = loss_of(**options)(X, Y)
        differing = [name for name in ("spatial", "fourier", "edge") if changed[name] != whole[name]]
        assert differing == [next(iter(options))]
    latents = loss_of(space="latents", spatial="mse")(X, Y)["spatial"]
    assert latents == pytest.approx(float((X - Y).square().mean()))


def test_a_known_picture_and_a_decoder_run_twice_give_the_same_loss_and_gradient() -> None:
    found = []
    for recompute, picture in ((False, None), (False, Y), (True, None)):
        x = X.clone().requires_grad_()
        loss = loss_of(recompute=recompute)(x, Y, picture)["loss"]
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-8)


def test_outside_of_its_range_a_picture_still_has_a_gradient() -> None:
    x = (X + 2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of()(x, Y)["loss"], x)
    assert float(gradient.abs().min(1).values.max()) > 0 and bool(torch.isfinite(gradient).all())


def test_dists_is_zero_for_equal_pictures_and_needs_vgg() -> None:
    network = dists("random")
    assert float(network(X, X).abs().max()) < 1e-5 and float(network(X, Y).min()) > 0.01


def test_published_channel_weights_stand_in_a_file_beside_the_trunks(tmp_path: Path) -> None:
    trunk = perceptual_distance("random").net.state_dict()
    torch.save({key: value for key, value in trunk.items() if key.startswith("features")}, tmp_path / "vgg16.pth")
    plain = dists(str(tmp_path / "vgg16.pth"))
    count = plain.alpha.numel()
    alpha, beta = torch.rand(2, 1, count, 1, 1)
    torch.save({"alpha": alpha, "beta": beta}, tmp_path / "weights.pt")
    network = dists(f"{tmp_path / 'vgg16.pth'}, {tmp_path / 'weights.pt'}")
    assert torch.equal(network.alpha, alpha) and torch.equal(network.beta, beta)
    assert float(network(X, X).abs().max()) < 1e-5 and not torch.allclose(network(X, Y), plain(X, Y))
    for wrong in ({"alpha": alpha}, {"alpha": alpha[:, :9], "beta": beta[:, :9]}):
        torch.save(wrong, tmp_path / "weights.pt")
        refused(
            f"expected alpha and beta with {count} each", dists, f"{tmp_path / 'vgg16.pth'},{tmp_path / 'weights.pt'}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_convolution_is_the_same_function_with_the_same_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    x, found = torch.randn(2, 3, 9, 7), []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = plain(leaf)
        found.append((out, torch.autograd.grad(out.float().square().sum(), leaf)[0]))
        spare_memory(plain)
    assert type(plain[0]) is FrozenConv2d
    for ours, theirs in zip(found[1], found[0]):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_frozen_convolutions_keep_no_input_and_trained_ones_stay_what_they_are() -> None:
    from common.costs import kept_bytes

    network = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))).requires_grad_(False)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    before = kept_bytes(lambda: network(x), network.parameters())
    assert spare_memory(network) == 4
    after = kept_bytes(lambda: network(x), network.parameters())
    assert before >= 3 * x.nbytes and after == 0
    assert spare_memory(nn.Conv2d(3, 3, 1)) == 0


def test_comparing_a_set_with_itself_finds_nothing() -> None:
    images = (X.repeat(3, 1, 1, 1) * 255).byte()
    from common.metrics.judge import judge_of

    found = compare(images, images, images, judge_of("shapes64"), 2.0)
    assert max(found["error"]) == 0 and found["fd_one"] == pytest.approx(0, abs=1e-4)
    assert found["power_one"] == found["power_many"] == found["power_data"]
    assert found["share_one"] == found["share_many"]
    exchange = Exchange(images, 255 - images, images, judge_of("shapes64"))
    assert exchange.turning_radius() is not None or exchange.at(1)["fd_low_one_high_many"] > 0


def test_the_written_gradients_of_dists_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 3, 6, 7, dtype=torch.float64)
    alpha, beta = torch.rand(2, 3, dtype=torch.float64)
    for a, b in ((x.requires_grad_(), y), (x, y.clone().requires_grad_())):
        assert torch.autograd.gradcheck(lambda f, g: _Similarity.apply(f, g, alpha, beta), (a, b))
    pool = L2Pool(3).double()
    assert torch.autograd.gradcheck(pool, (x + 0.1,))
    square = F.conv2d(x.square(), pool.filter, stride=2, padding=1, groups=3)
    torch.testing.assert_close(pool(x), (square + 1e-12).sqrt(), rtol=0, atol=0)
    mean, var = x.mean((2, 3)), x.var((2, 3), correction=0)
    means, other = y.mean((2, 3)), y.var((2, 3), correction=0)
    covariance = (x * y).mean((2, 3)) - mean * means
    texture = (2 * mean * means + C1) / (mean**2 + means**2 + C1)
    structure = (2 * covariance + C2) / (var + other + C2)
    torch.testing.assert_close(
        _Similarity.apply(x, y, alpha, beta), (alpha * texture + beta * structure).sum(1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"spatial": "mse", "fourier": "l1_complex", "edge": "dists"}, {"weight": 0.0}])
def test_a_loss_taken_a_few_pictures_at_a_time_is_that_of_the_batch(options: dict[str, object]) -> None:
    calls: list[int] = []

    def decode(part: torch.Tensor) -> torch.Tensor:
        calls.append(len(part))
        return 2 * part.square() - 1

    results = []
    for at_once, expected in ((0, [4]), (3, [3, 1])):
        calls.clear()
        z = X.clone().requires_grad_()
        loss = AdaptationLoss(LossConfig(at_once=at_once, **options), decode, torch.device("cpu"))  # type: ignore[arg-type]
        parts = loss(z, Y, Y)
        (3 * parts["loss"]).backward()
        results.append(({name: float(value.detach()) for name, value in parts.items()}, z.grad))
        assert calls == expected
    (whole, gradient), (part, part_gradient) = results
    assert part == pytest.approx(whole, rel=1e-5)
    assert part_gradient is not None and gradient is not None
    assert float((part_gradient - gradient).norm() / gradient.norm()) < 1e-4  # sums in another order
    with torch.no_grad():  # nothing to go back through: all at once
        assert float(loss(X, Y, Y)["loss"]) == pytest.approx(whole["loss"], rel=1e-5)
    assert calls[2:] == [4]
