"""What a network names right in scenes that it has never seen: of a training run, or of any model folder.

    python scenesplat/evaluate.py --run_dir runs/scenesplat-small                   # a finished run: metrics.json again
    python scenesplat/evaluate.py --model FOLDER --scenes SCENES                     # labelled scenes of the user's
    python scenesplat/evaluate.py --model FOLDER --scenes SCENES --labels scannet200 --exclude wall floor ceiling

f-mIoU and f-mAcc leave out walls, floors and ceilings. The tester's numbers average over the classes that were
predicted or occur, the hook's over those that occur: both are given, since they differ by many points.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Whole

if TYPE_CHECKING:
    from torch import Tensor

    from scenesplat.data import SceneData
    from scenesplat.export import LabelModel, SceneModel
    from scenesplat.gaussians import Gaussians
    from scenesplat.pretrain_config import MeasureConfig
    from scenesplat.protocol import Counts
    from scenesplat.rooms import Room
    from scenesplat.run import Run


@dataclass
class Asked:
    """Points of a scene whose class is asked for."""

    places_Q3: Tensor
    labels_Q: Tensor
    instances_Q: Tensor | None

    @classmethod
    def of(cls, scene: Room | Gaussians) -> Asked:
        """Points of a room's surfaces; of a scene without them its labelled Gaussians."""
        from scenesplat.rooms import Room

        if isinstance(scene, Room):
            return cls(scene.points_Q3, scene.point_labels_Q, scene.point_instances_Q)
        if scene.labels_N is None:
            raise UserError("a scene without labels cannot be measured; expected segment.npy, or labels in the .ply")
        return cls(scene.means_N3, scene.labels_N, scene.instances_N)


def counts_of(
    found_N: Tensor, scene: Gaussians, asked: Asked, classes: int, neighbours: int, instances: bool = False
) -> Counts:
    """Answers of a scene's Gaussians, voted onto the points that are asked about, beside the truth.

    Args:
        instances: also vote inside the scene's true instances, as the configs for ScanNet do.
    """
    from scenesplat.protocol import Counts, instance_vote, neighbour_vote

    voted = neighbour_vote(found_N, scene.means_N3, asked.places_Q3, classes, neighbours, scene.valid_N)
    if instances and asked.instances_Q is not None:
        voted = instance_vote(voted, asked.instances_Q)
    return Counts.of(voted, asked.labels_Q, classes)


def measured(
    model: SceneModel,
    scenes: Sequence[tuple[Gaussians, Asked]],
    names: Sequence[str],
    excluded: Sequence[str],
    neighbours: int,
    fragments: int = 0,
) -> tuple[dict[str, dict[str, float]], list[Tensor]]:
    """Metrics by who averages (tester, hook, tester with votes of instances), and the classes found in each scene."""
    from scenesplat.inference import scene_classes
    from scenesplat.protocol import excluded_classes

    texts = model.texts(names)
    found = [scene_classes(model, scene, texts, fragments) for scene, _ in scenes]
    plain, together = (
        summed(
            counts_of(labels, scene, asked, len(names), neighbours, instances)
            for labels, (scene, asked) in zip(found, scenes)
        )
        for instances in (False, True)
    )
    without = excluded_classes(names, excluded)
    metrics = {
        "tester": plain.metrics(without),
        "hook": plain.metrics(without, present_only=True),
        "instances": together.metrics(without),
    }
    return metrics, found


def summed(counts: Iterable[Counts]) -> Counts:
    """Counts of several scenes together."""
    return functools.reduce(operator.add, counts)


def evaluate_run(run: Run) -> dict[str, Any]:
    """The run's network on its unseen scenes, the labels that would have been lifted there, and pictures.

    Returns:
        {"arms": {name: metrics}, ...}; `table.md` has them, `room.png` shows an unseen scene.
    """
    from common.files import write_atomically
    from common.publishing import markdown_table
    from scenesplat.export import SceneModel
    from scenesplat.figures import room_picture
    from scenesplat.query import ask
    from scenesplat.text import NEGATIVES, STRUCTURE

    options, data = run.config.evaluation, run.scenes("test")
    asked: Sequence[Room | Gaussians] = data.rooms or data.scenes
    scenes = [(scene, Asked.of(points)) for scene, points in zip(data.scenes, asked, strict=True)]
    model = SceneModel.load(run.folder / "model")
    names = data.classes
    metrics, found = measured(model, scenes, names, STRUCTURE, options.neighbours, options.fragments)
    arms = {
        "network": metrics["tester"],
        "network, votes of instances": metrics["instances"],
        "network, hook's average": metrics["hook"],
    }
    if all(scene.features_NF is not None for scene, _ in scenes):
        arms["lifted labels"] = labels_score(scenes, model.texts(names), names, options.neighbours)
    keys = list(arms["network"])
    rows = [[arm, *(f"{values[key]:.3f}" for key in keys)] for arm, values in arms.items()]
    text = markdown_table(["arm", *keys], rows)
    write_atomically(run.folder / "table.md", lambda temporary: temporary.write_text(text + "\n"))
    queries = list(options.queries)
    number = shown_scene([scene.labels_N for scene, _ in scenes], model, names, queries)
    scene = scenes[number][0]
    scores, _ = ask(model, scene, queries, list(NEGATIVES), options.fragments)
    assert scene.labels_N is not None
    room_picture(scene, scene.labels_N, found[number], names, scores, queries, run.folder / "room.png")
    count = sum(len(scene) for scene, _ in scenes)
    result = {"scenes": len(scenes), "gaussians": count, "classes": names, "arms": arms}
    report(result)
    return result


