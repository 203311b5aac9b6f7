"""A run folder and what is in it: the vocabulary and examples, and an arm's way from a network to encoders on disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from common.data.cache import MODEL, fingerprint_path
from common.errors import UserError
from common.files import unfinished, write_json
from common.options import free_options, refuse_large_batch
from common.processes import is_main_process, say_once
from common.training import EveryNSteps, check_trainer, holds_work, open_run, train
from common.weights import check_weights
from electra.adversarial import AdversarialPretrainer
from electra.config import ElectraConfig, ElectraRun
from electra.corpora import load_corpus
from electra.data import PretrainingData, corpus_counts, open_examples, open_tokenizer
from electra.evaluate import open_tasks
from electra.examples import ExampleStore
from electra.flops import training_flops
from electra.layouts import (
    encoder_folder,
    generator_folder,
    load_pretrained,
    pretraining_state,
    save_transformers,
    why_not_stock,
)
from electra.masking import SpecialIds
from electra.objectives import ElectraPretrainer
from electra.tasks import Task
from electra.trainer import PretrainingModule, held_out_metrics
from electra.two_stage import SecondStage, second_stage, two_stage_flops
from electra.wordpiece import Tokenizer, load_tokenizer

MOST_UNKNOWN, SAY_UNKNOWN = 0.5, 0.01  # shares of unknown tokens in the text: refused, said
# What two starts of one run may disagree on: none of it changes the trained weights.
FREE_OPTIONS = free_options("arms", "downstream", "data.workers", "trainer.evaluate_every")
# Options that only say where an input lies, by what messages call it.
PLACES = {"data": ["data.corpus"], "tokenizer": ["data.vocabulary"], "starting weights": ["init_from"]}


@dataclass
class Arm:
    """One objective's part of a run: its folder and how long it trains."""

    name: str
    folder: Path
    steps: int
    flops: float

    @property
    def finished(self) -> bool:
        """Whether its encoders are there already."""
        return (self.folder / "arm.json").is_file() and (self.encoder / "config.json").is_file()

    @property
    def encoder(self) -> Path:
        """The transformers directory to fine-tune: discriminator/, or encoder/ of an arm that has none."""
        return self.folder / ("encoder" if "mlm" in self.name else "discriminator")

    @property
    def generator(self) -> Path:
        """The generator's transformers directory."""
        return self.folder / "generator"


