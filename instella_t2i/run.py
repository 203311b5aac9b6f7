"""A run folder: the tokenizer after each stage, and what is trained on its codes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.cli import read_run_config
from common.data.cache import fingerprint_strings, fingerprint_tensors
from common.errors import UserError
from common.options import free_options, refuse_large_batch
from common.processes import is_main_process, say_once
from common.training import booked, check_trainer, open_run_folder
from instella_t2i.aiming import new_tokenizer
from instella_t2i.config import InstellaConfig
from instella_t2i.data import Pictures, open_pictures
from instella_t2i.tokenizer import ABOUT, Tokenizer, check_network, load_tokenizer, multiple_of, save_tokenizer

if TYPE_CHECKING:
    from instella_t2i.generation import Painter
    from instella_t2i.text import CausalText

# What two starts of one run may disagree on; the options of a stage that is not trained now are read by nothing.
FREE_OPTIONS = free_options(
    "evaluation", "sampling", "stages", "data.eval_images", "text.cache_gb", "codes.folder", "stream.recompute"
)
PLACES = {
    "data": ["data.path"],
    "tokenizer": ["tokenizer_from"],
    "text": ["text.encoder"],
    "synthetic": ["codes.synthetic"],
}  # options that only say where an input lies
TOKENIZERS = ("tokenizer", "decoder")  # the stages that make one, the later the better


@dataclass
class Run:
    """One run; `seconds` holds the wall times of what was done in this process."""

    config: InstellaConfig
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: InstellaConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; everything is looked at before anything is written.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the data are.
        """
        check_options(config)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        run = cls(config, Path(config.run_dir))
        if "tokenizer" not in stages_of(config):
            run.tokenizer_folder()  # what the stages build on
        refuse_unreadable(config)
        opened = open_run_folder(run.folder, config.resume, config_yaml, FREE_OPTIONS, PLACES)
        inputs = {"data": run.pictures.fingerprint}
        if config.tokenizer_from:
            inputs["tokenizer"] = fingerprint_of(Path(config.tokenizer_from))
        if generators_of(config):
            inputs["text"] = run.reader().fingerprint
            inputs["captions"] = fingerprint_strings(run.pictures.captions)
            if not any(run.pictures.captions):
                say_once("no picture has a caption: the generators learn to draw without one")
            if config.codes.synthetic:
                inputs["synthetic"] = fingerprint_strings([run.synthetic.fingerprint, *run.synthetic.captions])
        for name in stages_of(config):
            refuse_large_batch(f"{name}.batch_size", getattr(config, name).batch_size, len(run.pictures))
        opened.begin(inputs)
        return run

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A run that train.py has begun; writes nothing.

        Raises:
            UserError: no run there.
        """
        return cls(read_run_config(InstellaConfig, folder, "--run_dir"), folder)

    @cached_property
    def pictures(self) -> Pictures:
        """The training pictures."""
        return open_pictures(self.config.data, "train", seed=self.config.seed)

    @cached_property
    def held_out(self) -> Pictures:
        """Those that are measured on."""
        return open_pictures(self.config.data, "test", seed=self.config.seed)

    @cached_property
    def synthetic(self) -> Pictures:
        """The pictures of the second data stage."""
        data = replace(self.config.data, name="folder", path=self.config.codes.synthetic, images=0)
        return open_pictures(data, "train", seed=self.config.seed)

    @property
    def device(self) -> torch.device:
        """Of what is frozen, in this process."""
        gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")

    def reader(self) -> CausalText:
        """What reads the captions."""
        from instella_t2i.text import CausalText

        return CausalText(self.config.text, self.config.stream.layers, self.device)

    def codes(self, tokenizer: Tokenizer) -> list[Tensor]:
        """Packed codes of the training pictures, and of the second set where there is one."""
        from instella_t2i.codes import encode_pictures

        config = self.config
        if tokenizer.size != config.data.size:
            raise UserError(
                f"--data.size {config.data.size}: the tokenizer was trained on pictures of {tokenizer.size} px; take "
                "that size"
            )
        place = Path(config.codes.folder) if config.codes.folder else self.folder / "codes"
        sets = {"pictures": self.pictures, **({"synthetic": self.synthetic} if config.codes.synthetic else {})}
        return [
            encode_pictures(tokenizer, pictures, place / name, config.trainer.progress, config.codes.views)
            for name, pictures in sets.items()
        ]

    def painter(self, kind: str | None = None, device: str | torch.device = "cpu") -> Painter:
        """The finished generators (or one of them), ready to draw.

        Raises:
            UserError: there is none.
        """
        from instella_t2i.generation import KINDS, open_painter

        wanted = KINDS if kind is None else (kind,)
        folders = [self.folder / name for name in wanted if (self.folder / name / ABOUT).is_file()]
        if not folders:
            raise UserError(
                f"{self.folder} has no finished {' or '.join(wanted)}: run instella_t2i/train.py with it among --stages"
            )
        return open_painter(self.load_tokenizer(), self.config.text, folders, device)

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has left its weights."""
        return self.config.resume != "never" and (self.folder / stage / ABOUT).is_file()

    def new_tokenizer(self) -> Tokenizer:
        """As it starts."""
        config = self.config
        return new_tokenizer(config.network, config.data.size, config.seed, config.tokenizer.aimed)

    def tokenizer_folder(self) -> Path:
        """Where the best tokenizer of the run lies.

        Raises:
            UserError: none is finished.
        """
        if self.config.tokenizer_from:
            return Path(self.config.tokenizer_from)
        for name in reversed(TOKENIZERS):
            if (self.folder / name / ABOUT).is_file():
                return self.folder / name
        raise UserError(f"{self.folder} has no finished tokenizer: add tokenizer to --stages, or give --tokenizer_from")

    def load_tokenizer(self, stage: str | None = None) -> Tokenizer:
        """The tokenizer of a stage, by default the best."""
        return load_tokenizer(self.tokenizer_folder() if stage is None else self.folder / stage)

    def save_tokenizer(self, tokenizer: Tokenizer, stage: str) -> None:
        """Keep a finished stage's weights."""
        if is_main_process():
            save_tokenizer(tokenizer, self.folder / stage, {"stage": stage, "data": self.config.data.name})

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Book the block's wall time."""
        return booked(self.seconds, name)


