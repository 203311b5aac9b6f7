"""Latent diffusion beside diffusers: training and sampling speed, memory, and how near the processor's peak we come.

    python -m benchmarks.ldm                    # writes results/bench_ldm.json
    python -m benchmarks.ldm --sizes emoji64    # 12 minutes on 2 CPU cores

Every arm is a process of its own that waits until it is its turn, so that arms alternate (A B C A B C ...), the
allocator settings of one do not help the other, and each has its own peak memory. Wall-clock medians count; the note
of a row says what each side did and what the ratio of CPU times was, which other load on the machine disturbs less.

The peer is what a diffusers user runs: the loop of examples/text_to_image/train_text_to_image.py (images through the
VAE and captions through the frozen text encoder in every step, UNet2DConditionModel, MSE, AdamW, no EMA, float32), and
StableDiffusionPipeline. Our arm is `ldm/train.py` as it is: Lightning, cached latents, a jointly trained text encoder,
EMA. The "U-Net only" rows leave all of that out and compare the same step on the same given latents.
Both sides start from the same weights, which `ldm/convert.py` writes as a diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.arms import (
    DEFAULTS,
    DRAWING,
    PRECISIONS,
    TRAINING,
    Pace,
    Process,
    Step,
    Timing,
    Turns,
    at_its_best,
    bench_parser,
    faster,
    fill_zero_weights,
    keep,
    leaner,
    matmul,
    measure,
    mixed,
    of_the_peak,
    parse,
    quality_rows,
    take_turns,
    taken_by_auto,
    training_step,
    where_of,
)
from common.costs import flop, parameter_count
from common.errors import run_main
from common.options import Count
from common.paths import REPOSITORY, RESULTS
from common.pretrained import from_folder

if TYPE_CHECKING:
    from ldm.config import LdmConfig
    from ldm.diffusion import LatentDiffusion
    from ldm.tasks import Task

TEACHER = REPOSITORY / "ldm" / "configs" / "teachers" / "emoji64.yaml"
# Options on top of the emoji64 teacher's configuration.
SIZES: dict[str, list[str]] = {
    "emoji64": ["--optimiser.name", "adamw"],  # as the peer; the published teacher is trained with Muon
    "wide": [
        *("--optimiser.name", "adamw", "--unet.model_channels", "128", "--data.size", "128"),
        *("--trainer.batch_size", "16"),
    ],
    "tiny": [
        *("--optimiser.name", "adamw", "--unet.model_channels", "32", "--unet.channel_mult", "[1]"),
        *("--data.size", "16", "--first_stage.ch", "8"),
        *("--first_stage.ch_mult", "[1,2]", "--first_stage.z_channels", "4", "--unet.norm_groups", "8"),
        *("--first_stage.norm_groups", "4", "--conditioner.width", "32", "--conditioner.layers", "1"),
        *("--conditioner.vocabulary", "300", "--trainer.batch_size", "2"),
    ],
}
CAPTIONS = (
    "a red apple with a green leaf",
    "a grinning face with big eyes",
    "a black cat sitting on a blue chair",
    "a yellow star",
)
LOSS_STEPS, LOSS_TAIL = 30, 10
LEARNING_RATE = 1e-3
GUIDANCE = 3.0
# float32 against float32 through 50 guided steps, on images in [0, 1].
IMAGE_TOLERANCE = 1e-3


def configuration(size: str) -> LdmConfig:
    """The teacher's configuration at one of SIZES."""
    from common.cli import parse_config
    from ldm.config import LdmConfig

    config, _ = parse_config(LdmConfig, None, "", ["--config", str(TEACHER), *SIZES[size]])
    return config


def latent_side(config: LdmConfig) -> int:
    return config.data.size // 2 ** (len(config.first_stage.ch_mult) - 1)


def build(config: LdmConfig, tokenizer: Any = None) -> tuple[LatentDiffusion, Task]:
    """Our model with the same random weights in every process."""
    from common.data.sampling import TensorTable
    from ldm.first_stage import build_first_stage, freeze
    from ldm.run import build_latent_diffusion
    from ldm.tasks import BertConditioner, Task, train_tokenizer

    torch.manual_seed(0)
    options = config.conditioner
    empty = TensorTable({"image": torch.zeros(1, 3, 1, 1, dtype=torch.uint8)})
    task = Task(
        "text",
        train=empty,
        reference=empty,
        conditioning_key="crossattn",
        context_dim=options.width,
        conditioner=BertConditioner(options, options.vocabulary),
        tokenizer=tokenizer or train_tokenizer(CAPTIONS, options.vocabulary, options.tokens),
    )
    ldm = build_latent_diffusion(config, task, freeze(build_first_stage(config.first_stage, config.data.size)))
    fill_zero_weights(ldm.model)
    return ldm, task


