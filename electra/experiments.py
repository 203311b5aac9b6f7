"""What the claims of `reproduce.py` are made of: text, arms pre-trained once and shared by the claims, fine-tuning, and
the measurements.

Every arm is trained by the step that users run (`training.PretrainingModule`) with one network shape, one batch, one
learning rate and one budget counted by the official counter (`flops.py`); arms differ in what a claim compares and in
nothing else. A finished arm and its scores stay on disk; an interrupted arm continues from its last checkpoint.

Shapes: N packed tokens of a batch, M chosen slots.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.sampling import derive_seed
from common.errors import UserError, stop_if_not_finite
from common.study import CHECKPOINT_EVERY, Arm, Watch, fit_arm
from common.study import Study as CommonStudy
from electra.adversarial import AdversarialPretrainer, sample_entropy
from electra.config import DataConfig, ElectraConfig, ElectraRun, FinetuneConfig, OptimiserConfig, TrainerConfig
from electra.data import PretrainingData, StepBatches, corpus_counts, held_out_batches, open_examples, open_tokenizer
from electra.examples import ExampleStore
from electra.fetch_text import find_text
from electra.finetuning import FinetuneResult, finetune
from electra.flops import steps_for, training_flops
from electra.layouts import Pretrained
from electra.masking import Corrupted, SpecialIds, corrupt
from electra.model import Batch
from electra.objectives import ElectraPretrainer, auc
from electra.tasks import Task, load_task
from electra.trainer import PretrainingModule, held_out_metrics
from electra.two_stage import second_stage, two_stage_flops
from electra.wordpiece import Tokenizer

SHARES = {"6": 1 / 16, "12": 1 / 8, "25": 1 / 4, "50": 1 / 2}  # of E7 (Table 1), each with a schedule of its own

OBJECTIVES = ("electra", "all_tokens_mlm", "replace_mlm", "electra15", "mlm")  # Table 5's order
SIZES = {"eighth": 1 / 8, "quarter": 1 / 4, "half": 1 / 2, "full": 1.0}  # generator's width (figure 3, left)
SCRATCH = "scratch"
# These need nothing but the default installation. Coherence is left out: in the default run every arm was at chance.
TASKS = ("acceptability", "sentiment")
# Fine-tuning rates, the best on the development split of a seed that no claim uses (`reproduce.py --calibrate`); from
# scratch acceptability stays at chance at every candidate, so it takes the rate of the pre-trained.
RATES = {"pretrained": 1e-3, SCRATCH: 1e-3}
CANDIDATE_RATES = (3e-4, 1e-3, 3e-3)
CALIBRATION_SEED = 9
LOOKS = 8  # measurements of an arm on held-out text while it trains
JUDGE_SEED = 1  # of the masks and samples on which all discriminators are compared
EXAMPLE_ROWS = 3
# Fields of `Sizes` on which no trained arm depends.
TUNING = ("train_examples", "test_examples", "epochs", "finetunings")
AFTER_TRAINING = (*TUNING, "tasks", "judged")


@dataclass(frozen=True)
class Sizes:
    """Sizes and budget of a tier; everything that takes time follows from these.

    Args:
        width, layers, heads: of the main network; vocabulary, length, batch: of its input.
        generator: width of the generator beside it, unless a claim varies it.
        lr, warmup: of every arm.
        sweep: per cent of `main` for each arm of E4 to E6: a key of SHARES, or 100.
        uncopied: steps of E6b, the first ones of the second stage.
        held_out: rows of held-out text for the losses; judged: for the AUC against the common generator.
        train_examples, test_examples, epochs: of fine-tuning; tasks: that are scored; finetunings: of one arm on one
            task, of which the median counts.
        main: TFLOP of pre-training of each arm of E1 to E3, and the end of E7's curves.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    sweep: str
    uncopied: int
    warmup: int
    held_out: int
    judged: int
    train_examples: int
    test_examples: int | None
    epochs: float
    finetunings: int
    tasks: tuple[str, ...]
    generator: float
    lr: float
    main: float


