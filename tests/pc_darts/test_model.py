"""Final networks: published sizes, auxiliary head, drop path, and any size of image."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from pc_darts.config import FinalConfig
from pc_darts.counting import count, multiply_adds
from pc_darts.genotypes import PUBLISHED
from pc_darts.model import FinalNetwork, pool_to_2x2
from pc_darts.operations import BatchNorm, drop_path


@pytest.mark.parametrize(
    ("name", "stem", "channels", "layers", "parameters", "macs"),
    [
        # Counted with the authors' code.
        ("PC_DARTS_cifar", "cifar", 36, 20, 3_634_678, 556.7),
        ("PC_DARTS_image", "cifar", 36, 20, 3_721_510, 570.5),
        ("PC_DARTS_cifar", "imagenet", 48, 14, 5_270_560, 571.1),
        ("PC_DARTS_image", "imagenet", 48, 14, 5_342_464, 581.6),
        # Sizes in quark0/darts' tables: 3.3 M; NASNet-A 3.3 M and AmoebaNet-A 3.2 M at the same depth and width.
        ("DARTS_V2", "cifar", 36, 20, 3_349_342, 528.4),
    ],
)
def test_published_networks_have_the_published_sizes(
    name: str, stem: str, channels: int, layers: int, parameters: int, macs: float
) -> None:
    side, classes = (224, 1000) if stem == "imagenet" else (32, 10)
    with torch.device("meta"):
        network = FinalNetwork(PUBLISHED[name], FinalConfig(channels, layers, stem, classes))  # type: ignore[arg-type]
    found = count(network, side)
    assert found.parameters == parameters
    assert round(found.macs / 1e6, 1) == macs


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    ("stem", "side"), [("cifar", 32), ("cifar", 8), ("cifar", 28), ("cifar", 15), ("imagenet", 64)]
)
def test_every_published_cell_trains_at_any_size_of_image(name: str, stem: str, side: int) -> None:
    torch.manual_seed(0)
    network = FinalNetwork(PUBLISHED[name], FinalConfig(4, 3, stem, 5, True, 1))  # type: ignore[arg-type]
    network.drop_path_probability = 0.2
    logits, auxiliary = network.forward_with_auxiliary(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 5) and auxiliary is not None and auxiliary.shape == (2, 5)
    (logits.sum() + auxiliary.sum()).backward()
    with torch.no_grad():
        logits, auxiliary = network.eval().forward_with_auxiliary(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 5) and auxiliary is None


def test_the_auxiliary_head_is_not_counted_with_the_network() -> None:
    with torch.device("meta"):
        network = FinalNetwork(PUBLISHED["PC_DARTS_cifar"], FinalConfig(auxiliary=True))
    assert count(network, 32).parameters == 3_634_678
    assert count(network, 32).parameters_with_auxiliary == 4_111_104


def test_norms_count_two_an_element() -> None:
    network = FinalNetwork(PUBLISHED["DARTS_V1"], FinalConfig(4, 1))
    norm = BatchNorm(6)
    assert multiply_adds(norm, torch.randn(2, 6, 5, 5)) == (0, 600)
    found = count(network, 8)
    assert found.macs < found.macs_with_norms < 2 * found.macs


def test_windows_of_the_auxiliary_head_are_the_authors() -> None:
    for side, stride in ((8, 3), (7, 2)):
        x = torch.randn(1, 2, side, side)
        torch.testing.assert_close(pool_to_2x2(x), torch.nn.functional.avg_pool2d(x, 5, stride))
    assert pool_to_2x2(torch.randn(1, 2, 1, 1)).shape[2:] == pool_to_2x2(torch.randn(1, 2, 4, 5)).shape[2:] == (2, 2)


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 2, 2), 0.3)
    assert set(dropped.flatten(1).std(dim=1).tolist()) == {0.0}
    assert abs(float(dropped.mean()) - 1) < 0.05 and abs(float((dropped == 0).float().mean()) - 0.3) < 0.03


def test_drop_path_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = FinalNetwork(PUBLISHED["DARTS_V2"], FinalConfig(4, 2, classes=5))
    x = torch.randn(4, 3, 8, 8)
    plain = network(x)
    network.drop_path_probability = 0.9
    assert not torch.allclose(network(x), plain)
    network.eval()
    assert torch.equal(network(x), network(x))


def test_impossible_final_networks_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        FinalConfig(4, 0)
    with pytest.raises(UserError, match="cifar or imagenet"):
        FinalConfig(4, 2, stem="mnist")  # type: ignore[arg-type]
