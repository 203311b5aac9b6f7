"""How far apart two sets of images are, measured on features [N,D]: FID, KID, precision/recall, Inception Score.

Everything is computed in float64: in float32 the Frechet distance comes out 0.1-0.3 % low when N < D.

Shape suffixes: N samples, D feature dimension.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from common.errors import UserError

FEW = 200  # images below which a Frechet distance is said to say little


def _pair(real: Tensor, fake: Tensor, minimum: int, metric: str) -> tuple[Tensor, Tensor]:
    for side, features in (("real", real), ("generated", fake)):
        if features.ndim != 2:
            raise UserError(f"{metric}: {side} features have shape {tuple(features.shape)}, expected [N,D]")
        if len(features) < minimum:
            raise UserError(f"{metric} needs at least {minimum} {side} images, got {len(features)}: add images")
        if not torch.isfinite(features).all():
            raise UserError(f"{metric}: {side} features hold NaN or infinity; check the images and the extractor")
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"{metric}: real features have {real.shape[1]} dimensions and generated ones {fake.shape[1]}; "
            "use one extractor for both"
        )
    return real.double(), fake.double()


class FeatureStats:
    """Running mean and covariance of features in float64, updated by batches and mergeable across workers.

    Chan, Golub & LeVeque 1979, pairwise update: stable where a sum of squares is not.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean_D = torch.zeros(dim, dtype=torch.float64)
        self.scatter_DD = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features_ND: Tensor) -> FeatureStats:
        """Statistics of one array of features [N,D]."""
        stats = cls(features_ND.shape[1])
        stats.update(features_ND)
        return stats

    def update(self, features_ND: Tensor) -> None:
        """Add a batch [N,D]."""
        if len(features_ND) == 0:
            return
        x_ND = features_ND.detach().cpu().double()
        batch = FeatureStats.__new__(FeatureStats)
        batch.n = len(x_ND)
        batch.mean_D = x_ND.mean(0)
        centred_ND = x_ND - batch.mean_D
        batch.scatter_DD = centred_ND.T @ centred_ND
        self.merge(batch)

    def merge(self, other: FeatureStats) -> None:
        """Add the samples behind `other`; the order of merges does not matter."""
        if other.mean_D.shape != self.mean_D.shape:
            raise UserError(f"cannot merge statistics of {len(other.mean_D)} and {len(self.mean_D)} dimensions")
        n = self.n + other.n
        if n == 0:
            return
        delta_D = other.mean_D - self.mean_D
        self.scatter_DD = (
            self.scatter_DD + other.scatter_DD + torch.outer(delta_D, delta_D) * (self.n * other.n / n)
        )  # fmt: skip
        self.mean_D = self.mean_D + delta_D * (other.n / n)
        self.n = n

    @property
    def covariance_DD(self) -> Tensor:
        """Unbiased covariance [D,D]."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.n}: add images")
        return self.scatter_DD / (self.n - 1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared Frechet distance of two Gaussians: |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2).

    Heusel et al. 2017, Eq. 6, with the symmetric product, whose eigenvalues are real and non-negative. Of fewer than
    FEW images it says so on stderr.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise UserError(f"Frechet distance of {len(a.mean_D)} against {len(b.mean_D)} dimensions: use one extractor")
    _warn_few(min(a.n, b.n))
    s_a, s_b = a.covariance_DD, b.covariance_DD
    values, vectors = torch.linalg.eigh(s_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root_a @ s_b @ root_a
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return _frechet(a.mean_D, b.mean_D, s_a.trace() + s_b.trace(), cross)


def _frechet(mean_a: Tensor, mean_b: Tensor, traces: Tensor, cross: Tensor) -> float:
    return max(0.0, float((mean_a - mean_b).square().sum() + traces - 2 * cross))


@cache  # once in a process
def _say_few(count: int) -> None:
    print(
        f"a Frechet distance of {count} images says little: it compares at equal counts only, thousands make it stable",
        file=sys.stderr,
    )


def _warn_few(count: int) -> None:
    if count < FEW:
        _say_few(count)


def fid(real_ND: Tensor, fake_ND: Tensor) -> float:
    """Frechet distance of two feature sets [N,D].

    With few samples the cross term is the nuclear norm of A B^T (A, B: centred features over sqrt(N - 1)), which is
    exact and needs an N x N decomposition instead of three of D x D. FID is biased by N: compare at equal N only; below
    FEW images that is said on stderr.
    """
    real, fake = _pair(real_ND, fake_ND, 2, "FID")
    _warn_few(min(len(real), len(fake)))
    if len(real) * len(fake) > real.shape[1] ** 2:
        return frechet_distance(FeatureStats.of(real), FeatureStats.of(fake))
    mean_a, mean_b = real.mean(0), fake.mean(0)
    a_ND = (real - mean_a) / (len(real) - 1) ** 0.5
    b_ND = (fake - mean_b) / (len(fake) - 1) ** 0.5
    cross = torch.linalg.svdvals(a_ND @ b_ND.T).sum()
    return _frechet(mean_a, mean_b, a_ND.square().sum() + b_ND.square().sum(), cross)


@dataclass(frozen=True)
class Estimate:
    """A value with its uncertainty; `std` is a standard error for KID on whole sets, else a spread over parts."""

    value: float
    std: float


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Cubic polynomial kernel (x.y / D + 1)^3 of Binkowski et al. 2018, Section 4."""
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1.0).pow_(3)


