"""Options of `eagan/train.py` as plain dataclasses; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.errors import UserError
from common.options import Count, Decay, NotNegative, Range, RunOptions, Seed, Share, Whole, check_ranges, free_options

Order = Literal["g_first", "d_first", "coupled", "g_only"]
Selection = Literal["nsga2", "cars", "fid"]
BatchNorm = Literal["genotype", "running", "batch"]
Change = Literal["colour", "translation", "cutout"]


@dataclass
class DataConfig:
    """Real pictures, without captions or classes.

    Args:
        name: emoji (artwork, embedded), digits (handwritten, 8 pixels, enlarged), fashion-mnist (`make
            data-fashion-mnist`), cifar10 or stl10 (binary versions, --data.path), or folder (your own pictures,
            --data.path; classes are not needed).
        path: folder of cifar10, stl10 or folder, or a table with pictures.
        image_column: the column of the pictures in a table; None takes `image`, or the one that may be it.
        only: of emoji, digits, fashion-mnist, cifar10: names of the classes that are learned; [] takes all.
        images: at most so many training pictures; 0 takes all.
    """

    name: Literal["emoji", "digits", "fashion-mnist", "cifar10", "stl10", "folder"] = "emoji"
    path: str | None = None
    image_column: str | None = None
    only: list[str] = field(default_factory=list)
    images: Whole = 0


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of both networks; pictures have the side 8 x bottom_width.

    Args:
        gf_dim: channels of the generator.
        df_dim: channels of the discriminator.
        latent_dim: length of z, a multiple of three, one third for each cell.
        bottom_width: side of the generator's first maps, 4 for CIFAR-10 (32 pixels) and 6 for STL-10 (48 pixels).

    Raises:
        UserError: z cannot be divided into three.
    """

    gf_dim: Annotated[int, Range(1, 4096)] = 256
    df_dim: Annotated[int, Range(2, 4096)] = 128
    latent_dim: Annotated[int, Range(3, 4096)] = 120
    bottom_width: Annotated[int, Range(1, 64)] = 4

    def __post_init__(self) -> None:
        check_ranges(self, "network.")
        if self.latent_dim % 3:
            raise UserError(
                f"--network.latent_dim {self.latent_dim}: expected a multiple of three, a part for each cell"
            )

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return 8 * self.bottom_width


@dataclass(frozen=True)
class GameOptions:
    """How generator and discriminator are trained against each other.

    Args:
        batch_real: real pictures of a discriminator step, and as many generated ones.
        batch_fake: generated pictures of a generator step.
        lr_g: learning rate of the generator (Adam, betas 0 and 0.9).
        lr_d: learning rate of the discriminator.
        d_steps: discriminator steps for each generator step.
        clip: largest norm of a gradient (STL-10: 50); 0 does not clip.
        augment: changes of all pictures before the discriminator (DiffAugment, not in the paper): colour, translation,
            cutout; for sets of few pictures.
    """

    batch_real: Count = 40
    batch_fake: Count = 80
    lr_g: NotNegative = 2e-4
    lr_d: NotNegative = 2e-4
    d_steps: Count = 1
    clip: NotNegative = 0.0
    augment: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class StageOptions(GameOptions):
    """One stage of the search; steps are those of the discriminator.

    Args:
        warmup_steps: first steps, each with an architecture that was never drawn before.
        round_steps: steps between two selections (E).
        rounds: number of selections (R).
    """

    warmup_steps: Whole = 62_500
    round_steps: Count = 12_500
    rounds: Count = 18


