"""Fine-tune a saved encoder on labelled tasks and print its scores beside the same network from scratch.

    python electra/evaluate.py runs/electra-small/electra                     # the default tasks, three seeds
    python electra/evaluate.py DIR OTHER_DIR --tasks acceptability,pos       # two encoders side by side
    python electra/evaluate.py DIR --tasks file:reviews.tsv --seeds 0 --output scores.json
    python electra/evaluate.py DIR --tasks sentiment --predict sentences.txt # one label a line, tab, the sentence

DIR is a transformers directory with its vocabulary, or the folder of a run's arm. Scores are per cent on the test
split, the median over the seeds and, in brackets, the lowest and the highest. Tasks: see electra/tasks.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.data.lines import read_lines
from common.errors import UserError, run_main
from common.options import Count, Portion, Positive, Range, device_or_auto

if TYPE_CHECKING:
    from electra.config import DownstreamConfig, FinetuneConfig
    from electra.finetuning import FinetuneResult
    from electra.tasks import Task

DEFAULT_TASKS = "acceptability,coherence,sentiment"
SCRATCH = "from scratch"


def evaluate_encoders(
    directories: Sequence[Path],
    tasks: Sequence[Task],
    config: FinetuneConfig,
    seeds: Sequence[int],
    scratch: bool = True,
    vocabulary: Path | None = None,
) -> list[dict[str, Any]]:
    """Fine-tune every encoder on every task: one record per task and encoder.

    Args:
        scratch: also train the first encoder's architecture from random weights.
        vocabulary: a vocab.txt for directories that hold none.

    Returns:
        Records with task, encoder, metric, score (median), scores (one per seed), majority and the runs themselves.
    """
    import statistics

    from electra.finetuning import finetune
    from electra.layouts import encoder_folder, load_pretrained
    from electra.wordpiece import load_tokenizer

    places = {folder: encoder_folder(folder) for folder in directories}
    loaded = [
        (str(folder), load_pretrained(place), load_tokenizer(vocabulary or place)) for folder, place in places.items()
    ]
    sources: list[tuple[str, Any, Any]] = [*loaded]
    if scratch:
        sources.insert(0, (SCRATCH, loaded[0][1].config, loaded[0][2]))
    records = []
    for task in tasks:
        for name, source, tokenizer in sources:
            runs: list[FinetuneResult] = []
            for seed in seeds:
                runs.append(finetune(source, tokenizer, task, config, seed))
                print(f"{task.name}, {name}, seed {seed}: {task.metric} {runs[-1].score:.1f}", file=sys.stderr)
            scores = [run.score for run in runs]
            records.append(
                {
                    "task": task.name,
                    "encoder": name,
                    "metric": task.metric,
                    "score": statistics.median(scores),
                    "scores": scores,
                    "majority": None if task.majority is None else 100 * task.majority,
                    "train_items": len(task.train),
                    "test_items": len(task.test),
                    "runs": [run.record() for run in runs],
                }
            )
    return records


def table_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A head and one row per task: metric, majority class, then a column per encoder: median [lowest, highest]."""
    encoders = list(dict.fromkeys(record["encoder"] for record in records))
    lines = [["task", "metric", "majority", *encoders]]
    for task in dict.fromkeys(record["task"] for record in records):
        of_task = {record["encoder"]: record for record in records if record["task"] == task}
        first = next(iter(of_task.values()))
        majority = "-" if first["majority"] is None else f"{first['majority']:.1f}"
        cells = []
        for encoder in encoders:
            scores = of_task[encoder]["scores"]
            spread = f" [{min(scores):.1f}, {max(scores):.1f}]" if len(scores) > 1 else ""
            cells.append(f"{of_task[encoder]['score']:.1f}{spread}")
        lines.append([task, first["metric"], majority, *cells])
    return lines


def format_table(records: Sequence[dict[str, Any]]) -> str:
    """`table_rows` in columns of equal width, for a terminal."""
    lines = table_rows(records)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown_tables(found: Mapping[str, Any]) -> str:
    """What a run found, as Markdown: a line an arm, then a line a labelled task if there are any."""
    lines = ["| arm | steps | TFLOP | pre-training, s |", "|---" * 4 + "|"]
    for name, arm in found["arms"].items():
        lines.append(f"| {name} | {arm['steps']:,} | {arm['flops'] / 1e12:.1f} | {arm['seconds']:,.0f} |")
    if records := found.get("downstream"):
        head, *rows = table_rows(records)
        lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    return "\n".join(lines) + "\n"


def open_tasks(options: DownstreamConfig) -> list[Task]:
    """The labelled tasks; opened before anything is trained, so that a misspelt name costs no time.

    Raises:
        UserError: an unknown task, or its data are missing.
    """
    from electra.tasks import load_task

    return [
        load_task(task, train_size=options.train_examples).first(test=options.test_examples) for task in options.tasks
    ]


