"""HiPA's training step against the same losses written plainly on peft, one step against 25, the merged adaptor.

    python -m benchmarks.hipa                         # writes results/bench_hipa.json; some five minutes
    python -m benchmarks.hipa --sizes shapes32 --rounds 3
    python -m benchmarks.hipa --sizes sd15 --devices cuda    # Stable Diffusion 1.5 sizes, random weights

Training: equal networks, adaptors, pairs and losses. The peer is what one writes with peft and torch: the target is
decoded in every step, both pictures go through a whole complex FFT, back and forth, and through DISTS with their
graphs; eager as users run it (float32 on a CPU), and at its best (same precision, compiled). Sampling: caption to image
at batch 1, stock DDIM with 25 guided steps against one step. The merged adaptor stands beside the bare U-Net.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import (
    Arm,
    Pace,
    Step,
    bench_parser,
    in_turns,
    mixed,
    parse,
    serve_or_measure,
    sparer,
    training_rows,
    where_of,
)
from benchmarks.few_steps import against_many_steps
from common.adaptors import adaptor_state, merge_adaptors
from common.errors import run_main
from common.ledger import bench_row
from common.optimisers import adamw
from common.paths import REPOSITORY
from common.stable_diffusion import stable_diffusion_unet, stable_diffusion_vae
from common.teacher import Teacher
from common.unets import as_diffusers_has_it
from hipa.config import PLACEMENTS, AdaptorConfig, LossConfig
from hipa.dists import dists
from hipa.frequency import edges, radii
from hipa.frozen import spare_memory
from hipa.losses import AdaptationLoss
from hipa.model import OneStep, bare_copy, make_student

TEACHER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"
LR, MEMORY, STEP_SPEEDUP, SAMPLING_SPEEDUP, FUSED = 1e-4, 1 / 0.8, 1.3, 20.0, 1 / 1.02
SIZES = {"shapes32": 32, "sd15": 1}  # images of a step
ADAPTORS = {"shapes32": AdaptorConfig(8, placement="attention_conv"), "sd15": AdaptorConfig(16)}


def teacher_of(arm: Arm) -> Teacher:
    """The repository's, or one whose networks have Stable Diffusion's size."""
    teacher = Teacher.load(TEACHER)
    if arm.size == "sd15":
        torch.manual_seed(0)
        teacher.unet = stable_diffusion_unet().requires_grad_(False).eval()
        teacher.vae = stable_diffusion_vae().requires_grad_(False).eval()
    return teacher.to(arm.device)


def batch_of(teacher: Teacher, arm: Arm) -> tuple[Tensor, Tensor, Tensor]:
    """(noise, the pair's latents, states): the same on both sides."""
    torch.manual_seed(1)
    count, tokens = SIZES[arm.size], 77 if arm.size == "sd15" else teacher.tokenizer.model_max_length
    noise, x1 = torch.randn(2, count, *teacher.latent_shape, device=arm.device)
    states = torch.randn(count, tokens, teacher.unet.config.cross_attention_dim, device=arm.device)
    return noise, x1, states


def ours(arm: Arm) -> Step:
    """The trainer's own step, without Lightning around it; the pairs' pictures were decoded before training."""
    teacher = teacher_of(arm)
    student = make_student(teacher, ADAPTORS[arm.size]).to(arm.device)
    spare_memory(teacher.vae)
    if arm.compiled:  # what the trainer does with --trainer.compile true
        for network in (student.unet, teacher.vae.decoder):
            network.compile()
    loss = AdaptationLoss(LossConfig(), teacher.decode_differentiable, teacher.device)
    noise, x1, states = batch_of(teacher, arm)
    with torch.no_grad(), mixed(arm.device, arm.bf16):
        picture = (teacher.decode_differentiable(x1) + 1) / 2
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = adamw(parameters, LR)

    def step(_: int) -> Tensor:
        with mixed(arm.device, arm.bf16):
            found = loss(student(noise, states), x1, picture)["loss"]
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return found.detach()

    return step


def peer(arm: Arm) -> Step:
    """The same losses as one writes them: peft, the decoder in the graph, whole transforms, loss after loss."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    from peft import LoraConfig

    teacher, options = teacher_of(arm), ADAPTORS[arm.size]
    teacher.vae.set_attn_processor(AttnProcessor2_0())
    unet = as_diffusers_has_it(bare_copy(teacher))
    targets = [
        name
        for name, m in unet.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
        and any(name == end or name.endswith(f".{end}") for end in PLACEMENTS[options.placement])
    ]
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))
    schedule, perceptual = teacher.schedule, dists("trained").to(arm.device)
    noise, x1, states = batch_of(teacher, arm)
    t = torch.full((len(noise),), schedule.steps - 1, device=arm.device)
    network, decode = (
        (torch.compile(unet), torch.compile(teacher.vae.decode)) if arm.compiled else (unet, teacher.vae.decode)
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    def picture(latents: Tensor) -> Tensor:
        return decode(latents / teacher.vae.config.scaling_factor).sample.float() / 2 + 0.5

    def high(images: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(images)
        kept = radii(*images.shape[-2:]).to(images.device) > images.shape[-2] / 8
        return torch.fft.ifft2(spectrum * kept).real

    def step(_: int) -> Tensor:
        with mixed(arm.device, arm.bf16):
            output = network(noise, t, encoder_hidden_states=states).sample.float()
            latents = schedule.read(output, noise, *schedule.levels(t))[0]
            drawn, wanted = picture(latents), picture(x1)
            spatial = perceptual(drawn, wanted).mean()
            fourier = (high(drawn) - high(wanted)).square().mean()
            loss = spatial + fourier + (edges(drawn) - edges(wanted)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a size: training speed and memory, sampling, the merged adaptor."""
    label, images = "training step against peft and plain losses", SIZES[size]
    rows, timings = training_rows("benchmarks.hipa", size, device, folder, pace, images, label, STEP_SPEEDUP)
    what = f"{size}, batch {images}"
    name = f"{where_of(device)}memory that a training step adds, both fp32, at most 0.8 of the peer's ({what})"
    rows.append(sparer(name, timings["ours fp32"], timings["peer fp32"], MEMORY))
    yield rows
    if size == "shapes32":
        yield [*sampling_rows(device, max(5, pace.rounds))]


def sampling_rows(device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Caption to image at batch 1, and the merged adaptor beside the bare U-Net."""
    teacher = Teacher.load(TEACHER, device)
    adapted = make_student(teacher, ADAPTORS["shapes32"])
    unet = bare_copy(teacher)
    merge_adaptors(unet, adaptor_state(adapted.unet))
    student, frozen = OneStep(unet, teacher.schedule), OneStep(teacher.unet, teacher.schedule)
    drawing = student.recorded()  # as hipa/sample.py draws
    noise, prompts = torch.randn(1, *teacher.latent_shape), ["a red star"]
    states = teacher.encode(prompts)
    yield from against_many_steps(
        "caption to image, one step",
        "shapes32",
        lambda: teacher.draw(drawing, prompts, noise),
        lambda: Teacher.load(TEACHER, device),
        prompts,
        "DDIM",
        1.5,
        rounds,
        device,
        SAMPLING_SPEEDUP,
    )
    x = noise.to(device)
    turns = {"ours": lambda: student(x, states), "bare": lambda: frozen(x, states), "peft": lambda: adapted(x, states)}
    with torch.inference_mode():
        found = in_turns(turns, 20 * rounds, device)
    name = f"{where_of(device)}merged adaptor against the bare U-Net, one step, batch 1 (shapes32)"
    yield bench_row(name, 1 / found["ours"], 1 / found["bare"], "images/s", target=FUSED)
    name = f"{where_of(device)}merged adaptor against peft's, one step, batch 1 (shapes32)"
    yield bench_row(name, 1 / found["ours"], 1 / found["peft"], "images/s")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = bench_parser(__doc__, "bench_hipa.json", SIZES, ["shapes32"], steps=3)
    return serve_or_measure(parse(parser, argv), {"ours": ours, "peer": peer}, parts)


if __name__ == "__main__":
    run_main(main)
