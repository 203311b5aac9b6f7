"""Draw images: `python ldm/sample.py --prompt "a red star left of a blue ring"` writes a PNG.

    python ldm/sample.py --prompt "two hearts" --model ldm/pretrained/shapes32-v # a diffusers directory (ours or yours)
    python ldm/sample.py --model runs/ldm-small              # a finished run of train.py: its task's grid
    python ldm/sample.py --model runs/ldm-small --size 64x96 # larger than trained (convolutional sampling)
    python ldm/sample.py --model runs/ldm-class --label star --label ring    # classes by name
    python ldm/sample.py --model runs/ldm-inpaint --image MINE.png --mask HOLE.png   # white is painted anew
    python ldm/sample.py --model runs/ldm-superres --image FOLDER --folder LARGER    # all pictures of a folder
    python ldm/sample.py --model runs/ldm-class --classifier runs/ldm-classifier --classifier_scale 3

`--model` is a run folder of train.py or any diffusers text-to-image directory. What else each task takes, a layout or a
label map for instance, stands in `own_input.py`; without any of it a run draws its first held-out conditions.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Range, Seed, Share

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.config import LdmConfig, SamplingConfig
    from ldm.diffusion import LatentDiffusion
    from ldm.tasks import Task

PRETRAINED = Path(__file__).parent / "pretrained"


def draw(
    ldm: LatentDiffusion,
    task_name: str,
    columns: dict[str, Tensor],
    count: int,
    side: tuple[int, int],
    sampling: SamplingConfig,
    seed: int = 0,
    progress: bool = False,
    classifier: nn.Module | None = None,
    classifier_scale: float = 0.0,
) -> Tensor:
    """Generate `count` images.

    Args:
        classifier: of noisy latents; draws towards the column `label` with `classifier_scale` (task class only).
        columns: the task's condition columns with at least `count` rows (none for unconditional models).
        side: height and width of the images in pixels; other sizes than trained work too (section 4.3.2).

    Returns:
        uint8 [count, 3, height, width]. Sample i depends on (seed, i) alone, not on the batch size.
    """
    import torch
    from tqdm import tqdm

    from common.images import to_uint8, to_unit
    from ldm.masks import paste_known
    from ldm.samplers import Denoiser, classifier_guided, sample, sample_generators, seeded_noise
    from ldm.tasks import raw_condition

    f = ldm.first_stage_model.downsampling
    channels = ldm.first_stage_model.embed_dim
    device = ldm.scale_factor.device
    parts = []
    with torch.no_grad():
        for first in tqdm(range(0, count, sampling.batch_size), desc="sampling", unit="batch", disable=not progress):
            size = min(sampling.batch_size, count - first)
            rows = {name: column[first : first + size].to(device) for name, column in columns.items()}
            cond = ldm.conditioning(raw_condition(task_name, rows))

            def towards_class(denoise: Denoiser, rows: dict[str, Tensor] = rows) -> Denoiser:
                assert classifier is not None
                return classifier_guided(denoise, ldm.schedule, classifier, rows["label"], classifier_scale)

            z_BCHW = sample(
                ldm,
                (size, channels, side[0] // f, side[1] // f),  # type: ignore[operator,arg-type]
                seeded_noise(sample_generators(seed, first, size, device)),
                cond,
                sampler=sampling.sampler,
                steps=sampling.steps,
                eta=sampling.eta,
                guidance=sampling.guidance if ldm.cond_drop > 0 else 1.0,
                wrap=towards_class if classifier is not None else None,
            )
            images = ldm.decode(z_BCHW)
            if task_name == "inpaint":
                images = paste_known(images, to_unit(rows["image"]), rows["hole"])
            parts.append(to_uint8(images).cpu())
    return torch.cat(parts)


def condition_columns(task: Task, config: LdmConfig, count: int) -> dict[str, Tensor]:
    """The first `count` held-out conditions of a task, from the start again where there are fewer; for inpainting with
    fixed random holes."""
    import torch

    from ldm.tasks import mask_bank

    rows = torch.arange(count) % len(task.reference)
    columns = {name: column[rows] for name, column in task.reference.columns.items()}
    if task.name == "inpaint":
        columns["hole"] = mask_bank(config.data.size, count, seed=config.seed + 1)
    return columns


def task_grid(ldm: LatentDiffusion, task: Task, config: LdmConfig, path: Path) -> None:
    """A picture of samples for held-out conditions, beside the condition and the true image where there is one; of
    classes, a column for each."""
    import torch

    from common.images import save_grid

    count, size = min(config.sampling.grid, len(task.reference)), config.data.size
    if task.name == "class":
        labels_N, across = spread_classes(task, count)
        images = draw(ldm, "class", {"label": labels_N}, len(labels_N), (size, size), config.sampling, config.seed)
        named = len(task.classes) > int(labels_N.max())
        names = [task.classes[label] for label in labels_N.tolist()] if named else None
        save_grid(images, path, columns=across, captions=names, tile=64 if size < 64 else None)
        return
    columns = condition_columns(task, config, count)
    images = draw(ldm, task.name, columns, count, (size, size), config.sampling, config.seed)
    captions = task.captions[:count] if task.captions else None
    scale = 64 if size < 64 else None
    shown = conditions_as_images(task.name, columns, size)
    if shown is None:
        save_grid(images, path, columns=8, captions=captions, tile=scale)
        return
    # Condition, sample, truth side by side.
    stacked = torch.stack([shown, images, columns["image"]], dim=1).flatten(0, 1)
    save_grid(stacked, path, columns=12, tile=scale)


def spread_classes(task: Task, count: int) -> tuple[Tensor, int]:
    """Labels of about `count` pictures with a class a column (int64 [N]), and the number of columns, at most 12."""
    import torch

    assert task.num_classes is not None
    classes = task.num_classes - 1  # the last one means none
    across = min(classes, count, 12)
    return torch.linspace(0, classes - 1, across).round().long().repeat(max(1, count // across)), across


def conditions_as_images(task_name: str, columns: dict[str, Tensor], size: int | tuple[int, int]) -> Tensor | None:
    """The condition as a uint8 picture [N, 3, H, W] of this size, for tasks whose condition is a picture."""
    import torch
    import torch.nn.functional as F

    if task_name == "superres":
        return F.interpolate(columns["low"].float(), size, mode="nearest").to(torch.uint8)
    if task_name == "inpaint":
        return torch.where(columns["hole"] > 0.5, 0, columns["image"]).to(torch.uint8)
    if task_name == "semantic":
        maps = columns["label_map"].long()
        colours = torch.tensor([[(37 * k) % 256, (91 * k) % 256, (151 * k + 80) % 256] for k in range(256)])
        colours[0] = 235
        return colours[maps].permute(0, 3, 1, 2).to(torch.uint8)
    if task_name == "layout":
        return draw_boxes(columns["boxes"], columns["classes"], size, columns.get("colours"))
    return None


def draw_boxes(boxes: Tensor, classes: Tensor, size: int | tuple[int, int], colours: Tensor | None = None) -> Tensor:
    """Box outlines, uint8 [N, 3, H, W] of this size; boxes [N, K, 4] as fractions x0 y0 x1 y1, class -1: no box.

    Args:
        colours: int [N, K], the palette's entries that the objects shall have; None gives each class a colour.
    """
    import torch

    from common.data.shapes import PALETTE

    tones = [torch.tensor(tone, dtype=torch.uint8) for tone, _ in PALETTE.values()]
    height, width = (size, size) if isinstance(size, int) else size
    canvas = torch.full((len(boxes), 3, height, width), 245, dtype=torch.uint8)
    for n in range(len(boxes)):
        for k, (box, category) in enumerate(zip(boxes[n], classes[n])):
            if int(category) < 0:
                continue
            last = (width - 1, height - 1) * 2
            x0, y0, x1, y1 = (min(most, max(0, int(v * most))) for v, most in zip(box.tolist(), last))
            if colours is None:
                code = int(category)
                colour = torch.tensor([(67 * code + 40) % 200, (131 * code) % 200, 90], dtype=torch.uint8)
            else:
                colour = tones[int(colours[n, k])]
            canvas[n, :, [y0, y1], x0 : x1 + 1] = colour[:, None, None]
            canvas[n, :, y0 : y1 + 1, [x0, x1]] = colour[:, None, None]
    return canvas


def pipeline_images(
    pipeline: Any, prompts: list[str], steps: int, guidance: float, seed: int, batch_size: int = 64, **options: Any
) -> Tensor:
    """uint8 [N, 3, H, W] from a diffusers pipeline; sample i depends on (seed, i) alone.

    Raises:
        UserError: the pictures are not finite.
    """
    import torch

    from common.data.sampling import derive_seed
    from common.teacher import refuse_bad_pictures

    parts = []
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(derive_seed(seed, first + i)) for i in range(len(chunk))]
        result = pipeline(
            chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np", **options
        )
        images = torch.from_numpy(result.images).permute(0, 3, 1, 2)
        refuse_bad_pictures(images)
        parts.append(images.mul(255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, for example 64x96") from None
    for side in (height, width):
        Range(8, 8192).check("size", side, int)
    return height, width


def check_drawing(size: tuple[int, int] | None, multiple: int, steps: int, most: int) -> None:
    """Refuse sizes that the networks cannot halve often enough, and numbers of steps that the noise levels lack.

    Args:
        multiple: of which both sides must be, in pixels.
        most: training steps of the noise levels.
    """
    Range(1, most).check("steps", steps, int)
    if size and (min(size) < multiple or any(side % multiple for side in size)):
        raise UserError(f"--size {size[0]}x{size[1]}: expected both sides to be multiples of {multiple} for this model")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--label", action="append", help="task class: a class by name or number; may be repeated")
    parser.add_argument("--layout", action="append", help='task layout: "NAME x0 y0 x1 y1; ..." or a .jsonl file')
    parser.add_argument("--image", type=Path, help="tasks superres and inpaint: your picture, or a folder of them")
    parser.add_argument("--mask", type=Path, help="inpaint: white is painted; semantic: label numbers; or a folder")
    parser.add_argument("--folder", type=Path, help="write each picture into this folder instead")
    parser.add_argument("--model", type=Path, default=PRETRAINED / "emoji64", help="run folder or diffusers directory")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="picture to write")
    parser.add_argument("--count", type=Count, default=8, help="images per prompt")
    parser.add_argument("--steps", type=Count, default=50, help="of the sampler")
    parser.add_argument(
        "--guidance", type=NotNegative, help="classifier-free guidance scale (default: 3, and 1 with --classifier)"
    )
    parser.add_argument("--classifier", type=Path, help="folder of train_classifier.py; runs of task class only")
    parser.add_argument("--classifier_scale", type=NotNegative, default=1.0, help="weight of the classifier's gradient")
    kinds = ("ddim", "ddpm", "plms", "dpm++")
    parser.add_argument("--sampler", choices=kinds, help="of a run folder (default: ddim); a diffusers one has its own")
    parser.add_argument("--eta", type=Share, default=0.0, help="noise of each DDIM step (run folders only)")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels, if another than trained")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    options = parser.parse_args(argv)
    if options.guidance is None:
        options.guidance = 1.0 if options.classifier else 3.0
    size = _size(options.size) if options.size else None
    if (options.model / "model.safetensors").is_file() and (options.model / "config.yaml").is_file():
        drawn = _from_run(options, size)
    else:
        drawn = _from_pipeline(options, size)
    if options.folder is not None:
        save_each(drawn, options.folder)
    else:
        save_together(drawn, options.out, options.count)


@dataclass
class Drawn:
    """Pictures uint8 [N, 3, H, W] of one condition; `shown` [1, 3, H, W] is the condition where that is a picture."""

    name: str
    images: Tensor
    shown: Tensor | None = None


def save_each(drawn: list[Drawn], folder: Path) -> None:
    """NAME.png, of several pictures of one condition NAME-0.png, NAME-1.png, ...; equal names are numbered."""
    from PIL import Image

    from common.images import save_png

    names: dict[str, int] = {}
    for found in drawn:
        stem = re.sub(r"[^\w.-]+", "-", found.name)[:80].strip("-.") or "sample"
        names[stem] = names.get(stem, -1) + 1
        stem += f"-{names[stem]}" if names[stem] else ""
        for number, image in enumerate(found.images):
            name = f"{stem}-{number}.png" if len(found.images) > 1 else f"{stem}.png"
            save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / name)
    print(folder)


def save_together(drawn: list[Drawn], path: Path, columns: int) -> None:
    """One picture with a row a condition: the condition, where it is a picture, and what was drawn.

    Raises:
        UserError: the pictures have different sizes.
    """
    import torch

    from common.images import save_grid

    if len({found.images.shape[1:] for found in drawn}) > 1:
        raise UserError("pictures of different sizes make no sheet: give --folder to write each by itself, or --size")
    parts = [part for found in drawn for part in (found.shown, found.images) if part is not None]
    names = [found.name for found in drawn for part in (found.shown, found.images) if part is not None for _ in part]
    images = torch.cat(parts)
    shown = any(found.shown is not None for found in drawn)
    tile = max(images.shape[-1], 128 // images.shape[-1] * images.shape[-1])
    print(save_grid(images, path, columns=columns + shown, captions=names if any(names) else None, tile=tile))


def _from_pipeline(options: argparse.Namespace, size: tuple[int, int] | None) -> list[Drawn]:
    import torch

    from common.teacher import check_steps, open_pipeline
    from ldm.own_input import refuse_other_options

    if not (options.model / "model_index.json").is_file():
        raise UserError(
            f"--model {options.model}: neither a run folder (config.yaml and model.safetensors) nor a diffusers "
            "directory (model_index.json)"
        )
    cuda = torch.cuda.is_available()
    pipeline = open_pipeline(options.model, "cuda" if cuda else "cpu", torch.float16 if cuda else torch.float32)
    refuse_other_options(options, "text", options.model)
    if options.classifier:
        raise UserError(f"--classifier guides runs of task class; {options.model} is a text-to-image pipeline")
    if options.sampler or options.eta:
        kind = type(pipeline.scheduler).__name__
        raise UserError(f"--sampler and --eta are for run folders; {options.model} draws with a scheduler, its {kind}")
    options.prompt = prompts_of(options.prompt, options.prompts, "a red apple, flat style")
    # Stock pipelines want multiples of 8 whatever the autoencoder's factor is.
    multiple = math.lcm(8, int(pipeline.vae_scale_factor))
    check_drawing(size, multiple, options.steps, int(pipeline.scheduler.config.num_train_timesteps))
    check_steps(pipeline.scheduler, options.steps)
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    extra = {"height": size[0], "width": size[1]} if size else {}
    images = pipeline_images(pipeline, prompts, options.steps, options.guidance, options.seed, **extra)
    return _by_condition(options.prompt, images)


def _by_condition(names: Sequence[str], images: Tensor) -> list[Drawn]:
    """The pictures of each condition, which stand one after the other."""
    parts = images.split(len(images) // len(names))
    return [Drawn(name, part) for name, part in zip(names, parts)]


def _from_run(options: argparse.Namespace, size: tuple[int, int] | None) -> list[Drawn]:
    from common.data.sampling import derive_seed
    from ldm.config import SamplingConfig
    from ldm.own_input import class_names, own_inputs, refuse_other_options
    from ldm.run import Run

    run = Run.existing(options.model, data=False)
    config, task = run.config, run.config.task
    refuse_other_options(options, task, options.model)
    if options.classifier and task != "class":
        trained = f"was trained for task {task}, which has no classes"
        raise UserError(f"--classifier guides runs of task class; {options.model} {trained}")
    side = size or (config.data.size, config.data.size)
    multiple = run.latent_factor * 2 ** (len(config.unet.channel_mult) - 1)
    check_drawing(size, multiple, options.steps, config.diffusion.timesteps)
    inputs = own_inputs(options, run, size, multiple)
    ldm = run.load()
    sampling = SamplingConfig(options.sampler or "ddim", options.steps, options.eta, options.guidance)
    guide: dict[str, Any] = {}
    if options.classifier:
        from ldm.classifier import load_classifier

        if size and size != (config.data.size, config.data.size):
            raise UserError("--classifier judges latents of the training size: leave --size out")
        guide = {
            "classifier": load_classifier(options.classifier, run, ldm),
            "classifier_scale": options.classifier_scale,
        }
    if task == "text":
        named = list(dict.fromkeys(run.task.captions))[:4]
        if options.prompt or options.prompts:
            named = prompts_of(options.prompt, options.prompts, named[0])
        columns = run.task.caption_columns([prompt for prompt in named for _ in range(options.count)])
        images = draw(ldm, task, columns, len(named) * options.count, side, sampling, options.seed)
        return _by_condition(named, images)
    drawn = []
    for number, given in enumerate(inputs):
        columns = {name: column.repeat_interleave(options.count, 0) for name, column in given.columns.items()}
        seed = options.seed if number == 0 else derive_seed(options.seed, number)
        images = draw(ldm, task, columns, options.count, given.side, sampling, seed, **guide)
        drawn.append(Drawn(given.name, images, conditions_as_images(task, given.columns, given.side)))
    if inputs:
        return drawn
    columns = condition_columns(run.task, config, options.count)
    images = draw(ldm, task, columns, options.count, side, sampling, options.seed, **guide)
    if task == "class":
        names = class_names(run)
        return [Drawn(names[int(label)], image[None]) for label, image in zip(columns["label"], images)]
    return [Drawn("", images)]


if __name__ == "__main__":
    run_main(main)
