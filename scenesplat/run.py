"""A run folder: the scenes, the text space, the network with its weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from common.cli import read_run_config
from common.errors import UserError
from common.options import TrainerOptions, free_options, refuse_large_batch
from common.processes import is_main_process
from common.steps import StepTraining
from common.training import booked, check_trainer, open_run, refuse_other_inputs, train
from common.weights import load_weights, save_weights
from scenesplat.config import NetworkConfig, SceneSplatConfig, check_network
from scenesplat.data import SceneData, SceneModule, open_scenes
from scenesplat.data_config import DataConfig
from scenesplat.export import SceneModel, start_from
from scenesplat.gaussians import ATTRIBUTES
from scenesplat.model import PointTransformer
from scenesplat.pretrain_config import FinetuneConfig, PretrainConfig
from scenesplat.rooms import Part
from scenesplat.text import TextSpace

FREE_OPTIONS = free_options("evaluation")
PLACES = {  # options that only say where an input lies
    "data": ["data.path", "data.segmenter", "data.image_encoder"],
    "text": ["text.encoder"],
}
WEIGHTS = Path("pretraining") / "encoder.safetensors"


@dataclass
class Run:
    """One run; `seconds` holds the wall times of what was done in this process."""

    config: SceneSplatConfig
    folder: Path
    text: TextSpace
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: SceneSplatConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; looks at texts and scenes before anything is written.

        Raises:
            UserError: the folder holds another run or cannot be written, or an option or an input is wrong.
        """
        check_options(config)
        opened = open_run(config, config_yaml, FREE_OPTIONS, PLACES)
        run = cls(config, opened.path, TextSpace(config.text.encoder, config.text.width))
        if run.text.width != config.network.dec_channels[0]:
            raise UserError(
                f"--network.dec_channels {config.network.dec_channels}: expected {run.text.width} as the first, the "
                "width of the text features"
            )
        start = run.new_network()
        scenes = run.scenes("train")
        refuse_large_batch("trainer.batch_size", config.trainer.batch_size, len(scenes), "training scenes")
        inputs = {"data": scenes.fingerprint, "text": run.text.fingerprint}
        if config.init_from:
            from common.data.cache import fingerprint_tensors

            inputs["weights"] = fingerprint_tensors(start.state_dict())
        opened.begin(inputs)
        return run

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A run that train.py has finished; writes nothing.

        Raises:
            UserError: no run there, or its text encoder was replaced.
        """
        config = read_run_config(SceneSplatConfig, folder, "--run_dir")
        text = TextSpace.read(folder / "model" / "text.safetensors", config.text.encoder)
        refuse_other_inputs(folder, {"text": text.fingerprint})
        return cls(config, folder, text)

    @cached_property
    def _scenes(self) -> dict[str, SceneData]:
        return {}

    def scenes(self, part: Part) -> SceneData:
        """The training scenes, or those that are never trained on (`test`)."""
        if part not in self._scenes:
            self._scenes[part] = open_scenes(self.config.data, part, self.text, self.config.seed)
        return self._scenes[part]

    def new_network(self) -> PointTransformer:
        """The network as it starts."""
        torch.manual_seed(self.config.seed)
        network = PointTransformer(self.config.network)
        if self.config.init_from:
            start_from(network, Path(self.config.init_from))
        return network

    def save(self, network: PointTransformer) -> None:
        """Keep the finished network's weights."""
        if is_main_process():
            save_weights(self.folder / WEIGHTS, network.state_dict())

    def restore(self, network: PointTransformer) -> bool:
        """Load the finished weights; False if training is not finished."""
        path = self.folder / WEIGHTS
        if self.config.resume == "never" or not path.is_file():
            return False
        load_weights(network, path, against="the network of this run's configuration")
        network.eval()
        return True

    def model(self, network: PointTransformer) -> SceneModel:
        """The network with what its answers mean."""
        data = self.config.data
        return SceneModel(network.eval(), self.text, data.voxel, list(data.inputs), self.scenes("train").classes)

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Book the block's wall time."""
        return booked(self.seconds, name)


def fit(
    module: StepTraining,
    scenes: SceneData,
    folder: Path,
    config: SceneSplatConfig | PretrainConfig | FinetuneConfig,
) -> None:
    """Train on the scenes, from wherever it was interrupted."""
    options = config.trainer
    train(
        folder,
        module,
        SceneModule(scenes, options.batch_size, options.max_steps, config.seed, accumulate=options.accumulate),
        options,
        steps=options.max_steps,
        batch_size=options.batch_size,
        resume=config.resume,
        grad_clip=config.optimiser.grad_clip,
        unit=("scenes", 1.0),
    )


def check_options(config: SceneSplatConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """
    check_trainer(
        config.trainer,
        {"trainer.batch_size": config.trainer.batch_size},
        resume=config.resume,
        grad_clip=config.optimiser.grad_clip,
    )
    check_encoder(config.network, config.data, config.trainer)


def check_encoder(network: NetworkConfig, data: DataConfig, trainer: TrainerOptions) -> None:
    """Refuse a network that does not fit its inputs or cannot be trained.

    Raises:
        UserError: naming the option.
    """
    seen = sum(ATTRIBUTES[name] for name in data.inputs)
    if network.in_channels != seen:
        raise UserError(f"--network.in_channels {network.in_channels}: expected {seen}, of {', '.join(data.inputs)}")
    check_network(network)
    if trainer.compile is True:
        raise UserError("--trainer.compile: patches and neighbours differ in every batch, nothing would stay compiled")
    if network.convolution == "spconv":
        raise UserError("--network.convolution spconv: the library has no backward pass on CPUs; expected gather")
