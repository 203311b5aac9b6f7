"""Command lines: from dataclasses (YAML files and `--section.option value`) and, for small programs, from argparse.

Both refuse what is unknown or out of its range by name, as one sentence and before any work, and both show in `--help`
what applies. Only light modules are imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from common.errors import UserError
from common.files import refuse_deep, text_of
from common.options import check_ranges, is_text, ranges_of, sections_of, types_of
from common.paths import REPOSITORY, shipped

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    default_config: Path | None,
    description: str,
    argv: Sequence[str] | None = None,
    beneath: Sequence[str] = (),
) -> tuple[Config, str]:
    """Read `--config FILE` (default: `default_config`) and overrides into a `config_class`.

    The command line wins over the files, wherever `--config` stands in it; a later file wins over an earlier one.

    Args:
        beneath: options that the files win over.

    Returns:
        The config object and its YAML text (every value, defaults included), to be saved beside the results.

    Raises:
        UserError: a missing file, an unknown key, a value of the wrong type or out of its range, named as the user
            wrote it.
    """
    given, arguments = take("--config", argv)
    given = [str(shipped(name)) for name in given]
    parser = _parser(config_class, description, default_config)
    for name in given:
        empty = [key for key, value in read_options(Path(name)).items() if value is None]
        for key in empty:
            hint = parser.types.get(key)
            if [*sections_of(hint)] and not get_args(hint):  # None may stand for a section that can be left out
                raise UserError(f'--config {name}: "{key}:" is empty; give it options, or leave it out')
    files = given or ([] if default_config is None else [str(default_config)])
    _refuse_unknown(arguments, [*parser._option_string_actions, *(f"--{name}" for name in parser.types)])
    written = [*beneath, *(word for name in files for word in ("--config", name))]
    try:
        if {"-h", "--help"} & {*arguments}:  # whose defaults are then the values that apply
            applies = parser.parse_args(written).items()
            parser.set_defaults({name: value for name, value in applies if name not in ("config", "print_config")})
        namespace = parser.parse_args([*written, *arguments])
    except ArgumentError as error:
        reason = _one_sentence(str(error))
        if wrong := re.fullmatch(r"option \"([\w.]+)\": Expected an? \w+\. Got value: (.*)", reason):
            for kind, allowed in ranges_of(parser.types.get(wrong[1])):
                allowed.check(wrong[1], wrong[2], kind)
        raise UserError(f"{_place(parser, files, written)}{reason}; --help lists every option") from None
    plain = Namespace({key: value for key, value in vars(namespace).items() if key != "config"})
    check_ranges(plain, declared=config_class)
    values = vars(parser.instantiate_classes(plain))
    return config_class(**{k: v for k, v in values.items() if k != "config"}), parser.dump(plain, skip_none=False)


def _place(parser: ArgumentParser, files: Sequence[str], written: Sequence[str]) -> str:
    """Names the files where a mistake is theirs, for messages; "" where it is on the command line."""
    try:
        parser.parse_args(written)
    except ArgumentError:
        return f"--config {' or '.join(files)}: " if files else ""
    return ""


def read_options(file: Path) -> dict[str, Any]:
    """The content of a `--config` file.

    Raises:
        UserError: no such file, no text, no YAML, or no options by name.
    """
    if not file.is_file():
        raise UserError(f"--config {file}: no such file; the ready-made ones are in configs/")
    import yaml

    try:
        content = yaml.safe_load(text_of(file, "expected a file of options"))
        refuse_deep(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(content, dict):
        raise UserError(f'--config {file}: expected options by name ("data:", "trainer:", ...), found {content!r:.40}')
    return content


def _parser(config_class: type, description: str, default_config: Path | None) -> ArgumentParser:
    """A parser whose help gives each option's range behind its description."""
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.usage = "%(prog)s [--config FILE] [--option VALUE ...] [--section.option VALUE ...]"
    default = "none" if default_config is None else default_config.name
    parser.add_argument(
        "--config", action="config", help=f"YAML file with the options below; they win over it (default: {default})"
    )
    parser.add_class_arguments(config_class)
    parser.types = dict(_options(config_class))  # with ranges, which jsonargparse drops
    for action in parser._actions:
        if limits := _limits(parser.types.get(action.dest)):
            action.help = f"{(action.help or '').rstrip('.')}; {limits[0]}"
    return parser


