"""Where files live. Nothing is absolute: everything hangs off the checkout, the working folder or `REPRO_CACHE`."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UserError

# The folder that holds the packages: the checkout, or site-packages where a plain `pip install` has put them.
REPOSITORY = Path(__file__).resolve().parents[1]
CHECKOUT = (REPOSITORY / "pyproject.toml").is_file()
# What programs write: in the checkout, else in the folder where they are started. Never into site-packages.
WORKPLACE = REPOSITORY if CHECKOUT else Path.cwd()
RESULTS = WORKPLACE / "results"


def papers(root: Path = REPOSITORY) -> tuple[str, ...]:
    """The papers' folders, by name: a folder with train.py and config.py is a paper."""
    return tuple(sorted(p.parent.name for p in root.glob("*/train.py") if (p.parent / "config.py").is_file()))


def existing_path(path: str | Path) -> Path:
    """A path as given, or beside the packages if it is not there (so that configs work from any folder)."""
    given = Path(path)
    return given if given.is_absolute() or given.exists() else REPOSITORY / given


def shipped(path: str | Path) -> Path:
    """A path as given; one that comes with a paper (ldm/pretrained/..., ldm/configs/...) is found from any folder."""
    given = Path(path)
    if given.parts[1:2] in (("pretrained",), ("configs",)) and not given.exists() and (REPOSITORY / given).exists():
        return REPOSITORY / given
    return given


def cache_root() -> Path:
    """The folder of derived data: `REPRO_CACHE`, else the checkout's .cache, else the user's."""
    if given := os.environ.get("REPRO_CACHE"):
        return Path(given)
    if CHECKOUT:
        return REPOSITORY / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "less-compute"


def cache_dir(*parts: str) -> Path:
    """A folder for derived data (rasterised images, features), created on demand.

    Raises:
        UserError: it cannot be made.
    """
    folder = cache_root().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror}); set REPRO_CACHE to a folder that can be written"
        ) from None
    return folder


def need_checkout(what: str) -> None:
    """Refuse what only makes sense in a checkout.

    Raises:
        UserError: the packages are installed without one.
    """
    if not CHECKOUT:
        raise UserError(f"{what} works in a checkout of the repository, and {REPOSITORY} is none: clone it")
