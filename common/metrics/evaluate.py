"""Generated images against real ones, every number with its judge, its sample counts and the real-vs-real floor.

    python -m common.metrics.evaluate REAL_DIR FAKE_DIR --extractor inception:PATH --json OUT

How to read the report
    kid_*        headline: unbiased squared MMD on features; 0 when both sets come from one source, whatever the count.
                 `std` is its standard error, so a difference of two standard errors is the least worth mentioning.
    fid_*        Frechet distance; depends on the count, so compare only columns of one count.
    precision_*, recall_*, density_*, coverage_*
                 fidelity and variety of the k-NN manifolds (k = 3); they too depend on the count.
    is_*         exp of the mean KL between an image's and the set's class probabilities, in the extractor's classes.
    columns      `all`: everything given; `at floor count`: generated and real images cut to the floor's count;
                 `floor`: two disjoint halves of the real images, the best value any generator can be expected to reach.
Numbers with the suffix _lite0 are not comparable with published (Inception) ones.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cli import Parser
from common.data.folders import broken_rows, open_source
from common.data.rows import LEFT_OUT, rows_to_measure
from common.errors import UserError, run_main
from common.metrics.alignment import AlignmentScorer
from common.metrics.distribution import fid, inception_score, kid, precision_recall
from common.metrics.features import Extractor, class_probabilities, extract, folder_features, load_extractor
from common.options import device

MINIMUM = 10  # images a side; fewer give no usable estimate of anything
NEIGHBOURS = 3

Record = dict[str, Any]


def compare_features(
    real_ND: Tensor,
    fake_ND: Tensor,
    extractor: Extractor,
    floor_split: bool = True,
    real_extra_ND: Tensor | None = None,
    seed: int = 0,
) -> Record:
    """All distribution metrics of features [N,D]; see `evaluate_generator` for the result."""
    needed = 2 * MINIMUM if floor_split else MINIMUM
    _require(len(real_ND), needed, "real")
    _require(len(fake_ND), MINIMUM, "generated")
    generator = torch.Generator().manual_seed(seed)
    real = real_ND[torch.randperm(len(real_ND), generator=generator)]
    fake = fake_ND[torch.randperm(len(fake_ND), generator=generator)]
    result: Record = {
        "extractor": {"name": extractor.name, "dim": extractor.dim, "resize": extractor.resize},
        "n_real": len(real),
        "n_fake": len(fake),
        "headline": f"kid_{extractor.name}",
        "metrics": _metrics(real, fake, extractor),
    }
    if floor_split:
        half = min(len(real) // 2, len(fake))
        result["metrics_at_floor_n"] = _metrics(real[:half], fake[:half], extractor)
        result["floor"] = _metrics(real[:half], real[half : 2 * half], extractor)
    if real_extra_ND is not None:
        _require(len(real_extra_ND), MINIMUM, "extra real")
        result["floor_full"] = _metrics(real, real_extra_ND, extractor)
    return result


def evaluate_generator(
    fake: Tensor | np.ndarray,
    real: Tensor | np.ndarray,
    extractor: Extractor | None = None,
    captions: Sequence[str] | None = None,
    floor_split: bool = True,
    real_extra: Tensor | np.ndarray | None = None,
    real_captions: Sequence[str] | None = None,
    scorer: AlignmentScorer | None = None,
    seed: int = 0,
) -> Record:
    """Compare generated with real images.

    fake, real:    uint8 [N,3,H,W], or any form `common.images.as_uint8` takes. Real features may be costly: to compare
                   many generators with one real set, use `extract` and `compare_features`.
    extractor:     the judge; default `lite0`.
    captions:      one per generated image: adds text-image alignment.
    floor_split:   measure the floor on two disjoint random halves of the real images (needs >= 20 of them).
    real_extra:    a second, disjoint real set: adds the floor at full size.
    real_captions: one per real image: adds the alignment of the real images, the ceiling on this very data.

    Returns {"extractor", "n_real", "n_fake", "headline", "metrics", "metrics_at_floor_n", "floor", "floor_full",
    "alignment", "alignment_real"} (optional parts only when asked for). The metric parts map names such as `kid_lite0`
    to {"value", "std" where there is one, "extractor", "n_real", "n_fake"}; in a floor both counts are of real images.
    Raises UserError when a set is too small.
    """
    judge = extractor or load_extractor()
    _require(len(real), 2 * MINIMUM if floor_split else MINIMUM, "real")
    _require(len(fake), MINIMUM, "generated")
    features = {"alignment_real": extract(real, judge), "alignment": extract(fake, judge)}
    extra = None if real_extra is None else extract(real_extra, judge)
    result = compare_features(features["alignment_real"], features["alignment"], judge, floor_split, extra, seed)
    for part, images, texts in (("alignment", fake, captions), ("alignment_real", real, real_captions)):
        if texts is not None:
            scorer = scorer or AlignmentScorer()
            shared = judge.name == scorer.images.name  # else the scorer looks through its own Lite0
            seen = features[part] if shared else extract(images, scorer.images)
            result[part] = scorer.score_features(seen, texts)
    return result


def compare_held_out(real_ND: Tensor, fake_ND: Tensor, extractor: Extractor) -> Record | None:
    """`compare_features` as far as few held-out images allow: without floor below 20 of them, not at all below 10."""
    if len(real_ND) < MINIMUM:
        return None
    return compare_features(real_ND, fake_ND, extractor, floor_split=len(real_ND) >= 2 * MINIMUM)


def judged(result: Record | None) -> Record:
    """The entries `judge` (the result) and `summary` (its numbers alone) of a run's metrics; none without a result."""
    return {} if result is None else {"judge": result, "summary": {k: round(v, 5) for k, v in flatten(result).items()}}