def _mmd2(real: Tensor, fake: Tensor) -> Estimate:
    """Unbiased MMD^2 (Gretton et al. 2012, Eq. 3), and the first-order standard error of that U-statistic."""
    m, n = len(real), len(fake)
    xx, yy, xy = _kernel(real, real), _kernel(fake, fake), _kernel(real, fake)
    xx_rows = (xx.sum(1) - xx.diagonal()) / (m - 1)
    yy_rows = (yy.sum(1) - yy.diagonal()) / (n - 1)
    value = xx_rows.mean() + yy_rows.mean() - 2 * xy.mean()
    # Hoeffding projection: each sample's own contribution to the statistic, whose variance falls as 4 / N.
    variance = 4 * (xx_rows - xy.mean(1)).var() / m + 4 * (yy_rows - xy.mean(0)).var() / n
    return Estimate(value.item(), variance.sqrt().item())


def kid(
    real_ND: Tensor, fake_ND: Tensor, subsets: int = 0, subset_size: int = 1000, seed: int = 0
) -> Estimate:  # fmt: skip
    """Kernel Inception Distance: unbiased MMD^2 with the cubic kernel; may be slightly negative for equal sets.

    subsets = 0: all samples at once, the lowest-variance estimate; std is its standard error.
    subsets > 0: mean and population std over random subsets of `subset_size` of each side, as in the literature.
    """
    real, fake = _pair(real_ND, fake_ND, 2, "KID")
    if subsets == 0:
        return _mmd2(real, fake)
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise UserError(
            f"KID subsets of {subset_size} from {len(real)} real and {len(fake)} generated images: "
            "lower subset_size or add images"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:subset_size]]
        y = fake[torch.randperm(len(fake), generator=generator)[:subset_size]]
        values.append(_mmd2(x, y).value)
    series = torch.tensor(values, dtype=torch.float64)
    return Estimate(series.mean().item(), series.std(unbiased=False).item())


@dataclass(frozen=True)
class Manifold:
    """Fidelity and variety. All but `density` lie in [0,1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def _squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    squared = x_ND.square().sum(1)[:, None] + y_MD.square().sum(1) - 2 * x_ND @ y_MD.T
    # Differences below the rounding of the two squared norms are zero: identical images must lie at distance 0.
    rounding = 1e-13 * (x_ND.square().sum(1)[:, None] + y_MD.square().sum(1))
    return torch.where(squared <= rounding, torch.zeros_like(squared), squared)


def precision_recall(real_ND: Tensor, fake_ND: Tensor, k: int = 3) -> Manifold:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1-3), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its points, each reaching the point's k-th nearest neighbour.
    """
    real, fake = _pair(real_ND, fake_ND, k + 1, f"precision/recall with k = {k}")
    real_radii = _squared_distances(real, real).fill_diagonal_(0).kthvalue(k + 1, dim=1).values
    fake_radii = _squared_distances(fake, fake).fill_diagonal_(0).kthvalue(k + 1, dim=1).values
    cross = _squared_distances(real, fake)
    inside_real = cross <= real_radii[:, None]
    return Manifold(
        precision=inside_real.any(0).double().mean().item(),
        recall=(cross <= fake_radii[None, :]).any(1).double().mean().item(),
        density=inside_real.double().sum(0).mean().item() / k,
        coverage=inside_real.any(1).double().mean().item(),
    )


def inception_score(probabilities_NC: Tensor, splits: int = 10) -> Estimate:
    """exp E_x KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and population std over consecutive splits, cut where
    their code cuts, at i N / splits.

    probabilities_NC: class probabilities [N,C] (rows sum to 1). Shuffle first when the images are ordered by class.
    """
    if probabilities_NC.ndim != 2 or splits < 1 or len(probabilities_NC) < splits:
        raise UserError(
            f"Inception Score over {splits} splits of probabilities {tuple(probabilities_NC.shape)}: expected [N,C] "
            "with at least one row per split"
        )
    p = probabilities_NC.double()
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise UserError("Inception Score needs probabilities: rows of non-negative numbers that sum to 1")
    scores = []
    for part in p.tensor_split([i * len(p) // splits for i in range(1, splits)]):
        marginal = part.mean(0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1).mean()
        scores.append(divergence.exp())
    series = torch.stack(scores)
    return Estimate(series.mean().item(), series.std(unbiased=False).item())