def fine_tune(tasks: Sequence[Task], options: DownstreamConfig, encoders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Scores of the encoders, and of the first one's network from scratch, on every task (see `evaluate_encoders`).

    Args:
        encoders: transformers directories by the name that tables show.
    """
    names = {str(folder): name for name, folder in encoders.items()}
    records = evaluate_encoders(list(encoders.values()), tasks, options, options.seeds)
    return [{**record, "encoder": names.get(record["encoder"], record["encoder"])} for record in records]


def predict_lines(
    directory: Path, task: Task, config: FinetuneConfig, sentences: Path, vocabulary: Path | None = None
) -> list[str]:
    """Fine-tune on the task, then answer every line of a text file: "answer TAB line". A line is a sentence, a pair
    with a tab between (for questions: the question and its passage), or for tagging words with blanks between them.

    There are as many answers as lines, in their order; a blank line gets an empty one.

    Raises:
        UserError: the file has no line, or for questions one without a passage.
    """
    from electra.finetuning import answer_text, finetune_model, predict
    from electra.layouts import encoder_folder
    from electra.tasks import Item
    from electra.wordpiece import load_tokenizer

    lines = [line for _, line in read_lines(sentences, blank=True)]
    if not any(line.strip() for line in lines):
        raise UserError(f"--predict {sentences}: the file is empty; expected one sentence a line")

    def item_of(number: int, line: str) -> Item | None:
        first, _, second = line.partition("\t")
        if not line.strip():
            return None
        if task.kind == "tagging":
            return Item(words=tuple(line.split()))
        if task.kind != "questions":
            return Item(first, second)
        if not (first.strip() and second.strip()):
            raise UserError(f"--predict {sentences} line {number}: expected a question, a tab, and its passage")
        return Item(first, words=tuple(second.split()))

    items = [item_of(number, line) for number, line in enumerate(lines, 1)]
    directory = encoder_folder(directory)
    tokenizer = load_tokenizer(vocabulary or directory)
    model, _ = finetune_model(directory, tokenizer, task, config)
    answers = iter(predict(model, [item for item in items if item is not None], task, tokenizer, config))
    told = ["" if item is None else answer_text(next(answers), item, task) for item in items]
    return [f"{answer}\t{line}" for answer, line in zip(told, lines)]


def split_tasks(text: str) -> list[str]:
    """The tasks of a list with commas; one inside the path of a `file:` task does not part it."""
    from electra.tasks import NAMES

    return re.split(rf",(?=\s*(?:(?:{'|'.join(NAMES)})\s*(?:[:,]|$)|file:|datasets:))", text)


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="folders of saved encoders (transformers directories)"
    )
    parser.add_argument("--tasks", default=DEFAULT_TASKS, help=f"with commas between them (default: {DEFAULT_TASKS})")
    parser.add_argument("--seeds", default="0,1,2", help="one fine-tuning each (default: 0,1,2)")
    parser.add_argument("--no_scratch", action="store_true", help="leave the network from scratch out")
    parser.add_argument("--vocab", type=Path, help="vocab.txt, if the directories hold none")
    parser.add_argument("--data_root", type=Path, help="folder with the files of a fetched corpus")
    parser.add_argument("--output", type=Path, help="also write the scores to this JSON file")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="answer the lines of a text file instead")
    parser.add_argument("--train_examples", type=Count, help="at most so many training examples")
    parser.add_argument("--test_examples", type=Count, help="at most so many test examples")
    parser.add_argument(
        "--epochs",
        type=Annotated[float, Range(0, 10**4, above=True)],
        default=3.0,
        help="passes over the training split",
    )
    parser.add_argument("--batch_size", type=Count, default=32, help="items of a step")
    parser.add_argument("--lr", type=Positive, default=3e-4, help="learning rate of the head")
    parser.add_argument("--scratch_lr", type=Positive, help="rate of the network from scratch (default: --lr)")
    parser.add_argument(
        "--layer_decay", type=Portion, default=0.8, help="factor of the rate from each layer to the one below"
    )
    parser.add_argument("--max_length", type=Annotated[int, Range(8, 10**6)], default=128, help="longest row in tokens")
    parser.add_argument("--double_unordered", action="store_true", help="train on pairs in both orders")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 runs the encoder under autocast"
    )
    parser.add_argument(
        "--device", type=device_or_auto, default="auto", help="cpu, cuda, or auto: a GPU if there is one"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    from common.files import write_json
    from electra.config import FinetuneConfig
    from electra.tasks import load_task

    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {arguments.seeds}: expected whole numbers with commas between them") from None
    for seed in seeds:
        Range(0, 2**32 - 1).check("seeds", seed, int)
    own = {field.name for field in fields(FinetuneConfig)}
    config = FinetuneConfig(**{key: value for key, value in vars(arguments).items() if key in own})
    tasks = [
        load_task(name.strip(), arguments.data_root, arguments.train_examples).first(test=arguments.test_examples)
        for name in split_tasks(arguments.tasks)
        if name.strip()
    ]
    if not tasks:
        raise UserError("--tasks: no task given; see electra/tasks.py")
    if arguments.predict is not None:
        if len(tasks) != 1 or len(arguments.directories) != 1:
            raise UserError("--predict needs one encoder and one task")
        print("\n".join(predict_lines(arguments.directories[0], tasks[0], config, arguments.predict, arguments.vocab)))
        return
    records = evaluate_encoders(arguments.directories, tasks, config, seeds, not arguments.no_scratch, arguments.vocab)
    print(format_table(records))
    if arguments.output is not None:
        write_json(arguments.output, {"config": vars(config), "seeds": seeds, "records": records})


if __name__ == "__main__":
    run_main(main)