def _refuse_unknown(arguments: Sequence[str], known: Sequence[str]) -> None:
    for word in arguments:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists every option"
            raise UserError(f"unknown option {name}; {hint}")


def _options(config_class: type, section: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name, with its type."""
    for name, hint in types_of(config_class).items():
        yield f"{section}{name}", hint
        for kind in sections_of(hint):
            yield from _options(kind, f"{section}{name}.")


def _limits(hint: Any) -> list[str]:
    return [str(allowed) for _, allowed in ranges_of(hint)]


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


class Parser(argparse.ArgumentParser):
    """argparse as every small program here has it.

    A wrong option is a UserError; `type` may be a range of `common.options` (`type=Count`), which `--help` then shows
    beside the default; texts are laid out as they are written, and options are never abbreviated.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **settings})

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's; `type` may be a range."""
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> Any:
        """Raise UserError in place of printing the usage and leaving."""
        if message.startswith("unrecognized arguments: --"):
            _refuse_unknown(message.split()[2:], [*self._option_string_actions])
        raise UserError(f"{re.sub(r'^argument ', '', message)}; --help lists every option")

    def _get_value(self, action: argparse.Action, word: str) -> Any:
        """A word of the command line as its option's type, within its range."""
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
        if (not is_text(word) and action.type is not Path) or (action.type is Path and not word.strip()):
            raise UserError(f"{name} {word!r}: expected text that is not empty")
        for kind, allowed in ranges_of(action.type):
            try:
                value = kind(word)
            except ValueError:
                value = word
            allowed.check(str(name).removeprefix("--"), value, kind)
            return value
        value = super()._get_value(action, word)  # type: ignore[misc]
        return shipped(value) if isinstance(value, Path) else value


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Texts as they are written; a range, and the default where there is one that the text does not name."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        text += "".join(f"; {limits}" for limits in _limits(action.type)[:1])
        switch = action.default is None or action.default is False or action.default == []
        if switch or action.default is argparse.SUPPRESS or "(default" in text or not action.option_strings:
            return text
        return f"{text} (default: {shown(action.default).replace('%', '%%')})"


def shown(value: Any) -> str:
    """A default, as the user would write it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return str(value.relative_to(REPOSITORY) if isinstance(value, Path) and value.is_relative_to(REPOSITORY) else value)


def take(option: str, arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The values of an option, `--option VALUE` or `--option=VALUE`, wherever it stands, and the other words.

    Args:
        arguments: None for those of this process.
    """
    values, others, words = [], [], iter(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        elif word == option:
            if (value := next(words, None)) is None:
                raise UserError(f"{option} needs a value")
            values.append(value)
        else:
            others.append(word)
    return values, others


_TYPES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "NoneType": "null"}


def _one_sentence(message: str) -> str:
    """jsonargparse explains a failure over several lines; keep the words, drop the layout."""
    text = re.sub(r"\s+", " ", message).strip()
    text = re.sub(r"^(Parser key|[Aa]rgument) ", "option ", text)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", re.sub(r"<class '(\w+)'>", r"\1", text))
    if union := re.match(r"(.*?)Does not validate .*? Errors: (.*) Given value type: \w+ Given value: (.*)$", text):
        expected = [each.strip() for each in re.findall(r"- Expected (.*?)(?= - Expected|$)", union[2])]
        words = [_TYPES.get(each.removeprefix("a "), each) for each in expected]
        text = f"{union[1]}expected {' or '.join(words)}, found {union[3]}"
    return text if len(text) < 500 else f"{text[:500]} ..."
