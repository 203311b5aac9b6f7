"""What the claims of `reproduce.py` are made of: text, arms pre-trained once and shared by the claims, fine-tuning, and
the measurements.

Every arm is trained by the step that users run (`training.PretrainingModule`) with one network shape, one batch, one
learning rate and one budget counted by the official counter (`flops.py`); arms differ in what a claim compares and in
nothing else. A finished arm and its scores stay on disk; an interrupted arm continues from its last checkpoint.

Shapes: N packed tokens of a batch, M chosen slots.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.data.sampling import derive_seed, generator_step
from common.errors import UserError
from common.files import write_atomically, write_json
from common.ledger import peak_memory
from common.training import SaveEvery, build_trainer, fit, latest_checkpoint
from electra.adversarial import AdversarialPretrainer, sample_entropy
from electra.config import DataConfig, ElectraConfig, ElectraRun, FinetuneConfig, OptimiserConfig, TrainerConfig
from electra.convert import Pretrained
from electra.data import PretrainingData, StepBatches, corpus_counts, held_out_batches, open_examples, open_tokenizer
from electra.examples import ExampleStore
from electra.fetch_text import find_text
from electra.finetuning import FinetuneResult, finetune
from electra.flops import steps_for, training_flops
from electra.masking import Corrupted, SpecialIds, corrupt
from electra.model import Batch
from electra.objectives import ElectraPretrainer, auc
from electra.tasks import Task, load_task
from electra.trainer import PretrainingModule, held_out_metrics
from electra.two_stage import second_stage, two_stage_flops
from electra.wordpiece import Tokenizer

# Budgets. Everything that takes time follows from these.
MAIN_TFLOP = {"small": 14.0, "smoke": 0.08}  # pre-training of each arm of E1 to E3, and the end of E7's curves
SWEEP = {"small": "50", "smoke": "100"}  # per cent of MAIN_TFLOP for each arm of E4 to E6: a key of SHARES, or 100
UNCOPIED_STEPS = {"small": 300, "smoke": 60}  # of E6b: the first steps of the second stage
FINETUNINGS = {"small": 1, "smoke": 1}  # of one arm on one task; the median counts
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
CHECKPOINT_EVERY = 500
LOOKS = 8  # measurements of an arm on held-out text while it trains
JUDGE_SEED = 1  # of the masks and samples on which all discriminators are compared
EXAMPLE_ROWS = 3
# Fields of `Plan` on which no trained arm depends.
TUNING = ("train_examples", "test_examples", "epochs", "finetunings")
AFTER_TRAINING = (*TUNING, "tasks", "judged")


@dataclass(frozen=True)
class Plan:
    """Sizes of a tier.

    Args:
        width, layers, heads: of the main network; vocabulary, length, batch: of its input.
        generator: width of the generator beside it, unless a claim varies it.
        main: TFLOP of an arm; sweep: per cent of it for E4 to E6; uncopied: steps of E6b.
        lr, warmup: of every arm.
        held_out: rows of held-out text for the losses; judged: for the AUC against the common generator.
        train_examples, test_examples, epochs, finetunings: of fine-tuning; tasks: that are scored.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    main: float
    sweep: str
    uncopied: int
    warmup: int
    held_out: int
    judged: int
    train_examples: int
    test_examples: int | None
    epochs: float
    finetunings: int
    tasks: tuple[str, ...] = TASKS
    generator: float = 0.5
    lr: float = 2e-3


PLANS = {
    "small": Plan(
        width=64,
        layers=2,
        heads=2,
        vocabulary=500,
        length=64,
        batch=32,
        main=MAIN_TFLOP["small"],
        sweep=SWEEP["small"],
        uncopied=UNCOPIED_STEPS["small"],
        warmup=200,
        held_out=512,
        judged=1024,
        train_examples=8000,
        test_examples=None,
        epochs=4,
        finetunings=FINETUNINGS["small"],
    ),
    "smoke": Plan(
        width=32,
        layers=2,
        heads=2,
        vocabulary=500,
        length=48,
        batch=16,
        main=MAIN_TFLOP["smoke"],
        sweep=SWEEP["smoke"],
        uncopied=UNCOPIED_STEPS["smoke"],
        warmup=20,
        held_out=128,
        judged=128,
        train_examples=200,
        test_examples=200,
        epochs=1,
        finetunings=FINETUNINGS["smoke"],
        tasks=("acceptability",),
    ),
}


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


