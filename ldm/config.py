"""Everything a run of `ldm/train.py` can be told, as plain dataclasses; imports nothing heavy, so `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, NotNegative, Positive, Range, Seed, Share, TrainerOptions, Whole

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
        max_memory_gb: data sets larger than this, in gigabytes, are read from disk batch by batch.
    """

    name: Literal["emoji", "emoji_groups", "shapes", "photos", "fashion_mnist", "folder", "hf", "shards"] = "emoji"
    path: str | None = None
    eval_path: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    size: Annotated[int, Range(8, 8192)] = 32
    train_images: Count | None = None
    eval_images: Count = 1000
    cache_latents: bool = True
    workers: Annotated[int, Range(0, 1024)] = 0
    max_memory_gb: NotNegative = 4.0
    tasks: list[str] | None = None


@dataclass
class AutoencoderOptions:
    """The autoencoder's network (appendix G).

    Args:
        ch: channels of the first level.
        ch_mult: what multiplies `ch` at each level; f = 2 ** (levels - 1).
        num_res_blocks: residual blocks per level.
        norm_groups: groups of every GroupNorm (32 in the paper's networks; narrow ones need fewer).
        z_channels: channels of the latent.
        n_embed: codebook entries (vq).
        legacy_beta: put beta on the codebook term as the published models do (vq).
        attn_resolutions: sides of the feature maps, for images of the nominal size, at which every block attends.
        attention: False removes every attention, also the middle one (`attn_type: none`).
    """

    ch: Count = 32
    ch_mult: list[Count] = field(default_factory=lambda: [1, 2, 2])
    num_res_blocks: Count = 1
    norm_groups: Count = 8
    z_channels: Count = 8
    n_embed: Count = 1024
    legacy_beta: bool = True
    attn_resolutions: list[Count] = field(default_factory=list)
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
        kl_weight: weight of the latent's KL divergence from a normal (kl).
        perceptual: weight of the LPIPS-form distance.
        perceptual_trunk: trained (the repository's own small VGG), random (same, untrained), or the path of official
            LPIPS weights.
        disc_start: generator step at which the patch discriminator joins.
        disc_weight: weight of the discriminator's loss beside the reconstruction's; 0 leaves it out.
        disc_width: channels of the discriminator's first layer.
        disc_layers: layers of the discriminator that halve the picture.
        disc_loss: hinge or vanilla (logistic), as in the official code.
        steps: optimiser steps of the first stage.
        batch_size: global batch of the first stage, in pictures.
        optimiser: adam, as in the paper, or muon (common/muon.py); the discriminator always has Adam.
        lr: learning rate of the first stage.
        decay: last fraction of the steps over which lr falls linearly to a tenth (0: constant, as in the paper).
    """

    kind: Literal["kl", "vq", "pixels"] = "kl"
    weights: str | None = None
    init_from: str | None = None
    train: Literal["all", "decoder"] = "all"
    ema_decay: Share = 0.0
    kl_weight: NotNegative = 1e-6
    perceptual: NotNegative = 1.0
    perceptual_trunk: str = "trained"
    disc_start: Whole = 1000
    disc_weight: NotNegative = 0.5
    disc_width: Count = 32
    disc_layers: Annotated[int, Range(1, 8)] = 2
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    steps: Count = 1500
    batch_size: Count = 32
    optimiser: Literal["adam", "muon"] = "adam"
    lr: NotNegative = 1e-3
    decay: Share = 0.3


@dataclass
class UNetOptions:
    """The denoiser (paper section 3.2).

    Args:
        model_channels: channels of the first level.
        channel_mult: what multiplies `model_channels` at each level.
        num_res_blocks: residual blocks per level going down (one more going up).
        norm_groups: groups of every GroupNorm (32 in the paper's networks; narrow ones need fewer).
        attention_resolutions: DOWN-SAMPLING FACTORS (1, 2, 4, ...) at which attention follows each ResBlock.
        num_heads: heads at every level (of width channels / num_heads), or -1 with `num_head_channels`.
        num_head_channels: width of a head, where `num_heads` is -1.
        transformer_depth: blocks of each transformer, where tokens enter by cross-attention.
        dropout: probability of dropping a feature in the ResBlocks.
        use_scale_shift_norm: the time embedding scales and shifts the normalised features, instead of being added.
        resblock_updown: resample inside ResBlocks.
    """

    model_channels: Count = 64
    channel_mult: list[Count] = field(default_factory=lambda: [1, 2])
    num_res_blocks: Count = 1
    norm_groups: Count = 16
    attention_resolutions: list[Count] = field(default_factory=lambda: [1, 2])
    num_heads: Literal[-1] | Count = -1
    num_head_channels: Literal[-1] | Count = 32
    transformer_depth: Count = 1
    dropout: Share = 0.0
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False


@dataclass
class ConditionerConfig:
    """What the denoiser is conditioned on (paper section 3.3).

    Args:
        kind: auto picks the paper's choice for the task. bert: a transformers BertModel trained jointly (exports to
            diffusers); tau: the paper's own transformer; frozen: token states of a fixed encoder (MiniLM or `encoder`).
        width: of the jointly trained transformer's tokens.
        layers: of the jointly trained transformer.
        tokens: longest condition (longer ones are cut).
        vocabulary: pieces of the tokenizer that is learned from the captions.
        encoder: directory of a transformers encoder for kind `frozen`.
        drop: probability of training without the condition, for classifier-free guidance.
        caption_variants: how many phrasings of each caption are drawn from (text).
        class_embedding: how a class enters: as a token by cross_attention, or added to the time embedding (adm).
        scale: factor of super-resolution (superres).
        degradation: how low-resolution pictures are made: bicubic, or bsr (blur, noise, JPEG; superres).
    """

    kind: Literal["auto", "bert", "tau", "frozen"] = "auto"
    width: Count = 128
    layers: Count = 3
    tokens: Annotated[int, Range(3, 10**5)] = 24
    vocabulary: Count = 4096
    encoder: str | None = None
    drop: Share = 0.1
    caption_variants: Count = 4
    class_embedding: Literal["cross_attention", "adm"] = "cross_attention"
    scale: Annotated[int, Range(2, 64)] = 4
    degradation: Literal["bicubic", "bsr"] = "bicubic"


@dataclass
class DiffusionConfig:
    """Schedule and objective (paper sections 3.2 and B).

    Args:
        timesteps: of the noise schedule.
        schedule: of beta: linear (in sqrt(beta), the paper's), cosine, sqrt_linear (in beta) or sqrt.
        linear_start: beta of the first timestep (all schedules but cosine).
        linear_end: beta of the last timestep (all schedules but cosine).
        prediction: what the denoiser predicts: eps (the noise), x0 (the clean latent) or v.
        loss: l2 (squared) or l1 (absolute difference).
        learn_logvar: learn a weight per timestep.
        elbo_weight: weight of the variational bound's term.
        v_posterior: 0 takes the posterior's variance for sampling, 1 beta itself, in between a mixture.
        scale_by_std: divide latents by the standard deviation of the first batch.
        scale_factor: what multiplies latents where `scale_by_std` is false.
    """

    timesteps: Annotated[int, Range(2, 10**5)] = 1000
    schedule: Literal["linear", "cosine", "sqrt_linear", "sqrt"] = "linear"
    linear_start: Annotated[float, Range(0, 0.999, above=True)] = 0.0015
    linear_end: Annotated[float, Range(0, 0.999, above=True)] = 0.0195
    prediction: Literal["eps", "x0", "v"] = "eps"
    loss: Literal["l1", "l2"] = "l2"
    learn_logvar: bool = False
    elbo_weight: NotNegative = 0.0
    v_posterior: Share = 0.0
    scale_by_std: bool = True
    scale_factor: Positive = 1.0


@dataclass
class OptimiserConfig:
    """AdamW, as in the paper, on the denoiser and its conditioner.

    Args:
        name: muon takes orthogonalised steps for weight matrices instead (common/muon.py).
        lr: highest learning rate.
        scale_lr: multiply lr by batch x accumulation (the official rule; the configs' lr is then the base value).
        weight_decay: of all weights.
        warmup: steps over which the rate rises linearly.
        schedule: of the rate after the warm-up: constant, or cosine to zero at max_steps.
        grad_clip: largest norm of the gradient; 0 does not clip.
        ema_decay: of the moving average of the weights that samples are drawn with; 0 takes the last weights.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: NotNegative = 1e-3
    scale_lr: bool = False
    weight_decay: NotNegative = 0.01
    warmup: Whole = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: NotNegative = 1.0
    ema_decay: Share = 0.9999


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of the diffusion stage.
        batch_size: global batch (all processes and accumulated micro-batches together).
        sample_every: steps between sample grids; 0 draws none on the way.
    """

    max_steps: Count = 3000
    batch_size: Count = 64
    sample_every: Whole = 1000


@dataclass
class SamplingConfig:
    """How the sample grids and the final metrics are drawn.

    Args:
        sampler: ddim, ddpm (all timesteps), plms or dpm++.
        steps: of the sampler, at most `diffusion.timesteps`.
        eta: noise of each DDIM step: 0 is deterministic, 1 is DDPM's.
        guidance: scale of classifier-free guidance; 1 draws without it.
        grid: pictures of a sample grid.
        metric_images: pictures drawn for FID and KID.
        batch_size: pictures drawn at once.
    """

    sampler: Literal["ddim", "ddpm", "plms", "dpm++"] = "ddim"
    steps: Count = 50
    eta: Share = 0.0
    guidance: NotNegative = 3.0
    grid: Count = 32
    metric_images: Count = 1000
    batch_size: Count = 100


@dataclass
class ClassifierNetwork:
    """The classifier of noisy latents: the U-Net's contracting path and a pooling (appendix D.4).

    Args:
        model_channels: channels of the first level.
        channel_mult: what multiplies `model_channels` at each level.
        num_res_blocks: residual blocks per level.
        norm_groups: groups of every GroupNorm (32 in ADM's networks; narrow ones need fewer).
        attention_resolutions: DOWN-SAMPLING FACTORS (1, 2, 4, ...) at which attention follows each ResBlock.
        num_head_channels: width of a head.
        dropout: probability of dropping a feature in the ResBlocks.
        pool: attention needs latents of the training size; the others take any.
    """

    model_channels: Count = 64
    channel_mult: list[Count] = field(default_factory=lambda: [1, 2])
    num_res_blocks: Count = 1
    norm_groups: Count = 16
    attention_resolutions: list[Count] = field(default_factory=lambda: [2])
    num_head_channels: Count = 32
    dropout: Share = 0.0
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"


@dataclass
class ClassifierConfig:
    """One classifier p(y | z_t), trained on the noisy latents of a class-conditional run.

    Args:
        model: folder of a finished run with task class; its data, first stage and noise schedule are used.
        run_dir: folder of the classifier's checkpoints, logs, weights and metrics.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder; or the path of a .ckpt file.
        seed: of the weights' start, the order of the data and the noise.
        lr: highest learning rate of AdamW, which falls to zero at max_steps along a cosine.
        weight_decay: of AdamW.
        warmup: steps over which the rate rises linearly.
        network: size of the classifier.
        trainer: how to run; sample_every and compile do not concern it.
    """

    model: str = "runs/ldm-class"
    run_dir: str = "runs/ldm-classifier"
    seed: Seed = 0
    resume: str = "auto"
    lr: NotNegative = 1e-3
    weight_decay: NotNegative = 0.05
    warmup: Whole = 100
    network: ClassifierNetwork = field(default_factory=ClassifierNetwork)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass
class LdmConfig:
    """One run: first stage, then diffusion in its latent space, then metrics.

    Args:
        task: unconditional, class, text, layout, semantic, superres or inpaint.
        run_dir: folder of this run's checkpoints, logs, samples and metrics.
        seed: of the weights' start, the order of the data, the noise and the samples.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder; or the path of a .ckpt file.
        init_from: another run's model.safetensors, or a pipeline folder, from which the second stage starts; its
            tokenizer and the scale of its latents come with it.
        stages: which parts to run, of first_stage, diffusion, evaluate.
        export_pipeline: write a diffusers pipeline beside the weights, where it can carry the model.
    """

    task: Literal["unconditional", "class", "text", "layout", "semantic", "superres", "inpaint"] = "text"
    run_dir: str = "runs/ldm"
    seed: Seed = 0
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
