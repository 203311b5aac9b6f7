"""Command lines from dataclasses: YAML config plus `--section.option value` overrides, unknown keys refused by name.

Only light modules are imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from common.errors import UserError

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    default_config: Path | None,
    description: str,
    argv: Sequence[str] | None = None,
) -> tuple[Config, str]:
    """Read `--config FILE` (default: `default_config`) and overrides into a `config_class`.

    Returns:
        The config object and its YAML text (every value, defaults included), to be saved beside the results.

    Raises:
        UserError: a missing file, an unknown key or a value of the wrong type, named as the user wrote it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help=f"YAML file with the options below (default: {default_config})"
    )
    parser.add_class_arguments(config_class)
    given = _config_files(arguments)
    for name in given:
        if not Path(name).is_file():
            raise UserError(f"--config {name}: no such file; the ready-made ones are in configs/")
    if not given and default_config is not None:
        arguments = ["--config", str(default_config), *arguments]
    try:
        namespace = parser.parse_args(arguments)
    except ArgumentError as error:
        reason = _one_sentence(str(error))
        if "parsing config" in reason and len(files := given or [str(default_config)]) == 1:
            raise UserError(f"--config {files[0]} is not valid YAML: {reason}") from None
        raise UserError(f"{reason}; --help lists every option") from None
    plain = Namespace({key: value for key, value in vars(namespace).items() if key != "config"})
    values = vars(parser.instantiate_classes(plain))
    return config_class(**{k: v for k, v in values.items() if k != "config"}), parser.dump(plain, skip_none=False)


def read_run_config(config_class: type[Config], folder: Path, option: str = "") -> Config:
    """The configuration that a run's folder was made with.

    Args:
        option: that named the folder, for messages.

    Raises:
        UserError: the folder is not a run's, or its config.yaml has an option that is unknown or of another type.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{option} {folder}: no config.yaml there; expected the folder of a finished run".strip())
    return parse_config(config_class, None, "", ["--config", str(file)])[0]


def _config_files(arguments: Sequence[str]) -> list[str]:
    """The files named by `--config FILE` or `--config=FILE`."""
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    return files + [value for option, value in pairwise(arguments) if option == "--config"]


def _one_sentence(message: str) -> str:
    """jsonargparse explains a failure over several lines; keep the words, drop the layout."""
    text = re.sub(r"\s+", " ", message).strip()
    return re.sub(r"^(Parser key|Argument) ", "option ", text)
