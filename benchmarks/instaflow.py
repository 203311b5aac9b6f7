"""One step against the teacher's 25: latency and images per second, and how much of pair generation is U-Net work.

    python -m benchmarks.instaflow                      # writes results/bench_instaflow.json; about two minutes
    python -m benchmarks.instaflow --rounds 5 --devices cpu
    python -m benchmarks.instaflow --stable-diffusion   # at the size of Stable Diffusion 1.5 (random weights; GPU)

The peer is what a user of the teacher runs: StableDiffusionPipeline of diffusers with DPM-Solver++, 25 steps, guidance;
ours is the one-step pipeline. Both start from a caption and end with an image, text encoder and decoder included. Arms
take turns; medians count. Speed does not depend on the weights: an untrained student stands in where no run is given.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import chosen_devices, in_turns, machine_options, record, where_of
from benchmarks.few_steps import against_many_steps
from common.cli import Parser
from common.cpu import tune_allocator
from common.data.pairs import generate_pairs
from common.errors import run_main
from common.ledger import bench_row
from common.paths import REPOSITORY
from common.solvers import DiffusionSource, stock_pipeline
from common.stable_diffusion import stable_diffusion_unet, stable_diffusion_vae
from common.teacher import Teacher
from instaflow.pipeline import Card, InstaFlowPipeline
from instaflow.student import make_student

TEACHER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"
SOLVER, STEPS = "DPMSolverMultistepScheduler", 25
GUIDANCE = 5.0  # the paper's; its value costs nothing, being above 1 does
PROMPTS = ("a red star", "a blue ring left of a green cross", "three yellow circles", "a purple heart")
SPEEDUP = 20.0  # wall clock at batch 1
FEWER = 40.0  # U-Net evaluations
BARE = 0.9  # of bare U-Net throughput, for pairs


def random_stable_diffusion(device: str, dtype: torch.dtype) -> Teacher:
    """A teacher of Stable Diffusion 1.5's sizes with random weights; its tokenizer knows the prompts' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *dict.fromkeys(word for prompt in PROMPTS for word in prompt.split())]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", model_max_length=77)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=1
    )
    torch.manual_seed(0)
    schedule = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }
    parts = [part.to(device, dtype) for part in (stable_diffusion_unet(), stable_diffusion_vae(), CLIPTextModel(text))]
    return Teacher(parts[0], parts[1], parts[2], tokenizer, schedule)


def student_pipeline(teacher: Teacher, folder: Path | None, dtype: torch.dtype) -> InstaFlowPipeline:
    """The one-step pipeline of a finished run, or an untrained student of the same shape."""
    if folder is not None:
        return InstaFlowPipeline.load(folder / "pipeline", teacher.device, dtype)
    init = "raw" if teacher.schedule.prediction_type == "sample" else "negate"
    flow = make_student(teacher, init).to(teacher.device, dtype).eval().requires_grad_(False)
    return InstaFlowPipeline.of(flow, teacher, Card(one_step=True)).channels_last()


def latency_rows(
    open_teacher: Callable[[], Teacher], student: InstaFlowPipeline, what: str, rounds: int, device: str
) -> list[dict[str, Any]]:
    """One step against 25 guided steps, from caption to image, at batch 1 and 16; and the U-Net evaluations of both."""
    teacher = open_teacher()
    peer = stock_pipeline(teacher, SOLVER)
    counted = {"student": 0, "teacher": 0}
    hooks = [
        network.register_forward_pre_hook(
            # A guided step is one call on both branches: rows are evaluations.
            lambda _, inputs, name=name: counted.__setitem__(name, counted[name] + len(inputs[0]))
        )
        for name, network in (("student", student.flow.unet), ("teacher", teacher.unet))
    ]
    student(PROMPTS[0])
    peer(PROMPTS[0], num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np")
    for hook in hooks:
        hook.remove()
    where = where_of(device)
    rows = [
        bench_row(
            f"{where}U-Net evaluations per image ({what})",
            counted["student"],
            counted["teacher"],
            "evaluations",
            target=FEWER,
            higher_is_better=False,
        )
    ]
    for batch in (1, 16):
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        rows += against_many_steps(
            "caption to image, 1 step",
            what,
            lambda p=prompts: student(p),  # type: ignore[misc]
            open_teacher,
            prompts,
            "DPM-Solver++",
            GUIDANCE,
            rounds,
            device,
            SPEEDUP if batch == 1 else None,
        )
        if batch == 1:
            first = rows[-2 if device == "cpu" else -1]
            name = f"{where}latency of one image ({what})"
            rows.append(bench_row(name, 1000 / first["ours"], 1000 / first["peer"], "ms", higher_is_better=False))
    return rows


def pair_row(teacher: Teacher, what: str, rounds: int, device: str, batch: int = 32) -> dict[str, Any]:
    """U-Net evaluations per second inside pair generation, against the same U-Net called in a bare loop."""
    source = DiffusionSource(teacher, SOLVER, STEPS, GUIDANCE)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    dtype = next(teacher.unet.parameters()).dtype
    noise = torch.randn(2 * batch, *teacher.latent_shape, device=teacher.device, dtype=dtype)
    both = torch.cat([teacher.null(batch), teacher.encode(prompts)]).to(dtype)
    time_B = torch.tensor(500.0, device=teacher.device)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(source.evaluations // 2):
            teacher.unet(noise, time_B, both, return_dict=False)

    with tempfile.TemporaryDirectory() as name:
        numbers = itertools.count()

        def pairs() -> None:
            generate_pairs(source, prompts, Path(name) / str(next(numbers)), batch, 0, batch, batch)

        seconds = in_turns({"pairs": pairs, "bare": bare}, rounds, device)
    evaluations = batch * source.evaluations
    where = where_of(device)
    name = f"{where}pair generation against bare U-Net evaluation, guided, batch {batch} ({what})"
    return bench_row(name, evaluations / seconds["pairs"], evaluations / seconds["bare"], "evaluations/s", target=BARE)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = Parser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="a diffusers text-to-image directory")
    parser.add_argument("--run_dir", type=Path, help="a finished run to time (default: untrained weights)")
    parser.add_argument("--stable-diffusion", action="store_true", help="sizes of Stable Diffusion 1.5, random weights")
    options = machine_options(parser, "bench_instaflow.json", rounds=15).parse_args(argv)
    torch.set_num_threads(options.threads)
    tune_allocator()
    rows = []
    for device in chosen_devices(options):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        what = "Stable Diffusion 1.5 sizes" if options.stable_diffusion else options.teacher.name

        def open_teacher(device: str = device, dtype: torch.dtype = dtype) -> Teacher:
            if options.stable_diffusion:
                return random_stable_diffusion(device, dtype)
            return Teacher.load(options.teacher, device, dtype)

        teacher = open_teacher()
        student = student_pipeline(teacher, options.run_dir, dtype)
        with torch.inference_mode():
            rows += latency_rows(open_teacher, student, what, options.rounds, device)
            rows.append(pair_row(teacher, what, max(3, options.rounds // 3), device))
    record(rows, options.output)
    return rows


if __name__ == "__main__":
    run_main(main)
