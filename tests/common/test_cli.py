"""Command lines from dataclasses: what is wrong is named as the user wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common.cli import parse_config, read_run_config
from common.errors import UserError


@dataclass
class Inner:
    """An inner section.

    Args:
        rate: a number.
    """

    rate: float = 0.5
    kind: Literal["small", "large"] = "small"
    widths: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class Outer:
    """A program's options.

    Args:
        steps: how long.
    """

    steps: int = 3
    name: str | None = None
    inner: Inner = field(default_factory=Inner)


def parse(*arguments: str, default: Path | None = None) -> Outer:
    return parse_config(Outer, default, "A program.", list(arguments))[0]


def test_options_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\ninner: {rate: 0.25, widths: [4]}\n")
    config = parse("--config", str(tmp_path / "c.yaml"), "--inner.rate", "2", "--inner.kind=large")
    assert config == Outer(steps=7, inner=Inner(rate=2.0, kind="large", widths=[4]))
    assert parse("--name", "x", default=tmp_path / "c.yaml") == Outer(7, "x", Inner(0.25, "small", [4]))


def test_saved_text_gives_the_same_config(tmp_path: Path) -> None:
    config, text = parse_config(Outer, None, "", ["--steps", "9", "--inner.widths", "[3, 3]"])
    (tmp_path / "saved.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "saved.yaml")) == config and "name: null" in text


def test_a_run_folder_gives_back_its_config_and_another_folder_is_named(tmp_path: Path) -> None:
    config, text = parse_config(Outer, None, "", ["--steps", "9"])
    with pytest.raises(UserError, match=f"^--model {tmp_path}: no config.yaml there; expected the folder"):
        read_run_config(Outer, tmp_path, "--model")
    (tmp_path / "config.yaml").write_text(text)
    assert read_run_config(Outer, tmp_path) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "3"], "stepz"),
        (["--step", "3"], "--step"),  # no abbreviations: a longer name may be meant
        (["--inner.stepz", "3"], "stepz"),
        (["--steps", "many"], "steps.*many"),
        (["--inner.kind", "huge"], "kind.*huge"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
        (["--config=absent.yaml"], "--config absent.yaml: no such file"),
        (["--steps"], "steps"),
    ],
)
def test_wrong_option_is_one_sentence_that_names_it(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as failure:
        parse(*arguments)
    assert "\n" not in str(failure.value) and "Traceback" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "words"), [("inner: {rato: 1}", "rato"), ("steps: [", "c.yaml|yaml|parse"), ("steps: x", "steps")]
)
def test_wrong_file_is_one_sentence_that_names_the_key(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as failure:
        parse("--config", str(tmp_path / "c.yaml"))
    assert "\n" not in str(failure.value)


def test_help_lists_every_option_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--inner.rate" in printed and "how long" in printed
