"""Everything a run of `instella_t2i/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from common.options import Count, NotNegative, Portion, Positive, Range, Seed, Share, TrainerOptions, Whole

Side = Annotated[int, Range(2, 4096)]  # of a picture, in pixels
Layers = Annotated[int, Range(1, 256)]
Heads = Annotated[int, Range(1, 256)]
HeadWidth = Annotated[int, Range(2, 512)]


@dataclass
class DataConfig:
    """Pictures: committed artwork, drawn scenes, or the user's own, with captions where there are any.

    Args:
        name: emoji (captioned artwork), shapes (drawn scenes), or folder (the user's pictures, at `path`).
        path: an image folder, a parquet file or a data set's name; for name folder.
        image_column: of a table, with the pictures; found by itself where there is one candidate.
        text_column: of a table, with the captions; found by itself where there is one candidate.
        size: side of the square pictures that the encoder sees.
        images: how many training pictures are drawn (shapes), or at most taken (the others); 0 takes all.
        eval_images: held-out pictures, that the metrics are taken on, at most.
        flip: mirror a training picture with probability one half.
    """

    name: Literal["emoji", "shapes", "folder"] = "emoji"
    path: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    size: Side = 64
    images: Whole = 0
    eval_images: Annotated[int, Range(2)] = 512
    flip: bool = True


@dataclass
class NetworkConfig:
    """The tokenizer, by default as it was released (427.8M parameters, 1 KiB a picture).

    Args:
        patch: side of a patch, in pixels.
        tokens: k, latent tokens of a picture.
        bits: of a token; a vq codebook has 2^bits entries.
        encoder_layers: blocks of the encoder.
        encoder_heads: heads of its attention.
        encoder_head_dim: width of such a head.
        decoder_layers: blocks of the decoder.
        decoder_heads: heads of the attention there.
        decoder_head_dim: width of a head there.
        down_after: encoder blocks, from 0, after which image tokens are merged 2 by 2.
        up_after: decoder blocks, from 0, after which image tokens are split 2 by 2.
        axes: three even numbers, how a head's width is shared out to token number, row and column.
        theta: base of the rotary frequencies.
        scale: pixels that every picture's coordinates are stretched to, whatever its size; None leaves them whole
            numbers of patches.
        rotary: released (the mismatched layouts that released weights were trained with) or pairs (a true rotation).
        layout: line (learned latent tokens, the paper) or grid (image tokens pooled to a square grid, the baseline).
        quantizer: binary (the paper), vq (one-hot, l2-normalised), lfq (lookup-free) or bsq (binary spherical).
    """

    patch: Annotated[int, Range(1, 256)] = 16
    tokens: Annotated[int, Range(1, 65536)] = 128
    bits: Annotated[int, Range(1, 4096)] = 64
    encoder_layers: Layers = 12
    encoder_heads: Heads = 12
    encoder_head_dim: HeadWidth = 64
    decoder_layers: Layers = 16
    decoder_heads: Heads = 16
    decoder_head_dim: HeadWidth = 64
    down_after: list[Whole] = field(default_factory=lambda: [7])
    up_after: list[Whole] = field(default_factory=lambda: [7])
    axes: list[Whole] = field(default_factory=lambda: [8, 28, 28])
    theta: Positive = 10_000.0
    scale: Positive | None = 1024.0
    rotary: Literal["released", "pairs"] = "released"
    layout: Literal["line", "grid"] = "line"
    quantizer: Literal["binary", "vq", "lfq", "bsq"] = "binary"


@dataclass
class TokenizerConfig:
    """Stage 1: encoder, quantizer and decoder at one size. The authors released no training; the recipe is ours.

    Args:
        steps: optimiser steps.
        batch_size: pictures of a step, over all processes and micro-batches.
        optimiser: adamw, or muon: the blocks' matrices by orthogonal steps as long as AdamW's, the rest by AdamW.
        lr: learning rate after warm-up, then a cosine to zero at the last step.
        warmup: steps over which the learning rate rises linearly.
        weight_decay: of the optimiser; with muon on those matrices alone.
        grad_clip: largest norm of the gradient; 0 does not clip.
        pixel_beta: of the smooth-L1 distance, below which it is quadratic.
        perceptual: weight of the perceptual distance; 0 leaves it out.
        perceptual_trunk: trained (this repository's), random, or official LPIPS weights: a file, or two with a comma.
        code: weight of the quantizer's own loss: p (1 - p) of binary codes, commitment and entropy of the others.
        logit: weight of the mean square of binary codes' logits, which leads back bits that are the same for all
            pictures and so have no gradient left (ours).
        tau_start: temperature of the bits' Bernoulli noise at the first step.
        tau_end: temperature after `tau_share` of the steps.
        tau_share: share of the steps over which the temperature falls linearly.
        noise: draw the bits while training; without it they are thresholded (ablation).
        aimed: latent tokens start out looking at a place of the picture each (ours), not at averages of all of it.
        gan: weight of the adversarial term; 0 leaves the discriminator out.
        gan_start: share of the steps after which the discriminator joins.
        gan_warmup: steps over which the adversarial weight rises from 0 after that.
        gan_lr: learning rate of the discriminator.
        gan_width: channels of its first layer.
    """

    steps: Count = 3000
    batch_size: Count = 32
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: NotNegative = 1e-3
    warmup: Whole = 100
    weight_decay: NotNegative = 0.0
    grad_clip: NotNegative = 1.0
    pixel_beta: Positive = 0.1
    perceptual: NotNegative = 1.0
    perceptual_trunk: str = "trained"
    code: NotNegative = 0.1
    logit: NotNegative = 1e-3
    tau_start: NotNegative = 1.0
    tau_end: NotNegative = 0.1
    tau_share: Portion = 0.6
    noise: bool = True
    aimed: bool = False
    gan: NotNegative = 0.1
    gan_start: Share = 0.6
    gan_warmup: Whole = 100
    gan_lr: NotNegative = 2e-4
    gan_width: Annotated[int, Range(1, 1024)] = 32


@dataclass
class DecoderConfig:
    """Stage 2: the decoder alone, on several sizes, from the frozen encoder's codes.

    Args:
        steps: optimiser steps.
        batch_size: pictures of a step, over all processes and micro-batches.
        lr: learning rate after warm-up, then a cosine to zero at the last step.
        warmup: steps over which the learning rate rises linearly.
        sizes: sides of the pictures that are decoded; a step takes one of them.
        gan_start: share of the steps after which a new discriminator joins.
        gan_warmup: steps over which the adversarial weight rises from 0 after that.
    """

    steps: Count = 1000
    batch_size: Count = 32
    lr: NotNegative = 3e-4
    warmup: Whole = 50
    sizes: list[Side] = field(default_factory=lambda: [32, 48, 64, 96])
    gan_start: Share = 0.1
    gan_warmup: Whole = 100


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        sample_every: steps between pictures on the way; 0 draws none.
    """

    checkpoint_every: Count = 200
    sample_every: Whole = 500


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        features: network of the features of KID and r-KID: lite0, or inception:FILE.
        generated: pictures that each generator draws to be measured.
        batch_size: pictures at once.
        grid: pictures shown side by side.
    """

    features: str = "lite0"
    generated: Annotated[int, Range(2)] = 256
    batch_size: Count = 64
    grid: Count = 12


@dataclass
class StreamConfig:
    """The network of both generators, by default as they were released (1.29B and 0.88B parameters).

    Args:
        layers: number of blocks, each of which reads one layer of the language model.
        heads: heads of the attention.
        head_dim: width of a head.
        recompute: compute each block again for the backward pass, for less memory; the same losses.
    """

    layers: Layers = 16
    heads: Heads = 16
    head_dim: HeadWidth = 128
    recompute: bool = False


@dataclass
class TextConfig:
    """What reads the captions; it stays as it is.

    Args:
        encoder: folder of a causal language model that transformers has written.
        length: tokens of a caption at most; longer ones are cut at their end.
        layers: each (block i reads layer i, the paper) or last (all blocks read the last layer, the baseline).
        cache_gb: memory for features of captions, each encoded once; what does not fit is encoded in every step.
    """

    encoder: str = "instella_t2i/pretrained/captions"
    length: Annotated[int, Range(1, 4096)] = 128
    layers: Literal["each", "last"] = "each"
    cache_gb: NotNegative = 1.0


@dataclass
class CodesConfig:
    """Codes of the training pictures, made once, and the second set of pictures of the later data stage.

    Args:
        folder: where they are kept, to be shared by runs; None keeps them in the run folder.
        views: codes of each picture: the first of the picture itself, the others of it moved and scaled by a few
            percent (ours), so that a generator that sees few pictures often cannot learn their bits by heart.
        synthetic: image folder with captions, for example of `instella_t2i/synthesize.py`; None has one data stage.
        synthetic_share: of the samples once the second stage has begun (3 : 1 in the paper).
        synthetic_from: share of the steps after which it begins.
    """

    folder: str | None = None
    views: Count = 1
    synthetic: str | None = None
    synthetic_share: Share = 0.25
    synthetic_from: Share = 0.5


@dataclass
class GeneratorConfig:
    """How a generator is trained: the released example, but for the number of steps, which is not known.

    Args:
        steps: optimiser steps.
        batch_size: samples of a step, over all processes and micro-batches.
        lr: learning rate after warm-up.
        warmup: steps over which the learning rate rises linearly.
        schedule: constant (released) or cosine to zero at the last step.
        optimiser: adamw (released), or muon: the blocks' matrices by orthogonal steps as long as AdamW's (ours).
        weight_decay: of the optimiser; with muon on those matrices alone.
        grad_clip: largest norm of the gradient; 0 does not clip.
        uncond: share of the captions that are replaced by the empty one.
    """

    steps: Count = 100_000
    batch_size: Count = 256
    lr: NotNegative = 1e-4
    warmup: Whole = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    optimiser: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.0
    grad_clip: NotNegative = 1.0
    uncond: Share = 0.1


@dataclass
class DiffusionConfig(GeneratorConfig):
    """Binary diffusion.

    Args:
        target: epsilon (the network says which bits were flipped) or x (which are set).
        times: law of t: logistic_normal or uniform.
        shift: s of t = s u / (1 + (s - 1) u) for u of that law; above 1 for more noise, 1 is the released law (ours).
    """

    target: Literal["epsilon", "x"] = "epsilon"
    times: Literal["logistic_normal", "uniform"] = "logistic_normal"
    shift: Positive = 1.0


@dataclass
class SamplingConfig:
    """How pictures are drawn.

    Args:
        steps: evaluations of the denoiser.
        guidance: w of binary diffusion; the usual guidance scale is 1 + w.
        temperature: that the denoiser's logits are divided by; 0 takes the likelier bit.
        rho: exponent of the denoiser's times, above 1 for smaller steps at the end, below 1 at the beginning.
        protocol: renoise (the released protocol 1), approximate (2), or exact, the posterior of the process.
        ar_guidance: w of autoregression.
        ar_temperature: that its logits are divided by.
    """

    steps: Annotated[int, Range(1, 10_000)] = 20
    guidance: NotNegative = 7.5
    temperature: NotNegative = 1.0
    rho: Positive = 1.0
    protocol: Literal["renoise", "approximate", "exact"] = "renoise"
    ar_guidance: NotNegative = 7.5
    ar_temperature: NotNegative = 1.0


Stage = Literal["tokenizer", "decoder", "diffusion", "autoregression"]


@dataclass
class InstellaConfig:
    """One run: a tokenizer in two stages, then what is generated in its codes.

    Args:
        stages: which stages to train, in this order; what they build on is read from the run folder.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and weights.
        seed: of the order of the data and of everything drawn in training.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        tokenizer_from: a finished tokenizer's folder to build on, in place of training one.
    """

    stages: Stage | list[Stage] = field(default_factory=lambda: list(get_args(Stage)))
    run_dir: str = "runs/instella"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    tokenizer_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    text: TextConfig = field(default_factory=TextConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoregression: GeneratorConfig = field(default_factory=GeneratorConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
