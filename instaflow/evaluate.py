"""How good the few-step images are: of a training run, or of any pipeline directory on your own captions and images.

    python instaflow/evaluate.py --run_dir runs/instaflow-small           # a finished run: its metrics.json again
    python instaflow/evaluate.py --model PIPELINE --images DIR            # captions from DIR/metadata.jsonl
    python instaflow/evaluate.py --model PIPELINE --images val2017 --captions captions_val2017.json --count 5000 \\
        --extractor inception:pt_inception-2015-12-05.pth --clip CLIP_DIR  # FID-5k and CLIP score as in the paper
    python instaflow/evaluate.py --model TEACHER --solver DPMSolverMultistepScheduler --steps 25 --guidance 5 ...

The paper's FID-30k resizes to 256 pixels before anything else: --size 256. Guidance stays off for one-step models: it
is inside their training pairs. Only Inception features may be called FID; every number names its judge and its counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.data.lines import read_lines
from common.data.rows import read_captioned
from common.errors import UserError, run_main
from common.files import read_object
from common.options import Count, NotNegative, Seed, device

if TYPE_CHECKING:
    from torch import Tensor

    from common.metrics.measures import PromptSet
    from instaflow.flow import UNetFlow
    from instaflow.run import Run


def evaluation_prompts(run: Run) -> PromptSet:
    """Held-out prompts of a run, with noises and, where there are some, real images of the same prompts."""
    from common.metrics.measures import held_out_prompts

    pairs, teacher = run.config.pairs, run.teacher
    shape, size = teacher.latent_shape, teacher.image_size[0]
    return held_out_prompts(pairs.prompts, run.config.evaluation.images, shape, size, pairs.text_column)


def evaluate_run(run: Run, flow: UNetFlow | None = None, student: UNetFlow | None = None) -> dict[str, Any]:
    """Teacher with many and with one step, rectified flow with one and many, student: same prompts, same noises.

    Args:
        flow, student: the rectified flow and the student, where they are in memory already.

    Returns:
        {"arms": {name: measures}, "unet_forwards_per_image": {name: number}, ...}; pictures go to `comparison.png`.
    """
    from common.data.pairs import PairSource
    from common.images import comparison_grid
    from common.metrics.judge import judge_of
    from common.metrics.measures import Yardstick
    from common.metrics.perceptual import perceptual_distance
    from common.solvers import DiffusionSource
    from instaflow.flow import FlowSource

    config, teacher = run.config, run.teacher
    prompts = evaluation_prompts(run)
    judge = judge_of(config.evaluation.judge, config.pairs.prompts)
    student = student or run.load_student()
    rounds, many, k = config.reflow.rounds, config.pairs.steps, config.distil.k
    arms: dict[str, PairSource] = {
        f"teacher {steps}-step": DiffusionSource(teacher, config.pairs.solver, steps, config.pairs.guidance)
        for steps in (many, 1)
    }
    if rounds:
        flow = flow or run.load_flow(rounds)
        for steps in (1, config.distil.teacher_steps):
            arms[f"{rounds + 1}-RF {steps}-step"] = FlowSource(flow, teacher, steps, 1.0)
    ours = f"{'InstaFlow' if rounds else 'direct distillation'} {k}-step"
    arms[ours] = FlowSource(student, teacher, k, 1.0)
    forwards = {arm: source.evaluations for arm, source in arms.items()}
    forwards[ours] *= 1 if config.student.stack == "none" else 2
    images = {
        arm: teacher.draw(source, prompts.prompts, prompts.noise, config.evaluation.batch_size)
        for arm, source in arms.items()
    }
    distance = perceptual_distance(config.perceptual.trunk)
    yardstick = Yardstick(prompts, judge, images[f"teacher {many}-step"], distance)
    measures = {arm: yardstick.measure(found) for arm, found in images.items()}
    shown = {a: i for a, i in images.items() if not (a.endswith(f" {many}-step") and not a.startswith("teacher"))}
    comparison_grid(shown, prompts.prompts, config.evaluation.grid, run.folder / "comparison.png")
    metrics = {
        "teacher": config.teacher,
        "teacher_sha256": teacher.checksum(),
        "judge": judge.name,
        "images": len(prompts),
        "prompts": config.pairs.prompts,
        "arms": measures,
        "unet_forwards_per_image": forwards,
    }
    report(metrics)
    return metrics


def report(metrics: dict[str, Any]) -> None:
    """Print one line an arm."""
    print(f"{metrics['images']} images an arm, judged by {metrics['judge']}")
    for arm, values in metrics["arms"].items():
        print(f"  {arm}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def read_captions(path: Path, files: Sequence[str], text: str | None = None) -> list[str]:
    """One caption for each image file.

    Args:
        path: COCO's captions_*.json (the first caption of each image), a table with `file_name` and captions, or a
            text file with a line an image, in the order of the sorted names.
        text: the column of the captions in a table; None finds it.

    Raises:
        UserError: the file is missing, damaged, or has no caption for an image.
    """
    if not path.is_file():
        raise UserError(f"--captions {path}: no such file; expected COCO's captions_*.json, a .jsonl or a .txt file")
    if path.suffix.lower() == ".txt":
        lines = [line for _, line in read_lines(path)]
        if len(lines) != len(files):
            raise UserError(f"{path}: {len(lines)} lines for {len(files)} images; expected one line an image")
        return lines
    names = [Path(file).name for file in files]
    if len(set(names)) < len(names):
        raise UserError("--images: two files in different folders have the same name; rename one")
    texts: dict[str, str] = {}
    if path.suffix.lower() != ".json":
        for where, row, caption in read_captioned(path, text):
            if not isinstance(name := row.get("file_name"), str):
                raise UserError(f'{where}: "file_name" is missing; its columns are {", ".join(row)}')
            texts.setdefault(Path(name).name, caption)
    else:
        content = read_object(path, "no such file", advice="not a caption file, see evaluate.py --help")
        try:
            name_of = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
            for row in content["annotations"]:
                texts.setdefault(name_of[row["image_id"]], " ".join(str(row["caption"]).split()))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a caption file ({type(error).__name__}: {error}); see evaluate.py --help"
            ) from None
    bare = [file for file, name in zip(files, names) if name not in texts]
    if bare:
        raise UserError(f"{path}: no caption for {bare[0]} ({len(bare)} such images)")
    return [texts[name] for name in names]


def sampler_of(model: Path, solver: str | None, steps: int, guidance: float, device: str) -> tuple[Any, Any]:
    """(prompts, noise -> uint8 images; latent shape) of a flow directory, or with `solver` of a diffusion teacher."""
    if solver is None:
        from instaflow.pipeline import InstaFlowPipeline

        pipeline = InstaFlowPipeline.load(model, device)
        return (
            lambda prompts, noise: pipeline(list(prompts), steps=steps, guidance=guidance, latents=noise),
            pipeline.latent_shape,
        )
    from common.solvers import DiffusionSource
    from common.teacher import Teacher

    teacher = Teacher.load(model, device)
    source = DiffusionSource(teacher, solver, steps, guidance)
    return lambda p, noise: teacher.decode(source(noise.to(teacher.device), teacher.encode(p))), teacher.latent_shape


def clip_score(images: Tensor, captions: Sequence[str], folder: Path, batch: int = 64) -> float:
    """Mean cosine of CLIP's image and text embeddings (a transformers CLIPModel directory of the user's)."""
    import torch
    from transformers import AutoTokenizer, CLIPModel

    from common.images import resize_clean
    from common.pretrained import from_folder

    try:
        model = from_folder(CLIPModel, folder, use_safetensors=True).eval()
        tokenizer = from_folder(AutoTokenizer, folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--clip {folder}: not a CLIPModel directory ({' '.join(str(error).split())[:160]})") from None
    side = model.config.vision_config.image_size
    # CLIP's own normalisation constants (preprocessor_config.json of every published CLIP).
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    total = 0.0
    with torch.inference_mode():
        for first in range(0, len(images), batch):
            pixels = (resize_clean(images[first : first + batch], side) / 255 - mean) / std
            tokens = tokenizer(
                list(captions[first : first + batch]), padding=True, truncation=True, return_tensors="pt"
            )
            vision = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            text = model.text_projection(
                model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            )
            total += float(torch.nn.functional.cosine_similarity(vision, text).double().sum())
    return total / len(images)


def evaluate_directory(options: argparse.Namespace) -> dict[str, Any]:
    """FID, KID, precision and recall of a pipeline against a folder of real images, and text-image alignment."""
    import torch

    from common.images import open_rgb, resize_uint8
    from common.metrics.evaluate import MINIMUM, evaluate_generator, format_report, open_measured
    from common.metrics.features import load_extractor
    from common.metrics.measures import fixed_noise

    found = open_measured(options.images, True, options.image_column, options.text_column, 2 * MINIMUM)
    if options.count < 2 * MINIMUM:
        raise UserError(f"--count {options.count}: too few images to measure, at least {2 * MINIMUM} are needed")
    if options.captions:
        captions = read_captions(options.captions, found.names, options.text_column)
    elif found.captions is not None:
        captions = found.captions
    else:
        raise UserError(f"{options.images} has no metadata.jsonl: give the captions with --captions FILE")
    files, captions = found.pictures[: options.count], captions[: options.count]
    draw_images, shape = sampler_of(options.model, options.solver, options.steps, options.guidance, options.device)
    started = time.perf_counter()
    noise = fixed_noise(len(files), shape, options.seed)
    parts = [
        draw_images(captions[i : i + options.batch_size], noise[i : i + options.batch_size])
        for i in range(0, len(files), options.batch_size)
    ]
    fake = torch.cat(parts)
    speed = len(fake) / (time.perf_counter() - started)
    side = options.size or fake.shape[-1]
    fake = resize_uint8(fake, side)
    real = torch.cat([resize_uint8(torch.from_numpy(open_rgb(f).copy()).permute(2, 0, 1)[None], side) for f in files])
    result: dict[str, Any] = evaluate_generator(
        fake, real, load_extractor(options.extractor), captions if options.alignment else None
    )
    result |= {"model": str(options.model), "steps": options.steps, "guidance": options.guidance, "size": side}
    result["images_per_second"] = round(speed, 2)
    print(format_report(result))
    if options.clip:
        result["clip_score"] = {"value": clip_score(fake, captions, options.clip), "model": options.clip.name}
        print(f"CLIP score ({options.clip.name}): {result['clip_score']['value']:.4f}")
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="folder of a finished run of train.py")
    parser.add_argument("--model", type=Path, help="a pipeline directory")
    parser.add_argument("--images", type=Path, help="folder or table of real images; of splits, test")
    parser.add_argument("--captions", type=Path, help="COCO captions_*.json, a table or .txt (default: metadata.jsonl)")
    parser.add_argument("--image_column", help="column of the pictures in a table (default: the one that may be it)")
    parser.add_argument("--text_column", help="column of the captions in a table (default: the one that may be it)")
    parser.add_argument("--count", type=Count, default=5000, help="images compared (the first so many)")
    parser.add_argument("--steps", type=Count, default=1, help="Euler steps of a picture (of the solver with --solver)")
    parser.add_argument("--guidance", type=NotNegative, default=0.0, help="acts above 1 only")
    parser.add_argument("--solver", help="diffusers scheduler, when --model is a diffusion teacher")
    parser.add_argument("--size", type=Count, help="both sides are resized to this side (default: the model's)")
    parser.add_argument("--extractor", default="lite0", help="lite0, lite0@SIZE or inception:FILE")
    parser.add_argument("--alignment", action="store_true", help="text-image alignment by the repository's own scorer")
    parser.add_argument("--clip", type=Path, help="a transformers CLIPModel directory, for the CLIP score")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--batch_size", type=Count, default=16, help="pictures drawn at once")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(argv)
    if options.run_dir:
        from common.training import write_metrics
        from instaflow.run import Run

        run = Run.existing(options.run_dir)
        return write_metrics(run.metrics, evaluate_run(run), {}, 0.0, trained=False)
    if not options.model or not options.images:
        raise UserError("give --run_dir, or --model and --images")
    result = evaluate_directory(options)
    if options.json:
        from common.files import write_json

        write_json(options.json, result)
    return result


if __name__ == "__main__":
    run_main(main)
