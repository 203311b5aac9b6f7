"""A run folder and what is in it: the chain of flows v_1 (the teacher), v_2 .. v_k (reflow) and the distilled student.

Each link keeps its averaged weights in its stage's folder (`reflow_1/student.safetensors`), so an interrupted run
continues with the first unfinished one, from its last checkpoint.

Shape suffixes: B batch, L text tokens, D text width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from common.data.cache import fingerprint_strings
from common.data.pairs import PairDataset, PairSource, StateTable, make_pairs, prompt_list
from common.data.sampling import derive_seed
from common.errors import UserError
from common.metrics.features import load_extractor
from common.metrics.perceptual import perceptual_distance
from common.options import free_options, refuse_large_batch
from common.processes import is_main_process
from common.solvers import DiffusionSource
from common.teacher_runs import WEIGHTS, TeacherRun
from common.training import booked, check_trainer, open_run
from common.weights import load_weights, save_weights
from instaflow.config import InstaFlowConfig
from instaflow.flow import FlowSource, UNetFlow
from instaflow.pipeline import Card, InstaFlowPipeline
from instaflow.student import make_student, stack, unique_state

# What two starts of one run may disagree on: none of it changes the trained weights.
FREE_OPTIONS = free_options("stages", "evaluation", "pairs.folder", "pairs.batch_size", "trainer.cache_text_gb")
PLACES = {"teacher": ["teacher"], "prompts": ["pairs.prompts"]}  # options that only say where an input lies


class Run(TeacherRun[InstaFlowConfig, UNetFlow]):
    """One run; `seconds` holds the wall times of the stages that ran in this process."""

    config_class = InstaFlowConfig

    @classmethod
    def open(cls, config: InstaFlowConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; loads the teacher.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the teacher is.
        """
        check_options(config)
        opened = open_run(config, config_yaml, FREE_OPTIONS, PLACES)
        run = cls(config, opened.path, cls.load_teacher(config))
        teacher, prompts = run.teacher, prompt_list(config.pairs.prompts, config.pairs.count)
        run.teacher_source()  # which knows whether there is such a solver
        if not run.finished:
            run.new_student(make_student(teacher, config.student.init))
        opened.begin({"teacher": teacher.checksum, "prompts": fingerprint_strings(prompts)})
        return run

    @property
    def metrics(self) -> Path:
        """Where the final numbers are."""
        return self.folder / "metrics.json"

    def states(self, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Prompt numbers [B] to text states [B, L, D]; encoded once while `trainer.cache_text_gb` lasts."""
        return StateTable(self.teacher, int(self.config.trainer.cache_text_gb * 2**30)).numbered(prompts)

    def teacher_source(self) -> DiffusionSource:
        """The teacher's ODE, from which the first pairs come."""
        options = self.config.pairs
        return DiffusionSource(self.teacher, options.solver, options.steps, options.guidance)

    def flow_source(self, flow: UNetFlow) -> FlowSource:
        """A rectified flow's ODE with its guided velocity, from which later pairs come."""
        options = self.config.distil
        return FlowSource(flow.to(self.teacher.device), self.teacher, options.teacher_steps, options.alpha)

    def teacher_pairs(self) -> PairDataset:
        """Pairs of the teacher; in the cache unless `pairs.folder` says otherwise."""
        folder = self.config.pairs.folder
        return self._pairs(self.teacher_source(), self.config.pairs.count, 0, Path(folder) if folder else None)

    def flow_pairs(self, flow: UNetFlow, count: int, stage: str) -> PairDataset:
        """New pairs (other noises) of a rectified flow, kept in the run folder."""
        stream = 1 + int(stage.rpartition("_")[2]) if stage.startswith("reflow") else 1000
        return self._pairs(self.flow_source(flow), count, stream, self.folder / stage / "pairs")

    def distillation_pairs(self, flow: UNetFlow) -> PairDataset:
        """Pairs of the flow that is distilled: of the teacher itself, where there was no reflow."""
        if self.config.reflow.rounds == 0:
            return self.teacher_pairs()
        return self.flow_pairs(flow, self.config.distil.pairs, "distil")

    def _pairs(self, source: PairSource, count: int, stream: int, folder: Path | None) -> PairDataset:
        options, seed = self.config.pairs, self.config.seed
        with booked(self.seconds, "pairs"):
            return make_pairs(
                source,
                prompt_list(options.prompts, options.count, text=options.text_column),
                count,
                derive_seed(seed, stream) if stream else seed,
                options.batch_size,
                options.shard_size,
                folder,
                self.config.trainer.progress,
            )

    def new_student(self, flow: UNetFlow) -> UNetFlow:
        """What the distillation trains: a copy of the flow, or a stack of two."""
        options = self.config.student
        if options.stack == "none":
            return copy.deepcopy(flow)
        return stack(flow, options.pruning, shared=options.stack == "shared")

    def save(self, flow: UNetFlow, stage: str) -> None:
        """Keep the finished weights of a stage."""
        if is_main_process():
            save_weights(self.folder / stage / WEIGHTS, unique_state(flow))

    def restore(self, flow: UNetFlow, stage: str) -> bool:
        """Load the finished weights of a stage into `flow`; False if it is not finished.

        Raises:
            UserError: the file is damaged or of another network.
        """
        path = self.folder / stage / WEIGHTS
        if self.config.resume == "never" or not path.is_file():
            return False
        load_weights(flow, path, against="the network of this run's configuration", wanted=unique_state(flow))
        flow.to(self.teacher.device).eval()
        return True

    def load_flow(self, rounds: int) -> UNetFlow:
        """The finished flow after so many rounds of reflow (0: the student as it starts)."""
        flow = make_student(self.teacher, self.config.student.init).to(self.teacher.device).eval()
        if rounds and not self.restore(flow, f"reflow_{rounds}"):
            raise UserError(f"{self.folder / f'reflow_{rounds}'} is not finished; run the stage reflow first")
        return flow

    def load_student(self, stages: Sequence[str] = ("perceptual", "distil")) -> UNetFlow:
        """The finished student: after the perceptual stage if it was run, else after L2 distillation."""
        student = self.new_student(self.load_flow(self.config.reflow.rounds))
        if not any(self.restore(student, stage) for stage in stages):
            raise UserError(f"{self.folder / 'distil'} is not finished; run the stage distil first")
        return student

    @property
    def finished(self) -> bool:
        """Whether the last training stage is there already."""
        last = "perceptual" if "perceptual" in self.config.stages and self.config.perceptual.steps else "distil"
        return self.config.resume == "auto" and (self.folder / last / WEIGHTS).is_file()

    def export(self, flow: UNetFlow | None, student: UNetFlow | None) -> None:
        """Write what was trained as diffusers directories: `reflowed/` (many steps) and `pipeline/` (one step)."""
        config, teacher = self.config, self.teacher
        init, checksum = config.student.init, teacher.checksum()
        if config.reflow.rounds and flow is not None:
            card = Card(guidance=config.pairs.guidance, init=init, teacher=checksum)
            InstaFlowPipeline.of(flow, teacher, card).save(self.folder / "reflowed")
        if student is not None:
            inside = config.pairs.guidance if config.reflow.rounds == 0 else config.distil.alpha
            card = Card(one_step=config.distil.k == 1, guidance=inside, init=init, teacher=checksum)
            InstaFlowPipeline.of(student, teacher, card).save(self.folder / "pipeline")


def check_options(config: InstaFlowConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """
    batches = {"reflow": config.reflow, "distil": config.distil, "perceptual": config.perceptual}
    if config.reflow.then:
        batches["reflow.then"] = config.reflow.then
    check_trainer(
        config.trainer,
        {f"{name}.batch_size": stage.batch_size for name, stage in batches.items()},
        resume=config.resume,
        ema_decay=config.optimiser.ema_decay,
        grad_clip=config.optimiser.grad_clip,
    )
    pairs = config.pairs.count
    last = config.distil.pairs if config.reflow.rounds else pairs
    samples = {"reflow": pairs, "reflow.then": pairs, "distil": last, "perceptual": last}
    for name, stage in batches.items():
        if name.partition(".")[0] in config.stages:
            refuse_large_batch(f"{name}.batch_size", stage.batch_size, samples[name], "pairs")
    if "perceptual" in config.stages and config.perceptual.steps:
        perceptual_distance(config.perceptual.trunk)
    if config.evaluation.judge not in (None, "shapes64") and "evaluate" in config.stages:
        load_extractor(str(config.evaluation.judge))
    if config.student.stack != "none" and config.student.init == "wrapped":
        raise UserError("--student.stack needs --student.init raw or negate: a wrapped network cannot be stacked")
    if config.pairs.online and config.reflow.rounds == 0:
        raise UserError("--pairs.online is for reflow: with --reflow.rounds 0 there is none")