def stages_of(config: InstellaConfig) -> list[str]:
    """The stages to train, in the order of the table in train.py."""
    return [config.stages] if isinstance(config.stages, str) else list(config.stages)


def generators_of(config: InstellaConfig) -> list[str]:
    """The generators among the stages."""
    return [name for name in stages_of(config) if name not in TOKENIZERS]


def fingerprint_of(folder: Path) -> str:
    """Of a tokenizer's weights, read whole.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return fingerprint_tensors(load_tokenizer(folder, option="--tokenizer_from").state_dict())


def refuse_unreadable(config: InstellaConfig) -> None:
    """Read the files that networks of loss and metrics come from, which would fail after the training otherwise.

    Raises:
        UserError: one is missing or not what it should be.
    """
    from common.metrics.features import load_extractor
    from common.metrics.perceptual import perceptual_distance

    if set(stages_of(config)) & set(TOKENIZERS) and config.tokenizer.perceptual > 0:
        perceptual_distance(config.tokenizer.perceptual_trunk)
    load_extractor(config.evaluation.features)


def check_options(config: InstellaConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """
    check_trainer(
        config.trainer,
        {f"{name}.batch_size": getattr(config, name).batch_size for name in stages_of(config)},
        resume=config.resume,
        grad_clip=max(getattr(config, name).grad_clip for name in ("tokenizer", *generators_of(config))),
    )
    if set(stages_of(config)) & set(TOKENIZERS):  # which step two optimisers by hand
        options = config.trainer
        if options.strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true"):
            raise UserError(
                f"--trainer.strategy {options.strategy} shards one optimiser, the stages tokenizer and decoder have "
                "several: expected auto or ddp (train the generators in a run of their own, with --tokenizer_from)"
            )
        if options.precision == "16-mixed":
            raise UserError("--trainer.precision 16-mixed: the tokenizer trains in bf16-mixed or 32-true")
    check_network(config.network)
    if config.tokenizer.aimed and config.network.layout != "line" and "tokenizer" in stages_of(config):
        raise UserError(
            f"--tokenizer.aimed true: --network.layout {config.network.layout} has no latent tokens; expected "
            "line, or --tokenizer.aimed false"
        )
    multiple = multiple_of(config.network)
    sizes = {"data.size": [config.data.size], "decoder.sizes": config.decoder.sizes}
    for name, sides in sizes.items():
        for side in sides:
            if side % multiple or (config.network.scale is not None and side < 2 * multiple):
                raise UserError(
                    f"--{name} {side}: expected a multiple of {multiple} (a patch at the coarsest grid), "
                    f"at least {2 * multiple if config.network.scale is not None else multiple}"
                )
    if not config.decoder.sizes:
        raise UserError("--decoder.sizes []: expected at least one side")
    if config.data.name == "shapes" and config.data.images == 0:
        raise UserError("--data.images 0: expected a number of at least 1 for --data.name shapes, which draws them")
    if not stages_of(config):
        raise UserError("--stages []: expected at least one stage")
    if config.tokenizer_from and set(stages_of(config)) & set(TOKENIZERS):
        raise UserError("--tokenizer_from is a finished tokenizer: leave tokenizer and decoder out of --stages")
