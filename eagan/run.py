"""A run's folder: what is learned from, what judges, and the stages of the search in their order."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from common.cli import read_run_config
from common.data.cache import fingerprint_strings
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import file_sha256, write_atomically
from common.metrics.features import Extractor
from common.options import refuse_large_batch
from common.training import open_run_folder
from eagan.config import FREE_OPTIONS, RunConfig, StageOptions
from eagan.data import Real, open_pictures
from eagan.drawing import draw_genes
from eagan.genotypes import DISCRIMINATOR, GENERATOR, PUBLISHED, SIMPLE, Genes, open_genes, save_genes
from eagan.judge import judge_file, open_judge
from eagan.measuring import Reference
from eagan.model import Discriminator, Generator
from eagan.searching import Found, Judging, Search, Searched, new_discriminator
from eagan.training import STREAMS, AnyDiscriminator, open_device

SIMPLE_SIDE = 32  # pixels, which five convolutions of stride 2 need
PLACES = {"data": ["data.path"], "judge": ["evaluation.judge"]}
JUDGE, REFERENCE, GENOTYPE = "judge.safetensors", "reference.safetensors", "genotype.json"


@dataclass
class Run:
    """One run; `seconds` holds the wall times of what was done in this process."""

    config: RunConfig
    folder: Path
    real: Real
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: RunConfig, text: str) -> Run:
        """Create or continue `config.run_dir`; everything that can be refused is, before anything is written.

        Raises:
            UserError: the folder holds another run or cannot be written, or an option or the data are wrong.
        """
        folder = Path(config.run_dir)
        opened = open_run_folder(folder, config.resume, text, FREE_OPTIONS, PLACES)
        device = open_device(config.device, config.precision, config.threads)
        pair = given_pair(config)
        fixed = fixed_genes(config.search.fixed) if pair is None else pair[1]
        if fixed is None and config.network.side < SIMPLE_SIDE:
            option = "--search.fixed" if pair is None else "--genotype"
            raise UserError(
                f"{option} simple: expected pictures of at least {SIMPLE_SIDE} pixels, not {config.network.side}"
            )
        if config.network.bottom_width % 2:
            raise UserError(
                f"--network.bottom_width {config.network.bottom_width}: expected an even number, since a discriminator "
                "may halve the sides four times"
            )
        first = open_genes(GENERATOR, config.search.first_generator, "--search.first_generator")
        real = open_pictures(config.data, config.network.side)
        for name, options in (("stage_g", config.stage_g), ("stage_d", config.stage_d), ("train", config.train)):
            refuse_large_batch(f"{name}.batch_real", options.batch_real, len(real.train), "training pictures")
        if len(real.held_out) < 2:
            raise UserError(f"{real.name}: {len(real.held_out)} held-out pictures are too few for a floor; give more")
        if config.evaluation.images > len(real.train):
            raise UserError(
                f"--evaluation.images {config.evaluation.images}: {real.name} has {len(real.train)} training pictures, "
                "and FID is taken between equal numbers"
            )
        run = cls(config, folder, real, device)
        if config.evaluation.judge not in (None, "classes", "lite0"):
            open_judge(config.evaluation.judge)
        # A run that goes on keeps its judge: another machine would round another one.
        judge = folder / JUDGE if (folder / JUDGE).is_file() else run.judge_source()
        file = judge if isinstance(judge, Path) else Path(judge.partition(":")[2])
        genotypes = fingerprint_strings([str(pair), str(fixed), str(first)])
        checksum = file_sha256(file) if file.is_file() else str(judge)
        opened.begin({"data": real.contents, "judge": checksum, "genotypes": genotypes})
        if isinstance(judge, Path) and not (folder / JUDGE).is_file():
            write_atomically(folder / JUDGE, lambda temporary: shutil.copyfile(judge, temporary))
        return run

    @classmethod
    def finished(cls, folder: Path) -> RunConfig:
        """The options of a run's folder."""
        return read_run_config(RunConfig, folder, "--run_dir")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Book the seconds of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    # What judges ------------------------------------------------------------------------------------------------------

    def judge_source(self) -> Path | str:
        """The weights of the classifier, or what `common.metrics.features` calls the judge."""
        name = self.config.evaluation.judge
        if name in (None, "classes") and self.real.classed is not None:
            return judge_file(self.real.classed, self.config.evaluation.judge_steps)
        if name == "classes":
            raise UserError(f"--evaluation.judge classes: {self.real.name} has no classes; lite0 or inception:FILE")
        return name or "lite0"

    @property
    def judge_name(self) -> str:
        """As `open_judge` takes it; of the folder's own weights."""
        return (
            f"classes:{(self.folder / JUDGE).absolute()}"
            if (self.folder / JUDGE).is_file()
            else str(self.judge_source())
        )

    @cached_property
    def judge(self) -> Extractor:
        return open_judge(self.judge_name, str(self.device))

    def reference(self) -> Path:
        """Features of as many real pictures as the largest measurement needs, and of others for the floor."""
        path = (self.folder / REFERENCE).absolute()
        Reference.of(path, self.real, self.judge, self.final_images)
        return path

    @property
    def final_images(self) -> int:
        """As many as are asked for, at most the training pictures: FID is taken between equal numbers."""
        wanted = max(self.config.evaluation.final_images, self.config.evaluation.images)
        return min(wanted, len(self.real.train))

    # The search -------------------------------------------------------------------------------------------------------

    def search(self) -> Found:
        """The stages of `search.order`, one after the other; what each finds is drawn and handed on."""
        options = self.config.search
        first = fixed_genes(options.fixed)
        found = Found(None, first, {})
        if options.order == "d_first":
            genes = open_genes(GENERATOR, options.first_generator, "--search.first_generator")
            found = Found(genes, first, {})
        for number in range(options.repeats):
            suffix = "" if number == 0 else str(number + 1)
            for name, searched in stages(self.config):
                with self.timed(name + suffix):
                    found = self._stage(name + suffix, searched, found, number)
        save_genes(self.folder / GENOTYPE, generator=found.generator, discriminator=found.discriminator)
        assert found.generator is not None
        draw_genes(GENERATOR, found.generator, self.folder / "generator.svg")
        if found.discriminator is not None:
            draw_genes(DISCRIMINATOR, found.discriminator, self.folder / "discriminator.svg")
        return found

    def _stage(self, name: str, searched: Searched, before: Found, repeat: int) -> Found:
        config, network = self.config, self.config.network
        kinds = {"generator": 1, "discriminator": 2, "both": 3}
        seed = derive_seed(config.seed, STREAMS["start"], kinds[searched], repeat)
        torch.manual_seed(seed)
        # The one that is searched begins anew; the other goes on with the weights that it came to.
        generator = Generator(network, None if searched != "discriminator" else before.generator)
        discriminator: AnyDiscriminator = (
            Discriminator(network) if searched != "generator" else new_discriminator(network, before.discriminator)
        )
        for kind, made in (("generator", generator), ("discriminator", discriminator)):
            if kind in before.weights and searched not in (kind, "both"):
                made.load_state_dict(before.weights[kind])
        search = Search(
            searched,
            stage_options(config, searched),
            config.search,
            network,
            config.evaluation,
            Judging(self.judge_name, self.reference()),
            self.real,
            self.folder / name,
            generator,
            discriminator,
            seed,
            config,
            self.device,
            config.precision == "bf16-mixed",
        )
        found = search.run()
        save_genes(search.folder / GENOTYPE, generator=found.generator, discriminator=found.discriminator)
        return found


