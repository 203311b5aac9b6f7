"""One run from teacher to one-step pipeline; `train.py` is its command line.

A run is a chain of flows: v_1 (the teacher), v_2 .. v_k (reflow), then the distilled student. Each link keeps its
averaged weights in its stage's folder (`reflow_1/student.safetensors`), so an interrupted run continues with the first
unfinished one, from its last checkpoint.

Shape suffixes: B batch, C channels, H height, W width (latents), L text tokens, D text width, P prompts.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.sampling import StepDataModule, TensorTable, derive_seed, step_generator
from common.ema import Ema
from common.errors import UserError
from common.files import write_atomically, write_json
from common.images import save_grid
from common.options import free_options
from common.processes import is_main_process
from common.training import EveryNSteps, open_run_folder, train
from instaflow.config import InstaFlowConfig, OptimiserConfig, StageConfig, TrainerConfig
from instaflow.flow import UNetFlow, conditioned, euler, interpolate, rectified_flow_loss, sample_times
from instaflow.measures import fixed_noise
from instaflow.pairs import (
    DiffusionSource,
    FlowSource,
    PairDataset,
    PairSource,
    StateTable,
    default_folder,
    generate_pairs,
    read_prompts,
)
from instaflow.student import make_student, stack
from instaflow.teacher import Teacher

# What two starts of one run may disagree on: none of it changes the trained weights.
FREE_OPTIONS = free_options("stages", "evaluation", "pairs.folder", "pairs.batch_size", "trainer.cache_text_gb")
WEIGHTS = "student.safetensors"
STAMP = "teacher.sha256"


@dataclass
class Draws:
    """Random numbers of one training step: drawn for the global batch, of which this process takes its rows.

    So resuming, adding processes and accumulating gradients change nothing.
    """

    generator: torch.Generator
    batch: int
    mine: slice

    def uniform(self) -> Tensor:
        """[b] in [0, 1)."""
        return torch.rand(self.batch, generator=self.generator, device=self.generator.device)[self.mine]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """[b, *shape], unit normal."""
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.generator.device)[self.mine]

    def times(self, schedule: str) -> Tensor:
        """Training times [b] of `instaflow.flow.sample_times`."""
        return sample_times(self.batch, schedule, generator=self.generator, device=self.generator.device)[self.mine]


# A loss of one (micro-)batch: (flow, {"x0", "x1", "states"}, draws) -> scalar.
Loss = Callable[[nn.Module, dict[str, Tensor], Draws], Tensor]


def reflow_loss(reduction: str = "mean") -> Loss:
    """Section 2: regress X1 - X0 at uniform times."""

    def loss(flow: nn.Module, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        velocity = conditioned(flow, batch["states"])
        return rectified_flow_loss(velocity, batch["x0"], batch["x1"], draws.times("uniform"), reduction)

    return loss


def distillation_loss(k: int = 1) -> Loss:
    """Section 3.2 with D = L2: the same regression at t = 0 alone, or at the k times i/k."""

    def loss(flow: nn.Module, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        velocity = conditioned(flow, batch["states"])
        t_B = draws.times("t0" if k == 1 else str(k))
        return rectified_flow_loss(velocity, batch["x0"], batch["x1"], t_B)

    return loss


def perceptual_loss(teacher: Teacher, distance: Any, k: int = 1) -> Loss:
    """Section 3.2 with D = LPIPS on decoded images: the gradient passes the frozen decoder."""

    def loss(flow: nn.Module, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        t_B = draws.times("t0" if k == 1 else str(k))
        x_BCHW = interpolate(batch["x0"], batch["x1"], t_B)
        # The line from x_t along v, up to t = 1.
        z1_BCHW = x_BCHW + (1 - t_B.view(-1, 1, 1, 1)) * flow(x_BCHW, t_B, batch["states"])
        with torch.no_grad():
            target_BCHW = teacher.decode_differentiable(batch["x1"])
        return distance(teacher.decode_differentiable(z1_BCHW), target_BCHW).mean()

    return loss


def online(loss: Loss, source: PairSource) -> Loss:
    """The same loss on pairs that `source` makes anew in every step, each used once."""

    def wrapped(flow: nn.Module, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        x0_BCHW = draws.normal(source.teacher.latent_shape)
        # Inference-mode tensors cannot enter a graph.
        x1_BCHW = source(x0_BCHW, batch["states"]).clone()
        return loss(flow, {**batch, "x0": x0_BCHW, "x1": x1_BCHW}, draws)

    return wrapped


class StudentTrainer(pl.LightningModule):
    """Minimises a loss of a flow with AdamW, warm-up and averaged weights.

    Everything random in a step is a function of (seed, step).

    Args:
        states: prompt numbers [b] to text states [b, L, D] (of the frozen encoder, which is no part of the checkpoint).
        accumulate: micro-batches per step.
    """

    def __init__(
        self,
        flow: nn.Module,
        loss: Loss,
        stage: StageConfig,
        optimiser: OptimiserConfig,
        seed: int,
        states: Callable[[Tensor], Tensor],
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.flow, self.loss, self.stage, self.options = flow, loss, stage, optimiser
        self.seed, self.states, self.accumulate = seed, states, accumulate
        self.ema = Ema(flow, optimiser.ema_decay)
        self._sum = self.last_loss = torch.zeros(())

    def configure_optimizers(self) -> Any:
        options = self.options
        trainable = [p for p in self.flow.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trainable, lr=self.stage.lr, weight_decay=options.weight_decay, foreach=True)

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / max(1, options.warmup))
            if options.schedule == "constant":
                return rise
            return rise * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, step / self.stage.steps)))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        world, step = self.trainer.world_size, self.trainer.global_step
        part, size = batch_idx % self.accumulate, self.stage.batch_size // self.accumulate
        mine = slice(part * size + self.trainer.global_rank, (part + 1) * size, world)
        draws = Draws(step_generator(self.seed, step, self.device), self.stage.batch_size, mine)
        loss = self.loss(self.flow, {**batch, "states": self.states(batch["prompt"])}, draws)
        self._log_mean(loss.detach(), part)
        return loss

    def _log_mean(self, loss: Tensor, part: int) -> None:
        """Log the mean over the whole global batch: micro-batches here, processes by Lightning."""
        self._sum = loss if part == 0 else self._sum + loss
        if part == self.accumulate - 1:
            self.log("train/loss", self._sum / self.accumulate, sync_dist=self.trainer.world_size > 1)
            self.last_loss = self._sum / self.accumulate

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        self.ema.update(self.flow)
        self.zero_grad(set_to_none=True)


def optimise(
    flow: UNetFlow,
    loss: Loss,
    data: Dataset,
    states: Callable[[Tensor], Tensor],
    stage: StageConfig,
    optimiser: OptimiserConfig,
    seed: int,
    folder: Path,
    trainer: TrainerConfig,
    callbacks: Sequence[pl.Callback] = (),
    keep: bool = True,
    show: Callable[[int], None] | None = None,
) -> StudentTrainer:
    """Train `flow` in place for one stage; afterwards it holds the averaged weights and is in eval mode.

    Args:
        data: map-style, one row a pair (`x0`, `x1`, `prompt`).
        keep: write checkpoints and logs below `folder`, and continue from the last checkpoint there.
        show: called every `trainer.sample_every` steps while the flow holds its averaged weights.
    """
    module = StudentTrainer(flow.train(), loss, stage, optimiser, seed, states, trainer.accumulate)

    def shown(step: int) -> None:
        assert show is not None
        with module.ema.swapped_into(flow):
            flow.eval()
            show(step)
            flow.train()

    grids = [EveryNSteps(trainer.sample_every, shown)] if show and trainer.sample_every else []
    batches = StepDataModule(data, stage.batch_size, stage.steps, seed, accumulate=trainer.accumulate)
    train(
        folder,
        module,
        batches,
        trainer,
        steps=stage.steps,
        batch_size=stage.batch_size,
        grad_clip=optimiser.grad_clip,
        callbacks=[*grids, *callbacks],
        logs=keep,
    )
    module.ema.copy_to(flow)
    flow.eval()
    return module


def prompt_list(name: str, count: int) -> list[str]:
    """The prompts that pairs are made for: captions of a training set, or the lines of a file.

    Raises:
        UserError: no such file, or one that holds no prompts.
    """
    if name == "shapes":
        from common.data.shapes import Shapes

        return Shapes("train", count, 32).captions
    if name == "emoji":
        from common.data.emoji import EmojiCap

        data = EmojiCap("train", size=32)
        return [data[i % len(data)]["caption"] for i in range(count)]
    path = Path(name)
    if path.suffix != ".jsonl":
        return read_prompts(path)
    if not path.is_file():
        raise UserError(f'prompt file {path}: no such file; expected one JSON object a line with the field "text"')
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{path} line {number}: "text" is missing or empty; expected {{"text": PROMPT}}')
        prompts.append(" ".join(text.split()))
    return prompts


def process_place() -> tuple[int, int]:
    """(rank, processes) of this process: of the process group if there is one, else what the launcher says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))), int(os.environ.get("WORLD_SIZE", "1"))