@dataclass
class Run:
    """A run folder: config.yaml, tokenizer/, a folder an arm, curves.png and metrics.json."""

    config: ElectraRun
    folder: Path
    tokenizer: Tokenizer
    train: ExampleStore
    held_out: ExampleStore
    tasks: list[Task]
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: ElectraRun, text: str) -> Run:
        """Create or continue `config.run_dir`; opens the vocabulary and the examples.

        Args:
            text: the config as YAML, saved there.

        Raises:
            UserError: the folder holds another run or cannot be written, or an option or the data are wrong.
        """
        started = time.perf_counter()
        check_options(config)
        opened = open_run(config, text, FREE_OPTIONS, PLACES)
        folder = opened.path
        tokenizer = run_tokenizer(config, folder)
        inputs: dict[str, Callable[[], str] | str] = {
            "data": lambda: load_corpus(config.data.corpus).fingerprint,
            "tokenizer": tokenizer.fingerprint,
        }
        if config.init_from is not None and Path(config.init_from).exists():
            inputs["starting weights"] = partial(fingerprint_path, Path(config.init_from), MODEL)
        tasks = open_tasks(config.downstream)
        train, held_out = (open_examples(config.data, tokenizer, split) for split in ("train", "held_out"))
        if (share := train.statistics["unknown_share"]) > MOST_UNKNOWN:
            raise UserError(
                f"{share:.0%} of the tokens of --data.corpus {config.data.corpus} are unknown to the vocabulary, more "
                f"than {MOST_UNKNOWN:.0%}: for a script without spaces between words make every character a piece "
                "(--data.characters true); otherwise give a vocabulary that was learned from such text"
            )
        if share > SAY_UNKNOWN:
            say_once(f"{share:.1%} of the tokens of --data.corpus {config.data.corpus} are unknown to the vocabulary")
        run = cls(config, folder, tokenizer, train, held_out, tasks)
        run.say_what_transformers_lacks()
        run.check_networks()
        refuse_large_batch("trainer.batch_size", config.trainer.batch_size, len(train), "rows of text")
        opened.begin(inputs)
        if is_main_process():
            tokenizer.save(folder / "tokenizer", config.model.max_position)
        run.seconds["data"] = time.perf_counter() - started
        return run

    @property
    def model(self) -> ElectraConfig:
        """The discriminator's configuration."""
        return self.config.model.with_vocabulary(self.tokenizer.size)

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(*self.tokenizer.special_ids)

    @property
    def tokens_per_row(self) -> float:
        return float(self.train.lengths.mean())

    def arms(self) -> list[Arm]:
        """The arms with their steps: as many FLOPs for each as `max_steps` steps of electra take, whichever others are
        asked for.
        """
        budget = self.flops("electra", self.config.trainer.max_steps)
        made = []
        for name in self.config.arms:
            one = self.flops(name, 1)
            steps = max(1, round(budget / one))
            made.append(Arm(name, self.folder / name, steps, one * steps))
        return made

    def flops(self, arm: str, steps: int) -> float:
        """Training FLOPs by the official counter; an adversarial step counts as one of electra."""
        sizes = (self.config.trainer.batch_size, round(self.tokens_per_row), self.config.objective.mask_probability)
        if arm == "two_stage":
            return two_stage_flops(self.model, self.config.objective.first_stage, steps, *sizes)
        objective: Any = "electra" if arm == "adversarial" else arm
        return training_flops(self.model, objective, steps, *sizes)

    def network(self, arm: str) -> ElectraPretrainer:
        """A new network for an arm, or the one that `init_from` holds."""
        config, options = self.config, self.config.objective
        torch.manual_seed(config.seed)
        kind = AdversarialPretrainer if arm == "adversarial" else ElectraPretrainer
        network = kind(
            self.model,
            self.special,
            objective="electra" if arm == "adversarial" else arm,  # type: ignore[arg-type]
            mask_probability=options.mask_probability,
            max_length=config.data.length,
            disc_weight=options.disc_weight,
            temperature=options.temperature,
            disallow_correct=options.disallow_correct,
        )
        if isinstance(network, AdversarialPretrainer):
            network.baseline_decay, network.gen_weight = options.baseline_decay, options.mlm_weight
        if config.model.generator == "unigram":
            network.set_unigram(corpus_counts(self.train, self.tokenizer.size))
        if config.init_from is not None:
            start_from(network, Path(config.init_from))
        return network

    def say_what_transformers_lacks(self) -> None:
        """Name the networks that stock transformers will not read."""
        networks = {"the main network": self.model}
        if self.model.generator == "network" and set(self.config.arms) - {"mlm"}:
            networks["the generator"] = self.model.generator_config()
        for name, config in networks.items():
            if (why := why_not_stock(config, self.special.pad)) is not None:
                say_once(f"{name} is saved for this program alone, not for stock transformers: {why}")

    def check_networks(self) -> None:
        """Refuse sizes that no network has, and an `init_from` that does not fit; nothing is trained.

        Raises:
            UserError: naming what does not fit.
        """
        arms = [arm for arm in self.arms() if not arm.finished]
        for name in {"mlm" if arm.name == "two_stage" else arm.name for arm in arms}:
            with torch.device("cpu" if self.config.init_from is not None else "meta"):
                self.network(name)

    def pretrain(self, arm: Arm, callbacks: Sequence[pl.Callback] = ()) -> None:
        """Pre-train or resume an arm and write its encoders."""
        started = time.perf_counter()
        if arm.name == "two_stage":
            network = self._pretrain_two_stages(arm, callbacks)
        else:
            network = self.network(arm.name)
            self._fit(network, arm.folder, arm.steps, callbacks)
        self.seconds[arm.name] = time.perf_counter() - started
        if is_main_process():
            self._finish(arm, network)

    def _pretrain_two_stages(self, arm: Arm, callbacks: Sequence[pl.Callback]) -> ElectraPretrainer:
        """Section 3.2, two-stage: the generator alone, then the discriminator with the generator frozen."""
        options = self.config.objective
        first_steps = max(1, round(options.first_stage * arm.steps))
        generator = self.network("mlm")
        self._fit(generator, arm.folder / "generator_stage", first_steps, callbacks)
        network: SecondStage = second_stage(generator, options.copy_weights, self.config.seed)
        self._fit(network, arm.folder, arm.steps - first_steps, callbacks)
        return network

    def _fit(self, network: ElectraPretrainer, folder: Path, steps: int, callbacks: Sequence[pl.Callback]) -> None:
        config, options = self.config, self.config.trainer
        module = PretrainingModule(network, config, steps)

        def measure(step: int) -> None:
            found = held_out_metrics(network, self.held_out, options.batch_size, config.seed)
            for logger in module.trainer.loggers:
                logger.log_metrics({f"held_out/{key}": value for key, value in found.items()}, step)

        every = options.evaluate_every or steps + 1
        data = PretrainingData(
            self.train,
            steps,
            config.data.workers,
            batch_size=options.batch_size,
            seed=config.seed,
            mask_probability=config.objective.mask_probability,
            max_length=config.data.length,
            accumulate=options.accumulate,
        )
        trainer = train(
            folder,
            module,
            data,
            options,
            steps=steps,
            batch_size=options.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            callbacks=[EveryNSteps(every, measure), *callbacks],
            unit=("tokens", self.tokens_per_row),
            networks=[part for part in (network.electra, network.generator) if part is not None],
            dynamic=True,
        )
        trainer.strategy.barrier()

    def _finish(self, arm: Arm, network: ElectraPretrainer) -> None:
        """Write the transformers directories and the arm's record, which marks the end."""
        with unfinished(arm.encoder, folder=True) as place:
            saved = place / "network"
            save_transformers(network, saved, self.tokenizer)
            if (saved / "generator").is_dir():
                replace_folder(saved / "generator", arm.generator)
            replace_folder(saved, arm.encoder)
        found = held_out_metrics(network, self.held_out, self.config.trainer.batch_size, self.config.seed)
        record = {
            "arm": arm.name,
            "steps": arm.steps,
            "flops": arm.flops,
            "seconds": round(self.seconds[arm.name], 1),
            "held_out": found,
        }
        write_json(arm.folder / "arm.json", record)