@dataclass
class Arm:
    """A pre-trained network, what it cost, and its held-out measurements during training."""

    name: str
    network: ElectraPretrainer
    steps: int
    tflop: float
    cpu_seconds: float
    peak_bytes: int
    curve: list[dict[str, float]]

    def at(self, step: int) -> dict[str, float]:
        """The measurements after so many steps."""
        return next(point for point in self.curve if point["step"] == step)

    @property
    def last(self) -> dict[str, float]:
        return self.curve[-1]

    def costs(self) -> dict[str, float]:
        """Steps, TFLOP and CPU seconds, each key ending in the arm's name."""
        name = self.name.replace("-", "_")
        return {
            f"steps_{name}": float(self.steps),
            f"tflop_{name}": self.tflop,
            f"cpu_seconds_{name}": self.cpu_seconds,
        }


class Watch(pl.Callback):
    """Measures at some steps and counts CPU seconds (measuring is free); both are part of the checkpoint."""

    def __init__(self, steps: Iterable[int], measure: Callable[[], dict[str, float]]) -> None:
        self.steps, self.measure = set(steps), measure
        self.seconds = self._last = 0.0
        self.curve: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seconds += time.process_time() - self._last
        step = generator_step(trainer)
        if step in self.steps:
            self.curve.append({"step": step, "seconds": self.seconds, **self.measure()})
        self._last = time.process_time()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.curve = state_dict["seconds"], list(state_dict["curve"])


