"""One run: every arm pre-trained from text to transformers directories, then all fine-tuned; `train.py` is its command.

Logged every `log_every` steps, as means over the steps since the last line and over all processes:
    train/mlm_loss, train/mlm_accuracy       the generator's cross-entropy and arg-max at the chosen tokens (arm mlm: of
                                             the one network)
    train/sample_accuracy                    share of the generator's samples that are the true token
    train/main_loss                          the discriminator's cross-entropy (MLM ablations: of the main network)
    train/main_accuracy                      MLM ablations: share of tokens predicted right
    train/rtd_accuracy, _precision, _recall  of "replaced"; a constant "original" has accuracy of about 0.9, recall 0
    train/loss                               what is minimised
    train/lr                                 in this step
    held_out/...                             the same on held-out text with fixed masks, and rtd_auc; every
                                             `evaluate_every` steps and at the end

Shapes: as in data.py.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import write_atomically, write_json
from common.training import (
    EveryNSteps,
    build_trainer,
    fit,
    is_main_process,
    latest_checkpoint,
    open_run_folder,
)
from electra.adversarial import AdversarialPretrainer
from electra.config import DownstreamConfig, ElectraRun
from electra.convert import load_pretrained, pretraining_state, save_transformers
from electra.data import PretrainingData, StepBatch, corpus_counts, held_out_batches, open_examples, open_tokenizer
from electra.evaluate import evaluate_encoders, format_table, table_rows
from electra.examples import ExampleStore
from electra.finetuning import FinetuneConfig
from electra.flops import training_flops
from electra.masking import SpecialIds
from electra.model import ElectraConfig
from electra.objectives import ElectraPretrainer, Losses, auc, metrics
from electra.optim import clip_global_norm, learning_rate, official_optimizer
from electra.tasks import Task, load_task
from electra.two_stage import SecondStage, second_stage, two_stage_flops
from electra.wordpiece import Tokenizer

HELD_OUT_ROWS = 1024
# What two starts of one run may disagree on: none of it changes the trained weights.
FREE_OPTIONS = (
    "run_dir",
    "resume",
    "arms",
    "downstream",
    "data.workers",
    *(
        f"trainer.{name}"
        for name in (
            "accelerator",
            "devices",
            "num_nodes",
            "strategy",
            "checkpoint_every",
            "evaluate_every",
            "log_every",
            "threads",
            "progress",
        )
    ),
)


class PretrainingModule(pl.LightningModule):
    """The official pre-training step in Lightning's loop.

    Which rows, masks and samples a step has follows from (seed, step), and the losses are means over the global batch,
    so that resuming, adding processes and accumulating gradients change nothing. Dropout alone differs between
    processes.

    Args:
        network: of any objective.
        steps: of the whole run, for the learning rate.
    """

    def __init__(self, network: ElectraPretrainer, config: ElectraRun, steps: int) -> None:
        super().__init__()
        self.network, self.config, self.steps = network, config, steps
        self._counters: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._since = 0
        if config.trainer.compile:
            network.electra.compile(dynamic=True)
            if network.generator is not None:
                network.generator.compile(dynamic=True)

    def configure_optimizers(self) -> Any:
        options = self.config.optimiser
        optimiser = official_optimizer(self.network, options.lr, options.weight_decay)
        factor = partial(learning_rate, base=1.0, warmup=options.warmup, total=self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        accumulate = self.config.trainer.accumulate
        part = batch_idx % accumulate
        if self.network.config.dropout > 0 or self.network.config.attention_dropout > 0:
            # Dropout draws from the global generator, which no checkpoint holds.
            torch.manual_seed(derive_seed(self.config.seed, self.trainer.global_step, part, self.trainer.global_rank))
        weights_2 = global_weights(self.network.objective, batch.weights_W)
        losses = self.network(
            batch.batch,
            batch.draws,
            all_reduce=lambda _: weights_2,
            world_size=self.trainer.world_size * accumulate,
        )
        self._tally(losses)
        if part == accumulate - 1:
            self._since += 1
            if (self.trainer.global_step + 1) % self.config.trainer.log_every == 0:
                self._log_means()
        return losses.total

    def _tally(self, losses: Losses) -> None:
        mine = {key: value.detach().float() for key, value in losses.counters.items()}
        share = losses.total.detach() / (self.trainer.world_size * self.config.trainer.accumulate)
        self._counters = {key: self._counters[key] + v if key in self._counters else v for key, v in mine.items()}
        self._loss = share if self._loss is None else self._loss + share

    def _log_means(self) -> None:
        assert self._loss is not None
        # The loss of a process is its part of the global mean, so it is summed like the counters.
        sums = torch.stack([self._loss, *self._counters.values()])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        loss, *counters = sums.tolist()
        rates = metrics(dict(zip(self._counters, counters)))
        values = {"loss": loss / self._since, **rates, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
        self.log_dict({f"train/{key}": float(value) for key, value in values.items()}, batch_size=1)
        self._counters, self._loss, self._since = {}, None, 0

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.config.optimiser.grad_clip > 0:
            clip_global_norm(self.network.parameters(), self.config.optimiser.grad_clip)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        if isinstance(self.network, AdversarialPretrainer):
            self.network.update_baseline()
        # Lightning would keep the gradients until after the next forward pass, beside its activations.
        self.zero_grad(set_to_none=True)


def global_weights(objective: str, weights_W: Tensor) -> Tensor:
    """Weights of the generator's and the main loss over the global batch, from those of a `StepBatch`."""
    slots, tokens, distinct = weights_W.unbind()
    main = {"electra": tokens, "electra15": distinct, "replace_mlm": slots, "all_tokens_mlm": tokens}
    return torch.stack([slots, main.get(objective, torch.zeros_like(slots))])


