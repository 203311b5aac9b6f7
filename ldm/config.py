"""Everything a run of `ldm/train.py` can be told, as plain dataclasses; imports nothing heavy, so `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.options import TrainerOptions

TASKS = ("unconditional", "class", "text", "layout", "semantic", "superres", "inpaint")


@dataclass
class DataConfig:
    """Which images to learn from.

    Args:
        name: emoji (embedded artwork with captions), emoji_groups (its 9 classes), shapes (procedural scenes with exact
            labels), photos (photo collages), fashion_mnist, folder (your own images), hf (a Hugging Face data set),
            shards (a stream over parquet files or image folders, for data that does not fit one disk).
        path: the folder for `folder`, the name or path for `hf`, a glob pattern of paths or URLs for `shards`; optional
            root for photos and fashion_mnist.
        eval_path: the held-out shards; None holds out those whose names say test or validation, or the last one of
            `path` (shards only).
        image_column: the column of the pictures in a table (hf, shards); None takes `image`, or the one that may be it.
        text_column: the column of the captions (folder, hf, shards), likewise `text` by default.
        label_column: the column of the classes (folder, hf, shards), likewise `label` by default.
        size: side of the square training images in pixels.
        train_images: number of generated samples (shapes, photos); None means all there are.
        eval_images: number of held-out images used as reference for FID and KID.
        cache_latents: encode the training set once and keep the latents' moments (same loss curve, less work per step).
        workers: loader processes for data that does not fit in memory.
        tasks: kinds of scenes (shapes only), for example [grid3]; None means the six of the prompts.
        max_memory_gb: data sets larger than this are read from disk batch by batch.
    """

    name: Literal["emoji", "emoji_groups", "shapes", "photos", "fashion_mnist", "folder", "hf", "shards"] = "emoji"
    path: str | None = None
    eval_path: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    size: int = 32
    train_images: int | None = None
    eval_images: int = 1000
    cache_latents: bool = True
    workers: int = 0
    max_memory_gb: float = 4.0
    tasks: list[str] | None = None


@dataclass
class AutoencoderOptions:
    """The autoencoder's network (appendix G).

    Args:
        ch: width of the first level; ch_mult multiplies it per level, and f = 2 ** (levels - 1).
        norm_groups: groups of every GroupNorm (32 in the paper's networks; narrow ones need fewer).
        n_embed: codebook entries (vq). legacy_beta: put beta on the codebook term as the published models do.
        attn_resolutions: sides of the feature maps, for images of the nominal size, at which every block attends.
        attention: False removes every attention, also the middle one (`attn_type: none`).
    """

    ch: int = 32
    ch_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    num_res_blocks: int = 1
    norm_groups: int = 8
    z_channels: int = 8
    n_embed: int = 1024
    legacy_beta: bool = True
    attn_resolutions: list[int] = field(default_factory=list)
    attention: bool = True


@dataclass
class FirstStageConfig(AutoencoderOptions):
    """The first stage and its training (paper section 3.1, appendix G).

    Args:
        kind: kl, vq, or pixels (f = 1, no autoencoder: the paper's LDM-1).
        weights: a .safetensors/.ckpt file or a diffusers `vae/` directory to use instead of training one.
        init_from: the same kinds of path, but training goes on from there.
        train: all, or decoder alone (kl): the latents stay what they are, so a denoiser trained on them stays valid.
        ema_decay: the moving average of the weights that is saved (0: the last weights, as in the paper).
        perceptual: weight of the LPIPS-form distance; perceptual_trunk: trained (the repository's own small VGG),
            random (same, untrained), or the path of official LPIPS weights.
        optimiser: adam, as in the paper, or muon (ldm/optimisers.py); the discriminator always has Adam.
        decay: last fraction of the steps over which lr falls linearly to a tenth (0: constant, as in the paper).
        disc_start: generator step at which the patch discriminator joins; disc_weight 0 leaves it out.
    """

    kind: Literal["kl", "vq", "pixels"] = "kl"
    weights: str | None = None
    init_from: str | None = None
    train: Literal["all", "decoder"] = "all"
    ema_decay: float = 0.0
    kl_weight: float = 1e-6
    perceptual: float = 1.0
    perceptual_trunk: str = "trained"
    disc_start: int = 1000
    disc_weight: float = 0.5
    disc_width: int = 32
    disc_layers: int = 2
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    steps: int = 1500
    batch_size: int = 32
    optimiser: Literal["adam", "muon"] = "adam"
    lr: float = 1e-3
    decay: float = 0.3


@dataclass
class UNetOptions:
    """The denoiser (paper section 3.2).

    Args:
        model_channels: width of the first level; level i has model_channels * channel_mult[i].
        num_res_blocks: per level going down (one more going up).
        norm_groups: groups of every GroupNorm (32 in the paper's networks; narrow ones need fewer).
        attention_resolutions: DOWN-SAMPLING FACTORS (1, 2, 4, ...) at which attention follows each ResBlock.
        num_heads: heads at every level (of width channels / num_heads), or -1 with num_head_channels, their width.
        transformer_depth: blocks of each transformer, where tokens enter by cross-attention.
        resblock_updown: resample inside ResBlocks.
    """

    model_channels: int = 64
    channel_mult: list[int] = field(default_factory=lambda: [1, 2])
    num_res_blocks: int = 1
    norm_groups: int = 16
    attention_resolutions: list[int] = field(default_factory=lambda: [1, 2])
    num_heads: int = -1
    num_head_channels: int = 32
    transformer_depth: int = 1
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False


@dataclass
class ConditionerConfig:
    """What the denoiser is conditioned on (paper section 3.3).

    Args:
        kind: auto picks the paper's choice for the task. bert: a transformers BertModel trained jointly (exports to
            diffusers); tau: the paper's own transformer; frozen: token states of a fixed encoder (MiniLM or `encoder`).
        width, layers, tokens, vocabulary: size of the jointly trained transformer.
        encoder: directory of a transformers encoder for kind `frozen`.
        drop: probability of training without the condition, for classifier-free guidance.
        caption_variants: how many phrasings of each caption are drawn from (text).
        scale: super-resolution factor; degradation: bicubic or bsr (superres).
    """

    kind: Literal["auto", "bert", "tau", "frozen"] = "auto"
    width: int = 128
    layers: int = 3
    tokens: int = 24
    vocabulary: int = 4096
    encoder: str | None = None
    drop: float = 0.1
    caption_variants: int = 4
    class_embedding: Literal["cross_attention", "adm"] = "cross_attention"
    scale: int = 4
    degradation: Literal["bicubic", "bsr"] = "bicubic"


@dataclass
class DiffusionConfig:
    """Schedule and objective (paper sections 3.2 and B; `linear` means linear in sqrt(beta))."""

    timesteps: int = 1000
    schedule: Literal["linear", "cosine", "sqrt_linear", "sqrt"] = "linear"
    linear_start: float = 0.0015
    linear_end: float = 0.0195
    prediction: Literal["eps", "x0", "v"] = "eps"
    loss: Literal["l1", "l2"] = "l2"
    learn_logvar: bool = False
    elbo_weight: float = 0.0
    v_posterior: float = 0.0
    scale_by_std: bool = True
    scale_factor: float = 1.0


@dataclass
class OptimiserConfig:
    """AdamW, as in the paper, on the denoiser and its conditioner.

    Args:
        name: muon takes orthogonalised steps for weight matrices instead (ldm/optimisers.py).
        scale_lr: multiply lr by batch x accumulation (the official rule; the configs' lr is then the base value).
        schedule: constant, or cosine to zero at max_steps, both after `warmup` linear steps.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    scale_lr: bool = False
    weight_decay: float = 0.01
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: float = 1.0
    ema_decay: float = 0.9999


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of the diffusion stage.
        batch_size: global batch (all processes and accumulated micro-batches together).
        sample_every: steps between sample grids; 0 draws none on the way.
    """

    max_steps: int = 3000
    batch_size: int = 64
    sample_every: int = 1000


@dataclass
class SamplingConfig:
    """How the sample grids and the final metrics are drawn."""

    sampler: Literal["ddim", "ddpm", "plms", "dpm++"] = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 3.0
    grid: int = 32
    metric_images: int = 1000
    batch_size: int = 100


@dataclass
class ClassifierNetwork:
    """The classifier of noisy latents: the U-Net's contracting path and a pooling (appendix D.4).

    Args:
        norm_groups: groups of every GroupNorm (32 in ADM's networks; narrow ones need fewer).
        pool: attention needs latents of the training size; the others take any.
    """

    model_channels: int = 64
    channel_mult: list[int] = field(default_factory=lambda: [1, 2])
    num_res_blocks: int = 1
    norm_groups: int = 16
    attention_resolutions: list[int] = field(default_factory=lambda: [2])
    num_head_channels: int = 32
    dropout: float = 0.0
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"


@dataclass
class ClassifierConfig:
    """One classifier p(y | z_t), trained on the noisy latents of a class-conditional run.

    Args:
        model: folder of a finished run with task class; its data, first stage and noise schedule are used.
        run_dir: folder of the classifier's checkpoints, logs, weights and metrics.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder; or the path of a .ckpt file.
        lr, weight_decay, warmup: AdamW after `warmup` linear steps, cosine to zero at max_steps.
        network: size of the classifier.
        trainer: how to run; sample_every and compile do not concern it.
    """

    model: str = "runs/ldm-class"
    run_dir: str = "runs/ldm-classifier"
    seed: int = 0
    resume: str = "auto"
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    network: ClassifierNetwork = field(default_factory=ClassifierNetwork)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass
class LdmConfig:
    """One run: first stage, then diffusion in its latent space, then metrics.

    Args:
        task: unconditional, class, text, layout, semantic, superres or inpaint.
        run_dir: folder of this run's checkpoints, logs, samples and metrics.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder; or the path of a .ckpt file.
        init_from: another run's model.safetensors, or a pipeline folder, from which the second stage starts; its
            tokenizer and the scale of its latents come with it.
        stages: which parts to run.
    """

    task: Literal["unconditional", "class", "text", "layout", "semantic", "superres", "inpaint"] = "text"
    run_dir: str = "runs/ldm"
    seed: int = 0
    resume: str = "auto"
    init_from: str | None = None
    stages: list[Literal["first_stage", "diffusion", "evaluate"]] = field(
        default_factory=lambda: ["first_stage", "diffusion", "evaluate"]  # type: ignore[arg-type]
    )
    export_pipeline: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    unet: UNetOptions = field(default_factory=UNetOptions)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
