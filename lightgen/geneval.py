"""GenEval: the six columns, by the exact verifier for scenes, and the official layout for its own detectors.

    python lightgen/geneval.py write --model MODEL --prompts METADATA.jsonl --out OUT     # then score OUT
    python lightgen/geneval.py table --results RESULTS.jsonl

`write` draws four pictures a prompt into OUT/NNNNN/samples/0000.png beside OUT/NNNNN/metadata.jsonl, where the official
evaluate_images.py looks for them; `table` reads the results.jsonl that it writes. The overall score is the mean of the
six tasks' means, not of all prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Seed

if TYPE_CHECKING:
    from torch import Tensor

    from common.data.shapes import Spec

# Columns of tables 1 and 2, by the names of the official tags and of the scenes' tasks.
COLUMNS = ("single", "two", "colors", "counting", "position", "attribution", "overall")
TAGS = dict(zip(("single_object", "two_object", "colors", "counting", "position", "color_attr"), COLUMNS))
TASKS = dict(zip(("single", "two", "color", "count", "position", "attr"), COLUMNS))


def columns(images: Tensor, specs: Sequence[Spec]) -> dict[str, float]:
    """The six columns and `overall` of pictures of scenes, with `NAME_low` and `NAME_high` (95 %)."""
    from common.data.shapes_verifier import score

    found = score(images.numpy(), specs)
    result: dict[str, float] = {}
    for task, name in {**TASKS, "mean": "overall"}.items():
        if task in found:
            result |= {f"{name}{end}": found[f"{task}{end}"] for end in ("", "_low", "_high")}
    return result


def sides_right(images: Tensor, specs: Sequence[Spec]) -> tuple[float, int]:
    """(share of left and right that are right, pictures): of the position prompts that say left or right, over the
    pictures that show exactly the two objects; what mirrored training pictures take away (section 4.2). The share is
    not a number where no picture shows them.
    """
    from common.data.shapes_verifier import read

    right = shown = 0
    rows = [i for i, spec in enumerate(specs) if spec.relation in ("left of", "right of")]
    if not rows:
        return float("nan"), 0
    for reading, row in zip(read(images[rows].numpy()), rows):
        spec = specs[row]
        place = {(o.colour, o.shape): o.cx for o in reading.objects}
        first, second = spec.objects
        if len(reading.objects) == 2 and set(place) == {first, second}:
            left = place[first] < place[second]  # type: ignore[index]
            shown, right = shown + 1, right + (left == (spec.relation == "left of"))
    return (right / shown if shown else float("nan")), shown


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The columns of the official results: of every task the mean over pictures, overall the mean of the tasks."""
    by_tag: dict[str, list[float]] = {}
    for line in lines:
        by_tag.setdefault(TAGS[line["tag"]], []).append(float(line["correct"]))
    means = {name: sum(by_tag[name]) / len(by_tag[name]) for name in COLUMNS if name in by_tag}
    return {**means, "overall": sum(means.values()) / len(means)}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """GenEval's evaluation_metadata.jsonl, or a results.jsonl.

    Raises:
        UserError: a line that is not of that kind.
    """
    from common.data.lines import read_lines

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = []
    for number, text in read_lines(path):
        try:
            line = json.loads(text)
            known = line["tag"] in TAGS and isinstance(line["prompt"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(f'{path} line {number}: expected an object with "prompt" and a "tag" of GenEval\'s six')
        found.append(line)
    if not found:
        raise UserError(f"{path} is empty; expected one object a line")
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: one row a model."""
    from common.publishing import markdown_table

    rows = [[name, *(f"{values[c]:.3f}" if c in values else "-" for c in COLUMNS)] for name, values in found.items()]
    return markdown_table(["model", *COLUMNS], rows)


def main(argv: list[str] | None = None) -> Any:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="draw the official prompts into the official folders")
    write.add_argument("--model", type=Path, required=True, help="folder of a model")
    write.add_argument("--prompts", type=Path, required=True, help="GenEval's evaluation_metadata.jsonl")
    write.add_argument("--out", type=Path, required=True, help="folder to write")
    write.add_argument("--count", type=Count, default=4, help="pictures a prompt")
    write.add_argument("--seed", type=Seed, default=0, help="of the noises and orders")
    write.add_argument("--device", help="cpu or cuda")
    results = commands.add_parser("table", help="columns of the official results")
    results.add_argument("--results", type=Path, required=True, help="results.jsonl of evaluate_images.py")
    options = parser.parse_args(argv)
    if options.command == "table":
        lines = read_prompts(options.results)
        if bad := next((n for n, line in enumerate(lines, 1) if not isinstance(line.get("correct"), bool)), None):
            raise UserError(f'{options.results} line {bad}: "correct" is missing; expected results, not prompts')
        found = summary(lines)
        print(table({options.results.parent.name or "model": found}))
        return found

    import torch
    from PIL import Image

    from common.images import save_png
    from lightgen.painter import Painter

    prompts = read_prompts(options.prompts)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    painter = Painter.load(options.model, device)
    for number, prompt in enumerate(prompts):
        folder = options.out / f"{number:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(prompt), encoding="utf-8")
        images = painter.draw([prompt["prompt"]] * options.count, options.seed, number * options.count)
        for index, image in enumerate(images):
            save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / "samples" / f"{index:04d}.png")
    print(options.out)
    return options.out


if __name__ == "__main__":
    run_main(main)