class Study:
    """Text, arms and scores of a tier; everything is made when first asked for.

    Args:
        folder: where trained arms and their scores are kept.

    Raises:
        UserError: the folder holds arms of another plan.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        kept, own = (
            folder / "plan.json",
            {key: value for key, value in asdict(plan).items() if key not in AFTER_TRAINING},
        )
        if not kept.is_file():
            write_json(kept, own)
        elif (old := json.loads(kept.read_text())) != own:
            changed = [key for key in own if old.get(key) != own[key]]
            raise UserError(
                f"{folder} holds arms of another plan ({', '.join(changed)} changed in experiments.py): delete that "
                "folder to train them anew"
            )
        self._tasks: dict[str, Task] = {}
        self._loaded: dict[tuple[str, int], Arm] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a claim's numbers depend on, as it is after a round trip through JSON."""
        return json.loads(json.dumps({**asdict(self.plan), "tasks": self.tasks, "rates": RATES}))

    # Text

    @cached_property
    def data(self) -> DataConfig:
        return DataConfig(vocabulary_size=self.plan.vocabulary, length=self.plan.length)

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
        plan = self.plan
        return ElectraConfig(
            vocab_size=self.tokenizer.size,
            embedding_size=plan.width,
            hidden_size=plan.width,
            layers=plan.layers,
            heads=plan.heads,
            intermediate_size=4 * plan.width,
            max_position=plan.length,
            dropout=0.0,
            attention_dropout=0.0,
            relative_positions=True,
            init="fan_in",
            **{"generator_factor": plan.generator, **changes},
        )

    def flops(self, spec: ArmSpec) -> float:
        """Training FLOPs of an arm; an adversarial step counts as one of electra, a second stage without the first."""
        sizes = (self.plan.batch, self.mean_length)
        if spec.objective == "two_stage":
            return two_stage_flops(self.model(), 0.0, spec.steps, *sizes, 0.15)
        objective: Any = "electra" if spec.objective == "adversarial" else spec.objective
        return training_flops(self.model(**spec.changes), objective, spec.steps, *sizes)

    def swept(self, objective: str) -> str:
        """The arm of this objective with the budget of E4 to E6."""
        return objective if self.plan.sweep == "100" else f"{objective}-{self.plan.sweep}"

    @cached_property
    def specs(self) -> dict[str, ArmSpec]:
        """All arms there are, by name."""
        model, sizes = self.model(), (self.plan.batch, self.mean_length)

        def equal_flops(objective: Any, share: float = 1.0) -> ArmSpec:
            return ArmSpec(objective, steps_for(model, objective, share * self.plan.main * 1e12, *sizes))

        specs = {name: equal_flops(name) for name in OBJECTIVES}
        for name, share in SHARES.items():
            specs |= {f"{objective}-{name}": equal_flops(objective, share) for objective in ("electra", "mlm")}
        # E4 and E5 compare at equal steps (figure 3), E6 at equal FLOPs.
        budget = 1.0 if self.plan.sweep == "100" else SHARES[self.plan.sweep]
        steps = equal_flops("electra", budget).steps
        for name, factor in SIZES.items():
            if factor != self.plan.generator:
                specs[f"size-{name}"] = ArmSpec("electra", steps, {"generator_factor": factor})
        for kind in ("unigram", "uniform"):
            specs[kind] = ArmSpec("electra", steps, {"generator": kind})
        for tying in ("none", "all"):
            specs[f"tying-{tying}"] = ArmSpec("electra", steps, {"generator_factor": 1.0, "tying": tying})
        specs["adversarial"] = ArmSpec("adversarial", steps)
        both = max(4, round(budget * self.plan.main * 1e12 / two_stage_flops(model, 0.5, 1, *sizes, 0.15)))
        second = both - both // 2
        specs["two_stage_generator"] = ArmSpec("mlm", both // 2)
        specs["two_stage"] = ArmSpec("two_stage", second, first="two_stage_generator")
        uncopied = min(second, self.plan.uncopied)
        specs["uncopied"] = ArmSpec("two_stage", uncopied, {}, second, "two_stage_generator", copy_weights=False)
        return specs

    def build(self, spec: ArmSpec, seed: int) -> ElectraPretrainer:
        """The network with its starting weights."""
        if spec.objective == "two_stage":
            return second_stage(self.arm(spec.first, seed).network, spec.copy_weights, seed)
        torch.manual_seed(seed)
        adversarial = spec.objective == "adversarial"
        objective: Any = "electra" if adversarial else spec.objective
        kind = AdversarialPretrainer if adversarial else ElectraPretrainer
        network = kind(self.model(**spec.changes), self.special, objective, max_length=self.plan.length)
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
            optimiser=OptimiserConfig(lr=self.plan.lr, warmup=self.plan.warmup),
            trainer=TrainerConfig(
                batch_size=self.plan.batch, precision="bf16-mixed", accelerator="cpu", threads=1, progress=False
            ),
        )

    def looks(self, name: str) -> set[int]:
        """After which steps an arm is measured on held-out text."""
        steps = self.specs[name].steps
        marks = {max(1, round(steps * look / LOOKS)) for look in range(1, LOOKS + 1)}
        return marks | ({self.specs["uncopied"].steps} if name == "two_stage" else set())

    def arm(self, name: str, seed: int) -> Arm:
        """An arm: read from disk if it was trained before, else trained (from its last checkpoint) and kept."""
        if (name, seed) in self._loaded:
            return self._loaded[name, seed]
        spec = self.specs[name]
        store = self.folder / "arms" / f"{name}-seed{seed}.json"
        network = self.build(spec, seed)
        if store.is_file():
            network.load_state_dict(load_file(store.with_suffix(".safetensors")))
        else:
            self._train(network, name, seed, store)
        known = json.loads(store.read_text())
        arm = Arm(name, network.eval(), **known)
        self._loaded[name, seed] = arm
        return arm

    def _train(self, network: ElectraPretrainer, name: str, seed: int, store: Path) -> None:
        spec, config, plan = self.specs[name], self.run_config(seed), self.plan
        folder = store.with_suffix("")
        measure = lambda: held_out_metrics(network, self.held_out_rows, plan.batch, seed, plan.held_out)  # noqa: E731
        watch = Watch(self.looks(name), measure)
        trainer = build_trainer(
            folder,
            config.trainer,
            steps=spec.steps,
            batch_size=plan.batch,
            grad_clip=config.optimiser.grad_clip,
            logs=False,
            callbacks=[watch, SaveEvery(folder / "checkpoints", CHECKPOINT_EVERY, last=spec.steps)],
        )
        data = PretrainingData(self.train_rows, spec.steps, batch_size=plan.batch, seed=seed, max_length=plan.length)
        module = PretrainingModule(network, config, spec.schedule or spec.steps)
        network.train()
        fit(trainer, module, data, latest_checkpoint(folder))
        state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
        write_atomically(store.with_suffix(".safetensors"), lambda path: save_file(state, str(path)))
        known = {
            "steps": spec.steps,
            "tflop": self.flops(spec) / 1e12,
            "cpu_seconds": watch.seconds,
            "peak_bytes": peak_memory(),
            "curve": watch.curve,
        }
        write_json(store, known)
        shutil.rmtree(folder, ignore_errors=True)

    def forget(self) -> None:
        """Drop the networks from memory (they stay on disk)."""
        self._loaded.clear()

    # Fine-tuning

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The plan's tasks, and parts of speech where the Brown corpus was fetched."""
        if self.plan.tasks != TASKS:
            return self.plan.tasks
        try:
            find_text("brown")
        except UserError:
            return TASKS
        return (*TASKS, "pos")

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            task = load_task(name, train_size=self.plan.train_examples)
            self._tasks[name] = task.first(test=self.plan.test_examples)
        return self._tasks[name]

    def score(self, name: str, seed: int, task: str) -> float:
        """Per cent on the test split: the median over fine-tunings of an arm, or of a network from scratch."""
        store = self.folder / "scores" / f"{name}-seed{seed}.json"
        known: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
        lr = RATES[SCRATCH if name == SCRATCH else "pretrained"]
        settings = {"lr": lr, **{key: getattr(self.plan, key) for key in TUNING}}
        if task not in known or known[task]["settings"] != settings:
            runs = [self.finetune(name, seed, task, number, lr) for number in range(self.plan.finetunings)]
            scores = [run.score for run in runs]
            known[task] = {"settings": settings, "scores": scores, "runs": [run.record() for run in runs]}
            write_json(store, known)
        return float(statistics.median(known[task]["scores"]))

    def finetune(self, name: str, seed: int, task: str, number: int, lr: float) -> FinetuneResult:
        """One fine-tuning; `number` decides the head's start and the order."""
        source: Pretrained | ElectraConfig
        if name == SCRATCH:
            source = self.model()
        else:
            network = self.arm(name, seed).network
            state = {key: value for key, value in network.state_dict().items() if key.startswith("electra.")}
            source = Pretrained(network.config, "ElectraModel", state)
        config = FinetuneConfig(lr=lr, epochs=self.plan.epochs, device="cpu")
        return finetune(source, self.tokenizer, self.task(task), config, derive_seed(seed, number) % 2**31)

    # Measurements on held-out text

    def common_corruptions(self, seed: int) -> list[tuple[Batch, Corrupted]]:
        """Held-out rows corrupted by one generator for all arms: the masked language model of the sweep's budget.

        It is the training partner of no discriminator, so it favours none.
        """
        sampler = self.arm(self.swept("mlm"), seed).network
        table_VE = sampler.main_embeddings.word_embeddings.weight
        found = []
        with torch.no_grad():
            for number, batch in held_out_batches(self.held_out_rows, self.plan.batch, self.plan.judged):
                generator = torch.Generator().manual_seed(derive_seed(JUDGE_SEED, number))
                masked = sampler.mask(batch, generator)
                hidden_ME = sampler.generator_predictions(
                    sampler.generator_hidden(batch, masked.ids_N, masked.positions_M)
                )
                seeds_M = torch.randint(1 << 62, (len(hidden_ME),), generator=generator)
                bias_V = sampler.generator_lm_head.bias
                drawn = sampler.head(hidden_ME, table_VE, bias_V, masked.targets_M, seeds_M)
                assert drawn.sampled_M is not None
                found.append((batch, corrupt(batch, masked, drawn.sampled_M)))
        return found

    @torch.no_grad()
    def common_auc(self, name: str, seed: int, corruptions: Sequence[tuple[Batch, Corrupted]]) -> float:
        """AUC of an arm's discriminator on `common_corruptions`."""
        network = self.arm(name, seed).network
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for batch, corrupted in corruptions:
            logits.append(network.discriminate(batch, corrupted.ids_N))
            labels.append(corrupted.labels_N)
        return auc(torch.cat(logits), torch.cat(labels))

    def generator_entropy(self, name: str, seed: int) -> float:
        """Mean entropy in nats of the generator's distribution at chosen tokens of held-out text."""
        network = self.arm(name, seed).network
        values = []
        for number, batch in held_out_batches(self.held_out_rows, self.plan.batch, self.plan.held_out):
            generator = torch.Generator().manual_seed(derive_seed(JUDGE_SEED, number))
            values.append(sample_entropy(network, batch, generator))
        return statistics.fmean(values)

    @torch.no_grad()
    def corrupted_example(self, name: str, seed: int, rows: int = EXAMPLE_ROWS) -> list[list[dict[str, Any]]]:
        """The first held-out rows, corrupted by the arm's generator: for every token what it was, what the
        discriminator read, and its probability of "replaced"."""
        network = self.arm(name, seed).network
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
        batches = StepBatches(self.train_rows, self.plan.batch, CALIBRATION_SEED, max_length=self.plan.length)
        optimiser = module.configure_optimizers()["optimizer"]
        network.train()
        taken = []
        for number in range(rounds):
            started = time.process_time()
            for step in range(number * steps, (number + 1) * steps):
                batch = batches[step]
                network(batch.batch, batch.draws).total.backward()
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
        training = epoch * self.plan.epochs * len(whole.train) / len(part.train)
        return training + max(0.0, taken[1] - epoch) * (len(whole.test) + len(whole.dev)) / len(part.test)
