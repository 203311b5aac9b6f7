"""Where files live. Nothing is absolute: everything hangs off the repository or `REPRO_CACHE`."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"


def papers(root: Path = REPOSITORY) -> tuple[str, ...]:
    """The papers' folders, by name: a folder with train.py and config.py is a paper."""
    return tuple(sorted(p.parent.name for p in root.glob("*/train.py") if (p.parent / "config.py").is_file()))


def existing_path(path: str | Path) -> Path:
    """A path as given, or below the repository if it is not there (so that configs work from any folder)."""
    given = Path(path)
    return given if given.is_absolute() or given.exists() else REPOSITORY / given


def cache_dir(*parts: str) -> Path:
    """A folder for derived data (rasterised images, features), created on demand; `REPRO_CACHE` overrides its root.

    Raises:
        UserError: it cannot be made.
    """
    root = Path(os.environ.get("REPRO_CACHE", REPOSITORY / ".cache"))
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror}); set REPRO_CACHE to a folder that can be written"
        ) from None
    return folder
