"""ELECTRA's pre-training beside transformers: tokens per second, memory, and the fraction of the matmul peak.

    python -m benchmarks.electra                     # writes results/bench_electra.json; some 20 minutes on 2 CPUs
    python -m benchmarks.electra --sizes small --rounds 3

Every arm is a process of its own that waits until it is its turn, so that arms alternate (A B A B ...), and each has
its own peak memory. Wall-clock medians count; the note of a row says what the ratio of CPU times was.

Both sides train the same networks from the same weights on the same rows and masked positions, through a full trainer:
ours is `electra/train.py`'s (Lightning), the peer what a transformers user assembles, ElectraForMaskedLM and
ElectraForPreTraining with shared embeddings in one module, padded batches, AdamW, transformers.Trainer. Before
anything is timed, one step's losses in float32 must agree to 1e-4 of their value.

Sizes: `small` has three layers of 128, without relative positions, which transformers lacks; `paper_small` and
`paper_base` are the paper's. Rows are as the official builder makes them from long documents ("full": nineteen in
twenty of the longest length) or from short ones ("mixed": an eighth of the longest length and up).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms import (
    Pace,
    Timing,
    Turns,
    bench_parser,
    beside_the_peer,
    chosen_devices,
    in_both_precisions,
    matmul,
    measure,
    noted,
    of_the_peak,
    parse,
    record,
    take_turns,
    where_of,
)
from common.errors import run_main
from common.ledger import bench_row
from common.paths import RESULTS
from common.pretrained import from_folder

if TYPE_CHECKING:
    from electra.config import ElectraConfig
    from electra.data import StepBatch
    from electra.objectives import ElectraPretrainer


class Size(NamedTuple):
    length: int
    batch: int  # rows of a step on CPUs
    cuda_batch: int
    options: dict[str, Any]  # of ElectraConfig


NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
SIZES = {
    "tiny": Size(
        16,
        4,
        4,
        dict(
            vocab_size=150,
            embedding_size=8,
            hidden_size=16,
            layers=2,
            heads=2,
            intermediate_size=32,
            max_position=16,
            generator_factor=0.5,
            **NO_DROPOUT,
        ),
    ),
    "small": Size(
        96,
        24,
        256,
        dict(
            vocab_size=1000,
            hidden_size=128,
            layers=3,
            heads=4,
            intermediate_size=512,
            max_position=96,
            generator_factor=0.5,
            **NO_DROPOUT,
        ),
    ),
    "paper_small": Size(128, 16, 128, {}),
    "paper_base": Size(
        512, 2, 32, dict(embedding_size=768, hidden_size=768, heads=12, intermediate_size=3072, generator_factor=1 / 3)
    ),
}
MASK_PROBABILITY = 0.15
LEARNING_RATE, WARMUP = 5e-4, 10
STEPS = 1_000_000  # of the learning-rate schedule; the arms are stopped before
LOSS_TOLERANCE = 1e-4


def configuration(size: str) -> ElectraConfig:
    from electra.config import ElectraConfig

    return ElectraConfig(**SIZES[size].options)


def build(size: str) -> ElectraPretrainer:
    """Generator and discriminator with the same random weights in every process."""
    from electra.masking import SpecialIds
    from electra.objectives import ElectraPretrainer

    torch.manual_seed(0)
    config = configuration(size)
    return ElectraPretrainer(config, SpecialIds(), mask_probability=MASK_PROBABILITY, max_length=SIZES[size].length)


class Rows:
    """Rows of random ordinary ids with the interface of an ExampleStore."""

    def __init__(self, size: str, rows: str, count: int = 4096) -> None:
        longest, vocabulary = SIZES[size].length, configuration(size).vocab_size
        rng = np.random.default_rng(0)
        short = rng.random(count) < (1.0 if rows == "mixed" else 0.05)
        self.lengths = np.where(short, rng.integers(max(5, longest // 8), longest + 1, count), longest)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.first_lengths_R = np.maximum(3, self.lengths // 2)
        # Ids thin out like words do, so that there is something to learn.
        ids = 104 + (vocabulary - 104) * rng.random(self.offsets[-1]) ** 3
        self.ids_T = ids.astype(np.int32)
        self.ids_T[self.offsets[:-1]] = 101
        self.ids_T[self.offsets[:-1] + self.first_lengths_R - 1] = 102
        self.ids_T[self.offsets[1:] - 1] = 102

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self.ids_T[self.offsets[row] : self.offsets[row + 1]], int(self.first_lengths_R[row])


def our_batches(size: str, rows: str, batch: int) -> Any:
    """`StepBatches` without the positions that official masking draws twice, which the peer cannot represent."""
    from electra.data import StepBatches

    class DistinctPositions(StepBatches):
        def _draw(self, step: int, chosen: list[int]) -> Any:
            drawn = super()._draw(step, chosen)
            rng = np.random.default_rng(step)
            columns_BS = np.ones_like(drawn.columns_BS)
            for place, row in enumerate(chosen):
                ids, _ = self.store[row]
                ordinary = np.flatnonzero((ids != 101) & (ids != 102))
                count = int(drawn.slots_B[place])
                columns_BS[place, :count] = rng.permutation(ordinary)[:count]
            weights_W = drawn.weights_W.copy()
            weights_W[2] = weights_W[0]
            return replace(drawn, columns_BS=columns_BS, weights_W=weights_W)

    return DistinctPositions(Rows(size, rows), batch, 0, MASK_PROBABILITY, SIZES[size].length)  # type: ignore[arg-type]


def padded(network: ElectraPretrainer, step: StepBatch) -> dict[str, Tensor]:
    """A step's batch as transformers wants it: padded ids, masked ids, labels (-100 elsewhere), types, mask."""
    batch = step.batch
    masked = network.mask(batch, draws=step.draws)
    labels_N = torch.full_like(batch.ids_N, -100)
    labels_N[masked.positions_M] = masked.targets_M
    return {
        "input_ids": batch.pad(masked.ids_N),
        "original_ids": batch.pad(batch.ids_N),
        "labels": batch.pad(labels_N, -100),
        "token_type_ids": batch.pad(batch.types_N),
        "attention_mask": batch.pad(torch.ones_like(batch.ids_N)),
    }


