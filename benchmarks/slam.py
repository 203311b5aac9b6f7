"""SLAM's training step against the loop of diffusers' LCM distillation example, and 4 steps against the teacher's 25.

    python -m benchmarks.slam                         # writes results/bench_slam.json; some five minutes
    python -m benchmarks.slam --sizes shapes32 --rounds 3
    python -m benchmarks.slam --sizes sd15 --devices cuda    # Stable Diffusion 1.5 sizes, random weights

Training: equal networks, batch, sub-paths and noises. The peer is the example's loop as written: the teacher's
conditional and unconditional pass one after the other, the target network, AdamW, and the average kept weight by
weight; eager as users run it (float32 on a CPU), and at its best (same precision, compiled; ours with --trainer.compile
true beside it). Sampling: caption to image at batch 1, stock DDIM with 25 guided steps against 4 steps of the student.
"""

from __future__ import annotations

import copy
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
    mixed,
    parse,
    serve_or_measure,
    training_rows,
)
from benchmarks.few_steps import against_many_steps
from common.costs import flop
from common.errors import run_main
from common.optimisers import adamw
from common.paths import REPOSITORY
from common.stable_diffusion import stable_diffusion_unet
from common.teacher import Teacher
from common.unets import as_diffusers_has_it
from slam.config import LossConfig, StudentConfig, SubPathConfig
from slam.evaluate import few_step_source
from slam.losses import solve_subpath, subpath_loss
from slam.model import averaged_copy, follow, make_student, scalar_embedding

TEACHER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"
PATHS = SubPathConfig(solver_steps=25, sigma="linear", time="effective", embedding_scale=0.1)
W, DECAY, LR, FORWARDS = 0.5, 0.95, 1e-4, 6
STEP_SPEEDUP, SAMPLING_SPEEDUP = 1.3, 10.0
SIZES = {"shapes32": 32, "sd15": 4}  # images of a step


def teacher_of(arm: Arm) -> Teacher:
    """The repository's, or one whose U-Net has Stable Diffusion's size."""
    teacher = Teacher.load(TEACHER)
    if arm.size == "sd15":
        torch.manual_seed(0)
        teacher.unet = stable_diffusion_unet().requires_grad_(False).eval()
    return teacher.to(arm.device)


def batches(teacher: Teacher, arm: Arm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latents, noises, indices, states): the same on both sides."""
    torch.manual_seed(1)
    count, unet = SIZES[arm.size], teacher.unet
    side = unet.config.sample_size
    x1, noise = torch.randn(2, count, unet.config.in_channels, side, side, device=arm.device)
    tokens = 77 if arm.size == "sd15" else teacher.tokenizer.model_max_length
    states = torch.randn(count, tokens, unet.config.cross_attention_dim, device=arm.device)
    return x1, noise, torch.arange(count, device=arm.device) % PATHS.solver_steps, states


def ours(arm: Arm) -> Step:
    """The trainer's own step, without Lightning around it."""
    teacher = teacher_of(arm)
    student = make_student(teacher, StudentConfig(), PATHS).to(arm.device)
    target = averaged_copy(student)
    if arm.compiled:  # what the trainer does with --trainer.compile true
        for unet in (student.unet, target.unet, teacher.unet):
            unet.compile()
    x1, noise, index, states = batches(teacher, arm)
    null, gamma = states.flip(0), torch.linspace(0, 1, len(x1), device=arm.device)
    w = torch.full((len(x1),), W, device=arm.device)
    parameters = list(student.parameters())
    optimiser = adamw(parameters, LR)

    def step(_: int) -> Tensor:
        with mixed(arm.device, arm.bf16):
            path = solve_subpath(teacher, student.paths, x1, noise, index, states, w, null)
            loss = subpath_loss(student, target, path, gamma, states, LossConfig())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        follow(target, student, DECAY)
        return loss.detach()

    return step