def core_batch(config: LdmConfig, step: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents [B, C, H, W], target, timesteps [B] and context [B, L, D] of step `step`, the same for all arms.

    The latents are smooth maps whose mean follows the context, so that there is something to learn.
    """
    from common.data.sampling import step_generator
    from ldm.diffusion import NoiseSchedule

    diffusion, side = config.diffusion, latent_side(config)
    batch, channels, width = config.trainer.batch_size, config.first_stage.z_channels, config.conditioner.width
    generator = step_generator(1, step)
    context_BLD = torch.randn(batch, config.conditioner.tokens, width, generator=generator)
    coarse = torch.randn(batch, channels, 2, 2, generator=generator)
    coarse += 4 * context_BLD.mean(dim=(1, 2))[:, None, None, None]
    z_BCHW = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise_BCHW = torch.randn(z_BCHW.shape, generator=generator)
    t_B = torch.randint(0, diffusion.timesteps, (batch,), generator=generator)
    schedule = NoiseSchedule(
        diffusion.schedule,
        diffusion.timesteps,
        diffusion.linear_start,
        diffusion.linear_end,
        prediction=diffusion.prediction,
    )
    zt_BCHW, target_BCHW = schedule.q_sample(z_BCHW, t_B, noise_BCHW), schedule.target(z_BCHW, t_B, noise_BCHW)
    return zt_BCHW.to(device), target_BCHW.to(device), t_B.to(device), context_BLD.to(device)


# What one arm does, step by step. Each function is called once in its own process and returns its step.


def core_step(
    network: torch.nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    config: LdmConfig,
    device: str,
    bf16: bool,
    fused: bool,
) -> Step:
    """MSE on given latents."""
    network.to(device)
    batches = [core_batch(config, step, device) for step in range(LOSS_STEPS)]

    def loss_of(index: int) -> Tensor:
        zt_BCHW, target_BCHW, t_B, context_BLD = batches[index % LOSS_STEPS]
        with mixed(device, bf16):
            output_BCHW = predict(zt_BCHW, t_B, context_BLD)
        return torch.nn.functional.mse_loss(output_BCHW.float(), target_BCHW)

    return training_step(network, loss_of, LEARNING_RATE, weight_decay=0.01, fused=fused)


def our_core(config: LdmConfig, device: str, bf16: bool, compiled: bool = False) -> Step:
    """Our U-Net alone."""
    from common.cpu import tune_allocator

    tune_allocator()
    ldm, _ = build(config)
    unet: Any = ldm.model.diffusion_model
    del ldm
    if device == "cuda":
        unet.to(memory_format=torch.channels_last)
    if compiled:
        unet.compile()
    return core_step(unet, unet, config, device, bf16, fused=True)


def peer_core(config: LdmConfig, device: str, bf16: bool, pipeline: Path, compiled: bool = False) -> Step:
    """diffusers' U-Net alone, in the same step with the optimiser as its example makes it."""
    from diffusers import UNet2DConditionModel

    unet = from_folder(UNet2DConditionModel, pipeline / "unet")
    if compiled:
        unet.compile()
    return core_step(unet, lambda *inputs: unet(*inputs).sample, config, device, bf16, fused=False)


def peer_whole(config: LdmConfig, device: str, bf16: bool, pipeline: Path) -> Step:
    """The training loop of diffusers' text-to-image example on images [B, 3, H, W] and token ids [B, L]."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import BertModel

    scheduler = from_folder(DDPMScheduler, pipeline / "scheduler")
    dtype = torch.bfloat16 if bf16 else torch.float32
    vae = from_folder(AutoencoderKL, pipeline / "vae").requires_grad_(False).to(device, dtype)
    text_encoder = from_folder(BertModel, pipeline / "text_encoder").requires_grad_(False).to(device, dtype)
    unet = from_folder(UNet2DConditionModel, pipeline / "unet").to(device).train()
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    columns = training_columns(config)

    def step(index: int) -> Tensor:
        rows = torch.randint(len(columns["image"]), (config.trainer.batch_size,))
        images = columns["image"][rows].to(device, dtype).div(127.5).sub(1.0)
        latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t_B = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),), device=device).long()
        noisy = scheduler.add_noise(latents, noise, t_B)
        states = text_encoder(columns["tokens"][rows, 0].to(device), return_dict=False)[0]
        kind = scheduler.config.prediction_type
        target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, t_B)
        with mixed(device, bf16):
            prediction = unet(noisy, t_B, states, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        rates.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def training_columns(config: LdmConfig, count: int = 256) -> dict[str, Tensor]:
    """Random uint8 images [N, 3, H, W] and token ids [N, phrasings, L]: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(2)
    size, options = config.data.size, config.conditioner
    shape = (count, options.caption_variants, options.tokens)
    return {
        "image": torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8),
        "tokens": torch.randint(4, options.vocabulary, shape, generator=generator),
    }


