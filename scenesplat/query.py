"""Ask a scene of Gaussians for something in words.

    python scenesplat/query.py ROOM.ply "a chair"
    python scenesplat/query.py ROOM.ply "a chair" "a lamp" --out found.png --json
    python scenesplat/query.py ROOM.ply "a chair" --save chair.ply      # the chosen Gaussians, as a standard splat
    python scenesplat/query.py ROOM.ply "a chair" --best 500            # the 500 most similar ones, whatever that is
    python scenesplat/query.py ROOM.ply "a chair" --negatives table sofa wall --threshold 0.6

A score is the worst against the negatives: exp(10 cos(query)) over that plus exp(10 cos(negative)),
as LERF has it. Above 0.5 the query fits better than every negative. Nothing is stretched between the scene's own least
and most, so that a scene without a chair answers with nothing.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Share, Whole, device_or_auto
from common.paths import REPOSITORY, WORKPLACE

if TYPE_CHECKING:
    from torch import Tensor

    from scenesplat.export import SceneModel
    from scenesplat.gaussians import Gaussians
    from scenesplat.ply import Reading

TRAINED = WORKPLACE / "runs" / "scenesplat-small" / "model"
PUBLISHED = REPOSITORY / "scenesplat" / "pretrained" / "rooms"
SHARPNESS = 10.0  # LERF's


def relevance(features_ND: Tensor, queries_QD: Tensor, negatives_MD: Tensor) -> Tensor:
    """Scores [Q, N] in 0..1: the smaller of each Gaussian's odds against the negatives."""
    import torch

    against_NM = features_ND @ negatives_MD.t()
    hardest_N = against_NM.max(1).values  # the odds fall with the negative's similarity
    return torch.sigmoid(SHARPNESS * (queries_QD @ features_ND.t() - hardest_N))


def negatives_for(queries: list[str], negatives: list[str]) -> list[str]:
    """The negatives that are none of the queries themselves.

    Raises:
        UserError: none is left.
    """
    from scenesplat.text import plain

    asked = {plain(query).lower() for query in queries}
    left = [name for name in negatives if plain(name).lower() not in asked]
    if not left:
        raise UserError(
            f"--negatives {' '.join(negatives)}: expected another name than the query's own, to compare with"
        )
    return left


def ask(
    model: SceneModel, scene: Gaussians, queries: list[str], negatives: list[str], limit: int = 0
) -> tuple[Tensor, Tensor]:
    """(scores [Q, N], features [N, D]) of a scene.

    Args:
        limit: passes over the scene at most (`inference.passes`).
    """
    import torch

    from scenesplat.inference import scene_features

    against = [negatives_for([query], negatives) for query in queries]
    with ThreadPoolExecutor(1) as side:  # loading a text encoder takes as long as passing over a scene
        embedded = side.submit(lambda: (model.texts(queries), [model.texts(names) for names in against]))
        features = scene_features(model, scene, limit)
        texts, others = embedded.result()
    return torch.stack([relevance(features, row[None], no)[0] for row, no in zip(texts, others)]), features


def chosen(score_N: Tensor, threshold: float, best: int | None) -> Tensor:
    """Numbers of the Gaussians that a query is answered with, the most similar first."""
    order_N = score_N.argsort(descending=True, stable=True)
    if best is not None:
        return order_N[:best]
    return order_N[: int((score_N > threshold).sum())]


def answers(scene: Gaussians, scores_QN: Tensor, queries: list[str], threshold: float, best: int | None) -> list[Any]:
    """What is said of each query: how many Gaussians, how similar, and where."""
    import torch

    found = []
    origin = torch.zeros(3) if scene.origin_3 is None else scene.origin_3
    for query, score_N in zip(queries, scores_QN):
        rows = chosen(score_N, threshold, best)
        places = scene.means_N3[rows].double() + origin
        found.append(
            {
                "query": query,
                "gaussians": len(rows),
                "of": len(scene),
                "above_half": int((score_N > 0.5).sum()),
                "highest": round(float(score_N.max()), 4),
                "lowest_chosen": round(float(score_N[rows[-1]]), 4) if len(rows) else None,
                "median_of_scene": round(float(score_N.median()), 4),
                "centre": [round(v, 3) for v in places.median(0).values.tolist()] if len(rows) else None,
            }
        )
    return found


def default_model() -> Path:
    """The run's own model where it was trained here, else the published one."""
    return TRAINED if (TRAINED / "config.json").is_file() else PUBLISHED


def need_model(given: Path | None) -> None:
    """Refuse to begin where no model was given and none is there.

    Raises:
        UserError: saying how to get one.
    """
    if given is None and not (default_model() / "config.json").is_file():
        raise UserError(
            f"no trained model: run `make scenesplat-train`, which writes {TRAINED}, or give --model FOLDER"
        )


