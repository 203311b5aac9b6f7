"""Bring a finished default run's table, numbers and pictures into results/, where READMEs show them.

    python -m report.record_run pc_darts runs/pc_darts-small
    python -m report.record_run electra runs/electra-small --figure curves.png "Default run: losses in training."
    python -m report.record_run eeea_net runs/eeea_net-detection --name detection   # another run of the same paper
    python -m report.readme_tables        # then: the READMEs

Writes results/run_<paper>.md (the run's table.md and a line on time and machine), results/runs/<folder's name>.json
(the run's metrics.json with the machine, versions and commit) and, for every --figure FILE CAPTION,
results/figures/<paper>/default_run_<FILE> with its caption; --name NAME stands between paper and file in the names.
Nothing is computed here. On a CPU without bf16 instructions (or with ONEDNN_MAX_CPU_ISA=AVX2, as the run itself) only
results/runs/<folder's name>-without-bf16.json is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.choices import FILE, Choices
from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically, write_json
from common.ledger import origin_of
from common.paths import RESULTS
from common.precision import bf16_possible, precisions_taken
from common.publishing import copy_picture
from report.papers import all_papers

WITHOUT_BF16 = "-without-bf16"  # in the name of a record from a CPU that lacks these instructions


def _precision(run_dir: Path) -> str | None:
    """Which precision the run trained in; None for a program that has no choice."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) if (run_dir / "config.yaml").is_file() else {}
    chosen = any(Choices(file.parent).kept("precision") for file in run_dir.rglob(FILE))
    asked = config.get("trainer", {}).get("precision", "auto" if chosen else None)
    return None if asked is None else precisions_taken(run_dir, asked)


def _seconds(metrics: dict[str, Any], path: Path) -> float:
    taken = metrics.get("seconds")
    total = taken.get("total") if isinstance(taken, dict) else taken
    if not isinstance(total, int | float):
        raise UserError(f"{path}: expected the run's wall time as 'seconds' or 'seconds.total'")
    return float(total)


def record(
    paper: str,
    run_dir: Path,
    figures: Mapping[str, str] | None = None,
    results: Path = RESULTS,
    name: str = "",
    note: str = "",
) -> Path:
    """Write the run's table and numbers below `results`; returns the file (the Markdown one, if both).

    Args:
        figures: captions of the pictures to copy, by their places in `run_dir`.
        name: of another run than the paper's first one.
        note: of how the machine was used, which stands behind its name: "one thread, other programs beside it".
    Raises:
        UserError: an unknown paper, a file of a finished run is missing, or the wall time is not in metrics.json.
    """
    known, figures = [entry.key for entry in all_papers()], figures or {}
    if paper not in known:
        raise UserError(f"unknown paper {paper!r}; expected one of {', '.join(known)}")
    for needed in ("metrics.json", *(("table.md", *figures) if bf16_possible("cpu") else ())):
        if not (run_dir / needed).is_file():
            raise UserError(f"{run_dir / needed} is missing; expected the folder of a finished run of {paper}/train.py")
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    minutes = _seconds(metrics, run_dir / "metrics.json") / 60
    kept = origin_of(run_dir, *(path.parent for path in run_dir.glob("*/origin.json"))) | metrics
    if note:
        kept["hardware"] = f"{kept['hardware']}; {note}"
    if not bf16_possible("cpu"):
        kept["bf16_instructions"] = False
    if (precision := _precision(run_dir)) is not None:
        kept["precision"] = precision
    (results / "runs").mkdir(parents=True, exist_ok=True)
    if not kept.get("bf16_instructions", True):  # the other kind of CPU: its time stands beside the record
        path = results / "runs" / f"{run_dir.name}{WITHOUT_BF16}.json"
        write_json(path, kept)
        return path
    text = (run_dir / "table.md").read_text(encoding="utf-8").strip()
    text += f"\n\n{minutes:.1f} minutes in all on {kept['hardware']}.\n"
    target = results / f"run_{paper}{name and f'_{name}'}.md"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"))
    write_json(results / "runs" / f"{run_dir.name}.json", kept)
    for figure, caption in figures.items():
        kept_as = f"default_run_{name and f'{name}_'}{Path(figure).name}"
        copy_picture(run_dir / figure, results / "figures" / paper / kept_as, caption)
    return target


def main(argv: Sequence[str] | None = None) -> None:
    """See --help."""
    parser = Parser(description=__doc__)
    parser.add_argument("paper", help="name of the paper")
    parser.add_argument("run_dir", type=Path, help="folder of a finished run of its train.py")
    parser.add_argument(
        "--figure",
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "CAPTION"),
        help="picture of the run folder and what it shows; may be repeated",
    )
    parser.add_argument("--name", default="", help="of another run than the paper's first one")
    parser.add_argument("--note", default="", help="of how the machine was used: threads, other programs beside it")
    options = parser.parse_args(argv)
    print(record(options.paper, options.run_dir, dict(options.figure), name=options.name, note=options.note))


if __name__ == "__main__":
    run_main(main)
