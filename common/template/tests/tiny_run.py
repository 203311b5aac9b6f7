"""A run of the trainer that takes seconds, which `tests.drills` kills, stops and feeds damaged files."""

from pathlib import Path


def command(folder: Path) -> list[str]:
    """Arguments of train.py for a whole run in `folder`."""
    options = ["--trainer.max_steps=6", "--trainer.checkpoint_every=2", "--trainer.log_every=1"]
    return [f"--run_dir={folder}", "--trainer.progress=false", "--trainer.precision=32-true", *options]
