"""One stage of the recipe, from its pictures to its weights; `train.py` is its command line.

Logged in every step, as means over the global batch:
    train/loss   train/mse + train/vb
    train/mse    squared error of the predicted noise
    train/vb     bits per dimension of the variational bound, which trains the variance alone
    train/lr     after warm-up and the batch-size rule

Shape suffixes: B batch, C latent channels, H W latent grid, L caption tokens, D width of the text encoder.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from common.data.sampling import step_generator
from common.errors import UserError
from common.files import write_atomically, write_json
from common.images import save_grid
from common.options import check_trainer, free_options
from common.paths import existing_path
from common.processes import is_main_process
from common.training import EveryNSteps, open_run_folder, train
from pixart.config import Recipe, StageConfig
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
from pixart.data import BucketDataModule, Pictures, open_pictures
from pixart.diffusion import Diffusion
from pixart.features import Codec, FeatureTable, open_features
from pixart.model import DiT, PixArt, PixArtConfig
from pixart.sample import ABOUT, CONTROL, Painter, read_json
from pixart.text import TextEncoder

Network = DiT | PixArt | ControlPixArt

MIN_HELD_OUT = 20  # pictures without which no metric is measured
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


class Average(nn.Module):
    """Exponential moving average of a network's parameters; `network` is the average, ready to sample from.

    It begins as a copy of the network (the authors' update with rate 0). Parameters that are not trained, and buffers,
    are shared with the network instead of copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise UserError(f"optimiser.ema_decay {decay}: expected a number between 0 and 1 (0 leaves it out)")
        shared = [p for p in network.parameters() if not p.requires_grad] + list(network.buffers())
        self.network = copy.deepcopy(network, {id(tensor): tensor for tensor in shared}).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * parameter; call once after each optimiser step."""
        pairs = [
            (average, parameter)
            for average, parameter in zip(self.network.parameters(), network.parameters())
            if parameter.requires_grad
        ]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1.0 - self.decay)


class StageModule(pl.LightningModule):
    """Learns to predict noise and its variance in latents (section 2.3; loss of iDDPM), conditioned on class or text.

    Everything random in a step is a function of (seed, step), drawn for the global batch and shared out among processes
    and micro-batches, so that resuming, caching features, adding processes and accumulating gradients change nothing.
    """

    def __init__(self, network: Network, codec: Codec, config: StageConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.codec = codec  # no module of this one: its weights are no part of checkpoints
        self.diffusion = Diffusion()
        decay = config.optimiser.ema_decay
        self.average = Average(network, decay) if decay > 0 else None
        self._sums: dict[str, Tensor] = {}
        parts = (network, network.base_model) if isinstance(network, ControlPixArt) else (network,)
        for part in parts:
            part.gradient_checkpointing = config.trainer.gradient_checkpointing  # type: ignore[assignment]
        if config.trainer.compile:
            network.compile()

    @property
    def averaged(self) -> Network:
        """The network to sample from."""
        return self.network if self.average is None else self.average.network  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        options, batch = self.config.optimiser, self.config.trainer.batch_size
        if not 0.0 <= options.cooldown <= 1.0:
            raise UserError(f"optimiser.cooldown {options.cooldown}: expected a fraction of the steps, 0 to 1")
        # The official code's auto_lr: its base batch is 256.
        lr = options.lr * math.sqrt(batch / 256) if options.auto_lr == "sqrt" else options.lr
        trained = [p for p in self.network.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=options.weight_decay, eps=options.eps, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, partial(rate_factor, options.warmup, options.cooldown, self.config.trainer.max_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        options, world = self.config.trainer, self.trainer.world_size
        part = batch_idx % options.accumulate
        size = options.batch_size // options.accumulate
        mine = slice(part * size + self.trainer.global_rank, (part + 1) * size, world)
        generator = step_generator(self.config.seed, self.trainer.global_step, self.device)
        uniform_2B = torch.rand(2, options.batch_size, generator=generator, device=self.device)[:, mine]
        moments = batch["moments"]
        shape = (2, options.batch_size, moments.shape[1] // 2, *moments.shape[2:])
        posterior_noise, noise_BCHW = torch.randn(shape, generator=generator, device=self.device)[:, mine]
        x0_BCHW = self.codec.latents(moments, posterior_noise)
        t_B = (uniform_2B[0] * self.diffusion.steps).long()
        drop_B = uniform_2B[1] < self.config.optimiser.drop
        losses = self.diffusion.training_losses(
            lambda x, t: self.predict(x, t, batch, drop_B), x0_BCHW, t_B, noise_BCHW, self.config.optimiser.snr_loss
        )
        means = {name: values.mean() for name, values in losses.items()}
        self._log_mean(means, part, options.accumulate)
        return means["loss"]

    def predict(self, x_BCHW: Tensor, t_B: Tensor, batch: dict[str, Tensor], drop_B: Tensor) -> Tensor:
        """The network's output for a batch of the feature table; conditions marked in drop_B are left out."""
        network: Any = self.network
        if self.config.kind == "class":
            return network(x_BCHW, t_B, torch.where(drop_B, network.config.classes, batch["label"]))
        conditions: dict[str, Tensor] = {"drop_B": drop_B}
        if network.config.multi_scale:
            conditions |= {"size_B2": batch["size"], "ratio_B1": batch["ratio"]}
        if self.config.kind == "controlnet":
            conditions["control_BCHW"] = self.codec.scaling_factor * batch["edges"]
        return network(x_BCHW, t_B, batch["caption"].float(), batch["mask"], **conditions)

    def _log_mean(self, values: dict[str, Tensor], part: int, parts: int) -> None:
        """Log the means over the whole global batch: micro-batches here, processes by Lightning."""
        if part == 0:
            self._sums = {}
        self._sums = {k: self._sums.get(k, torch.zeros_like(v)) + v.detach() for k, v in values.items()}
        if part == parts - 1:
            logged = {f"train/{k}": v / parts for k, v in self._sums.items()}
            self.log_dict(logged, sync_dist=self.trainer.world_size > 1)
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        if self.average is not None:
            self.average.update(self.network)
        # Lightning would keep the gradients until after the next forward pass, beside its activations.
        self.zero_grad(set_to_none=True)


def rate_factor(warmup: int, cooldown: float, steps: int, step: int) -> float:
    """Multiplier of the learning rate in a step: a linear rise, 1, and a linear fall over the last `cooldown` steps."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise if cooldown == 0 else min(rise, max(0.0, (steps - step) / (cooldown * steps)))


def network_config(config: StageConfig, codec: Codec, encoder: TextEncoder | None, classes: int) -> PixArtConfig:
    """The network of a stage: its own options, and sizes that follow from codec, encoder and data.

    Raises:
        UserError: sizes that do not fit each other.
    """
    options = config.network
    try:
        return PixArtConfig(
            input_size=config.data.size // codec.factor,
            patch_size=options.patch_size,
            in_channels=codec.channels,
            width=options.width,
            depth=options.depth,
            heads=options.heads,
            mlp_ratio=options.mlp_ratio,
            caption_channels=encoder.channels if encoder else 1,
            caption_tokens=options.caption_tokens,
            interpolation_scale=options.interpolation_scale,
            multi_scale=options.multi_scale,
            adaln=options.adaln if config.kind != "class" else "single",
            embedder_init=options.embedder_init,
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
        return bool(read_json(path / CONFIG).get("classes")) if (path / CONFIG).is_file() else False
    return "y_embedder.embedding_table.weight" in read_state_dict(path)


@dataclass
class Stage:
    """A stage's folder and what is in it: config.yaml, checkpoints/, logs/, samples/, model/, metrics.json."""

    config: StageConfig
    folder: Path
    start: Path | None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: StageConfig, text: str, names: list[str]) -> Stage:
        """Create or continue a stage's folder.

        Args:
            text: the config as YAML, saved there.
            names: of the recipe's stages, which `init_from` may refer to.

        Raises:
            UserError: the folder holds another run, an option is wrong, or the stage before is not finished.
        """
        trainer = config.trainer
        check_trainer(
            trainer,
            {"trainer.batch_size": trainer.batch_size},
            resume=config.resume,
            ema_decay=config.optimiser.ema_decay,
            grad_clip=config.optimiser.grad_clip,
        )
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        start = starting_weights(config, names)
        open_run_folder(config.folder, config.resume, text, FREE_OPTIONS)
        stage = cls(config, config.folder, start)
        stage._remember_start()
        return stage

    @property
    def weights(self) -> Path:
        """Folder of the finished (averaged) weights."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        """Whether the weights are there already."""
        return self.config.resume == "auto" and (self.weights / ABOUT).is_file()

    def _remember_start(self) -> None:
        """Refuse to go on from other starting weights than those the stage was begun with."""
        if self.start is None or not is_main_process():
            return
        file = self.start / WEIGHTS if self.start.is_dir() else self.start
        if not file.is_file():
            return  # a diffusers directory: its weights have other names, and nobody retrains it
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        record = self.folder / "start.json"
        if record.is_file() and self.config.resume == "auto":
            known = read_json(record).get("sha256")
            if known != digest:
                raise UserError(
                    f"{self.folder} was started from other weights than {file} now holds: delete that folder to train "
                    "the stage again, or choose another --run_dir"
                )
        write_json(record, {"path": str(self.start), "sha256": digest})

    def codec(self, device: str | torch.device = "cpu") -> Codec:
        """The frozen autoencoder."""
        return Codec(self.config.vae, device)

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
        measured = min(config.sampling.metric_images, config.data.eval_images)
        if config.evaluate and len(self.held_out(measured)) < MIN_HELD_OUT:
            raise UserError(
                f"{pictures.name}: fewer than {MIN_HELD_OUT} pictures are too few to measure with; set --evaluate false"
            )
        network = build_network(config, network_config(config, codec, encoder, pictures.classes), self.start)
        table = self._features(pictures, codec, encoder)
        self.seconds["features"] = time.perf_counter() - started
        module = StageModule(network, codec, config)
        painter = Painter(module.averaged, codec, encoder, config.data.size)

        def grid(step: int) -> None:
            with sampling_mode(module):
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
        trainer = train(
            self.folder,
            module,
            data,
            trainer_config,
            steps=trainer_config.max_steps,
            batch_size=trainer_config.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            callbacks=[*([EveryNSteps(every, grid)] if every else []), *(callbacks or [])],
        )
        painter.network = painter.network.eval()
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
            from safetensors.torch import save_file

            state = network.controlnet.state_dict()
            branch = {f"controlnet.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
            write_atomically(self.weights / CONTROL, lambda temporary: save_file(branch, str(temporary)))
            network = network.base_model
        save_transformer(network, self.weights)
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
        from pixart.sample import open_painter

        return open_painter(self.weights)

    def held_out(self, count: int, square: bool = True) -> Pictures:
        """Pictures of the stage's data that training has not seen (for a small folder: the training pictures)."""
        options = copy.copy(self.config.data)
        if square:
            options.ratios = [1.0]
        codec_factor = self._factor()
        return open_pictures(options, "test", self.config.seed, codec_factor * self.config.network.patch_size, count)

    def _factor(self) -> int:
        folder = existing_path(self.config.vae)
        file = folder / "config.json" if (folder / "config.json").is_file() else folder / "vae" / "config.json"
        return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)

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