@dataclass(frozen=True)
class ArmSpec:
    """How an arm is trained.

    Args:
        objective: one of `objectives.OBJECTIVES`, two_stage (its second stage) or adversarial.
        changes: of the model's configuration.
        schedule: steps that the learning rate is planned for, if not `steps`.
        first: the arm whose generator the second stage keeps; copy_weights: its start (see two_stage.py).
    """

    objective: str
    steps: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    schedule: int = 0
    first: str = ""
    copy_weights: bool = True


class Study(CommonStudy[Sizes]):
    """Text, arms and scores of a tier; everything is made when first asked for."""

    paper = "electra"

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes, folder)
        self._tasks: dict[str, Task] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "tasks": self.tasks, "rates": RATES}

    # Text

    @cached_property
    def data(self) -> DataConfig:
        return DataConfig(vocabulary_size=self.sizes.vocabulary, length=self.sizes.length)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.data)

    @cached_property
    def train_rows(self) -> ExampleStore:
        return open_examples(self.data, self.tokenizer, "train")

    @cached_property
    def held_out_rows(self) -> ExampleStore:
        return open_examples(self.data, self.tokenizer, "held_out")

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(*self.tokenizer.special_ids)

    @cached_property
    def mean_length(self) -> int:
        """Mean length of a training row, for the FLOPs."""
        return round(float(self.train_rows.lengths.mean()))

    # Arms

    def model(self, **changes: Any) -> ElectraConfig:
        """The one network shape of the tier."""
        sizes = self.sizes
        return ElectraConfig(
            vocab_size=self.tokenizer.size,
            embedding_size=sizes.width,
            hidden_size=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            intermediate_size=4 * sizes.width,
            max_position=sizes.length,
            dropout=0.0,
            attention_dropout=0.0,
            relative_positions=True,
            init="fan_in",
            **{"generator_factor": sizes.generator, **changes},
        )

    def flops(self, spec: ArmSpec) -> float:
        """Training FLOPs of an arm; an adversarial step counts as one of electra, a second stage without the first."""
        per_step = (self.sizes.batch, self.mean_length)
        if spec.objective == "two_stage":
            return two_stage_flops(self.model(), 0.0, spec.steps, *per_step, 0.15)
        objective: Any = "electra" if spec.objective == "adversarial" else spec.objective
        return training_flops(self.model(**spec.changes), objective, spec.steps, *per_step)

    def swept(self, objective: str) -> str:
        """The arm of this objective with the budget of E4 to E6."""
        return objective if self.sizes.sweep == "100" else f"{objective}-{self.sizes.sweep}"

    @cached_property
    def specs(self) -> dict[str, ArmSpec]:
        """All arms there are, by name."""
        model, per_step = self.model(), (self.sizes.batch, self.mean_length)

        def equal_flops(objective: Any, share: float = 1.0) -> ArmSpec:
            return ArmSpec(objective, steps_for(model, objective, share * self.sizes.main * 1e12, *per_step))

        specs = {name: equal_flops(name) for name in OBJECTIVES}
        for name, share in SHARES.items():
            specs |= {f"{objective}-{name}": equal_flops(objective, share) for objective in ("electra", "mlm")}
        # E4 and E5 compare at equal steps (figure 3), E6 at equal FLOPs.
        budget = 1.0 if self.sizes.sweep == "100" else SHARES[self.sizes.sweep]
        steps = equal_flops("electra", budget).steps
        for name, factor in SIZES.items():
            if factor != self.sizes.generator:
                specs[f"size-{name}"] = ArmSpec("electra", steps, {"generator_factor": factor})
        for kind in ("unigram", "uniform"):
            specs[kind] = ArmSpec("electra", steps, {"generator": kind})
        for tying in ("none", "all"):
            specs[f"tying-{tying}"] = ArmSpec("electra", steps, {"generator_factor": 1.0, "tying": tying})
        specs["adversarial"] = ArmSpec("adversarial", steps)
        both = max(4, round(budget * self.sizes.main * 1e12 / two_stage_flops(model, 0.5, 1, *per_step, 0.15)))
        second = both - both // 2
        specs["two_stage_generator"] = ArmSpec("mlm", both // 2)
        specs["two_stage"] = ArmSpec("two_stage", second, first="two_stage_generator")
        uncopied = min(second, self.sizes.uncopied)
        specs["uncopied"] = ArmSpec("two_stage", uncopied, {}, second, "two_stage_generator", copy_weights=False)
        return specs

    def build(self, spec: ArmSpec, seed: int) -> ElectraPretrainer:
        """The network with its starting weights."""
        if spec.objective == "two_stage":
            return second_stage(self.pretrained(spec.first, seed).network, spec.copy_weights, seed)
        torch.manual_seed(seed)
        adversarial = spec.objective == "adversarial"
        objective: Any = "electra" if adversarial else spec.objective
        kind = AdversarialPretrainer if adversarial else ElectraPretrainer
        network = kind(self.model(**spec.changes), self.special, objective, max_length=self.sizes.length)
        if adversarial:
            network.gen_weight = 0.0  # appendix F: the generator follows the discriminator's loss alone
        if network.config.generator == "unigram":
            network.set_unigram(corpus_counts(self.train_rows, self.tokenizer.size))
        return network

    def run_config(self, seed: int) -> ElectraRun:
        """What the training step is told, the same for every arm."""
        return ElectraRun(
            seed=seed,
            data=self.data,
            optimiser=OptimiserConfig(lr=self.sizes.lr, warmup=self.sizes.warmup),
            trainer=TrainerConfig(
                batch_size=self.sizes.batch, precision=self.precision, accelerator="cpu", threads=1, progress=False
            ),
        )

    def looks(self, name: str) -> set[int]:
        """After which steps an arm is measured on held-out text."""
        steps = self.specs[name].steps
        marks = {max(1, round(steps * look / LOOKS)) for look in range(1, LOOKS + 1)}
        return marks | ({self.specs["uncopied"].steps} if name == "two_stage" else set())

    def pretrained(self, name: str, seed: int) -> Arm[ElectraPretrainer]:
        """An arm: read from disk if it was trained before, else trained (from its last checkpoint) and kept."""
        spec = self.specs[name]
        train = partial(self._train, name, seed)
        return self.arm(name, seed, lambda: self.build(spec, seed), train, self._settings_of(name))

    def _settings_of(self, name: str) -> dict[str, Any]:
        """What an arm, or a network from scratch, depends on."""
        sizes = {key: value for key, value in asdict(self.sizes).items() if key not in AFTER_TRAINING}
        if name == SCRATCH:
            return sizes
        spec = self.specs[name]
        return {**sizes, "spec": asdict(spec), "first": asdict(self.specs[spec.first]) if spec.first else None}

    def _train(
        self, name: str, seed: int, network: ElectraPretrainer, folder: Path
    ) -> tuple[ElectraPretrainer, dict[str, Any]]:
        spec, config, sizes = self.specs[name], self.run_config(seed), self.sizes

        def measure(step: int) -> dict[str, float]:
            return held_out_metrics(network, self.held_out_rows, sizes.batch, seed, sizes.held_out)

        watch = Watch(self.looks(name), measure)
        data = PretrainingData(self.train_rows, spec.steps, batch_size=sizes.batch, seed=seed, max_length=sizes.length)
        module = PretrainingModule(network, config, spec.schedule or spec.steps)
        network.train()
        fit_arm(
            module,
            data,
            watch,
            config.trainer,
            steps=spec.steps,
            batch_size=sizes.batch,
            grad_clip=config.optimiser.grad_clip,
            folder=folder,
            checkpoint_every=CHECKPOINT_EVERY,
        )
        return network, {**watch.record(), "tflop": self.flops(spec) / 1e12}

    # Fine-tuning

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tier's tasks, and parts of speech where the Brown corpus was fetched."""
        if self.sizes.tasks != TASKS:
            return self.sizes.tasks
        try:
            find_text("brown")
        except UserError:
            return TASKS
        return (*TASKS, "pos")

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            task = load_task(name, train_size=self.sizes.train_examples)
            self._tasks[name] = task.first(test=self.sizes.test_examples)
        return self._tasks[name]

    def score(self, name: str, seed: int, task: str) -> float:
        """Per cent on the test split: the median over fine-tunings of an arm, or of a network from scratch."""
        lr = RATES[SCRATCH if name == SCRATCH else "pretrained"]

        def scored() -> dict[str, Any]:
            runs = [self.finetune(name, seed, task, number, lr) for number in range(self.sizes.finetunings)]
            return {"scores": [run.score for run in runs], "runs": [run.record() for run in runs]}

        settings = {"rate": lr, "arm": self._settings_of(name), **{key: getattr(self.sizes, key) for key in TUNING}}
        return float(statistics.median(self.values(f"scores/{name}-seed{seed}-{task}", scored, settings)["scores"]))

    def finetune(self, name: str, seed: int, task: str, number: int, lr: float) -> FinetuneResult:
        """One fine-tuning; `number` decides the head's start and the order."""
        source: Pretrained | ElectraConfig
        if name == SCRATCH:
            source = self.model()
        else:
            network = self.pretrained(name, seed).network
            state = {key: value for key, value in network.state_dict().items() if key.startswith("electra.")}
            source = Pretrained(network.config, "ElectraModel", state)
        config = FinetuneConfig(lr=lr, epochs=self.sizes.epochs, device="cpu")
        return finetune(source, self.tokenizer, self.task(task), config, derive_seed(seed, number) % 2**31)

    # Measurements on held-out text

    def common_corruptions(self, seed: int) -> list[tuple[Batch, Corrupted]]:
        """Held-out rows corrupted by one generator for all arms: the masked language model of the sweep's budget.

        It is the training partner of no discriminator, so it favours none.
        """
        sampler = self.pretrained(self.swept("mlm"), seed).network
        found = []
        with torch.no_grad():
            for number, batch in held_out_batches(self.held_out_rows, self.sizes.batch, self.sizes.judged):
                generator = torch.Generator().manual_seed(derive_seed(JUDGE_SEED, number))
                masked = sampler.mask(batch, generator)
                hidden_ME = sampler.generator_predictions(
                    sampler.generator_hidden(batch, masked.ids_N, masked.positions_M)
                )
                seeds_M = torch.randint(1 << 62, (len(hidden_ME),), generator=generator)
                drawn = sampler.generator_head(hidden_ME, masked.targets_M, seeds_M)
                assert drawn.sampled_M is not None
                found.append((batch, corrupt(batch, masked, drawn.sampled_M)))
        return found

    @torch.no_grad()
    def common_auc(self, name: str, seed: int, corruptions: Sequence[tuple[Batch, Corrupted]]) -> float:
        """AUC of an arm's discriminator on `common_corruptions`."""
        network = self.pretrained(name, seed).network
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for batch, corrupted in corruptions:
            logits.append(network.discriminate(batch, corrupted.ids_N))
            labels.append(corrupted.labels_N)
        return auc(torch.cat(logits), torch.cat(labels))

    def generator_entropy(self, name: str, seed: int) -> float:
        """Mean entropy in nats of the generator's distribution at chosen tokens of held-out text."""
        network = self.pretrained(name, seed).network
        values = []
        for number, batch in held_out_batches(self.held_out_rows, self.sizes.batch, self.sizes.held_out):
            generator = torch.Generator().manual_seed(derive_seed(JUDGE_SEED, number))
            values.append(sample_entropy(network, batch, generator))
        return statistics.fmean(values)

    @torch.no_grad()
    def corrupted_example(self, name: str, seed: int, rows: int = EXAMPLE_ROWS) -> list[list[dict[str, Any]]]:
        """The first held-out rows, corrupted by the arm's generator: for every token what it was, what the
        discriminator read, and its probability of "replaced"."""
        network = self.pretrained(name, seed).network
        _, batch = next(iter(held_out_batches(self.held_out_rows, rows, rows)))
        generator = torch.Generator().manual_seed(JUDGE_SEED)
        masked = network.mask(batch, generator)
        corrupted = corrupt(batch, masked, network.generate(batch, masked, generator).samples_M)
        replaced_N = network.discriminate(batch, corrupted.ids_N).sigmoid()
        pieces = self.tokenizer.vocabulary
        tokens = [
            {"was": pieces[was], "read": pieces[read], "written": written, "replaced": replaced}
            for was, read, written, replaced in zip(
                batch.ids_N.tolist(), corrupted.ids_N.tolist(), corrupted.written_N.tolist(), replaced_N.tolist()
            )
        ]
        starts = batch.cu_lengths.tolist()
        return [tokens[start:end] for start, end in pairwise(starts)]

    # Choices made before the claims, and what they cost

    def calibrate(self) -> list[dict[str, Any]]:
        """Mean development score on acceptability at each candidate fine-tuning rate, on a seed that no claim uses."""
        rows: list[dict[str, Any]] = []
        for name in (SCRATCH, "electra", "mlm"):
            for lr in CANDIDATE_RATES:
                runs = [self.finetune(name, CALIBRATION_SEED, "acceptability", number, lr) for number in range(2)]
                scores = [round(run.dev[run.metric], 2) for run in runs]
                rows.append({"arm": name, "lr": lr, "dev": statistics.fmean(scores), "each": scores})
                print(rows[-1], flush=True)
        return rows

    def seconds_per_step(self, name: str, steps: int = 8, rounds: int = 2) -> float:
        """CPU seconds of a training step of an arm with untrained weights: the faster of two rounds."""
        spec = self.specs[name]
        if spec.objective == "two_stage":
            first = self.build(replace(self.specs[spec.first], steps=1), CALIBRATION_SEED)
            network: ElectraPretrainer = second_stage(first, True, CALIBRATION_SEED)
        else:
            network = self.build(spec, CALIBRATION_SEED)
        module = PretrainingModule(network, self.run_config(CALIBRATION_SEED), spec.steps)
        batches = StepBatches(self.train_rows, self.sizes.batch, CALIBRATION_SEED, max_length=self.sizes.length)
        optimiser = module.configure_optimizers()["optimizer"]
        network.train()
        taken = []
        for number in range(rounds):
            started = time.process_time()
            for step in range(number * steps, (number + 1) * steps):
                batch = batches[step]
                loss = network(batch.batch, batch.draws).total
                stop_if_not_finite(float(loss.detach()), step)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            taken.append((time.process_time() - started) / steps)
        return min(taken)

    def finetuning_seconds(self, task: str, items: int = 256) -> float:
        """CPU seconds of one fine-tuning with its evaluation, estimated from a small part of the task."""
        whole = self.task(task)
        part = replace(whole, train=whole.train[:items], dev=[], test=whole.test[:items])
        taken = []
        for epochs in (1, 1, 3):  # the first warms up
            began = time.process_time()
            config = FinetuneConfig(lr=RATES[SCRATCH], epochs=epochs, device="cpu")
            finetune(self.model(), self.tokenizer, part, config, CALIBRATION_SEED)
            taken.append(time.process_time() - began)
        epoch = max(0.0, taken[2] - taken[1]) / 2
        training = epoch * self.sizes.epochs * len(whole.train) / len(part.train)
        return training + max(0.0, taken[1] - epoch) * (len(whole.test) + len(whole.dev)) / len(part.test)