def peer(arm: Arm) -> Step:
    """The example's loop at gamma = 1 (its only form), written as it is written there."""
    teacher = teacher_of(arm)
    schedule, networks = teacher.schedule, teacher.unet
    as_diffusers_has_it(networks)
    student = make_student(teacher, StudentConfig(), PATHS).unet.to(arm.device, memory_format=torch.contiguous_format)
    as_diffusers_has_it(student)
    target = copy.deepcopy(student).requires_grad_(False)
    paths = make_student(teacher, StudentConfig(), PATHS).paths
    if arm.compiled:
        networks, student_call, target_call = (torch.compile(n) for n in (networks, student, target))
    else:
        student_call, target_call = student, target
    x1, noise, index, states = batches(teacher, arm)
    null, t, s = states.flip(0), paths.start_N.to(x1.device)[index], paths.end_N.to(x1.device)[index]
    embedded = scalar_embedding(torch.zeros(len(x1), device=arm.device), 256)
    optimiser = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0)

    def read(output: Tensor, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        return schedule.read(output.float(), z, *schedule.levels(tau))

    def step(index_of_step: int) -> Tensor:
        alpha, sigma = schedule.levels(t)
        z = alpha * x1 + sigma * noise
        with mixed(arm.device, arm.bf16):
            output = student_call(z, t, timestep_cond=embedded, encoder_hidden_states=states).sample
        prediction, _ = read(output, z, t)
        with torch.no_grad():
            with mixed(arm.device, arm.bf16):
                cond = networks(z, t, encoder_hidden_states=states).sample
                uncond = networks(z, t, encoder_hidden_states=null).sample
            (x_c, e_c), (x_u, e_u) = read(cond, z, t), read(uncond, z, t)
            x0, eps = x_c + W * (x_c - x_u), e_c + W * (e_c - e_u)
            alpha_s, sigma_s = schedule.levels(s)
            earlier = alpha_s * x0 + sigma_s * eps
            with mixed(arm.device, arm.bf16):
                output = target_call(earlier, s, timestep_cond=embedded, encoder_hidden_states=states).sample
            wanted, _ = read(output, earlier, s)
        loss = torch.mean(torch.sqrt((prediction.float() - wanted.float()) ** 2 + 1e-6) - 1e-3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for a, b in zip(target.parameters(), student.parameters()):
            a.detach().mul_(DECAY).add_(b, alpha=1 - DECAY)
        return loss.detach()

    return step


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a size: training speed and memory, share of the peak, sampling."""

    def work() -> float:
        arm = Arm("ours", size, "cpu")
        teacher = teacher_of(arm)
        x1, _, _, states = batches(teacher, arm)
        return FORWARDS * flop(lambda: teacher.unet(x1, torch.zeros(len(x1)), states))

    label, images = "training step against diffusers' LCM example", SIZES[size]
    yield training_rows("benchmarks.slam", size, device, folder, pace, images, label, STEP_SPEEDUP, work)[0]
    if size == "shapes32":
        for count in (4, 1):
            yield sampling_rows(device, max(5, pace.rounds), count)


def sampling_rows(device: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Caption to image at batch 1: few steps of the student against 25 guided DDIM steps of stock diffusers."""
    teacher = Teacher.load(TEACHER, device)
    student = make_student(teacher, StudentConfig(), PATHS).eval().requires_grad_(False).to(device)
    draw, noise, prompts = few_step_source(student, steps), torch.randn(1, *teacher.latent_shape), ["a red star"]
    return against_many_steps(
        f"caption to image, {steps} steps",
        "shapes32",
        lambda: teacher.draw(draw, prompts, noise),
        lambda: Teacher.load(TEACHER, device),
        prompts,
        "DDIM",
        1.5,
        rounds,
        device,
        SAMPLING_SPEEDUP if steps == 4 else None,
    )


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = bench_parser(__doc__, "bench_slam.json", SIZES, ["shapes32"], steps=3)
    return serve_or_measure(parse(parser, argv), {"ours": ours, "peer": peer}, parts)


if __name__ == "__main__":
    run_main(main)