@contextlib.contextmanager
def sampling_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no trace in the global random state."""
    state = torch.get_rng_state()
    module.eval()
    try:
        yield
    finally:
        module.train()
        torch.set_rng_state(state)


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


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run the stages one after another; what is finished is not repeated. Returns the metrics by stage.

    The metrics of each evaluated stage go to its metrics.json; those of the last finished one, with the scores and
    times of all, to metrics.json of the recipe's folder.
    """
    metrics: dict[str, Any] = {}
    for config, text in recipe.stages:
        stage = Stage.open(config, text, recipe.names)
        painter: Painter | None = None
        if stage.finished:
            if is_main_process():
                print(f"{stage.folder}: trained already", file=sys.stderr)
        else:
            painter = stage.train()
        if is_main_process():
            metrics[config.name] = finish(stage, painter)
    if metrics and is_main_process():
        folder = Path(recipe.stages[-1][0].run_dir)
        files = {name: folder / name / "metrics.json" for name in recipe.names}
        write_summary(folder, {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()})
    return metrics


def finish(stage: Stage, painter: Painter | None) -> dict[str, Any]:
    """Grid and metrics of a trained stage, unless they are there already."""
    from pixart.evaluate import evaluate_stage

    file = stage.folder / "metrics.json"
    if file.is_file() and painter is None:
        return json.loads(file.read_text())
    started = time.perf_counter()
    painter = painter or stage.painter()
    stage.grid(painter, stage.folder / "samples.png")
    metrics: dict[str, Any] = evaluate_stage(stage, painter) if stage.config.evaluate else {"task": stage.config.kind}
    stage.seconds["evaluation"] = time.perf_counter() - started
    metrics["seconds"] = {name: round(value, 1) for name, value in stage.seconds.items()}
    write_json(file, metrics)
    return metrics


def write_summary(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json of a recipe: the last stage's, the headline numbers and times of every stage, the total time."""
    last = dict(next(reversed(metrics.values())))
    last["stages"] = {
        name: {key: values[key] for key in ("summary", "shapes_score", "seconds") if key in values}
        for name, values in metrics.items()
    }
    total = sum(sum(values.get("seconds", {}).values()) for values in metrics.values())
    last["seconds"] = {**last.get("seconds", {}), "total": round(total, 1)}
    write_json(folder / "metrics.json", last)