def stages(config: RunConfig) -> list[tuple[str, Searched]]:
    """(name of the folder, what is searched) of one repeat."""
    g: tuple[str, Searched] = ("stage_g", "generator")
    d: tuple[str, Searched] = ("stage_d", "discriminator")
    orders: dict[str, list[tuple[str, Searched]]] = {
        "g_first": [g, d],
        "g_only": [g],
        "d_first": [d, g],
        "coupled": [("coupled", "both")],
    }
    return orders[config.search.order]


def stage_options(config: RunConfig, searched: Searched) -> StageOptions:
    """Of a stage; the coupled baseline has the rounds of both."""
    if searched == "both":
        return replace(config.stage_g, rounds=config.stage_g.rounds + config.stage_d.rounds)
    return config.stage_g if searched == "generator" else config.stage_d


def fixed_genes(name: str, option: str = "--search.fixed") -> Genes | None:
    """Of the discriminator that a generator is searched against, named by `option`; None for the simple one."""
    return None if name == SIMPLE else open_genes(DISCRIMINATOR, name, option)


def given_pair(config: RunConfig) -> tuple[Genes, Genes | None] | None:
    """The pair that is trained without a search; None where there is to be one.

    Raises:
        UserError: no such file or names.
    """
    if config.genotype is None:
        return None
    names = config.genotype.split(",")
    if len(names) == 1 and names[0] not in PUBLISHED:
        names *= 2
    if len(names) != 2:
        raise UserError(f"--genotype {config.genotype}: expected a JSON file, or two names: best_G,cifar10_D")
    return open_genes(GENERATOR, names[0], "--genotype"), fixed_genes(names[1], "--genotype")