def our_sampling(config: LdmConfig, arm: Arm, folder: Path, steps: int) -> Step:
    """Captions to images by `ldm.samplers.sample`; the first call's images [B, 3, H, W] in [0, 1] are kept."""
    device, batch = arm.device, arm.batch
    from transformers import PreTrainedTokenizerFast

    from common.cpu import tune_allocator
    from ldm.samplers import recorded_noise, sample
    from ldm.tasks import tokenize

    tune_allocator()
    # The ids of "" are the null condition: ours must come from the tokenizer that the pipeline has.
    tokenizer = from_folder(PreTrainedTokenizerFast, folder / "pipeline" / "tokenizer")
    ldm, _ = build(config, tokenizer)
    ldm.to(device).eval()
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    start = start_noise(config, batch).to(device)

    @torch.no_grad()
    def step(index: int) -> Tensor:
        with mixed(device, arm.bf16):
            cond = ldm.conditioning({"condition": tokenize(tokenizer, prompts).to(device)})
            noise = recorded_noise([torch.zeros(()).expand_as(start)] * (steps + 1))
            z_BCHW = sample(ldm, start.shape, noise, cond, steps=steps, guidance=GUIDANCE, zT_BCHW=start)
            return keep(folder / arm.images, ldm.decode(z_BCHW).add(1).div(2).clamp(0, 1))

    return step


def peer_sampling(config: LdmConfig, arm: Arm, folder: Path, steps: int) -> Step:
    """The same by StableDiffusionPipeline."""
    device, batch = arm.device, arm.batch
    from diffusers import StableDiffusionPipeline

    pipeline = from_folder(StableDiffusionPipeline, folder / "pipeline").to(device)
    pipeline.set_progress_bar_config(disable=True)
    if arm.compiled:
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    start = start_noise(config, batch).to(device)

    def step(index: int) -> Tensor:
        with mixed(device, arm.bf16):
            images = pipeline(
                prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=start.clone(), output_type="pt"
            ).images
        return keep(folder / arm.images, images)

    return step


