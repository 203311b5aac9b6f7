"""Everything a stage of `pixart/train.py` can be told, as plain dataclasses; nothing heavy is imported for `--help`.

A stage is one YAML file with the options of `StageConfig`. A recipe is a YAML file whose `stages` lists stage files
(relative to itself); whatever else it holds are options that all of them share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from common.cli import parse_config, read_options, take
from common.errors import UserError
from common.options import Count, NotNegative, Positive, Range, Seed, Share, TrainerOptions, Whole

Steps = Annotated[int, Range(1, 1000)]  # of a sampler
Timestep = Annotated[float, Range(0, 999)]
SMALL = Path(__file__).parent / "configs" / "small.yaml"


@dataclass
class DataConfig:
    """Which captioned images a stage learns from.

    Args:
        name: shapes (procedural scenes with exact captions), emoji (embedded artwork with captions), folder (your own).
        path: the image folder (metadata.jsonl with "file_name" and "text" (and "label"), a .txt beside each picture, or
            one subfolder per class), parquet files, or a data set saved by `datasets`.
        image_column: the column of the pictures in a table; None takes `image`, or the one that may be it.
        text_column: the column of the captions, likewise `text` by default.
        label_column: the column of the classes, likewise `label` by default.
        size: side of the square images in pixels; other buckets have about as many pixels.
        images: how many scenes to draw (shapes), or at most how many images to use; None means all there are.
        eval_images: held-out images that the metrics compare with.
        scenes: one (a single object, stage 1), few (one to three solid objects), hq (all tasks and textures) or all
            (a third of each: the mixed baseline of claim P4).
        captions: dense (every attribute of every object), sparse (as a person would ask), mixed (half and half) or
            web (each attribute kept with probability 0.35, one caption in five of another image: claim P3).
        shapes: restrict the scenes to these shapes; None means all.
        colours: restrict the scenes to these colours; None means all.
        styles: drawing styles of the emoji; None means all five.
        prompt: one caption for every image (DreamBooth's "a photo of sks dog").
        ratios: aspect ratios (height / width) to bucket by; [1.0] is square only, [] means the paper's whole table.
        cache: encode images and captions once and keep the features; false encodes them in every step.
        cache_dir: where to keep the features; None means below the cache folder, named after their content.
    """

    name: Literal["shapes", "emoji", "folder"] = "shapes"
    path: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    size: Annotated[int, Range(8, 8192)] = 32
    images: Count | None = None
    eval_images: Count = 500
    scenes: Literal["one", "few", "hq", "all"] = "few"
    captions: Literal["dense", "sparse", "mixed", "web"] = "dense"
    shapes: list[str] | None = None
    colours: list[str] | None = None
    styles: list[str] | None = None
    prompt: str | None = None
    ratios: list[Annotated[float, Range(0.1, 10)]] = field(default_factory=lambda: [1.0])
    cache: bool = True
    cache_dir: str | None = None


@dataclass(frozen=True)
class NetworkConfig:
    """The shape of the network; channels and sizes of latents and captions follow from the codec and the encoder.

    Args:
        patch_size: latents per token and side.
        width: channels of the tokens.
        depth: number of blocks.
        heads: of each attention, into which the width is divided.
        mlp_ratio: width of each MLP's hidden layer over `width`.
        caption_tokens: longest caption (longer ones are cut).
        interpolation_scale: divides the positions ("lewei_scale") when a stage has another resolution than the one
            before: 2 at 1024 px, else 1.
        multi_scale: micro-conditioning on size and aspect ratio (PixArtMS), needed for buckets at the paper's 1024 px.
        adaln: single (the paper's), or block: the ablation of figure 6, an MLP a block on time and text.
        embedder_init: official, or unit for narrow networks and short runs (`model.py: UNIT_GAINS`).
    """

    patch_size: Count = 2
    width: Count = 192
    depth: Count = 6
    heads: Count = 6
    mlp_ratio: Positive = 4.0
    caption_tokens: Annotated[int, Range(3, 10**5)] = 56
    interpolation_scale: Positive = 1.0
    multi_scale: bool = False
    adaln: Literal["single", "block"] = "single"
    embedder_init: Literal["official", "unit"] = "official"


@dataclass(frozen=True)
class PixArtConfig(NetworkConfig):
    """The whole shape of a network, and config.json beside saved weights. Defaults: PixArt-XL/2 at 256 px.

    Args:
        input_size: side of the latents at the training resolution.
        in_channels: of the latents.
        caption_channels: width of the text encoder.
        base_size: tokens a side whose positions are 0, 1, 2, ...; None: input_size // patch_size.
        learn_sigma: C more output channels, the interpolated log-variance.
        classes: of the DiT; 0: conditioned on text.

    Raises:
        ValueError: sizes that do not fit each other, named in the message.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    caption_tokens: int = 120
    input_size: int = 32
    in_channels: int = 4
    caption_channels: int = 4096
    base_size: int | None = None
    learn_sigma: bool = True
    classes: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width must be a multiple of heads and of 4, got {self.width} and {self.heads} heads")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.multi_scale and self.width % 3:
            raise ValueError(f"multi_scale embeds height, width and ratio in thirds: width {self.width} % 3 != 0")
        if self.adaln not in ("single", "block"):
            raise ValueError(f'adaln must be "single" or "block", got {self.adaln!r}')
        if self.embedder_init not in ("official", "unit"):
            raise ValueError(f'embedder_init must be "official" or "unit", got {self.embedder_init!r}')

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def base(self) -> int:
        """Tokens a side whose positions are 0, 1, 2, ... before `interpolation_scale`."""
        return self.base_size or self.input_size // self.patch_size


@dataclass
class OptimiserConfig:
    """AdamW with decay on all parameters, constant rate after a linear warm-up (table 4; the official configs).

    Args:
        name: muon takes orthogonalised steps for weight matrices instead (common/muon.py).
        lr: learning rate after the warm-up.
        auto_lr: none takes lr as it is (the paper's text); sqrt multiplies it by sqrt(batch / 256) (the official code).
        weight_decay: of all parameters.
        eps: AdamW's epsilon.
        warmup: steps over which the rate rises linearly.
        cooldown: last fraction of the steps over which the rate falls linearly to zero (0: constant, as in the paper).
        grad_clip: largest norm of the gradient; 0 does not clip.
        ema_decay: of the moving average of the weights that samples are drawn with; 0 takes the last weights.
        drop: probability of training without caption or class, for classifier-free guidance.
        snr_loss: compare x_0 instead of the noise at t <= 249 (official option, off).
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: NotNegative = 2e-5
    auto_lr: Literal["none", "sqrt"] = "none"
    weight_decay: NotNegative = 0.03
    eps: Positive = 1e-10
    warmup: Whole = 1000
    cooldown: Share = 0.0
    grad_clip: NotNegative = 0.01
    ema_decay: Share = 0.9999
    drop: Share = 0.1
    snr_loss: bool = False


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of the stage.
        max_minutes: limit of the stage's training: a machine that would take longer does as many eighths of max_steps
            as fit (measured at the start, kept in the stage's folder); 0 sets no limit.
        batch_size: global batch (all processes and accumulated micro-batches together).
        gradient_checkpointing: compute each block again in the backward pass, for less memory.
        sample_every: steps between sample grids; 0 draws none on the way.
        workers: loader processes for features that are not in memory.
    """

    max_steps: Count = 1000
    max_minutes: NotNegative = 0.0
    batch_size: Count = 64
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 250
    sample_every: Whole = 0
    workers: Annotated[int, Range(0, 1024)] = 0


@dataclass
class SamplingConfig:
    """How sample grids and metrics are drawn (appendix A.5: 20 DPM-Solver steps, guidance 4.5).

    Args:
        sampler: dpm-solver (the paper's), iddpm (all timesteps, respaced) or sa-solver.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 draws without it.
        grid: pictures of a sample grid.
        metric_images: pictures drawn for FID and KID.
        per_task: prompts of each task of the Shapes score.
        curve: guidance scales of the FID-against-guidance curve (A.6), empty to leave it out.
        curve_images: pictures drawn for each point of that curve.
        batch_size: pictures drawn at once.
    """

    sampler: Literal["dpm-solver", "iddpm", "sa-solver"] = "dpm-solver"
    steps: Steps = 20
    guidance: NotNegative = 4.5
    grid: Count = 24
    metric_images: Count = 500
    per_task: Count = 50
    curve: list[NotNegative] = field(default_factory=list)
    curve_images: Count = 200
    batch_size: Count = 100


@dataclass
class StageConfig:
    """One stage of the recipe.

    Args:
        name: of the stage; its folder below run_dir.
        kind: class (stage 1: DiT on class labels), text (PixArt on captions) or controlnet (PixArt frozen, edges in).
        run_dir: folder of the whole recipe's stages.
        seed: of the weights' start, the order of the data, the noise and the samples.
        resume: auto continues an unfinished stage; never refuses a used folder; or the path of a .ckpt file.
        init_from: what to start from: the name of an earlier stage, a folder of ours, a .pth of the authors, or a
            diffusers directory. A class-conditional start is re-parameterised (section 2.3).
        reparam_t: the timestep (0 to 999) at which the re-parameterised network equals its start.
        vae: a diffusers AutoencoderKL directory.
        text_encoder: a transformers directory; None takes the packaged MiniLM.
        controlnet_form: official (13 of 28 blocks, from PixArt-delta) or full (all blocks, appendix A.9).
        evaluate: measure FID, KID and alignment when the stage ends.
    """

    name: str = "stage"
    kind: Literal["class", "text", "controlnet"] = "text"
    run_dir: str = "runs/pixart"
    seed: Seed = 0
    resume: str = "auto"
    init_from: str | None = None
    reparam_t: Timestep = 500.0
    vae: str = "ldm/pretrained/shapes32-v/vae"
    text_encoder: str | None = None
    controlnet_form: Literal["official", "full"] = "official"
    evaluate: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def folder(self) -> Path:
        """Where this stage's checkpoints, logs, samples, weights and metrics are."""
        return Path(self.run_dir) / self.name


@dataclass(frozen=True)
class Recipe:
    """Stages in their order, each with its YAML text (all values, defaults included)."""

    stages: list[tuple[StageConfig, str]]
    names: list[str]  # of all stages of the recipe, also those left out by --stage


def read_recipe(argv: Sequence[str] | None, description: str) -> Recipe:
    """The stages that a command line asks for.

    `--config FILE` is a recipe or a single stage (default configs/small.yaml), `--stage NAME` picks one stage of a
    recipe, and every other option overrides the stages' files: all of them, or the picked one.

    Raises:
        UserError: a missing or unreadable file, an unknown stage or option, a value of the wrong type.
    """
    named, arguments = take("--config", argv)
    picked, arguments = take("--stage", arguments)
    file, wanted = Path(named[-1]) if named else SMALL, picked[-1] if picked else None
    content = read_options(file)
    if "stages" not in content:
        files, shared = [file], []
    else:
        listed = content.pop("stages")
        if not isinstance(listed, list) or not listed or not all(isinstance(entry, str) for entry in listed):
            raise UserError(f'{file}: "stages" must be a list of stage files, for example [small/stage1.yaml]')
        files = [file.parent / entry for entry in listed]
        shared = _as_options(content)
    asked = {"-h", "--help", "--print_config"} & {word.partition("=")[0] for word in arguments}
    stages = []
    for stage_file in files:
        name = str(read_options(stage_file).get("name", stage_file.stem))
        if asked and wanted not in (None, name):
            continue
        # What all stages share, beneath the stage's file, beneath the command line.
        beneath = [*shared, "--name", name]
        try:
            stages.append(parse_config(StageConfig, stage_file, description, arguments, beneath))
        except SystemExit:
            if "--print_config" not in asked or stage_file == files[-1] or wanted is not None:
                raise
            print("---")  # and the next stage's
    names = [config.name for config, _ in stages]
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two stages have the same name: {', '.join(names)}")
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"--stage {wanted}: {file} has no such stage; it has {', '.join(names)}")
        stages = [stage for stage in stages if stage[0].name == wanted]
    return Recipe(stages, names)


def _as_options(content: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested options as a command line: {"trainer": {"threads": 2}} is ["--trainer.threads=2"]."""
    options: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            options += _as_options(value, f"{prefix}{key}.")
        else:
            options.append(f"--{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return options