@torch.no_grad()
def held_out_metrics(
    network: ElectraPretrainer, store: ExampleStore, batch_size: int, seed: int, rows: int = HELD_OUT_ROWS
) -> dict[str, float]:
    """The training metrics and the AUC of "replaced" on held-out rows, with masks and samples fixed by the seed."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    sums: dict[str, float] = {}
    logits, labels = [], []
    for number, batch in held_out_batches(store, batch_size, rows):
        generator = torch.Generator(device).manual_seed(derive_seed(seed, -1, number))
        losses = network(batch.to(device), generator=generator)
        for key, value in losses.counters.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        if losses.logits_N is not None and losses.labels_N is not None:
            logits.append(losses.logits_N.float().cpu())
            labels.append(losses.labels_N.cpu())
    network.train(training)
    found = metrics(sums)
    if logits:
        found["rtd_auc"] = auc(torch.cat(logits), torch.cat(labels))
    return found


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
        return (self.folder / "arm.json").is_file()

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
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        folder = Path(config.run_dir)
        open_run_folder(folder, config.resume, text, FREE_OPTIONS)
        tokenizer = open_tokenizer(config.data)
        train, held_out = (open_examples(config.data, tokenizer, split) for split in ("train", "held_out"))
        if is_main_process():
            tokenizer.save(folder / "tokenizer")
        run = cls(config, folder, tokenizer, train, held_out, open_tasks(config.downstream))
        run.seconds["data"] = time.perf_counter() - started
        return run

    @property
    def model(self) -> ElectraConfig:
        """The discriminator's configuration."""
        return ElectraConfig(vocab_size=self.tokenizer.size, **asdict(self.config.model))

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(*self.tokenizer.special_ids)

    @property
    def tokens_per_row(self) -> float:
        return float(self.train.lengths.mean())

    def arms(self) -> list[Arm]:
        """The arms with their steps: as many FLOPs for each as `max_steps` steps of the first take."""
        budget = self.flops(self.config.arms[0], self.config.trainer.max_steps)
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
            for logger in trainer.loggers:
                logger.log_metrics({f"held_out/{key}": value for key, value in found.items()}, step)

        every = options.evaluate_every or steps + 1
        trainer = build_trainer(
            folder,
            steps=steps,
            batch_size=options.batch_size,
            precision=options.precision,
            accumulate=options.accumulate,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            grad_clip=config.optimiser.grad_clip or None,
            checkpoint_every=options.checkpoint_every,
            unit=("tokens", self.tokens_per_row),
            log_every=options.log_every,
            progress=options.progress,
            callbacks=[EveryNSteps(every, measure), *callbacks],
        )
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
        fit(trainer, module, data, checkpoint_to_resume(config.resume, folder))
        trainer.strategy.barrier()

    def _finish(self, arm: Arm, network: ElectraPretrainer) -> None:
        """Write the transformers directories and the arm's record, which marks the end."""
        with tempfile.TemporaryDirectory(prefix=".saving.", dir=arm.folder) as name:
            saved = Path(name) / "network"
            save_transformers(network, saved)
            self.tokenizer.save(saved)
            if (saved / "generator").is_dir():
                self.tokenizer.save(saved / "generator")
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

    def compare(self, arms: Sequence[Arm], started: float) -> dict[str, Any]:
        """Fine-tune all arms and the network from scratch, print the table, write metrics.json and curves.png.

        Args:
            started: `time.perf_counter()` at the start of the run.
        """
        draw_curves(self.folder, [arm.folder for arm in arms])
        found: dict[str, Any] = {"arms": {arm.name: json.loads((arm.folder / "arm.json").read_text()) for arm in arms}}
        if self.config.downstream.tasks:
            began = time.perf_counter()
            records = fine_tune(self.tasks, self.config.downstream, {arm.name: arm.encoder for arm in arms})
            found["downstream"] = records
            self.seconds["downstream"] = time.perf_counter() - began
            print(format_table(records))
        self.seconds["total"] = time.perf_counter() - started
        found["seconds"] = {key: round(value, 1) for key, value in self.seconds.items()}
        earlier = self.folder / "metrics.json"
        if earlier.is_file() and not any(arm.name in self.seconds for arm in arms):
            # Nothing was pre-trained now: the times of the start that did it stand.
            found["seconds"] = json.loads(earlier.read_text()).get("seconds", found["seconds"])
        write_json(earlier, found)
        text = markdown_tables(found)
        write_atomically(self.folder / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
        return found


def markdown_tables(found: Mapping[str, Any]) -> str:
    """What `Run.compare` found, as Markdown: a line an arm, then a line a labelled task if there are any."""
    lines = ["| arm | steps | TFLOP | pre-training, s |", "|---" * 4 + "|"]
    for name, arm in found["arms"].items():
        lines.append(f"| {name} | {arm['steps']:,} | {arm['flops'] / 1e12:.1f} | {arm['seconds']:,.0f} |")
    if records := found.get("downstream"):
        head, *rows = table_rows(records)
        lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    return "\n".join(lines) + "\n"


def open_tasks(options: DownstreamConfig) -> list[Task]:
    """The labelled tasks; opened before anything is trained, so that a misspelt name costs no time.

    Raises:
        UserError: an unknown task, or its data are missing.
    """
    return [
        load_task(task, train_size=options.train_examples).first(test=options.test_examples) for task in options.tasks
    ]


def fine_tune(tasks: list[Task], options: DownstreamConfig, encoders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Scores of the encoders, and of the first one's network from scratch, on every task (see evaluate.py).

    Args:
        encoders: transformers directories by the name that tables show.
    """
    names = {str(folder): name for name, folder in encoders.items()}
    config = FinetuneConfig(
        lr=options.lr,
        scratch_lr=options.scratch_lr,
        layer_decay=options.layer_decay,
        epochs=options.epochs,
        batch_size=options.batch_size,
        dropout=options.dropout,
    )
    records = evaluate_encoders(list(encoders.values()), tasks, config, options.seeds)
    return [{**record, "encoder": names.get(record["encoder"], record["encoder"])} for record in records]


def read_logs(folder: Path) -> dict[str, dict[int, float]]:
    """The logged quantities of an arm by step, over all its starts (a later start replaces what it did again)."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key not in ("step", "epoch") and value:
                        found.setdefault(key, {})[int(float(row["step"]))] = float(value)
    return found


CURVES = (
    ("mlm_loss", "masked-token cross-entropy (nats)"),
    ("main_loss", "main loss (nats a token)"),
    ("rtd_recall", "replaced tokens found"),
)


def draw_curves(folder: Path, arms: Sequence[Path]) -> None:
    """curves.png: what each arm logged in training (lines) and on held-out text (points)."""
    from common.figures import panels, save_figure

    figure, axes = panels(len(CURVES), 4.2, 3.4)
    for number, arm in enumerate(arms):
        logs = read_logs(arm)
        for axis, (key, label) in zip(axes, CURVES):
            axis.set(xlabel="step", ylabel=label)
            for part, style in (("train", {"linewidth": 1.0}), ("held_out", {"marker": "o", "linestyle": "none"})):
                points = sorted(logs.get(f"{part}/{key}", {}).items())
                if points:
                    name = arm.name if part == "train" else None
                    axis.plot(*zip(*points), color=f"C{number}", label=name, **style)  # type: ignore[arg-type]
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    save_figure(figure, folder / "curves.png")


def check_options(config: ElectraRun) -> None:
    """Refuse what cannot run, before anything is written.

    Raises:
        UserError: naming the option.
    """
    trainer = config.trainer
    if not config.arms or len(set(config.arms)) < len(config.arms):
        raise UserError(f"--arms {config.arms}: expected at least one objective, each once")
    if trainer.batch_size < 1 or trainer.accumulate < 1 or trainer.batch_size % trainer.accumulate:
        raise UserError(
            f"--trainer.batch_size {trainer.batch_size} cannot be divided into --trainer.accumulate "
            f"{trainer.accumulate} micro-batches"
        )
    if trainer.max_steps < 1:
        raise UserError(f"--trainer.max_steps {trainer.max_steps}: expected at least 1")
    if config.resume not in ("auto", "never") and not Path(config.resume).is_file():
        raise UserError(f"--resume {config.resume}: no such file; expected auto, never or a checkpoint of a run")
    if config.data.length > config.model.max_position:
        raise UserError(
            f"--data.length {config.data.length} is more than --model.max_position {config.model.max_position}"
        )
    if "two_stage" in config.arms and not 0 < config.objective.first_stage < 1:
        raise UserError(f"--objective.first_stage {config.objective.first_stage}: expected a share between 0 and 1")
    if "adversarial" in config.arms and config.model.generator != "network":
        raise UserError("--arms adversarial needs --model.generator network")


def checkpoint_to_resume(resume: str, folder: Path) -> Path | None:
    """The checkpoint from which the arm in `folder` goes on, if any."""
    if resume == "auto":
        return latest_checkpoint(folder)
    return None if resume == "never" else Path(resume)


def replace_folder(new: Path, place: Path) -> None:
    """Move a finished folder to its place; one that an interrupted start left there goes."""
    if place.exists():
        shutil.rmtree(place)
    new.rename(place)


def start_from(network: ElectraPretrainer, path: Path) -> None:
    """Fill a network from an arm's folder (discriminator/, generator/) or a transformers directory (with generator/).

    Raises:
        UserError: nothing there, or weights of another network.
    """
    main = next((path / name for name in ("discriminator", "encoder") if (path / name).is_dir()), path)
    generator = path / "generator"
    _, state = pretraining_state(load_pretrained(main), load_pretrained(generator) if generator.is_dir() else None)
    own = {key: value for key, value in network.state_dict().items() if "." in key}
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise UserError(
            f"--init_from {path}: {len(wrong)} parameters do not fit --model and the arm's objective, for example "
            f"{wrong[0]}; give the options of the run that made it"
        )
    network.load_state_dict(state, strict=False)


def run_arms(config: ElectraRun, text: str) -> dict[str, Any]:
    """Pre-train every arm that is not finished, then fine-tune and compare. Returns the metrics, also metrics.json.

    Args:
        text: the config as YAML.
    """
    started = time.perf_counter()
    run = Run.open(config, text)
    arms = run.arms()
    for arm in arms:
        if config.resume == "auto" and arm.finished:
            if is_main_process():
                print(f"{arm.folder}: trained already", file=sys.stderr)
        else:
            run.pretrain(arm)
    if not is_main_process():
        return {}
    return run.compare(arms, started)