class Assembled(nn.Module):
    """Generator and discriminator of transformers in one module, embeddings shared; returns the joint loss."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import ElectraForMaskedLM, ElectraForPreTraining

        self.discriminator = from_folder(ElectraForPreTraining, folder)
        self.generator = from_folder(ElectraForMaskedLM, folder / "generator")
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        table = self.discriminator.electra.embeddings.word_embeddings.weight
        self.generator.generator_lm_head.weight = table
        self.last_loss: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor,
        original_ids: Tensor,
        labels: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`samples` ([B, L]) replaces what would be drawn, for the comparison of losses."""
        shared = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        logits = self.generator(input_ids=input_ids, **shared).logits
        mlm = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        chosen = labels != -100
        if samples is None:
            with torch.no_grad():
                scores = logits[chosen].float()
                noise = -torch.log(-torch.log(torch.rand_like(scores) + 1e-9) + 1e-9)
                samples = original_ids.masked_scatter(chosen, (scores + noise).argmax(-1))
        replaced = (samples != original_ids) & chosen
        scores = self.discriminator(input_ids=samples, **shared).logits
        real = attention_mask.bool()
        disc = F.binary_cross_entropy_with_logits(scores[real].float(), replaced[real].float())
        loss = mlm + 50 * disc
        self.last_loss = loss.detach()
        return {"loss": loss, "mlm": mlm, "disc": disc}


class PeerBatches(torch.utils.data.Dataset):
    """The same batches, padded, as items of a data set."""

    def __init__(self, size: str, rows: str, batch: int) -> None:
        self.batches, self.network = our_batches(size, rows, batch), build(size)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return padded(self.network, self.batches[step])


