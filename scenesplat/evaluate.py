"""What a network names right in scenes that it has never seen: of a training run, or of any model folder.

    python scenesplat/evaluate.py --run_dir runs/scenesplat-small                    # a finished run: metrics.json again
    python scenesplat/evaluate.py --model FOLDER --scenes SCENES                     # labelled scenes of the user's
    python scenesplat/evaluate.py --model FOLDER --scenes SCENES --labels scannet200 --exclude wall floor ceiling

f-mIoU and f-mAcc leave out walls, floors and ceilings. The tester's numbers average over the classes that were predicted
or occur, the hook's over those that occur: both are given, since they differ by many points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Whole

if TYPE_CHECKING:
    from torch import Tensor

    from scenesplat.data import SceneData
    from scenesplat.export import SceneModel
    from scenesplat.gaussians import Gaussians
    from scenesplat.protocol import Counts
    from scenesplat.run import Run


def counts_of(found_N: Tensor, scene: Gaussians, classes: int, neighbours: int, instances: bool = False) -> Counts:
    """Answers of a scene's Gaussians, voted onto its points, beside the truth.

    Args:
        instances: also vote inside the scene's true instances, as the configs for ScanNet do.
    """
    from scenesplat.protocol import Counts, instance_vote, neighbour_vote

    assert scene.labels_N is not None
    voted = neighbour_vote(found_N, scene.means_N3, scene.means_N3, classes, neighbours, scene.valid_N)
    if instances and scene.instances_N is not None:
        voted = instance_vote(voted, scene.instances_N, classes)
    return Counts.of(voted, scene.labels_N, classes)


def measured(
    model: SceneModel,
    scenes: Sequence[Gaussians],
    names: Sequence[str],
    excluded: Sequence[str],
    neighbours: int,
    fragments: int = 0,
) -> tuple[dict[str, dict[str, float]], list[Tensor]]:
    """Metrics by who averages (tester, hook, tester with votes of instances), and the classes found in each scene."""
    from scenesplat.inference import scene_classes
    from scenesplat.protocol import excluded_classes

    texts = model.text.embed(names)
    found = [scene_classes(model, scene, texts, fragments) for scene in scenes]
    plain, together = (
        _sum(counts_of(labels, scene, len(names), neighbours, instances) for labels, scene in zip(found, scenes))
        for instances in (False, True)
    )
    without = excluded_classes(names, excluded)
    metrics = {
        "tester": plain.metrics(without),
        "hook": plain.metrics(without, present_only=True),
        "instances": together.metrics(without),
    }
    return metrics, found


def _sum(counts: Any) -> Counts:
    first, *others = counts
    for other in others:
        first = first + other
    return first


def evaluate_run(run: Run) -> dict[str, Any]:
    """The run's network on its unseen scenes, the labels that would have been lifted there, and pictures.

    Returns:
        {"arms": {name: metrics}, ...}; `table.md` has them, `room.png` shows the first unseen scene.
    """
    from common.files import write_atomically
    from common.publishing import markdown_table
    from scenesplat.export import SceneModel
    from scenesplat.figures import room_picture
    from scenesplat.query import ask
    from scenesplat.text import NEGATIVES, STRUCTURE

    options = run.config.evaluation
    data = run.scenes("test")
    scenes = [data.scene(i) for i in range(len(data))]
    model = SceneModel.load(run.folder / "model")
    metrics, found = measured(model, scenes, data.classes, STRUCTURE, options.neighbours, options.fragments)
    arms = {"network": metrics["tester"], "network, votes of instances": metrics["instances"]}
    arms["network, hook's average"] = metrics["hook"]
    arms["lifted labels"] = labels_score(data, scenes, run, options.neighbours)
    keys = list(arms["network"])
    rows = [[arm, *(f"{values[key]:.3f}" for key in keys)] for arm, values in arms.items()]
    text = markdown_table(["arm", *keys], rows)
    write_atomically(run.folder / "table.md", lambda temporary: temporary.write_text(text + "\n"))
    queries = list(options.queries)
    scores, _ = ask(model, scenes[0], queries, list(NEGATIVES), options.fragments)
    assert scenes[0].labels_N is not None
    room_picture(scenes[0], scenes[0].labels_N, found[0], data.classes, scores, queries, run.folder / "room.png")
    result = {"scenes": len(scenes), "gaussians": sum(map(len, scenes)), "classes": data.classes, "arms": arms}
    report(result)
    return result


def labels_score(data: SceneData, scenes: Sequence[Gaussians], run: Run, neighbours: int) -> dict[str, float]:
    """What the collected labels of unseen scenes would score by themselves: the network never saw them."""
    from scenesplat.protocol import classify, excluded_classes
    from scenesplat.text import STRUCTURE

    texts = run.text.embed(data.classes)
    counts = []
    for scene in scenes:
        assert scene.features_NF is not None
        counts.append(counts_of(classify(scene.features_NF, texts), scene, len(data.classes), neighbours))
    return _sum(counts).metrics(excluded_classes(data.classes, STRUCTURE))


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
    from scenesplat.export import SceneModel

    model = SceneModel.load(options.model, encoder=options.text)
    names = class_names(options.labels, model)
    scenes = read_scenes(options.scenes)
    metrics, _ = measured(model, scenes, names, options.exclude, options.neighbours, options.fragments)
    result = {"scenes": len(scenes), "gaussians": sum(map(len, scenes)), "classes": names, "arms": metrics}
    report(result)
    return result


if __name__ == "__main__":
    run_main(main)