def say_few(count: int) -> None:
    """Warn, before a training, that its held-out images are too few for some metrics."""
    if count < 2 * MINIMUM:
        missing = "KID and FID are left out" if count < MINIMUM else "the floor of KID and FID is left out"
        warnings.warn(
            f"{count} held-out images: {missing}, at least {MINIMUM if count < MINIMUM else 2 * MINIMUM} are needed",
            stacklevel=2,
        )


def _require(count: int, minimum: int, what: str) -> None:
    if count < minimum:
        raise UserError(f"{count} {what} images are too few: give at least {minimum} (thousands for a stable FID)")


def _metrics(real_ND: Tensor, fake_ND: Tensor, extractor: Extractor) -> Record:
    counts = {"extractor": extractor.name, "n_real": len(real_ND), "n_fake": len(fake_ND)}
    distance = kid(real_ND, fake_ND)
    manifold = precision_recall(real_ND, fake_ND, NEIGHBOURS)
    records: Record = {
        "kid": {"value": distance.value, "std": distance.std},
        "fid": {"value": fid(real_ND, fake_ND)},
        "precision": {"value": manifold.precision},
        "recall": {"value": manifold.recall},
        "density": {"value": manifold.density},
        "coverage": {"value": manifold.coverage},
    }
    probabilities = class_probabilities(fake_ND, extractor)
    if probabilities is not None:
        splits = max(1, min(10, len(fake_ND) // 100))
        score = inception_score(probabilities, splits)
        records["is"] = {"value": score.value, "std": score.std, "splits": splits}
    return {f"{name}_{extractor.name}": {**record, **counts} for name, record in records.items()}


def flatten(result: Record) -> dict[str, float]:
    """The numbers alone, for a logger: {"kid_lite0": ..., "floor/kid_lite0": ..., "alignment/r_at_1": ...}."""
    flat = {name: float(record["value"]) for name, record in result["metrics"].items()}
    for part in ("metrics_at_floor_n", "floor", "floor_full"):
        flat |= {f"{part}/{name}": float(record["value"]) for name, record in result.get(part, {}).items()}
    for part in ("alignment", "alignment_real"):
        if part in result:
            flat |= {
                f"{part}/{name}": float(result[part][name]) for name in ("cosine", "r_at_1", "right_beats_random")
            }  # fmt: skip
    return flat


def format_report(result: Record) -> str:
    """The result as a text table; KID is shown times 1000."""
    columns = [
        (title, result[part])
        for title, part in (
            ("all", "metrics"),
            ("at floor count", "metrics_at_floor_n"),
            ("floor", "floor"),
            ("floor, full size", "floor_full"),
        )
        if part in result
    ]
    judge = result["extractor"]
    lines = [f"judged by {judge['name']}: {judge['dim']} features, {judge['resize']}"]
    lines.append(" " * 20 + "".join(f"{title:>22}" for title, _ in columns))
    first = next(iter(result["metrics"]))
    counts = [f"{part[first]['n_real']} / {part[first]['n_fake']}" for _, part in columns]
    lines.append(f"{'images':<20}" + "".join(f"{count:>22}" for count in counts))
    for name in result["metrics"]:
        scale = 1000 if name.startswith("kid_") else 1
        cells = []
        for _, part in columns:
            record = part[name]
            spread = f" ± {record['std'] * scale:.2f}" if "std" in record else ""
            cells.append(f"{record['value'] * scale:.3f}{spread}")
        label = f"{name} x 1000" if scale == 1000 else name
        lines.append(f"{label:<20}" + "".join(f"{cell:>22}" for cell in cells))
    for part, title in (("alignment", "generated"), ("alignment_real", "real")):
        if part in result:
            score = result[part]
            lines.append(f"alignment of {score['n']} {title} images by {score['scorer']}: {_retrieval(score)}")
            for kind, sizes in score["ceiling"].items():
                ceiling = sizes["64px"]
                lines.append(
                    f"  ceiling, {ceiling['n']} real images of {kind.replace('_', ' ')}: {_retrieval(ceiling)}"
                )
    return "\n".join(lines)


def _retrieval(score: Record) -> str:
    return (
        f"cosine {score['cosine']:.3f}, R@1 of {score['candidates']} {score['r_at_1']:.1%}, "
        f"right beats random {score['right_beats_random']:.1%}"
    )


@dataclass(frozen=True)
class Measured:
    """The pictures of a set that a program measures, undecoded, and their captions where the data say some."""

    pictures: list[Path | bytes]
    names: list[str]
    captions: list[str] | None


def open_measured(
    where: Path, held_out: bool = False, image: str | None = None, text: str | None = None, minimum: int = 0
) -> Measured:
    """The pictures of a folder or table that can be read; class folders give no captions.

    Args:
        held_out: of data with splits take those of `test`, or else of `validation`.
        image, text: names of columns of a table or of the metadata; None finds them.
        minimum: of the pictures.

    Raises:
        UserError: nothing there, fewer pictures than that, a bad line, a picture without caption where others have
            one, or more than 1 % of the pictures cannot be read.
    """
    if not where.exists():
        raise UserError(f"{where}: no such folder; expected a folder of images")
    source = open_source(where, image, text, LEFT_OUT)
    if unnamed := getattr(source, "unnamed", []):
        first = unnamed[0].relative_to(where).as_posix()
        raise UserError(f"{source.captions_from}: no line for {first} ({len(unnamed)} such images); add its caption")
    broken = broken_rows(source)
    rows = [row for row in (rows_to_measure(source) if held_out else range(len(source))) if row not in broken]
    _require(len(rows), minimum, "real" if held_out else "generated")
    captions = [source.label(row)[0] for row in rows] if source.captions_from else None
    return Measured([source.raw(row) for row in rows], [source.where(row) for row in rows], captions)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m common.metrics.evaluate", description=__doc__)
    parser.add_argument("real", type=Path, metavar="REAL_DIR", help="folder or table of real images; of splits, test")
    parser.add_argument("fake", type=Path, metavar="FAKE_DIR", help="folder or table of generated images")
    parser.add_argument("--image_column", help="column of the pictures in a table (default: the one that may be it)")
    parser.add_argument("--text_column", help="column of the captions (default: the one that may be it)")
    parser.add_argument("--extractor", default="lite0", help="lite0 (default), lite0@SIZE or inception:PATH")
    parser.add_argument("--real-extra", type=Path, help="second folder of real images: adds the floor at full size")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    judge = load_extractor(options.extractor, options.device)
    columns = {"image": options.image_column, "text": options.text_column}
    real = open_measured(options.real, held_out=True, **columns, minimum=2 * MINIMUM)
    fake = open_measured(options.fake, **columns, minimum=MINIMUM)
    extra = None
    if options.real_extra is not None:
        extra = folder_features(open_measured(options.real_extra, held_out=True, **columns).pictures, judge)
    features = {name: folder_features(found.pictures, judge) for name, found in (("real", real), ("fake", fake))}
    result = compare_features(features["real"], features["fake"], judge, real_extra_ND=extra)
    if fake.captions is not None:
        scorer = AlignmentScorer(device=options.device)
        # The scorer's own judge is Lite0 at its training size, whatever judged the distribution.
        shared = judge.name == scorer.images.name
        seen = features["fake"] if shared else folder_features(fake.pictures, scorer.images)
        result["alignment"] = scorer.score_features(seen, fake.captions)
    print(format_report(result))
    if options.json is not None:
        partial = options.json.with_name(f".{options.json.name}.{os.getpid()}.partial")
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(result, indent=2) + "\n")
            os.replace(partial, options.json)
        except OSError as error:
            raise UserError(f"{options.json}: cannot write the result ({error.strerror})") from error


if __name__ == "__main__":
    run_main(main)