def make_pairs(
    source: PairSource,
    prompts: Sequence[str],
    count: int,
    seed: int,
    batch_size: int,
    shard_size: int,
    folder: Path | None = None,
    progress: bool = True,
) -> PairDataset:
    """The first `count` pairs of `source`, made where they are missing; several processes share the shards out."""
    place = folder or default_folder(source, prompts, seed, shard_size)
    rank, world = process_place()
    report = (lambda text: print(f"pairs: {text}", flush=True)) if progress else None
    while True:
        pairs = generate_pairs(source, prompts, place, count, seed, batch_size, shard_size, rank, world, report)
        if pairs is not None:
            pairs.check_coupling()
            return pairs
        time.sleep(2)  # other processes are still at their shards


@dataclass
class Run:
    """A run folder and what is in it."""

    config: InstaFlowConfig
    folder: Path
    teacher: Teacher
    reflowed: UNetFlow | None = None
    student: UNetFlow | None = None
    is_main: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: InstaFlowConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; loads the teacher.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the teacher is.
        """
        options = config.trainer
        if options.threads:
            torch.set_num_threads(options.threads)
        stages: list[tuple[str, StageConfig | None]] = [
            ("reflow", config.reflow),
            ("reflow.then", config.reflow.then),
            ("distil", config.distil),
            ("perceptual", config.perceptual),
        ]
        for name, stage in stages:
            if stage and (stage.batch_size < 1 or stage.batch_size % options.accumulate):
                raise UserError(
                    f"--{name}.batch_size {stage.batch_size} cannot be divided into --trainer.accumulate "
                    f"{options.accumulate} micro-batches"
                )
        if "fsdp" in options.strategy or "deepspeed" in options.strategy:
            raise UserError(
                f"--trainer.strategy {options.strategy} shards the weights that the moving average follows: "
                "use auto or ddp"
            )
        if config.student.stack != "none" and config.student.init == "wrapped":
            raise UserError("--student.stack needs --student.init raw or negate: a wrapped network cannot be stacked")
        if config.distil.k < 1 or config.reflow.rounds < 0:
            raise UserError(
                f"--distil.k {config.distil.k} must be at least 1, --reflow.rounds {config.reflow.rounds} at least 0"
            )
        if config.pairs.online and config.reflow.rounds == 0:
            raise UserError("--pairs.online is for reflow: with --reflow.rounds 0 there is none")
        folder = Path(config.run_dir)
        teacher = load_teacher(config)
        open_run_folder(folder, config.resume, config_yaml, FREE_OPTIONS)
        refuse_other_teacher(folder, config.teacher, teacher)
        if is_main_process():
            write_atomically(folder / STAMP, lambda temporary: temporary.write_text(teacher.checksum()))
        return cls(config, folder, teacher, is_main=is_main_process())

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A run that `train.py` has finished, for its metrics; writes nothing.

        Raises:
            UserError: no run there, or its teacher was replaced.
        """
        from common.cli import parse_config

        config_file = folder / "config.yaml"
        if not config_file.is_file():
            raise UserError(f"{folder}: no config.yaml there; expected the folder of a finished run")
        config, _ = parse_config(InstaFlowConfig, None, "", ["--config", str(config_file)])
        teacher = load_teacher(config)
        refuse_other_teacher(folder, config.teacher, teacher)
        return cls(config, folder, teacher)

    def states(self, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Prompt numbers to text states; each prompt is encoded once while `trainer.cache_text_gb` lasts."""
        listed = list(prompts)
        table = StateTable(self.teacher, int(self.config.trainer.cache_text_gb * 2**30))
        return lambda ids_B: table([listed[i] for i in ids_B.tolist()]).float()

    def teacher_source(self) -> DiffusionSource:
        """The teacher's ODE, from which the first pairs come."""
        options = self.config.pairs
        return DiffusionSource(self.teacher, options.solver, options.steps, options.guidance)

    def _pairs(self, source: PairSource, count: int, stream: int, folder: Path | None) -> PairDataset:
        options = self.config.pairs
        started = time.perf_counter()
        pairs = make_pairs(
            source,
            prompt_list(options.prompts, options.count),
            count,
            derive_seed(self.config.seed, stream) if stream else self.config.seed,
            options.batch_size,
            options.shard_size,
            folder,
            self.config.trainer.progress,
        )
        self._took("pairs", started)
        return pairs

    def teacher_pairs(self) -> PairDataset:
        """Pairs of the teacher; in the cache unless `pairs.folder` says otherwise."""
        folder = self.config.pairs.folder
        return self._pairs(self.teacher_source(), self.config.pairs.count, 0, Path(folder) if folder else None)

    def flow_pairs(self, flow: UNetFlow, count: int, name: str) -> PairDataset:
        """New pairs (other noises) of a rectified flow with its guided velocity, kept in the run folder."""
        options = self.config.distil
        source = FlowSource(flow.to(self.teacher.device), self.teacher, options.teacher_steps, options.alpha)
        stream = 1 + int(name.rpartition("_")[2]) if name.startswith("reflow") else 1000
        return self._pairs(source, count, stream, self.folder / name / "pairs")

    def reflow(self, callbacks: Sequence[pl.Callback] = ()) -> UNetFlow:
        """v_2 .. v_k: one round after the other, each on the pairs of the flow before."""
        config = self.config
        flow = make_student(self.teacher, config.student.init)
        for number in range(1, config.reflow.rounds + 1):
            name = f"reflow_{number}"
            source: PairSource = (
                self.teacher_source()
                if number == 1
                else FlowSource(copy_of(flow), self.teacher, config.distil.teacher_steps, config.distil.alpha)
            )
            if self.restore(flow, name):
                continue
            loss = reflow_loss(config.reflow.loss)
            if config.pairs.online:
                prompts = prompt_list(config.pairs.prompts, config.pairs.count)
                data: Dataset = TensorTable({"prompt": torch.arange(len(prompts))})
                loss = online(loss, source)
            else:
                pairs = self.teacher_pairs() if number == 1 else self.flow_pairs(flow, config.pairs.count, name)
                data, prompts = pairs, pairs.prompts
            lr = config.reflow.later_lr if number > 1 and config.reflow.later_lr else config.reflow.lr
            phases = [StageConfig(config.reflow.steps, config.reflow.batch_size, lr)]
            phases += [config.reflow.then] if config.reflow.then else []
            for phase, stage in enumerate(phases, 1):
                part = name if phase == len(phases) else f"{name}/phase_{phase}"
                if self.restore(flow, part):
                    continue
                self._train(flow, loss, data, prompts, stage, part, (1, 4), callbacks)
        self.reflowed = flow
        return flow

    def distil(self, callbacks: Sequence[pl.Callback] = ()) -> UNetFlow:
        """The one-step (or k-step) student by L2; without reflow this is direct distillation of the teacher."""
        config = self.config
        flow = self.reflowed or self.load_flow(config.reflow.rounds)
        student = self._student(flow)
        if not self.restore(student, "distil"):
            pairs = self._distillation_pairs(flow)
            loss = distillation_loss(config.distil.k)
            self._train(student, loss, pairs, pairs.prompts, config.distil, "distil", (config.distil.k,), callbacks)
        self.student = student
        return student

    def perceptual(self, callbacks: Sequence[pl.Callback] = ()) -> UNetFlow:
        """Continue the distillation with the perceptual loss on decoded images."""
        from instaflow.perceptual import perceptual_distance

        config = self.config
        flow = self.reflowed or self.load_flow(config.reflow.rounds)
        student = self.student or self._student(flow)
        if self.student is None and not self.restore(student, "distil"):
            raise UserError(f"{self.folder / 'distil'} is not finished; --stages must run distil before perceptual")
        if not self.restore(student, "perceptual"):
            pairs = self._distillation_pairs(flow)
            distance = perceptual_distance(config.perceptual.trunk).to(self.teacher.device)
            loss = perceptual_loss(self.teacher, distance, config.distil.k)
            self._train(
                student, loss, pairs, pairs.prompts, config.perceptual, "perceptual", (config.distil.k,), callbacks
            )
        self.student = student
        return student

    def _student(self, flow: UNetFlow) -> UNetFlow:
        options = self.config.student
        if options.stack == "none":
            return copy_of(flow)
        return stack(flow, options.pruning, shared=options.stack == "shared")

    def _distillation_pairs(self, flow: UNetFlow) -> PairDataset:
        if self.config.reflow.rounds == 0:
            return self.teacher_pairs()
        return self.flow_pairs(flow, self.config.distil.pairs, "distil")

    def _train(
        self,
        flow: UNetFlow,
        loss: Loss,
        data: Dataset,
        prompts: Sequence[str],
        stage: StageConfig,
        name: str,
        shown_steps: Sequence[int],
        callbacks: Sequence[pl.Callback],
    ) -> None:
        started = time.perf_counter()
        folder, options = self.folder / name, self.config.trainer
        seed = derive_seed(self.config.seed, *name.encode())
        shown = list(dict.fromkeys(prompts))[: self.config.evaluation.grid]
        noise = fixed_noise(len(shown), self.teacher.latent_shape)

        def show(step: int) -> None:
            rows = [draw(flow, self.teacher, shown, noise, steps) for steps in shown_steps]
            captions = [f"{n} step{'s' * (n > 1)}: {p}" for n in shown_steps for p in shown]
            save_grid(torch.cat(rows), folder / "samples" / f"step_{step:06d}.png", len(shown), captions, tile=96)

        optimise(
            flow,
            loss,
            data,
            self.states(prompts),
            stage,
            self.config.optimiser,
            seed,
            folder,
            options,
            callbacks,
            show=show,
        )
        flow.to(self.teacher.device)
        self.is_main = process_place()[0] == 0
        if self.is_main:
            weights = {k: v.detach().cpu().contiguous().clone() for k, v in unique_state(flow).items()}
            write_atomically(folder / WEIGHTS, lambda temporary: save_file(weights, str(temporary)))
        self._took(name.split("/")[0], started)

    def _took(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def restore(self, flow: UNetFlow, name: str) -> bool:
        """Load the finished weights of a stage into `flow`; False if it is not finished."""
        path = self.folder / name / WEIGHTS
        if self.config.resume == "never" or not path.is_file():
            return False
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file: {error}; delete it to train again"
            ) from None
        wanted = unique_state(flow)
        wrong = wanted.keys() ^ state.keys() or {k for k in wanted if wanted[k].shape != state[k].shape}
        if wrong:
            raise UserError(f"{path} is of another network than this run's configuration: {min(wrong)} differs")
        flow.load_state_dict(state, strict=False)
        flow.to(self.teacher.device).eval()
        return True

    def load_flow(self, rounds: int) -> UNetFlow:
        """The finished flow after so many rounds of reflow (0: the student as it starts)."""
        flow = make_student(self.teacher, self.config.student.init).to(self.teacher.device).eval()
        if rounds and not self.restore(flow, f"reflow_{rounds}"):
            raise UserError(f"{self.folder / f'reflow_{rounds}'} is not finished; run the stage reflow first")
        return flow

    def load_student(self) -> UNetFlow:
        """The finished student: after the perceptual stage if it was run, else after L2 distillation."""
        student = self._student(self.load_flow(self.config.reflow.rounds))
        for name in ("perceptual", "distil"):
            if self.restore(student, name):
                return student
        raise UserError(f"{self.folder}: no distilled student there; run the stage distil first")

    @property
    def finished(self) -> bool:
        """Whether the last training stage is there already."""
        last = "perceptual" if "perceptual" in self.config.stages and self.config.perceptual.steps else "distil"
        return self.config.resume == "auto" and (self.folder / last / WEIGHTS).is_file()

    def export(self) -> None:
        """Write what was trained as diffusers directories: `reflowed/` (many steps) and `pipeline/` (one step)."""
        from instaflow.pipeline import Card, InstaFlowPipeline

        config = self.config
        init, checksum = config.student.init, self.teacher.checksum()
        if config.reflow.rounds and (flow := self.reflowed):
            card = Card(guidance=config.pairs.guidance, init=init, teacher=checksum)
            InstaFlowPipeline.of(flow, self.teacher, card).save(self.folder / "reflowed")
        if self.student is not None:
            inside = config.pairs.guidance if config.reflow.rounds == 0 else config.distil.alpha
            card = Card(one_step=config.distil.k == 1, guidance=inside, init=init, teacher=checksum)
            InstaFlowPipeline.of(self.student, self.teacher, card).save(self.folder / "pipeline")

    def evaluate(self, seconds: float) -> dict[str, Any]:
        """Compare teacher, rectified flow and student on the same prompts and noises; writes metrics.json."""
        from instaflow.evaluate import evaluate_run

        metrics = evaluate_run(self)
        metrics["seconds"] = {**{k: round(v, 1) for k, v in self.seconds.items()}, "total": round(seconds, 1)}
        earlier = self.folder / "metrics.json"
        trained = self.seconds.keys() - {"pairs"}
        if not trained and earlier.is_file():  # nothing was trained now: the training's own times stand
            metrics["seconds"] = json.loads(earlier.read_text()).get("seconds", metrics["seconds"])
        write_json(earlier, metrics)
        return metrics


def load_teacher(config: InstaFlowConfig) -> Teacher:
    """The run's teacher, on the device where the student will be trained."""
    return Teacher.load(config.teacher, accelerator_device(config.trainer), getattr(torch, config.dtype))


def refuse_other_teacher(folder: Path, name: str, teacher: Teacher) -> None:
    """Raise UserError if the run in `folder` was begun with other weights than the teacher has now."""
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text().strip() != teacher.checksum():
        raise UserError(
            f"{folder} was begun with another teacher than {name} is now (its weights changed): "
            "choose another --run_dir, or delete that folder"
        )


def copy_of(flow: UNetFlow) -> UNetFlow:
    """An independent copy."""
    return copy.deepcopy(flow)


def unique_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor under its first name only."""
    seen: set[int] = set()
    result = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result


def accelerator_device(options: TrainerConfig) -> torch.device:
    """Where the frozen teacher lives: beside the student."""
    if options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@torch.no_grad()  # not inference mode: text states made here are kept for training
def draw(
    flow: UNetFlow,
    teacher: Teacher,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
    alpha: float = 1.0,
    batch_size: int = 64,
) -> Tensor:
    """Euler samples of a flow, decoded: uint8 [N, 3, h, w] for noises [N, C, H, W]."""
    images = []
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        states_BLD = teacher.encode(list(prompts[rows])).float()
        null_BLD = teacher.null(len(states_BLD)).float() if alpha > 1 else None
        velocity = conditioned(flow, states_BLD, null_BLD, alpha)
        images.append(teacher.decode(euler(velocity, noise[rows].to(teacher.device), steps)))
    return torch.cat(images)
