"""The six GenEval columns of a training run's models, or of any model folder.

    python lightgen/evaluate.py --run_dir runs/lightgen-small          # a finished run: its metrics.json again
    python lightgen/evaluate.py --model runs/lightgen-small/model --per_task 200

Scenes are judged by an exact verifier, so that every column is a share of pictures that show what was asked. Other data
have no such judge: then captions are matched with pictures by a small CLIP-like scorer. Prompts and noises are the same
for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count
from lightgen.geneval import COLUMNS, columns, sides_right, table

if TYPE_CHECKING:
    from torch import Tensor

    from common.data.shapes import Spec
    from lightgen.model import Fluid
    from lightgen.painter import Painter
    from lightgen.run import Run

EVALUATION_SEED = 90210  # of orders and noises: the same for every model, never trained on
LABELS = {"before": "before preferences", "sft": "as many steps on the winners", "dpo": "DPO"}


def measured(images: Tensor, prompts: Sequence[str], specs: Sequence[Spec] | None) -> dict[str, float]:
    """All numbers of a model's pictures."""
    if specs is None:
        from common.metrics.alignment import AlignmentScorer

        found = AlignmentScorer().score(images, list(prompts))
        return {key: float(found[key]) for key in ("cosine", "r_at_1", "right_beats_random")}
    from common.metrics.measures import variety

    share, count = sides_right(images, specs)
    return {**columns(images, specs), "sides": share, "sides_pictures": count, "variety": variety(images)}


def evaluate_run(run: Run, models: Mapping[str, Fluid]) -> dict[str, Any]:
    """Before and after preferences: same prompts, orders and noises.

    Returns:
        {"arms": {name: numbers}, ...}; the table goes to `table.md`, pictures to `comparison.png`, the course of
        preferences to `preferences.png`.
    """
    from common.data.cache import fingerprint_module
    from common.files import write_atomically
    from common.images import comparison_grid
    from lightgen.data import evaluation_prompts
    from lightgen.figures import preference_figure

    config = run.config
    prompts, specs, real = evaluation_prompts(config)
    images = {
        name: run.painter(model).draw(prompts, EVALUATION_SEED, batch_size=config.evaluation.batch_size)
        for name, model in models.items()
    }
    arms = {name: measured(found, prompts, specs) for name, found in images.items()}
    if real is not None:
        arms["pictures held out"] = measured(real, prompts, specs)
    labelled = {LABELS[name]: found for name, found in images.items()}
    shown = [prompts.index(prompt) for prompt in _spread(prompts, config.evaluation.grid)]
    first = {name: found[shown] for name, found in labelled.items()}
    comparison_grid(first, [prompts[i] for i in shown], config.evaluation.grid, run.folder / "comparison.png")
    if "dpo" in models:
        preference_figure(run.folder)
    metrics = {
        "data": config.data.name,
        "judge": "lite0-minilm" if specs is None else "the Shapes verifier",
        "prompts": len(prompts),
        "models_sha256": {name: fingerprint_module(model) for name, model in models.items()},
        "arms": arms,
    }
    named = {LABELS.get(name, name): values for name, values in arms.items()}
    text = table(named) if specs is not None else plain_table(named)
    write_atomically(run.folder / "table.md", lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    print(f"{len(prompts)} prompts, judged by {metrics['judge']}\n{text}")
    return metrics


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """Different prompts from the whole list, which goes task by task."""
    distinct = list(dict.fromkeys(prompts))
    return [distinct[i * len(distinct) // min(count, len(distinct))] for i in range(min(count, len(distinct)))]


def plain_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of whatever was measured."""
    from common.publishing import markdown_table

    keys = list(next(iter(found.values())))
    return markdown_table(["model", *keys], [[n, *(f"{v[k]:.4g}" for k in keys)] for n, v in found.items()])


def scores(painter: Painter, specs: Sequence[Spec], seed: int = EVALUATION_SEED) -> dict[str, float]:
    """The columns of a model on given scenes."""
    prompts = [spec.caption for spec in specs]
    return measured(painter.draw(prompts, seed), prompts, specs)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of lightgen/train.py")
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--per_task", type=Count, default=100, help="prompts a task, with --model")
    parser.add_argument("--world", choices=("full", "small"), default="full", help="of the prompts, with --model")
    options = parser.parse_args(argv)
    if (options.run_dir is None) == (options.model is None):
        raise UserError("expected either --run_dir, a finished run, or --model, a folder of a model")
    if options.run_dir:
        from lightgen.run import Run

        run = Run.existing(options.run_dir)
        names = {"before": run.stages[-1], "sft": "sft", "dpo": "dpo"}
        done = {name: part for name, part in names.items() if name == "before" or (run.folder / part).is_dir()}
        return evaluate_run(run, {name: run.load(part) for name, part in done.items()})
    from common.data.shapes import prompts
    from lightgen.data import WORLDS
    from lightgen.painter import Painter

    specs = prompts(options.per_task, "test", **WORLDS[options.world])
    found = scores(Painter.load(options.model), specs)
    print(table({options.model.name: {key: found[key] for key in COLUMNS}}))
    return found


if __name__ == "__main__":
    run_main(main)
