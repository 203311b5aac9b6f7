"""A run folder: the stages, the preference pairs, and the models that come out of them.

stage1/, stage2/, ...   checkpoints, logs, sample grids, weights.safetensors (trained and averaged)
pairs/                  latents of winners and losers
dpo/, sft/              the same after preferences, and after as many steps on the winners
model/                  what sample.py draws with: after DPO, or of the last stage where there are no preferences
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.cli import read_run_config
from common.data.cache import fingerprint_strings
from common.errors import UserError
from common.options import free_options, refuse_large_batch
from common.processes import is_main_process
from common.training import RunFolder, booked, check_trainer, open_run, refuse_other_inputs
from common.weights import check_weights, read_weights, save_weights
from lightgen.config import LightgenConfig
from lightgen.data import Autoencoder, Captioned, captions_to_draw, is_shapes, open_pictures
from lightgen.diffusion import short_chain
from lightgen.model import Fluid
from lightgen.painter import Painter
from lightgen.text import TextStates

FREE_OPTIONS = free_options("evaluation", "trainer.recompute")
PLACES = {"teacher": ["teacher"], "autoencoder": ["autoencoder"], "data": ["data.path"]}
WEIGHTS = "weights.safetensors"
MODEL, AVERAGE = "model.", "average."


@dataclass
class Run:
    """One run; `seconds` holds the wall times of what was done in this process."""

    config: LightgenConfig
    folder: Path
    autoencoder: Autoencoder
    text: TextStates
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: LightgenConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; everything that the run needs is looked at before anything is written.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or an input is.
        """
        check_options(config)
        opened = open_run(config, config_yaml, FREE_OPTIONS, PLACES)
        run = cls(config, opened.path, Autoencoder(config.autoencoder, device_of(config)), text_of(config))
        run.text.check()
        run.check_network()
        run.begin(opened)
        return run

    def begin(self, opened: RunFolder) -> None:
        """Write down what the run learns from."""
        config, data = self.config, self.config.data
        inputs = {"autoencoder": self.autoencoder.fingerprint, "text encoder": self.text.fingerprint}
        if data.name == "teacher":
            from common.teacher import folder_checksum, load_parts

            load_parts(Path(config.teacher), torch.float32)  # refuses what is no teacher
            inputs["teacher"] = folder_checksum(Path(config.teacher))
            captions = captions_to_draw(data)
            inputs["data"] = fingerprint_strings([f"seed {config.seed}", *captions])
            count = len(captions)
        else:
            inputs["data"] = fingerprint_strings([self.pictures.fingerprint, *self.pictures.captions])
            count = len(self.pictures)
        refuse_large_batch("trainer.batch_size", config.trainer.batch_size, count)
        if data.name == "teacher" and not is_shapes(data) and not captions_to_draw(data, "test"):
            raise UserError(f"--data.captions {data.captions}: no prompt is left to measure on")
        opened.begin(inputs)

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A run that train.py has finished; writes nothing.

        Raises:
            UserError: no run there, or its autoencoder or text encoder was replaced.
        """
        config = read_run_config(LightgenConfig, folder, "--run_dir")
        run = cls(config, folder, Autoencoder(config.autoencoder, device_of(config)), text_of(config))
        refuse_other_inputs(folder, {"autoencoder": run.autoencoder.fingerprint, "text encoder": run.text.fingerprint})
        return run

    @cached_property
    def pictures(self) -> Captioned:
        """The training pictures; a teacher draws them when they are first asked for."""
        return open_pictures(self.config, "train")

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return [f"stage{number + 1}" for number in range(len(self.config.stages.sizes))]

    def new_model(self) -> Fluid:
        """The network as it starts."""
        torch.manual_seed(self.config.seed)
        network = self.config.network
        return Fluid(network, self.autoencoder.channels, self.text.width, self.config.trainer.recompute)

    def check_network(self) -> None:
        """Refuse, without memory, a network that cannot be built or does not fit the pictures."""
        config = self.config
        with torch.device("meta"):
            model = Fluid(config.network, self.autoencoder.channels, self.text.width)
        painter = self.painter(model)
        for size in config.stages.sizes:
            painter.grid(size, size)

    def painter(self, model: Fluid) -> Painter:
        return Painter(model, self.text, self.autoencoder, self.config.sampling, self.config.stages.sizes[-1])

    def save(self, name: str, model: Fluid, average: Fluid) -> None:
        """Keep a finished part: the trained weights and the averaged ones."""
        if is_main_process():
            state = {f"{MODEL}{key}": value for key, value in model.state_dict().items()}
            state |= {f"{AVERAGE}{key}": value for key, value in average.state_dict().items()}
            save_weights(self.folder / name / WEIGHTS, state)

    def restore(self, name: str) -> tuple[Fluid, Fluid] | None:
        """(trained, averaged) of a finished part; None if it is not finished."""
        path = self.folder / name / WEIGHTS
        if self.config.resume == "never" or not path.is_file():
            return None
        state, _ = read_weights(path)
        found = []
        for start in (MODEL, AVERAGE):
            model = self.new_model()
            own: dict[str, Tensor] = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            check_weights(own, model.state_dict(), f"{path}", "the network of this run's configuration")
            model.load_state_dict(own)
            found.append(model.to(self.device))
        return found[0], found[1]

    def load(self, name: str) -> Fluid:
        """The averaged weights of a finished part.

        Raises:
            UserError: it is not finished.
        """
        found = self.restore(name)
        if found is None:
            raise UserError(
                f"{self.folder / name} is not finished; run lightgen/train.py --run_dir {self.folder} first"
            )
        return found[1].eval()

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Book the block's wall time."""
        return booked(self.seconds, name)


def device_of(config: LightgenConfig) -> torch.device:
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")


def text_of(config: LightgenConfig) -> TextStates:
    return TextStates(config.text, device_of(config))


def check_options(config: LightgenConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """
    stages, preferences, batch = config.stages, config.preferences, config.trainer.batch_size
    batches = {"trainer.batch_size": batch}
    if preferences.pairs:
        batches["preferences.batch_size"] = preferences.batch_size
    check_trainer(
        config.trainer,
        batches,
        resume=config.resume,
        ema_decay=config.optimiser.ema_decay,
        grad_clip=config.optimiser.grad_clip,
    )
    if not stages.sizes or not len(stages.sizes) == len(stages.steps) == len(stages.lr):
        raise UserError(
            f"--stages.sizes {stages.sizes}, steps {stages.steps}, lr {stages.lr}: expected as many entries in each, "
            "one a stage"
        )
    if stages.sizes != sorted(stages.sizes):
        raise UserError(f"--stages.sizes {stages.sizes}: expected rising sizes")
    if config.data.name in ("teacher", "shapes") and config.data.images == 0:
        raise UserError(f"--data.images 0: expected a number of at least 1 for --data.name {config.data.name}")
    if config.sampling.head_chain:
        short_chain(config.sampling.head_chain)
    if preferences.pairs:
        refuse_large_batch("preferences.batch_size", preferences.batch_size, preferences.pairs, "preference pairs")
        if config.network.head == "regression" or config.network.order == "raster":
            raise UserError(
                "--network.head regression and --network.order raster have no preferences: expected "
                "--preferences.pairs 0"
            )