def labels_measured(model: LabelModel, data: SceneData, options: MeasureConfig) -> dict[str, Any]:
    """What a model that was fine-tuned with labels names right in unseen scenes: as `evaluate_run` has it."""
    from scenesplat.text import STRUCTURE

    points: Sequence[Room | Gaussians] = data.rooms or data.scenes
    scenes = [(scene, Asked.of(asked)) for scene, asked in zip(data.scenes, points, strict=True)]
    arms = classified(model, scenes, STRUCTURE, options.neighbours, options.fragments, options.views)
    count = sum(len(scene) for scene, _ in scenes)
    return {"scenes": len(scenes), "gaussians": count, "classes": model.classes, "arms": arms}


def classified(
    model: LabelModel,
    scenes: Sequence[tuple[Gaussians, Asked]],
    excluded: Sequence[str],
    neighbours: int,
    fragments: int = 0,
    views: int = 1,
) -> dict[str, dict[str, float]]:
    """Metrics by who averages, of a model with a head of classes."""
    from scenesplat.inference import scene_probabilities
    from scenesplat.protocol import excluded_classes

    found = summed(
        counts_of(
            scene_probabilities(model, scene, fragments, views).argmax(1), scene, asked, len(model.classes), neighbours
        )
        for scene, asked in scenes
    )
    without = excluded_classes(model.classes, excluded)
    return {"tester": found.metrics(without), "hook": found.metrics(without, present_only=True)}


def shown_scene(
    labels: Sequence[Tensor | None], model: SceneModel, names: Sequence[str], queries: Sequence[str]
) -> int:
    """The first scene with the most of the classes that are nearest to the queries: there is something to see."""
    asked = {int(k) for k in (model.texts(queries) @ model.texts(names).t()).argmax(1)}
    there = [len(asked & {*labels_N.tolist()}) if labels_N is not None else 0 for labels_N in labels]
    return there.index(max(there))


def labels_score(
    scenes: Sequence[tuple[Gaussians, Asked]], texts_KD: Tensor, names: Sequence[str], neighbours: int
) -> dict[str, float]:
    """What the labels that were collected for unseen scenes score by themselves: the network never saw them."""
    from scenesplat.protocol import classify, excluded_classes
    from scenesplat.text import STRUCTURE

    counts = []
    for scene, asked in scenes:
        assert scene.features_NF is not None
        counts.append(counts_of(classify(scene.features_NF, texts_KD), scene, asked, len(names), neighbours))
    return summed(counts).metrics(excluded_classes(names, STRUCTURE))


def report(metrics: dict[str, Any]) -> None:
    """Print one line an arm."""
    print(f"{metrics['scenes']} unseen scenes, {metrics['gaussians']:,} Gaussians, {len(metrics['classes'])} classes")
    for arm, values in metrics["arms"].items():
        print(f"  {arm}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


def class_names(word: str | None, model: SceneModel) -> list[str]:
    """The classes that `--labels` says: a label set, a file with one name a line, or those of the model.

    Raises:
        UserError: it is none of them.
    """
    from common.data.lines import read_lines
    from scenesplat.text import label_sets

    if word is None:
        if not model.classes:
            raise UserError(f"--labels is missing: the model names no classes; {', '.join(label_sets())} or a file")
        return model.classes
    if word in label_sets():
        return label_sets()[word]
    if not Path(word).is_file():
        raise UserError(f"--labels {word}: expected one of {', '.join(label_sets())}, or a file with one name a line")
    return [line.strip() for _, line in read_lines(word)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    from scenesplat.text import STRUCTURE

    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of scenesplat/train.py")
    parser.add_argument("--model", type=Path, help="a model folder instead")
    parser.add_argument("--scenes", type=Path, help="with --model: a folder of scenes that have labels")
    parser.add_argument("--labels", help="their classes: a label set, or a file with one name a line")
    parser.add_argument("--exclude", nargs="*", default=list(STRUCTURE), help="classes that f-mIoU leaves out")
    parser.add_argument("--neighbours", type=Count, default=25, help="nearest Gaussians whose majority counts")
    parser.add_argument("--fragments", type=Whole, default=0, help="passes over a scene at most; 0 sees every Gaussian")
    parser.add_argument("--text", help="folder of the text encoder, where it is not where the model says")
    options = parser.parse_args(argv)
    if (options.run_dir is None) == (options.model is None):
        raise UserError("expected either --run_dir, a finished run, or --model, a model folder")
    if options.run_dir:
        from scenesplat.run import Run

        return evaluate_run(Run.existing(options.run_dir))
    if options.scenes is None:
        raise UserError("--scenes is missing: a folder of scenes that have labels")
    from scenesplat.data import read_scenes
    from scenesplat.export import LabelModel, SceneModel, has_labels

    if has_labels(options.model):
        if options.labels is not None:
            raise UserError(f"--labels {options.labels}: {options.model} answers with the classes it was tuned with")
        tuned = LabelModel.load(options.model)
        names = tuned.classes
        scenes = [(scene, Asked.of(scene)) for scene in read_scenes(options.scenes)]
        metrics = classified(tuned, scenes, options.exclude, options.neighbours, options.fragments)
    else:
        model = SceneModel.load(options.model, encoder=options.text)
        names = class_names(options.labels, model)
        scenes = [(scene, Asked.of(scene)) for scene in read_scenes(options.scenes)]
        metrics, _ = measured(model, scenes, names, options.exclude, options.neighbours, options.fragments)
    count = sum(len(scene) for scene, _ in scenes)
    result = {"scenes": len(scenes), "gaussians": count, "classes": names, "arms": metrics}
    report(result)
    return result


if __name__ == "__main__":
    run_main(main)
