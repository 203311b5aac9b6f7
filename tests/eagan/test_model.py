"""The networks beyond the records: inheritance, equal forms, who gets gradients, spectral norm."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import nn

from eagan.config import NetworkConfig
from eagan.genotypes import DISCRIMINATOR, GENERATOR, PUBLISHED
from eagan.model import (
    Discriminator,
    Generator,
    SimpleDiscriminator,
    SpectralConv,
    averaged,
    inherit,
    sizes,
    supernet_names,
    write_out,
)
from eagan.training import adam
from tests.refusals import refused

SMALL = NetworkConfig(6, 6, 9, 2)


def test_published_networks_have_the_papers_sizes() -> None:
    """7.14 M and 11.55 M (section 5.1); 0.91 M and 1.58 M."""
    cifar, stl = NetworkConfig(), NetworkConfig(bottom_width=6)
    assert sizes(cifar, generator=PUBLISHED["best_G"]) == 7_142_403
    assert sizes(stl, generator=PUBLISHED["best_G"]) == 11_550_723
    assert sizes(cifar, discriminator=PUBLISHED["cifar10_D"]) == 906_240
    assert sizes(stl, discriminator=PUBLISHED["stl10_D"]) == 1_578_112
    assert sizes(cifar, discriminator=PUBLISHED["base_D"]) == 1_053_824
    with torch.device("meta"):
        assert sum(p.numel() for p in Generator(cifar).parameters()) == 72_776_963
        assert sum(p.numel() for p in Discriminator(cifar).parameters()) == 23_806_592
        assert sum(p.numel() for p in SimpleDiscriminator(cifar).parameters()) == 921_920


@pytest.mark.parametrize("kind", ["generator", "discriminator"])
def test_a_network_that_inherits_equals_the_supernets_own(kind: str) -> None:
    space, network = (GENERATOR, Generator) if kind == "generator" else (DISCRIMINATOR, Discriminator)
    supernet = network(SMALL).eval()
    x = torch.randn(3, 9) if kind == "generator" else torch.randn(3, 3, 16, 16)
    outputs = []
    for seed in range(4):
        genes = space.sample(Random(seed))
        alone = network(SMALL, genes).eval()
        inherit(alone, supernet.state_dict())
        with torch.no_grad():
            outputs.append(supernet(x, genes))
            torch.testing.assert_close(alone(x), outputs[-1], rtol=0, atol=1e-6)
        assert set(supernet_names(alone).values()) <= set(supernet.state_dict())
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_what_inherits_has_memory_of_its_own() -> None:
    supernet = Generator(SMALL)
    alone = Generator(SMALL, PUBLISHED["best_G"])
    inherit(alone, supernet.state_dict())
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for parameter in alone.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items())


@pytest.mark.parametrize("genes", ["best_G", "transposed"])
def test_the_equal_forms_have_equal_gradients(genes: str) -> None:
    own = (
        PUBLISHED["best_G"]
        if genes == "best_G"
        else ((2, 0, 3, 4, 0, 5, 6), (0, 1, 6, 0, 2, 0, 1), (1, 2, 0, 5, 4, 1, 0))
    )
    torch.manual_seed(1)
    generator, discriminator = Generator(SMALL, own).double(), Discriminator(SMALL, PUBLISHED["cifar10_D"]).double()
    z = torch.randn(4, 9, dtype=torch.float64)
    found = []
    for form in ("equal", "written out"):
        if form == "written out":
            write_out(generator)
            write_out(discriminator)
        parameters = [*generator.parameters(), *discriminator.parameters()]
        loss = discriminator.eval()(generator.eval()(z)).square().mean()
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for ours, theirs in zip(*found):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", [6, 7])
def test_one_convolution_of_4x4_is_3x3_and_the_mean_of_2x2(side: int) -> None:
    x, weight, bias = torch.randn(2, 3, side, side), torch.randn(5, 3, 3, 3), torch.randn(5)
    wanted = nn.functional.avg_pool2d(nn.functional.conv2d(x, weight, bias, padding=1), 2)
    found = nn.functional.conv2d(x, averaged(weight), bias, stride=2, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_only_the_sampled_path_has_gradients_and_moves() -> None:
    supernet, genes = Generator(SMALL), GENERATOR.sample(Random(3))
    optimiser = adam(supernet, 0.1)
    before = {name: value.clone() for name, value in supernet.named_parameters()}
    supernet(torch.randn(3, 9), genes).square().mean().backward()
    optimiser.step()
    path = set(supernet_names(Generator(SMALL, genes)).values())
    for name, parameter in supernet.named_parameters():
        assert name in path or (parameter.grad is None and torch.equal(before[name], parameter)), name
    assert len(optimiser.state) < len(before)


def test_spectral_norm_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    ours = SpectralConv(3, 5, 3, padding=1)
    theirs = nn.utils.spectral_norm(nn.Conv2d(3, 5, 3, padding=1))
    ours.normalise_weight()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.weight_u, theirs.weight_u, rtol=0, atol=1e-7)
    ours.eval()
    before = ours.weight_u.clone()
    ours(torch.randn(2, 3, 8, 8))
    assert torch.equal(before, ours.weight_u)


def test_the_authors_switch_leaves_spectral_norm_out_of_the_first_block_and_the_last_layer_alone() -> None:
    torch.manual_seed(0)
    with_norm = Discriminator(SMALL, PUBLISHED["cifar10_D"]).eval()
    without = Discriminator(SMALL, PUBLISHED["cifar10_D"], spectral=False).eval()
    state = with_norm.state_dict()
    for name in ("block1.c1", "block1.c2", "block1.c_sc", "l5"):
        state[f"{name}.weight"] = with_norm.get_submodule(name).normalised()  # type: ignore[operator]
        for part in ("orig", "u", "v"):
            del state[f"{name}.weight_{part}"]
    without.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(without(x), with_norm(x))
    torch.testing.assert_close(write_out(without)(x), with_norm(x))


def test_spectral_norm_stays_in_float32_under_autocast() -> None:
    discriminator = Discriminator(SMALL, PUBLISHED["base_D"])
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    wanted = discriminator.block1.c1.normalised()
    discriminator.load_state_dict(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(discriminator.block1.c1.normalised(), wanted)
        logits = discriminator(torch.randn(2, 3, 16, 16))
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in discriminator.parameters())


def test_a_network_of_another_side_and_a_latent_that_cannot_be_shared_out() -> None:
    assert Generator(NetworkConfig(4, 4, 6, 6), PUBLISHED["best_G"])(torch.randn(2, 6)).shape == (2, 3, 48, 48)
    refused("--network.latent_dim 10: expected a multiple of three", NetworkConfig, 4, 4, 10, 4)