def add_reading(parser: Parser) -> None:
    """The options that say how a scene's file is meant."""
    parser.add_argument("--unit", choices=("m", "cm", "mm", "inch", "ft"), help="of the file's lengths")
    parser.add_argument("--up", choices=("z", "-z", "y", "-y"), help="the file's axis that points upwards")
    parser.add_argument("--scales", choices=("log", "values"), default="log", help="logarithms (3DGS) or plain lengths")
    parser.add_argument("--opacity", choices=("logit", "values"), default="logit", help="logits (3DGS) or 0 to 1")


def reading_of(options: argparse.Namespace) -> Reading:
    """What those options say."""
    from scenesplat.ply import Reading

    return Reading(options.unit, options.up, options.scales, options.opacity)


def main(argv: list[str] | None = None) -> list[Any]:
    from scenesplat.text import NEGATIVES

    parser = Parser(description=__doc__)
    parser.add_argument("scene", type=Path, help="a 3DGS .ply, or a folder of .npy arrays")
    parser.add_argument("queries", nargs="+", metavar="TEXT", help="what to look for, each in its own words")
    parser.add_argument(
        "--model", type=Path, help="a model folder (default: that of the default run, else the published)"
    )
    parser.add_argument("--text", help="folder of the text encoder, where it is not where the model says")
    parser.add_argument("--negatives", nargs="+", default=list(NEGATIVES), help="what a query has to beat")
    parser.add_argument("--threshold", type=Share, default=0.5, help="lowest score that counts")
    parser.add_argument("--best", type=Count, help="take so many Gaussians, whatever their score")
    parser.add_argument("--passes", type=Whole, default=8, help="over the scene at most; 0 sees every Gaussian")
    parser.add_argument("--save", type=Path, help="write the chosen Gaussians as a .ply; one query only")
    parser.add_argument("--out", type=Path, help="write a picture, from above and from the door (.png)")
    parser.add_argument("--paint", type=Path, help="write the scene with what was found in red (.ply); one query only")
    parser.add_argument(
        "--features", type=Path, help="write the features: .safetensors, or .ply for their main directions as colours"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of sentences")
    add_reading(parser)
    parser.add_argument("--device", type=device_or_auto, default="cpu", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(argv)
    check(options)

    import torch

    from scenesplat.export import SceneModel
    from scenesplat.ply import read_scene, write_scene

    scene = read_scene(options.scene, reading_of(options))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    model = SceneModel.load(options.model or default_model(), encoder=options.text)
    model.network.to(device)
    scores, features = ask(model, scene, options.queries, options.negatives, options.passes)
    found = answers(scene, scores, options.queries, options.threshold, options.best)
    if options.save:
        rows = chosen(scores[0], options.threshold, options.best)
        if not len(rows):
            raise UserError(
                f"--save {options.save}: no Gaussian scores above {options.threshold:g} (the highest "
                f"{float(scores[0].max()):.3f}); lower --threshold, or take the --best K"
            )
        write_scene(options.save, scene.select(rows.sort().values))
    if options.out or options.features or options.paint:
        from common.weights import save_weights
        from scenesplat.figures import answers_picture, by_score, feature_colours, painted

        if options.out:
            answers_picture(scene, scores, options.queries, options.threshold, options.out)
        if options.paint:
            write_scene(options.paint, by_score(scene, scores[0], options.threshold))
        if options.features and options.features.suffix == ".safetensors":
            save_weights(options.features, {"features": features})
        elif options.features:
            write_scene(options.features, painted(scene, feature_colours(features)))
    print(json.dumps(found, indent=2) if options.json else "\n".join(map(sentence, found)))
    return found


def sentence(answer: dict[str, Any]) -> str:
    """An answer as a line."""
    if not answer["gaussians"]:
        return f"{answer['query']}: nothing; the highest score is {answer['highest']:.3f}"
    centre = ", ".join(f"{v:.2f}" for v in answer["centre"])
    return (
        f"{answer['query']}: {answer['gaussians']:,} of {answer['of']:,} Gaussians around ({centre}), scores "
        f"{answer['lowest_chosen']:.3f} to {answer['highest']:.3f}; the scene's median {answer['median_of_scene']:.3f}"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be before the scene is read.

    Raises:
        UserError: naming the option.
    """
    for name in ("save", "paint"):
        if getattr(options, name) and len(options.queries) > 1:
            raise UserError(f"--{name}: expected one query, whose Gaussians are written; ask the others by themselves")
    endings = {"save": [".ply"], "paint": [".ply"], "features": [".ply", ".safetensors"], "out": [".png"]}
    for name, known in endings.items():
        path = getattr(options, name)
        if path and path.suffix not in known:
            raise UserError(f"--{name} {path}: expected a name that ends in {' or '.join(known)}")
    need_model(options.model)


if __name__ == "__main__":
    run_main(main)