def train_ours(arm: Arm, turns: Turns) -> None:
    """Our trainer, a turn at a time."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from common.training import build_trainer, compiled
    from electra.config import ElectraRun, OptimiserConfig, TrainerConfig
    from electra.trainer import PretrainingModule

    class Wait(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 0 and not turns.wait():
                trainer.should_stop = True

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            if turns.done(outputs["loss"].detach()) and not turns.wait():
                trainer.should_stop = True

    batch = arm.rows_of_a_step
    precision: Any = "bf16-mixed" if arm.bf16 else "32-true"
    config = ElectraRun(
        optimiser=OptimiserConfig(lr=LEARNING_RATE, warmup=WARMUP),
        trainer=TrainerConfig(
            batch_size=batch,
            precision=precision,
            accelerator="gpu" if arm.device == "cuda" else "cpu",
            log_every=1000,
            progress=False,
        ),
    )
    module = PretrainingModule(build(arm.size), config, STEPS)
    parts = [part for part in (module.network.electra, module.network.generator) if part is not None]
    with compiled(parts if arm.compiled else (), dynamic=True), tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            Path(folder), config.trainer, steps=STEPS, batch_size=batch, grad_clip=1.0, callbacks=[Wait()], logs=False
        )
        batches = our_batches(arm.size, arm.rows, batch)
        loader = DataLoader(batches, batch_size=None, sampler=range(STEPS), pin_memory=arm.device == "cuda")
        trainer.fit(module, loader)


def train_peer(arm: Arm, folder: Path, turns: Turns) -> None:
    """transformers.Trainer, a turn at a time."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = Assembled(folder / "network")

    class Wait(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not turns.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if turns.done(model.last_loss):
                control.should_training_stop = not turns.wait()

    arguments = TrainingArguments(
        output_dir=str(folder / "peer"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        adam_epsilon=1e-6,
        warmup_steps=WARMUP,
        max_grad_norm=1.0,
        bf16=arm.bf16,
        use_cpu=arm.device == "cpu",
        torch_compile=arm.compiled,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=arm.device == "cuda",
    )
    batches = PeerBatches(arm.size, arm.rows, arm.rows_of_a_step)
    trainer = Trainer(model, arguments, train_dataset=batches, data_collator=lambda items: items[0], callbacks=[Wait()])
    trainer.train()


@dataclass(frozen=True)
class Arm:
    """One process: `side` is ours, peer, or "peak" (a large matrix product); `rows` full or mixed."""

    side: str
    size: str
    rows: str
    device: str
    bf16: bool = False
    compiled: bool = False

    @property
    def rows_of_a_step(self) -> int:
        spec = SIZES[self.size]
        return spec.cuda_batch if self.device == "cuda" else spec.batch


def prepare(size: str, folder: Path) -> None:
    """Write the peer's networks from our weights."""
    from electra.layouts import save_transformers

    save_transformers(build(size), folder / "network")


def losses_of_both(size: str, rows: str, folder: Path, step: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """(ours, peer's) losses in float32 without dropout, on one step with our samples."""
    network = build(size).eval()
    batch = our_batches(size, rows, min(8, SIZES[size].batch))[step]
    given = padded(network, batch)
    with torch.no_grad():
        ours = network(batch.batch, batch.draws)
        masked = network.mask(batch.batch, draws=batch.draws)
        samples_M = network.generate(batch.batch, masked, draws=batch.draws).samples_M
        samples_N = batch.batch.ids_N.clone()
        samples_N[masked.positions_M] = samples_M
        peer = Assembled(folder / "network").eval()(**given, samples=batch.batch.pad(samples_N))
    return (
        {"mlm": float(ours.mlm), "disc": float(ours.main), "loss": float(ours.total)},
        {key: float(value) for key, value in peer.items()},
    )


def check_same(size: str, rows: str, folder: Path) -> None:
    """Raises RuntimeError where the two sides' losses of one step differ."""
    ours, peer = losses_of_both(size, rows, folder)
    for key, value in ours.items():
        if not abs(value / peer[key] - 1) <= LOSS_TOLERANCE:
            raise RuntimeError(f"{size}, {rows}: {key} is {value} with us and {peer[key]} with the peer")


def step_tokens(arm: Arm, steps: int = 20) -> float:
    """Real tokens of a step, averaged."""
    return sum(float(our_batches(arm.size, arm.rows, arm.rows_of_a_step)[i].weights_W[1]) for i in range(steps)) / steps


def step_flop(arm: Arm, steps: int = 5) -> float:
    """FLOP of the matrix products of a training step on real tokens: three times the forward pass, no recomputation."""
    batches = our_batches(arm.size, arm.rows, arm.rows_of_a_step)

    def encoder(config: ElectraConfig, lengths: np.ndarray) -> float:
        h, tokens = config.hidden_size, float(lengths.sum())
        block = tokens * (8 * h * h + 4 * h * config.intermediate_size) + 4 * h * float((lengths**2).sum())
        project = 2 * config.embedding_size * h * tokens if config.embedding_size != h else 0.0
        return config.layers * block + project

    config = configuration(arm.size)
    small = config.generator_config()
    total = 0.0
    for step in range(steps):
        made = batches[step]
        lengths, slots = np.array(made.batch.lengths, np.float64), float(made.weights_W[0])
        total += encoder(config, lengths) + 2 * config.hidden_size**2 * lengths.sum()
        total += encoder(small, lengths)
        total += slots * 2 * config.embedding_size * (small.hidden_size + config.vocab_size)
    return 3 * total / steps


def rows_for(size: str, rows: str, device: str, folder: Path, pace: Pace) -> list[Any]:
    """Bench rows of one size and kind of rows; the two sides' losses are compared first."""
    check_same(size, rows, folder)
    arms = in_both_precisions(Arm("ours", size, rows, device), compiled=("peer",), peak=True)
    timings = take_turns("benchmarks.electra", arms, pace, 3, folder)
    return list(comparison(arms["ours bf16"], timings, pace))


def comparison(ours: Arm, timings: dict[str, Timing], pace: Pace) -> Iterator[dict[str, Any]]:
    """Bench rows from the arms' timings; `ours` is one of them."""
    size, rows, device = ours.size, ours.rows, ours.device
    spec, config, where = SIZES[size], configuration(size), where_of(device)
    batch = ours.rows_of_a_step
    what = (
        f"{size}: {config.layers} x {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{batch} rows of up to {spec.length}, {rows}"
    )
    tokens = step_tokens(ours)
    filled = tokens / (batch * spec.length)
    note = f"same weights, rows and masks; {filled:.0%} of the padded batch are tokens; {pace.threads} threads"

    def faster(label: str, a: Timing, b: Timing, target: float | None) -> dict[str, Any]:
        name = f"{where}pre-training, {label} ({what})"
        row = bench_row(name, tokens / a.wall, tokens / b.wall, "tokens/s", target=target)
        return noted(row, f"{note}; CPU-time ratio {b.cpu / a.cpu:.2f}")

    default = "bf16" if device == "cuda" else "fp32"  # transformers.Trainer's default on CPUs is float32
    yield from beside_the_peer(timings, device, default, faster, 1.5, "peak memory of pre-training", what)
    flop = step_flop(ours)
    for precision in ("bf16", "fp32"):
        name = f"{where}fraction of the matmul peak in {precision}, pre-training ({what})"
        trained, product = timings[f"ours {precision}"], timings[f"peak {precision}"]
        yield of_the_peak(name, flop, trained, product, device, pace.rounds)


# [M, E, V] of the vocabulary head: masked tokens of ELECTRA-Small, Base and Large, and all tokens of Small.
HEAD_SHAPES = ((2432, 128, 30522), (4864, 768, 30522), (4096, 1024, 30522), (16384, 128, 30522))


def kernel_rows() -> Iterator[dict[str, Any]]:
    """The fused vocabulary head beside eager torch and torch.compile, loss, sample and gradients, on a CUDA device."""
    from benchmarks.kernels import device_milliseconds
    from common.kernels.vocab_head import vocab_head

    def eager(hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden.bfloat16(), table.bfloat16(), bias.bfloat16()).float()
        noise = -torch.log(-torch.log(torch.rand_like(logits)))
        return F.cross_entropy(logits, targets, reduction="none"), (logits.detach() + noise).argmax(1)

    for rows, width, vocabulary in HEAD_SHAPES:
        torch._dynamo.reset()
        hidden = torch.randn(rows, width, device="cuda", requires_grad=True)
        table = (0.02 * torch.randn(vocabulary, width, device="cuda")).requires_grad_()
        bias = torch.zeros(vocabulary, device="cuda", requires_grad=True)
        targets = torch.randint(vocabulary, (rows,), device="cuda")
        seeds = torch.randint(1 << 62, (rows,), device="cuda")
        weights = torch.ones(rows, device="cuda")

        def fused(hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, seeds: Tensor = seeds) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                found = vocab_head(hidden, table, bias, targets, seeds)
            return found.loss_M, found.sampled_M

        contenders: dict[str, Callable[..., Any]] = {
            "fused": fused,
            "eager": eager,
            "torch.compile": torch.compile(eager, dynamic=False),
        }
        times, peaks = {}, {}
        for label, function in contenders.items():

            def both(
                function: Callable[..., Any] = function,
                inputs: Sequence[Tensor] = (hidden, table, bias, targets),
                weights: Tensor = weights,
            ) -> None:
                loss, _ = function(*inputs)
                torch.autograd.grad(loss, inputs[:3], weights)

            both()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            peaks[label] = (torch.cuda.max_memory_allocated() - before) / 2**20
            times[label] = device_milliseconds(both)
        for peer in ("eager", "torch.compile"):
            name = f"vocabulary head forward+backward with samples, bf16, {[rows, width, vocabulary]}, vs {peer}"
            target = 1.0 if peer == "torch.compile" else None
            yield bench_row(name, times["fused"], times[peer], "ms", target=target, higher_is_better=False)
            yield bench_row(f"{name}: memory", peaks["fused"], peaks[peer], "MiB", higher_is_better=False)


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """Rows of each comparison at one size."""
    prepare(size, folder)
    for rows in ("full", "mixed"):
        yield rows_for(size, rows, device, folder, pace)


def main() -> None:
    options = parse(bench_parser(__doc__, "bench_electra.json", SIZES, ["small", "paper_small"], steps=4))
    if options.arm:
        arm = Arm(**options.arm)
        turns = Turns(arm.device)
        if arm.side == "peak":
            turns.serve(matmul(arm.device, arm.bf16))
        elif arm.side == "ours":
            train_ours(arm, turns)
        else:
            train_peer(arm, options.folder, turns)
        return
    measure(options, parts)
    if "cuda" in chosen_devices(options):
        record(list(kernel_rows()), RESULTS / "bench_kernels.json")
    else:
        print("no CUDA device: the rows on CUDA are left out")


if __name__ == "__main__":
    run_main(main)
