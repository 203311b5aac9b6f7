"""IS and FID of a trained generator, with the distance of real pictures to real ones beside them.

    python eagan/evaluate.py --run_dir runs/eagan-small                          # a finished run, its own judge
    python eagan/evaluate.py --model MODEL --data.name cifar10 --data.path CIFAR --judge inception:FILE --images 50000

Everybody is drawn from the same z. Only Inception features may be called FID and compared with a paper's, and only at
its count: every number names its judge, its preprocessing, its count and how the generator normalised.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Range
from eagan.config import BatchNorm, DataConfig, EvaluationConfig

if TYPE_CHECKING:
    from common.metrics.features import Extractor
    from eagan.measuring import Reference
    from eagan.model import Generator

GRID = 64


def grid(generator: Generator, path: Path, batch_norm: BatchNorm) -> Path:
    """Samples of the z that everybody is measured with, in a square."""
    from common.images import save_grid
    from eagan.measuring import draw, latents

    images = draw(generator, latents(GRID, generator.config.latent_dim), batch_norm, GRID)
    return save_grid(images, path, columns=round(GRID**0.5), tile=max(images.shape[-1], 64))


def measured(
    generator: Generator, judge: Extractor, reference: Reference, options: EvaluationConfig, images: int
) -> dict[str, Any]:
    """The scores of a generator in every way of normalising, and the floor."""
    from eagan.measuring import draw, latents, score

    z_NZ = latents(images, generator.config.latent_dim)
    ways: tuple[BatchNorm, ...] = ("running", "batch", "genotype")  # the last one changes the running statistics
    found = {
        way: asdict(
            score(draw(generator, z_NZ, way, options.batch_size), reference.train_ND, judge, options.splits, way)
        )
        for way in ways
    }
    floor = asdict(reference.floor(judge, options.splits, images))
    return {**found[options.batch_norm], "ways_of_normalising": found, "floor": floor}


def measure_folder(folder: Path, options: EvaluationConfig, images: int, device: str = "cpu") -> dict[str, Any]:
    """What is known of a finished run's generator; draws `samples.png`, writes `table.md`.

    It needs the run's folder alone.

    Args:
        images: that scores are taken over; at most the real ones that were kept.
    """
    from common.costs import parameter_count
    from eagan.judge import open_judge
    from eagan.measuring import Reference
    from eagan.retraining import load_discriminator, load_generator
    from eagan.run import JUDGE, REFERENCE

    generator, about = load_generator(folder / "model")
    own = folder / JUDGE
    judge = open_judge(f"classes:{own}" if own.is_file() else options.judge or "lite0", device)
    reference = Reference(folder / REFERENCE)
    if reference.judge != judge.name:
        raise UserError(f"{folder / REFERENCE} holds features of {reference.judge}, the judge is {judge.name}")
    generator.to(device)
    images = min(images, len(reference.train_ND))
    content = measured(generator, judge, reference, options, images)
    grid(generator, folder / "samples.png", options.batch_norm)
    if hasattr(judge, "accuracy"):
        content["judge_accuracy"] = judge.accuracy
    content |= {
        "augment": about.get("augment", []),
        "parameters_generator": parameter_count(generator),
        "parameters_discriminator": parameter_count(load_discriminator(folder / "model")),
    }
    write_table(folder, content)
    return content


def write_table(folder: Path, content: dict[str, Any]) -> Path:
    """`table.md` of a run: its populations at the first and the last round, the trained generator, real pictures."""
    from common.files import read_object, write_atomically
    from common.publishing import markdown_table

    rows = []
    stages = {path.parent.name: path for path in folder.glob("*/history.json")}
    for name, path in sorted(stages.items(), key=lambda stage: (stage[0][7:], "_d" in stage[0])):
        history = read_object(path, kinds={"rounds": list, "floor": dict})
        for row in (history["rounds"][0], history["rounds"][-1]):
            of = f"{name}, round {row['round']}: mean (best) of the population"
            numbers = f"{row['fid_mean']:.4g} ({row['fid_best']:.4g})", f"{row['inception_score_mean']:.3g}"
            rows.append([of, *numbers, str(history["floor"]["images"])])
    for of, scores in (("trained generator", content), ("real against real", content["floor"])):
        rows.append([of, f"{scores['fid']:.4g}", f"{scores['inception_score']:.3g}", str(scores["images"])])
    text = markdown_table(["", "FID", "IS", "pictures"], rows)
    text += f"\n\nJudged by {content['judge']}; parameters of the generator {content['parameters_generator']:,}, "
    text += f"of the discriminator {content['parameters_discriminator']:,}.\n"
    write_atomically(folder / "table.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder / "table.md"


def report(content: dict[str, Any]) -> None:
    """Print the scores beside the floor."""
    floor = content["floor"]
    print(
        f"IS {content['inception_score']:.3g}, FID {content['fid']:.4g} of {content['images']} pictures, judged by "
        f"{content['judge']} (normalised: {content['batch_norm']})\n"
        f"real against real: IS {floor['inception_score']:.3g}, FID {floor['fid']:.4g} of {floor['images']}"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of eagan/train.py")
    parser.add_argument("--model", type=Path, help="a trained pair's folder instead")
    parser.add_argument(
        "--data.name",
        dest="name",
        choices=get_args(get_type_hints(DataConfig)["name"]),
        default="emoji",
        help="with --model: the real pictures",
    )
    parser.add_argument("--data.path", dest="path", help="with --model: folder of the real pictures")
    parser.add_argument("--judge", default="lite0", help="with --model: lite0, classes:FILE or inception:FILE")
    parser.add_argument(
        "--images", type=Annotated[int, Range(20)], help="pictures of each side (default: the run's; 2000 with --model)"
    )
    parser.add_argument(
        "--batch_norm", choices=get_args(BatchNorm), default="genotype", help="statistics that are used"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is drawn and judged")
    options = parser.parse_args(argv)
    if (options.run_dir is None) == (options.model is None):
        raise UserError("expected either --run_dir, a finished run, or --model, a trained pair's folder")
    if options.run_dir is not None:
        from eagan.run import Run

        settings = replace(Run.finished(options.run_dir).evaluation, batch_norm=options.batch_norm)
        content = measure_folder(options.run_dir, settings, options.images or settings.final_images, options.device)
    else:
        content = _against(options, EvaluationConfig(batch_norm=options.batch_norm))
    report(content)
    print(json.dumps(content, indent=1))
    return content


def _against(options: Any, settings: EvaluationConfig) -> dict[str, Any]:
    """A trained pair's folder against pictures of the user's choice."""
    from eagan.data import open_pictures
    from eagan.judge import open_judge
    from eagan.measuring import Reference
    from eagan.retraining import load_generator

    generator, _ = load_generator(options.model)
    real = open_pictures(DataConfig(name=options.name, path=options.path), generator.config.side)
    judge = open_judge(options.judge, options.device)
    count = min(options.images or 2000, len(real.train))
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference.of(Path(folder) / "reference.safetensors", real, judge, count)
    return measured(generator.to(options.device), judge, reference, settings, count)


if __name__ == "__main__":
    run_main(main)