def check_options(config: ElectraRun) -> None:
    """Refuse what cannot run, before anything is written.

    Raises:
        UserError: naming the option.
    """
    trainer = config.trainer
    if not config.arms or len(set(config.arms)) < len(config.arms):
        raise UserError(f"--arms {config.arms}: expected at least one objective, each once")
    check_trainer(trainer, {"trainer.batch_size": trainer.batch_size}, resume=config.resume)
    if config.data.length > config.model.max_position:
        raise UserError(
            f"--data.length {config.data.length} is more than --model.max_position {config.model.max_position}"
        )
    if "two_stage" in config.arms and not 0 < config.objective.first_stage < 1:
        raise UserError(f"--objective.first_stage {config.objective.first_stage}: expected a share between 0 and 1")
    if "adversarial" in config.arms and config.model.generator != "network":
        raise UserError("--arms adversarial needs --model.generator network")


def replace_folder(new: Path, place: Path) -> None:
    """Move a finished folder to its place; one that an interrupted start left there goes."""
    if place.exists():
        shutil.rmtree(place)
    os.replace(new, place)


def run_tokenizer(config: ElectraRun, folder: Path) -> Tokenizer:
    """The vocabulary of a run: the given one, the one it was begun with, that of the weights it starts from (whose
    embeddings mean its pieces), or a new one.

    Raises:
        UserError: the weights come without one, or with another than the given one.
    """
    given = None if config.data.vocabulary is None else load_tokenizer(config.data.vocabulary)
    if given is None and holds_work(folder) and (folder / "tokenizer").is_dir():
        return load_tokenizer(folder / "tokenizer")
    if config.init_from is None or not Path(config.init_from).is_dir():
        return given or open_tokenizer(config.data)
    main = encoder_folder(Path(config.init_from))
    if not any((main / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        if given is None:
            raise UserError(
                f"--init_from {config.init_from}: no vocab.txt in {main}, and without it nobody knows which pieces its "
                "embeddings stand for; give it with --data.vocabulary"
            )
        return given
    own = load_tokenizer(main)
    if given is not None and given.vocabulary != own.vocabulary:
        raise UserError(
            f"--data.vocabulary {config.data.vocabulary} is not that of --init_from {config.init_from}: its embeddings "
            "stand for other pieces; leave --data.vocabulary out"
        )
    return given or own


def start_from(network: ElectraPretrainer, path: Path) -> None:
    """Fill a network from an arm's folder (discriminator/, generator/) or a transformers directory (with generator/).

    Raises:
        UserError: nothing there, or weights of another network.
    """
    main = encoder_folder(path)
    generator = generator_folder(main)
    _, state = pretraining_state(load_pretrained(main), load_pretrained(generator) if generator else None)
    own = {key: value for key, value in network.state_dict().items() if "." in key}
    check_weights(
        state, own, f"--init_from {path}", "--model and the arm's objective (give those of the run that made it)"
    )
    network.load_state_dict(state, strict=False)
