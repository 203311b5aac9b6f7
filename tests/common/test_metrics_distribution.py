"""FID, KID, precision/recall and Inception Score against closed forms and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from common.errors import UserError
from common.metrics.distribution import (
    FEW,
    FeatureStats,
    _say_few,
    fid,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
)


def normal(count: int, dim: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStats:
    stats = FeatureStats(len(mean))
    stats.n, stats.mean_D, stats.scatter_DD = 1001, mean.double(), covariance.double() * 1000
    return stats


class PixelFeatures(nn.Module):
    """A tiny linear feature network for both libraries: 3 x 6 x 6 pixels -> 24 features."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(108, self.num_features, generator=torch.Generator().manual_seed(5)) / 10
        self.register_buffer("weight", weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1).float() / 255) @ self.get_buffer("weight")


@pytest.fixture(scope="module")
def two_image_sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (120, 3, 6, 6), generator=generator, dtype=torch.uint8)
    fake = torch.randint(40, 200, (150, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return real, fake


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.5, 1.0, 0.0])
    var_a, var_b = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([9.0, 4.0, 1.0])
    expected = (mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum()
    value = frechet_distance(gaussian(mean_a, var_a.diag()), gaussian(mean_b, var_b.diag()))
    assert value == pytest.approx(expected.item(), abs=1e-9)


def test_frechet_distance_of_non_commuting_covariances_matches_the_two_by_two_formula():
    # tr (S_a S_b)^1/2 = sqrt(tr(S_a S_b) + 2 sqrt(det S_a det S_b)) in two dimensions.
    s_a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    s_b = torch.tensor([[1.0, -0.6], [-0.6, 3.0]], dtype=torch.float64)
    cross = torch.sqrt((s_a @ s_b).trace() + 2 * torch.sqrt(torch.det(s_a) * torch.det(s_b)))
    expected = s_a.trace() + s_b.trace() - 2 * cross
    zero = torch.zeros(2)
    assert frechet_distance(gaussian(zero, s_a), gaussian(zero, s_b)) == pytest.approx(expected.item(), abs=1e-9)


def test_fid_of_large_samples_approaches_the_distance_of_their_gaussians():
    value = fid(normal(20000, 4, 1), normal(20000, 4, 2, mean=0.5, std=2.0))
    assert value == pytest.approx(4 * (0.25 + 1.0), rel=0.05)


@pytest.mark.parametrize(("count", "dim"), [(40, 100), (300, 10)])
def test_fid_of_a_set_with_itself_is_zero(count: int, dim: int):
    x = normal(count, dim, 3)
    assert fid(x, x) < 1e-5


def test_few_sample_path_equals_the_covariance_path():
    real, fake = normal(30, 64, 4), normal(50, 64, 5, mean=0.2, std=1.5)
    slow = frechet_distance(FeatureStats.of(real), FeatureStats.of(fake))
    assert fid(real, fake) == pytest.approx(slow, rel=1e-6)


def test_streamed_and_merged_statistics_equal_those_of_the_whole_set():
    x = normal(101, 7, 6, mean=1000.0)
    left, right = FeatureStats(7), FeatureStats(7)
    for batch in x[:60].split(17):
        left.update(batch)
    right.update(x[60:])
    left.merge(right)
    left.merge(FeatureStats(7))  # an idle worker
    assert left.n == 101
    np.testing.assert_allclose(left.mean_D, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(left.covariance_DD, np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-12)


def test_a_frechet_distance_of_few_images_is_said_to_say_little(capsys: pytest.CaptureFixture[str]) -> None:
    _say_few.cache_clear()
    draw = torch.Generator().manual_seed(0)
    for count in (FEW, 3, 3):
        fid(torch.randn(count, 2, generator=draw), torch.randn(count + 1, 2, generator=draw))
    said = capsys.readouterr()
    assert said.err.count("a Frechet distance of 3 images says little") == 1 and str(FEW) not in said.err
    assert said.out == ""


def test_fid_agrees_with_torchmetrics(two_image_sets):
    real, fake = two_image_sets
    network = PixelFeatures()
    oracle = FrechetInceptionDistance(feature=network, input_img_size=(3, 6, 6))
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    assert fid(network(real), network(fake)) == pytest.approx(oracle.compute().item(), rel=1e-3)


def test_kid_agrees_with_torchmetrics_on_whole_sets(two_image_sets):
    real, fake = two_image_sets
    network = PixelFeatures()
    fake = fake[:120]
    oracle = KernelInceptionDistance(feature=network, subsets=1, subset_size=120)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    expected = oracle.compute()[0].item()
    assert kid(network(real), network(fake)).value == pytest.approx(expected, rel=1e-3)
    assert kid(network(real), network(fake), subsets=1, subset_size=120).value == pytest.approx(expected, rel=1e-3)


def test_kid_of_equal_distributions_is_unbiased_and_its_standard_error_is_honest():
    estimates = [kid(normal(60, 16, 2 * seed), normal(60, 16, 2 * seed + 1, mean=0.0)) for seed in range(60)]
    values = torch.tensor([estimate.value for estimate in estimates])
    assert values.mean().abs() < 3 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()  # a biased (V-statistic) estimate is never negative
    shifted = [kid(normal(60, 16, 2 * seed), normal(60, 16, 2 * seed + 1, mean=0.7)) for seed in range(60)]
    spread = torch.tensor([estimate.value for estimate in shifted]).std().item()
    claimed = sum(estimate.std for estimate in shifted) / len(shifted)
    assert 0.7 < claimed / spread < 1.4


def test_kid_over_subsets_repeats_for_a_seed_and_centres_on_the_full_estimate():
    real, fake = normal(300, 8, 1), normal(300, 8, 2, mean=0.5)
    a, b = (kid(real, fake, subsets=40, subset_size=100, seed=7) for _ in range(2))
    assert a == b
    assert a.std > 0
    assert a.value == pytest.approx(kid(real, fake).value, abs=3 * a.std / math.sqrt(40))


def test_precision_and_recall_of_a_set_with_itself_are_one():
    x = normal(50, 5, 8)
    assert precision_recall(x, x).precision == precision_recall(x, x).recall == 1.0


def test_precision_and_recall_of_distant_sets_are_zero():
    result = precision_recall(normal(50, 5, 8), normal(50, 5, 9, mean=100.0))
    assert (result.precision, result.recall, result.density, result.coverage) == (0, 0, 0, 0)


def test_precision_and_recall_of_points_on_a_line_are_those_counted_by_hand():
    # k = 1: every real ball reaches 1, every fake ball 0.5.
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    fake = torch.tensor([[0.25], [0.75], [9.0], [9.5]])
    result = precision_recall(real, fake, k=1)
    assert result.precision == 0.5  # 0.25 and 0.75
    assert result.recall == 0.5  # 0 and 1 lie within 0.5 of a fake point
    assert result.density == pytest.approx((2 + 2) / 4)  # balls around 0.25: those of 0 and 1; around 0.75: the same
    assert result.coverage == 0.5


def test_dropping_a_mode_lowers_recall_and_adding_a_false_mode_lowers_precision():
    mode_a, mode_b = normal(100, 4, 1), normal(100, 4, 2, mean=50.0)
    both = torch.cat([mode_a, mode_b])
    one = torch.cat([normal(100, 4, 3), normal(100, 4, 4)])
    dropped, invented = precision_recall(both, one), precision_recall(one, both)
    assert dropped.recall < 0.6 < dropped.precision
    assert invented.precision < 0.6 < invented.recall


def test_repeated_images_lie_at_distance_zero():
    repeated = normal(4, 64, 1, mean=30.0).repeat(10, 1)
    assert precision_recall(repeated, repeated.clone()).precision == 1.0
    assert precision_recall(normal(40, 64, 2, mean=30.0), repeated).recall == 0.0


def test_inception_score_is_the_number_of_classes_when_sure_and_balanced():
    sure = torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=2).value == pytest.approx(5.0)
    assert inception_score(torch.full((20, 5), 0.2), splits=2).value == pytest.approx(1.0)
    assert inception_score(torch.eye(5)[:1].repeat(20, 1), splits=1).value == pytest.approx(1.0)


def test_inception_score_matches_its_definition_per_split():
    p = normal(40, 6, 1).softmax(1).double()
    expected = [
        math.exp((part * (part.log() - part.mean(0, keepdim=True).log())).sum(1).mean()) for part in p.split(10)
    ]
    score = inception_score(p, splits=4)
    assert score.value == pytest.approx(np.mean(expected))
    assert score.std == pytest.approx(np.std(expected))


def test_inception_score_of_uneven_splits_is_cut_as_its_authors_cut():
    p = normal(43, 6, 1).softmax(1).double()
    parts = [p[i * 43 // 10 : (i + 1) * 43 // 10] for i in range(10)]
    expected = [inception_score(part, splits=1).value for part in parts]
    assert inception_score(p, splits=10).value == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fid(torch.zeros(1, 3), torch.zeros(5, 3)), "at least 2 real images, got 1"),
        (lambda: kid(torch.zeros(5, 3), torch.zeros(1, 3)), "at least 2 generated images, got 1"),
        (lambda: kid(torch.zeros(9, 3), torch.zeros(9, 3), subsets=2, subset_size=10), "subset_size"),
        (lambda: precision_recall(torch.zeros(3, 3), torch.zeros(9, 3)), "at least 4 real images"),
        (lambda: fid(torch.zeros(5, 3), torch.zeros(5, 4)), "3 dimensions and generated ones 4"),
        (lambda: kid(torch.full((5, 3), float("nan")), torch.zeros(5, 3)), "NaN"),
        (lambda: inception_score(torch.ones(4, 3), splits=2), "sum to 1"),
        (lambda: inception_score(torch.eye(3), splits=4), "4 splits"),
    ],
)
def test_unusable_input_is_one_clear_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()