def start_noise(config: LdmConfig, batch: int) -> Tensor:
    side = latent_side(config)
    shape = (batch, config.first_stage.z_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def serve_our_training(config: LdmConfig, device: str, turns: Turns, folder: Path) -> None:
    """Our whole step as `ldm/train.py` runs it: Lightning, cached moments, joint text encoder, clipping, EMA."""
    import pytorch_lightning as pl

    from common.data.sampling import StepDataModule, TensorTable
    from common.training import build_trainer
    from ldm.trainer import DiffusionTrainer

    class TakeTurns(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = not turns.wait()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if turns.done() and not turns.wait():
                trainer.should_stop = True
                turns.left = -1

    ldm, _ = build(config)
    columns = training_columns(config)
    side, channels = latent_side(config), config.first_stage.z_channels
    moments = torch.randn(len(columns["image"]), 2 * channels, side, side)
    trainer_config = replace(config.trainer, accelerator="gpu" if device == "cuda" else "cpu", progress=False)
    trainer = build_trainer(
        folder / "run",
        trainer_config,
        steps=1_000_000,
        batch_size=trainer_config.batch_size,
        grad_clip=config.optimiser.grad_clip,
        callbacks=[TakeTurns()],
        logs=False,
    )
    table = TensorTable({"moments": moments, "tokens": columns["tokens"]})
    trainer.fit(DiffusionTrainer(ldm, config), StepDataModule(table, trainer_config.batch_size, 1_000_000, config.seed))


def prepare(config: LdmConfig, folder: Path) -> dict[str, float]:
    """Write the peer's pipeline from our weights; returns what is known of the size beforehand."""
    from ldm.run import export_pipeline

    ldm, task = build(config)
    export_pipeline(ldm, task, config, folder / "pipeline", torch.float32)
    unet: Any = ldm.model.diffusion_model
    zt_BCHW, target_BCHW, t_B, context_BLD = core_batch(config, 0, "cpu")
    step_flop = flop(lambda: torch.nn.functional.mse_loss(unet(zt_BCHW, t_B, context_BLD), target_BCHW).backward())
    return {"flops": float(step_flop), "parameters": float(parameter_count(unet))}


@dataclass(frozen=True)
class Arm:
    """One process: `kind` says what it does, see `work`."""

    kind: str
    size: str
    device: str
    bf16: bool = False
    batch: int = 0
    compiled: bool = False

    @property
    def images(self) -> str:
        """File of a sampling arm's first images."""
        return f"{self.kind}_{self.batch}_{'bf16' if self.bf16 else 'fp32'}{'_compiled' * self.compiled}.pt"


def work(arm: Arm, folder: Path, sampling_steps: int) -> None:
    """The life of an arm's process."""
    turns, device = Turns(arm.device), arm.device
    config = configuration(arm.size)
    pipeline = folder / "pipeline"
    if arm.kind == "prepare":
        turns.answer(**prepare(config, folder))
    elif arm.kind == "our whole":
        config.trainer.precision = "bf16-mixed" if arm.bf16 else "32-true"
        serve_our_training(config, device, turns, folder)
    else:
        steps: dict[str, Callable[[], Step]] = {
            "our core": lambda: our_core(config, device, arm.bf16, arm.compiled),
            "peer core": lambda: peer_core(config, device, arm.bf16, pipeline, arm.compiled),
            "peer whole": lambda: peer_whole(config, device, arm.bf16, pipeline),
            "our sampling": lambda: our_sampling(config, arm, folder, sampling_steps),
            "peer sampling": lambda: peer_sampling(config, arm, folder, sampling_steps),
            "matmul": lambda: matmul(device, arm.bf16),
        }
        turns.serve(steps[arm.kind]())


def training_rows(size: str, device: str, folder: Path, pace: Pace, info: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Rows of the training step at one size."""
    config = configuration(size)
    arms = {
        "ours": Arm("our whole", size, device, bf16=True),
        "peer": Arm("peer whole", size, device),
        "ours core bf16": Arm("our core", size, device, bf16=True),
        "ours core fp32": Arm("our core", size, device),
        "peer core bf16": Arm("peer core", size, device, bf16=True),
        "peer core fp32": Arm("peer core", size, device),
    }
    for p in PRECISIONS:
        for kind, whose in (("our core", "ours"), ("peer core", "peer")):
            arms[f"{whose} core {p} compiled"] = Arm(kind, size, device, bf16=p == "bf16", compiled=True)
    # The cores' warm-up is the comparison of losses.
    warm_up = {name: LOSS_STEPS if "core" in name else 3 for name in arms}
    products = {"peak fp32": Arm("matmul", size, device), "peak bf16": Arm("matmul", size, device, bf16=True)}
    warm_up |= dict.fromkeys(products, 10)
    steps = dict.fromkeys(arms, pace.steps) | dict.fromkeys(products, 10)
    timings = take_turns("benchmarks.ldm", arms | products, pace, warm_up, folder, steps=steps)
    batch, side = config.trainer.batch_size, latent_side(config)
    where = where_of(device)
    what = (
        f"{size}: {info['parameters'] / 1e6:.1f} M parameters, latents {side}x{side}x{config.first_stage.z_channels}, "
        f"batch {batch}"
    )
    core_note = "same given latents, weights, clipping; ours: fused AdamW, kept heap; peer: AdamW as in its example"
    yield faster(
        f"{where}training, whole step as users run it ({what})",
        timings["ours"],
        timings["peer"],
        batch,
        1.3,
        "ours: bf16 autocast, cached latents, jointly trained text encoder, EMA, Lightning; peer: diffusers example "
        "loop in fp32, VAE and frozen text encoder in every step, no EMA",
    )

    def core(label: str, ours: Timing, peer: Timing, target: float | None = None) -> dict[str, Any]:
        return faster(f"{where}training, U-Net only, {label} ({what})", ours, peer, batch, target, core_note)

    own = taken_by_auto(timings["ours core bf16"], timings["ours core fp32"], device)
    yield core(DEFAULTS.format(own, "fp32"), timings[f"ours core {own}"], timings["peer core fp32"], 1.3)
    for p in PRECISIONS:
        yield core(f"both {p}", timings[f"ours core {p}"], timings[f"peer core {p}"])
    for p, target in zip(PRECISIONS, TRAINING):
        names = (f"ours core {p}", f"peer core {p}", f"peer core {p} compiled", f"ours core {p} compiled")
        sides = (timings[name] for name in names)
        yield from at_its_best(p, core, target if device == "cpu" else None, *sides)
    if device == "cuda":
        eager, compiled = timings["ours core bf16"], timings["ours core bf16 compiled"]
        yield core("bf16, ours eager against ours compiled", eager, compiled)
    for label, ours, peer in (
        ("whole step", "ours", "peer"),
        ("U-Net only, ours bf16, peer fp32", "ours core bf16", "peer core fp32"),
        ("U-Net only, both fp32", "ours core fp32", "peer core fp32"),
        ("U-Net only, both bf16", "ours core bf16", "peer core bf16"),
    ):
        yield leaner(f"{where}peak memory of training, {label} ({what})", timings[ours], timings[peer], device)
    peers = {"ours in fp32": timings["ours core fp32"], "peer in fp32": timings["peer core fp32"]}
    yield from quality_rows(where, what, timings["ours core bf16"], peers, LOSS_STEPS, LOSS_TAIL)
    for precision in ("bf16", "fp32"):
        name = f"{where}fraction of the matmul peak in {precision}, U-Net training step ({what})"
        step, peak = timings[f"ours core {precision}"], timings[f"peak {precision}"]
        yield of_the_peak(name, info["flops"], step, peak, device, pace.rounds)


def sampling_rows(size: str, device: str, folder: Path, pace: Pace, sampling_steps: int) -> Iterator[dict[str, Any]]:
    """Rows of guided DDIM sampling at one size; also checks that both sides draw the same images."""
    where = where_of(device)
    for batch in (1, 16):
        ours, peer = (Arm(kind, size, device, batch=batch) for kind in ("our sampling", "peer sampling"))
        arms = {"ours fp32": ours, "ours bf16": replace(ours, bf16=True)}
        for p in PRECISIONS:
            arms |= {f"peer {p}{' compiled' * c}": replace(peer, bf16=p == "bf16", compiled=c) for c in (False, True)}
        given = ("--sampling-steps", str(sampling_steps))
        timings = take_turns("benchmarks.ldm", arms, pace._replace(steps=1), 1, folder, *given)
        images = [torch.load(folder / arms[side].images, weights_only=True) for side in ("ours fp32", "peer fp32")]
        difference = float((images[0] - images[1]).abs().max())
        if not difference <= IMAGE_TOLERANCE:
            raise RuntimeError(f"{size}, batch {batch}: the two sides' images differ by {difference:.2g} of 1")
        note = (
            f"peer: StableDiffusionPipeline, same weights; in fp32 the images differ by at most {difference:.1g} of 1"
        )
        named = f"{where}sampling, {sampling_steps} guided DDIM steps, captions to images, batch {batch}, {{}} ({size})"

        def row(label: str, mine: Timing, theirs: Timing, target: float | None) -> dict[str, Any]:
            return faster(named.format(label), mine, theirs, batch, target, note)  # noqa: B023

        yield row("both fp32", timings["ours fp32"], timings["peer fp32"], 1.0)
        yield row("both bf16", timings["ours bf16"], timings["peer bf16"], None)
        for p, target in zip(PRECISIONS, DRAWING):
            sides = (timings[side] for side in (f"ours {p}", f"peer {p}", f"peer {p} compiled"))
            yield from at_its_best(p, row, target if device == "cpu" else None, *sides)


def parts(size: str, device: str, folder: Path, pace: Pace, sampling_steps: int) -> Iterator[list[dict[str, Any]]]:
    """All rows of one size."""
    preparation = Process("benchmarks.ldm", Arm("prepare", size, "cpu"), folder, pace.threads)
    info = preparation.answer()
    preparation.end()
    found = list(training_rows(size, device, folder, pace, info))
    yield [*found, *sampling_rows(size, device, folder, pace, sampling_steps)]


def main() -> None:
    parser = bench_parser(__doc__, "bench_ldm.json", SIZES, ["emoji64", "wide"], steps=6)
    parser.add_argument("--sampling-steps", type=Count, default=50, help="DDIM steps of the sampling rows")
    options = parse(parser)
    if options.arm:
        work(Arm(**options.arm), options.folder, options.sampling_steps)
        return
    measure(options, partial(parts, sampling_steps=options.sampling_steps))
    if torch.cuda.is_available():
        from benchmarks import kernels

        kernels.measure("bf16", RESULTS / "bench_kernels.json")
    else:
        print("no CUDA device: the rows on CUDA and the fused kernel's are left out")


if __name__ == "__main__":
    run_main(main)
