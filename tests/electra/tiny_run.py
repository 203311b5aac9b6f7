"""A run of the trainer that takes seconds: what the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.drills import words

CONFIG = """
arms: [electra]
data: {{corpus: {corpus}, vocabulary_size: 120, length: 24}}
model:
  {{embedding_size: 16, hidden_size: 16, layers: 1, heads: 2, intermediate_size: 32, max_position: 24, dropout: 0.0,
   attention_dropout: 0.0, relative_positions: true, init: fan_in, generator_factor: 0.5}}
optimiser: {{lr: 0.002, warmup: 2}}
trainer:
  {{max_steps: 6, batch_size: 8, precision: 32-true, accelerator: cpu, checkpoint_every: 2, log_every: 1,
   evaluate_every: 3, progress: false}}
"""
WORDS = (
    *("we", "the", "people", "of", "this", "great", "nation", "must", "hold", "that", "all", "men", "are", "made"),
    *("to", "be", "free", "in", "law", "and", "at", "peace"),
)


def corpus(folder: Path) -> Path:
    """A text file of sentences in which a word follows from the one before."""
    path = folder / "text.txt"
    if not path.is_file():
        lines = []
        for number in range(240):
            first = number % len(WORDS)
            words = [WORDS[(first + number // 7 * i) % len(WORDS)] for i in range(4 + number % 9)]
            lines.append(" ".join(words).capitalize() + "." + ("\n" if number % 12 == 11 else ""))
        path.write_text("\n".join(lines) + "\n")
    return path


def arguments(folder: Path, **options: Any) -> list[str]:
    """Command line of the tiny run with run_dir `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "tiny.yaml"
    file.write_text(CONFIG.format(corpus=corpus(folder.parent)))
    return ["--config", str(file), "--run_dir", str(folder), *words(**options)]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`; dropout is drawn again as it was."""
    dropout = {"model__dropout": 0.1, "model__attention_dropout": 0.1}
    return arguments(folder, data__workers=0, downstream__tasks="[]", **dropout)


def train(folder: Path, **options: Any) -> Path:
    """Train; returns `folder`."""
    from electra.train import main

    main(arguments(folder, **options))
    return folder
