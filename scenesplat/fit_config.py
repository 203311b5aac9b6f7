"""Everything that `scenesplat/fit.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, NotNegative, Portion, Positive, Range, RunOptions, Seed, Share, Whole, free_options


@dataclass
class PicturesConfig:
    """Posed pictures.

    Args:
        path: a folder with transforms.json (nerfstudio) or with COLMAP's images/ and sparse/; None: pictures of a
            furnished room that no training has seen.
        room: number of that room.
        density: its Gaussians per square metre.
        views: pictures of it.
        width: pixels of a row; wider pictures are shrunk to it, 0 leaves them; the height of the room's is three
            quarters of it.
        test_every: each so many-th picture is held out.
        drop_blurred: share of the training pictures, the least sharp, that are left out.
        depth: use depth pictures where there are any.
    """

    path: str | None = None
    room: Seed = 0
    density: Positive = 400.0
    views: Annotated[int, Range(2, 10_000)] = 48
    width: Annotated[int, Range(0, 16_384)] = 160
    test_every: Annotated[int, Range(2)] = 8
    drop_blurred: Annotated[float, Range(0, 0.9)] = 0.0
    depth: bool = True


@dataclass
class LossConfig:
    """L1 + SSIM + depth + what keeps Gaussians small.

    Args:
        ssim: share of 1 - SSIM beside L1.
        depth: weight of the depth's L1, where a depth is known.
        outlier: errors above so many medians do not count.
        scale_reg: weight of the mean standard deviation.
        opacity_reg: weight of the mean opacity.
    """

    ssim: Share = 0.2
    depth: NotNegative = 1.0
    outlier: Positive = 10.0
    scale_reg: NotNegative = 0.02
    opacity_reg: NotNegative = 0.0


@dataclass
class GrowthConfig:
    """How the number of Gaussians grows (3DGS-MCMC).

    Args:
        kind: mcmc (faint ones are moved onto others, new ones are born there, all wander a little) or fixed (as many
            as at the start, none moved).
        begin: share of the steps after which Gaussians are moved and born.
        end: share of the steps after which no more are.
        every: steps between two such rounds.
        faint: opacity at or below which a Gaussian is moved.
        births: new ones of a round, as a share of those there are.
        noise: of the wandering, times the rate of the centres.
    """

    kind: Literal["mcmc", "fixed"] = "mcmc"
    begin: Share = 0.05
    end: Portion = 0.83
    every: Count = 50
    faint: Annotated[float, Range(0, 0.5)] = 0.005
    births: Share = 0.05
    noise: NotNegative = 5e5


@dataclass
class RatesConfig:
    """Adam's rates.

    Args:
        means: of the centres, in parts of the scene's radius; it falls to a hundredth.
        scales: of the logarithms of the standard deviations.
        quaternions: of the rotations.
        opacities: of the logits.
        colours: of the plain colours; that of the higher bands is a twentieth.
    """

    means: Positive = 1.6e-4
    scales: Positive = 0.01
    quaternions: Positive = 0.002
    opacities: Positive = 0.05
    colours: Positive = 0.01


@dataclass
class FitConfig(RunOptions):
    """One fit: pictures with cameras in, a splat out.

    Args:
        run_dir: folder of the checkpoint, the log, the scene and its pictures.
        seed: of the start, the order of the pictures and everything drawn.
        resume: auto continues an unfinished fit in run_dir; never refuses a used folder.
        device: auto, cpu, cuda or cuda:N; on GPUs through gsplat where it is installed.
        steps: pictures that are looked at, one a step.
        start: points (of depth pictures, COLMAP or the folder's .ply), random, or auto: points where there are any.
        first: Gaussians at the start.
        most: Gaussians at the end at most.
        degree: of the colours' spherical harmonics.
        crop: metres around the starting points beyond which Gaussians are left out at the end; 0 keeps all.
        pictures: what is fitted to.
        loss: what is minimised.
        growth: how Gaussians multiply.
        rates: of the optimiser.
    """

    run_dir: str = "runs/scenesplat-fit"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    device: str = "auto"
    steps: Count = 2000
    start: Literal["auto", "points", "random"] = "auto"
    first: Count = 8_000
    most: Count = 20_000
    degree: Annotated[int, Range(0, 3)] = 1
    crop: NotNegative = 1.0
    checkpoint_every: Count = 200
    log_every: Count = 20
    threads: Whole = 0
    progress: bool = True
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    rates: RatesConfig = field(default_factory=RatesConfig)


FREE_OPTIONS = free_options("device", section="")
