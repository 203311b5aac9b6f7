"""What the claims are measured on: stages of the search that they share, networks trained from scratch, one judge.

Every stage and training goes on from its last checkpoint; a finished one is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random
from statistics import fmean
from typing import Any

import torch

from common.data.sampling import derive_seed
from common.files import locked
from common.metrics.features import Extractor
from common.options import RunOptions
from common.study import Study as CommonStudy
from eagan.config import DataConfig, EvaluationConfig, NetworkConfig, SearchOptions, StageOptions, TrainOptions
from eagan.data import Real, open_pictures
from eagan.genotypes import GENERATOR, PUBLISHED, Genes
from eagan.judge import judge_file, open_judge
from eagan.measuring import Reference, draw, latents, score
from eagan.model import Discriminator, Generator
from eagan.retraining import Training
from eagan.searching import Found, Judging, Search, Searched
from eagan.training import AnyDiscriminator

CPU = torch.device("cpu")
RANDOM_STREAM = 13  # of the random generators
KINDS = {"generator": 1, "discriminator": 2, "both": 3}


@dataclass
class Sizes:
    """Sizes and budgets of a tier.

    Args:
        only: classes of emoji that are learned; [] takes all. judge_steps: of the classifier that judges.
        gf_dim, df_dim, latent_dim: of the networks; side 32.
        population, rounds: of a stage; batch: real and generated pictures of a step; lr: of both networks.
        images: that an individual is measured on; final_images: a trained generator.
        random_generators: that E1 trains.
        warmup_steps, round_steps, train_steps: the budget.
    """

    only: list[str]
    judge_steps: int
    gf_dim: int
    df_dim: int
    latent_dim: int
    population: int
    rounds: int
    batch: int
    lr: float
    images: int
    final_images: int
    random_generators: int
    warmup_steps: int
    round_steps: int
    train_steps: int


class Study(CommonStudy[Sizes]):
    """The stages of a tier by (name, seed)."""

    paper = "eagan"

    @cached_property
    def network(self) -> NetworkConfig:
        return NetworkConfig(self.sizes.gf_dim, self.sizes.df_dim, self.sizes.latent_dim, 4)

    @cached_property
    def real(self) -> Real:
        return open_pictures(DataConfig(only=self.sizes.only), self.network.side)

    @cached_property
    def judge(self) -> Extractor:
        return open_judge(self.judging.judge)

    @cached_property
    def judging(self) -> Judging:
        """The classifier of all classes, and features of as many real pictures as are measured."""
        assert self.real.classed is not None
        name = f"classes:{judge_file(self.real.classed, self.sizes.judge_steps)}"
        path = self.folder / "reference.safetensors"
        Reference.of(path, self.real, open_judge(name), self.sizes.final_images)
        return Judging(name, path)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.judging.reference)

    def floor(self, count: int) -> float:
        """FID of so many real pictures to as many others: what a perfect generator would reach."""
        return self.reference.floor(self.judge, 10, count).fid

    def stage(
        self, name: str, searched: Searched, seed: int, before: Found | None = None, rounds: int = 0, **changes: Any
    ) -> Search:
        """A stage of the search that goes on from where it was; `changes` replace options of the evolution.

        Args:
            before: what an earlier stage found; None begins with the fixed pair best_G and base_D, untrained.
            rounds: 0 for the tier's.
        """
        sizes = self.sizes
        options = SearchOptions(population=sizes.population, **changes)
        stage = StageOptions(
            batch_real=sizes.batch,
            batch_fake=sizes.batch,
            lr_g=sizes.lr,
            lr_d=sizes.lr,
            warmup_steps=sizes.warmup_steps,
            round_steps=sizes.round_steps,
            rounds=rounds or sizes.rounds,
            augment=["translation", "cutout"],
        )
        start = before or Found(PUBLISHED["best_G"], PUBLISHED["base_D"], {})
        genes = {"generator": start.generator, "discriminator": start.discriminator}
        settings = {**self.settings, "options": asdict(options), "searched": searched, "start": genes, "rounds": rounds}
        folder = self.workplace(f"stages/{name}-seed{seed}", settings)
        torch.manual_seed(derive_seed(seed, KINDS[searched]))
        generator = Generator(self.network, None if searched != "discriminator" else start.generator)
        discriminator: AnyDiscriminator = Discriminator(
            self.network, None if searched != "generator" else start.discriminator
        )
        for kind, network in (("generator", generator), ("discriminator", discriminator)):
            if kind in start.weights and searched not in (kind, "both"):
                network.load_state_dict(start.weights[kind])
        return Search(
            searched,
            stage,
            options,
            self.network,
            EvaluationConfig(images=sizes.images, splits=5),
            self.judging,
            self.real,
            folder,
            generator,
            discriminator,
            derive_seed(seed, KINDS[searched], 1),
            RunOptions(checkpoint_every=50, log_every=1, progress=False, logger="none"),
            CPU,
        )

    def found(self, search: Search) -> Found:
        """Finish a stage, by one process at a time, and note it."""
        with locked(search.folder.with_suffix(".run")), self.counted(search.folder):
            found = search.run()
        name, _, seed = search.folder.name.rpartition("-seed")
        values = {"rounds": search.history, "generator": found.generator, "discriminator": found.discriminator}
        self.note(f"stage-{name}", int(seed), {"options": asdict(search.options), **self.settings}, values)
        return found

    def first_stage(self, seed: int) -> Found:
        """The generator search against the fixed discriminator, which most claims begin with."""
        return self.found(self.stage("g", "generator", seed))

    def retrained(self, name: str, seed: int, generator: Genes, discriminator: Genes | None) -> dict[str, Any]:
        """IS and FID of a pair trained from scratch, with equal steps for everybody."""
        sizes = self.sizes
        settings = {**self.settings, "generator": generator, "discriminator": discriminator}

        def made() -> dict[str, Any]:
            options = TrainOptions(
                batch_real=sizes.batch,
                batch_fake=sizes.batch,
                lr_g=sizes.lr,
                lr_d=sizes.lr,
                d_steps=1,
                augment=["translation", "cutout"],
                steps=sizes.train_steps,
                ema_decay=0.99,
                ema_warmup=True,
            )
            training = Training(
                options,
                self.network,
                generator,
                discriminator,
                self.real,
                self.workplace(f"trainings/{name}-seed{seed}", settings),
                seed,
                RunOptions(checkpoint_every=50, log_every=10, progress=False, logger="none"),
                CPU,
            )
            averaged, _ = training.run()
            pictures = draw(averaged, latents(sizes.final_images, sizes.latent_dim), "genotype", 100)
            found = asdict(score(pictures, self.reference.train_ND, self.judge, 10, "genotype"))
            return {**found, "steps": training.step, "cpu_seconds": training.clock.cpu_seconds}

        values = self.values(f"trained-{name}-seed{seed}", made, settings)
        self.note(f"trained-{name}", seed, settings, values)
        return values

    def random_generators(self, seed: int) -> list[Genes]:
        random = Random(derive_seed(seed, RANDOM_STREAM))
        return [GENERATOR.sample(random) for _ in range(self.sizes.random_generators)]


def population_fid(search: Search) -> list[float]:
    """Mean FID of the population, by round."""
    return [float(row["fid_mean"]) for row in search.history]


def mean_of_rows(search: Search, name: str, round_number: int) -> float:
    """A logged quantity over the steps of a round."""
    return fmean(float(row[name]) for row in search.rows if row["round"] == round_number and row.get(name) is not None)
