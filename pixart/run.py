"""A stage's folder and what is in it, and the network that a stage begins with; `train.py` runs the stages."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

from common.data.cache import MODEL, fingerprint_path, names_of
from common.data.rows import FEWEST_IMAGES
from common.data.text import TextEncoder as FrozenEncoder
from common.errors import UserError
from common.files import read_object, write_json
from common.images import save_grid
from common.metrics.evaluate import say_few
from common.options import Range, free_options, refuse_large_batch
from common.paths import existing_path
from common.precision import affordable_steps
from common.processes import is_main_process
from common.training import EveryNSteps, Inputs, RunFolder, check_trainer, open_run_folder, say_other_inputs, train
from common.weights import save_weights
from pixart.config import PixArtConfig, StageConfig
from pixart.controlnet import COPIED_BLOCKS, ControlPixArt
from pixart.convert import (
    CONFIG,
    WEIGHTS,
    load_dit,
    load_transformer,
    read_state_dict,
    reparameterise,
    save_transformer,
)
from pixart.data import BucketDataModule, Part, Pictures, content_version, folder_source, open_pictures
from pixart.features import Codec, FeatureTable, codec_factor, codec_fingerprint, open_features
from pixart.model import DiT, PixArt
from pixart.sample import ABOUT, CONTROL, STEPS, VAE, Painter, open_painter
from pixart.text import TextEncoder
from pixart.trainer import Network, StageModule

# What two starts of one stage may disagree on: none of it changes the trained weights.
FREE_OPTIONS = free_options(
    "evaluate",
    "sampling",
    "data.cache",
    "data.cache_dir",
    "data.eval_images",
    "trainer.gradient_checkpointing",
    "trainer.workers",
)
# Options that only say where an input lies, by what messages call it.
PLACES = {
    "data": ["data.path"],
    "autoencoder": ["vae"],
    "text encoder": ["text_encoder"],
    "starting weights": ["init_from"],
}


def inputs_of(config: StageConfig, start: Path | None) -> Inputs:
    """Fingerprints of what a stage learns from."""
    source = folder_source(config.data) if config.data.name == "folder" else None
    inputs: dict[str, Callable[[], str] | str] = {
        "data": content_version(config.data) if source is None else source.fingerprint,
        "autoencoder": partial(codec_fingerprint, config.vae),
    }
    if source is not None and source.classes:
        inputs["classes"] = names_of(source.classes)
    if config.kind != "class":
        encoder = None if config.text_encoder is None else existing_path(config.text_encoder)
        inputs["text encoder"] = lambda: FrozenEncoder(encoder).fingerprint
    if start is not None:
        weights = start / WEIGHTS
        inputs["starting weights"] = partial(fingerprint_path, weights if weights.is_file() else start, MODEL)
    return inputs


def network_config(config: StageConfig, codec: Codec, encoder: TextEncoder | None, classes: int) -> PixArtConfig:
    """The network of a stage: its own options, and sizes that follow from codec, encoder and data.

    Raises:
        UserError: sizes that do not fit each other.
    """
    given = asdict(config.network)
    if config.kind == "class":
        given["adaln"] = "single"
    try:
        return PixArtConfig(
            **given,
            input_size=config.data.size // codec.factor,
            in_channels=codec.channels,
            caption_channels=encoder.channels if encoder else 1,
            classes=classes if config.kind == "class" else 0,
        )
    except ValueError as error:
        raise UserError(f"network: {error}") from None


def build_network(config: StageConfig, shape: PixArtConfig, start: Path | None) -> Network:
    """The network of a stage with the weights it starts from.

    Args:
        start: a folder of ours, an official .pth, or a diffusers directory; None initialises anew. Where a
            text-conditional stage starts from a class-conditional DiT, it is re-parameterised (section 2.3).

    Raises:
        UserError: weights that do not fit the network, or a stage that needs some and has none.
    """
    torch.manual_seed(config.seed)
    if config.kind == "class":
        return DiT(shape) if start is None else load_dit(start, shape)
    if config.kind == "controlnet":
        if start is None:
            raise UserError("a controlnet stage steers a trained network: give it with --init_from")
        base = load_transformer(start, shape)
        copies = max(1, min(COPIED_BLOCKS, shape.depth // 2))
        try:
            return ControlPixArt(base, copies, config.controlnet_form == "full")
        except ValueError as error:
            raise UserError(f"controlnet_form {config.controlnet_form}: {error}") from None
    if start is None:
        return PixArt(shape)
    if is_class_conditional(start):
        network = PixArt(shape)
        reparameterise(load_dit(start, heads=shape.heads), network, config.reparam_t)
        return network
    return load_transformer(start, shape)


def is_class_conditional(path: Path) -> bool:
    """Whether weights are those of a DiT (ours or the official .pt) rather than of a text-conditional network."""
    if path.is_dir():
        return bool(read_object(path / CONFIG).get("classes")) if (path / CONFIG).is_file() else False
    return "y_embedder.embedding_table.weight" in read_state_dict(path)


def check_options(config: StageConfig) -> None:
    """Refuse what would fail after work has begun, as far as the options alone tell.

    Raises:
        UserError: naming the option.
    """
    trainer = config.trainer
    check_trainer(
        trainer,
        {"trainer.batch_size": trainer.batch_size},
        resume=config.resume,
        ema_decay=config.optimiser.ema_decay,
        grad_clip=config.optimiser.grad_clip,
    )
    Range(*STEPS[config.sampling.sampler]).check("sampling.steps", config.sampling.steps, int)


@dataclass
class Stage:
    """A stage's folder and what is in it: config.yaml, checkpoints/, logs/, samples/, model/, metrics.json.

    measured: the part of the data that metrics see; "all" of pictures that have nothing to do with the training.
    """

    config: StageConfig
    folder: Path
    start: Path | None
    opened: RunFolder | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    measured: Part = "test"

    @classmethod
    def open(cls, config: StageConfig, text: str, names: list[str]) -> Stage:
        """Create or continue a stage's folder.

        Args:
            text: the config as YAML, saved there.
            names: of the recipe's stages, which `init_from` may refer to.

        Raises:
            UserError: the folder holds another run, an option is wrong, or the stage before is not finished.
        """
        check_options(config)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        start = starting_weights(config, names)
        opened = open_run_folder(config.folder, config.resume, text, FREE_OPTIONS, PLACES)
        stage = cls(config, config.folder, start, opened)
        if stage.finished:
            stage.begin()
        return stage

    def begin(self) -> None:
        """Refuse other inputs than those that the stage was begun with; write its config."""
        assert self.opened is not None
        if is_main_process():
            inputs = inputs_of(self.config, self.start)
            if self.start is not None:
                say_other_inputs(self.start.parent, inputs, ["autoencoder", "text encoder", "classes"])
            self.opened.begin(inputs)

    @property
    def weights(self) -> Path:
        """Folder of the finished (averaged) weights."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        """Whether the weights are there already."""
        return self.config.resume == "auto" and (self.weights / ABOUT).is_file()

    @property
    def vae(self) -> str:
        """Where the frozen autoencoder is: beside the finished weights, else where the options say."""
        own = self.weights / VAE
        return str(own) if (own / "config.json").is_file() else self.config.vae

    def codec(self, device: str | torch.device = "cpu") -> Codec:
        """The frozen autoencoder."""
        return Codec(self.vae, device)

    def encoder(self, device: str | torch.device = "cpu") -> TextEncoder | None:
        """The frozen text encoder; None for a class-conditional stage."""
        if self.config.kind == "class":
            return None
        path = self.config.text_encoder
        dtype = torch.float32 if str(device) == "cpu" else torch.bfloat16
        return TextEncoder(
            None if path is None else existing_path(path), self.config.network.caption_tokens, device, dtype
        )

    def train(self, callbacks: list[pl.Callback] | None = None) -> Painter:
        """Train or resume the stage, write its weights, and return what samples from them."""
        started = time.perf_counter()
        config, trainer_config = self.config, self.config.trainer
        device = encoding_device(trainer_config.accelerator)
        codec, encoder = self.codec(device), self.encoder(device)
        multiple = codec.factor * config.network.patch_size
        pictures = open_pictures(config.data, "train", config.seed, multiple)
        self._check(pictures)
        refuse_large_batch("trainer.batch_size", trainer_config.batch_size, len(pictures), "training pictures")
        measured = min(config.sampling.metric_images, config.data.eval_images)
        if config.evaluate and measured < FEWEST_IMAGES:
            raise UserError(
                f"{pictures.name}: fewer than {FEWEST_IMAGES} pictures are too few to measure with; raise "
                "--data.eval_images and --sampling.metric_images, or set --evaluate false"
            )
        if config.evaluate:
            held_out = self.held_out(measured)
            if held_out.trained_on:
                raise UserError(
                    f"{pictures.name}: {len(pictures)} pictures are too few to hold some out for the metrics, at least "
                    f"{FEWEST_IMAGES} are needed; set --evaluate false"
                )
            say_few(len(held_out))
        network = build_network(config, network_config(config, codec, encoder, pictures.classes), self.start)
        self.begin()
        table = self._features(pictures, codec, encoder)
        self.seconds["features"] = time.perf_counter() - started
        module = StageModule(network, codec, config)
        painter = Painter(network, codec, encoder, config.data.size)

        def grid(step: int) -> None:
            with module.sampling():
                self.grid(painter, self.folder / "samples" / f"step_{step:06d}.png")

        every = trainer_config.sample_every
        data = BucketDataModule(
            table,
            trainer_config.batch_size,
            trainer_config.max_steps,
            config.seed,
            workers=trainer_config.workers if config.data.cache else 0,
            accumulate=trainer_config.accumulate,
        )
        minutes = trainer_config.max_minutes
        steps = affordable_steps(self.folder, trainer_config, module, data, trainer_config.max_steps, minutes)
        trainer_config.max_steps = data.steps = steps  # which the learning rate's schedule reads as well
        trainer = train(
            self.folder,
            module,
            data,
            trainer_config,
            steps=steps,
            batch_size=trainer_config.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            callbacks=[*([EveryNSteps(every, grid)] if every else []), *(callbacks or [])],
            networks=[network],
        )
        painter.network = module.averaged()
        self.seconds["training"] = time.perf_counter() - started - self.seconds["features"]
        if trainer.is_global_zero:
            self.save(painter)
        trainer.strategy.barrier()  # the next stage of every process reads what this one has written
        return painter

    def _check(self, pictures: Pictures) -> None:
        if self.config.kind == "class" and (pictures.labels_N < 0).any():
            raise UserError(
                f"{pictures.name}: a stage of kind class needs a label for every picture: "
                'add "label" to metadata.jsonl, or use one subfolder per class'
            )

    def _features(self, pictures: Pictures, codec: Codec, encoder: TextEncoder | None) -> FeatureTable:
        show = self.config.trainer.progress and is_main_process()
        edges = self.config.kind == "controlnet"
        return open_features(pictures, codec, encoder, self.config.data, edges, show)

    def save(self, painter: Painter) -> None:
        """Write the averaged weights and what sampling needs to know; its file comes last and marks the end."""
        network = painter.network
        if isinstance(network, ControlPixArt):
            branch = {f"controlnet.{k}": v for k, v in network.controlnet.state_dict().items()}
            save_weights(self.weights / CONTROL, branch)
            network = network.base_model
        save_transformer(network, self.weights)
        painter.codec.save(self.weights / VAE)
        about = {
            "stage": self.config.name,
            "kind": "class" if self.config.kind == "class" else "text",
            "vae": self.config.vae,
            "text_encoder": self.config.text_encoder,
            "size": self.config.data.size,
            "steps": self.config.trainer.max_steps,
        }
        write_json(self.weights / ABOUT, about)

    def painter(self) -> Painter:
        """The finished stage, opened for sampling."""
        return open_painter(self.weights)

    def held_out(self, count: int, square: bool = True) -> Pictures:
        """Pictures of the stage's data that training has not seen (for a small folder: the training pictures)."""
        options = copy.copy(self.config.data)
        if square:
            options.ratios = [1.0]
        multiple = codec_factor(self.vae) * self.config.network.patch_size
        return open_pictures(options, self.measured, self.config.seed, multiple, count)

    def grid(self, painter: Painter, path: Path) -> None:
        """A picture of square samples for held-out captions, classes, or captions with edges."""
        sampling = self.config.sampling
        pictures = self.held_out(sampling.grid)
        bucket = pictures.buckets[0]
        captions = pictures.captions[: sampling.grid]
        if self.config.kind == "class":
            images = painter.classes(pictures.labels_N[: sampling.grid], bucket.height, bucket.width, sampling)
        else:
            control = pictures.images(range(len(captions))) if self.config.kind == "controlnet" else None
            images = painter.captions(captions, bucket.height, bucket.width, sampling, control_n3HW=control)
        tile = bucket.width * max(1, -(-96 // bucket.width))
        save_grid(images, path, columns=6, captions=captions, tile=tile)


def encoding_device(accelerator: str) -> str:
    """Where the frozen encoders of this process run."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def starting_weights(config: StageConfig, names: list[str]) -> Path | None:
    """What `init_from` refers to: a stage of this recipe, a stage's folder, or weights from elsewhere.

    Raises:
        UserError: that stage is not finished, or nothing is there.
    """
    if config.init_from is None:
        return None
    earlier = Path(config.run_dir) / config.init_from
    if config.init_from in names or (earlier / "config.yaml").is_file():
        if not (earlier / "model" / ABOUT).is_file():
            raise UserError(
                f"stage {config.name} starts from stage {config.init_from}, which is not finished in {config.run_dir}: "
                "run the recipe without --stage, or give other weights with --init_from"
            )
        return earlier / "model"
    given = existing_path(config.init_from)
    if not given.exists():
        raise UserError(
            f"init_from {config.init_from}: no such stage, folder or file; expected the name of an earlier stage, a "
            "folder of ours, an official .pth or a diffusers directory"
        )
    return given / "model" if (given / "model" / CONFIG).is_file() else given