@dataclass
class SearchOptions:
    """The evolution (algorithm 1).

    Args:
        order: g_first (the paper: generator, then discriminator), g_only (EAGAN-G), d_first and coupled (baselines of
            section 5.3).
        repeats: times that both stages are run; 2 is EAGAN-GD3, whose second generator search has the found
            discriminator.
        fixed: discriminator of the first generator search: base_D (EAGAN-GD1), simple (five convolutions, EAGAN-GD2),
            another published one or a JSON file.
        first_generator: generator that d_first searches a discriminator for: a published one or a JSON file.
        population: individuals (P), of which half are replaced in each round.
        weight_resetting: when a discriminator is searched, give every pair the best pair's generator after each round.
        selection: nsga2 (rank and crowding on 1/IS, FID, size), cars (the released code's four sorts of two), or fid.
        crossover: probability that a child takes one edge of another parent.
        mutation: probability that a child gets one new gene.
    """

    order: Order = "g_first"
    repeats: Annotated[int, Range(1, 9)] = 1
    fixed: str = "base_D"
    first_generator: str = "best_G"
    population: Annotated[int, Range(2, 4096)] = 32
    weight_resetting: bool = True
    selection: Selection = "nsga2"
    crossover: Share = 0.3
    mutation: Share = 0.5


@dataclass(frozen=True)
class TrainOptions(GameOptions):
    """Training the found pair from scratch.

    Args:
        steps: steps of the discriminator; 0 ends after the search.
        lr_decay: let both rates fall linearly to nothing.
        ema_decay: of the averaged generator, which is measured and drawn with.
        ema_warmup: average over fewer steps at the beginning.
        sample_every: steps between sample grids; 0 draws none on the way.
    """

    d_steps: Count = 5
    steps: Whole = 750_000
    lr_decay: bool = False
    ema_decay: Decay = 0.999
    ema_warmup: bool = False
    sample_every: Whole = 5000


@dataclass
class EvaluationConfig:
    """How generators are measured.

    Args:
        images: pictures of an individual, and as many real ones.
        final_images: the same of the fully trained generator (50,000 in the paper).
        splits: of the Inception Score.
        judge: classes (a small classifier, trained once on the classes of the data), lite0, or inception:FILE
            (pytorch-fid's); None: classes, for folder and stl10 lite0.
        judge_steps: steps that the classifier is trained with, for the judge classes.
        batch_norm: statistics of the generator's normalisation: genotype (estimated anew for each individual), running
            (those of the supernet, as the released code), or batch.
        batch_size: pictures drawn at once.
        engine: what evaluates individuals, with equal results: here, processes (of this machine) or ray (a cluster that
            sees run_dir).
        workers: of the engine processes; 0 is one for each core.
        sheet: pictures of each individual on the sheet of a population.
    """

    images: Annotated[int, Range(20)] = 5000
    final_images: Annotated[int, Range(20)] = 50_000
    splits: Annotated[int, Range(1, 100)] = 10
    judge: str | None = None
    judge_steps: Count = 600
    batch_norm: BatchNorm = "genotype"
    batch_size: Annotated[int, Range(2)] = 100
    engine: Literal["here", "processes", "ray"] = "here"
    workers: Whole = 0
    sheet: Count = 8


@dataclass
class RunConfig(RunOptions):
    """One run: two searches, the found pair trained from scratch, metrics.

    Args:
        run_dir: everything is written there.
        seed: of the weights' start, the order of the data and the evolution.
        resume: auto continues an unfinished run of the same options; never refuses a used folder.
        genotype: no search: train this pair, a JSON file with generator and discriminator, or two with a comma, each a
            published name (best_G,cifar10_D), a JSON file or the authors' .npy.
        precision: 32-true, or bf16-mixed where the device has it.
        device: auto, cpu or cuda.
    """

    checkpoint_every: Count = 200
    log_every: Count = 20
    run_dir: str = "runs/eagan"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    genotype: str | None = None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    search: SearchOptions = field(default_factory=SearchOptions)
    stage_g: StageOptions = field(default_factory=lambda: StageOptions(lr_d=4e-5))
    stage_d: StageOptions = field(default_factory=lambda: StageOptions(d_steps=5))
    train: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_ranges(self)


# How a run is executed and reported, not what it computes: these may differ between two starts of it.
FREE_OPTIONS = free_options(
    "device", "train.sample_every", "evaluation.engine", "evaluation.workers", "evaluation.final_images", section=""
)
