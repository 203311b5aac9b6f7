"""Command lines from dataclasses: what is wrong is named as the user wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common.cli import Parser, parse_config, read_run_config
from common.errors import UserError
from common.options import Count, NotNegative


@dataclass
class Inner:
    """An inner section.

    Args:
        rate: a number.
    """

    rate: NotNegative = 0.5
    kind: Literal["small", "large"] = "small"
    widths: list[int] = field(default_factory=lambda: [1, 2])
    quick: bool | Literal["auto"] = "auto"


@dataclass
class Outer:
    """A program's options.

    Args:
        steps: how long.
    """

    steps: Count = 3
    name: str | None = None
    inner: Inner = field(default_factory=Inner)


def parse(*arguments: str, default: Path | None = None) -> Outer:
    return parse_config(Outer, default, "A program.", list(arguments))[0]


def test_options_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\ninner: {rate: 0.25, widths: [4]}\n")
    config = parse("--config", str(tmp_path / "c.yaml"), "--inner.rate", "2", "--inner.kind=large")
    assert config == Outer(steps=7, inner=Inner(rate=2.0, kind="large", widths=[4]))
    assert parse("--name", "x", default=tmp_path / "c.yaml") == Outer(7, "x", Inner(0.25, "small", [4]))


def test_the_command_line_wins_wherever_the_file_stands(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\ninner: {rate: 0.25}\n")
    (tmp_path / "d.yaml").write_text("steps: 8\n")
    for order in (
        ["--steps=2", "--config", str(tmp_path / "c.yaml")],
        [f"--config={tmp_path / 'c.yaml'}", "--steps=2"],
    ):
        assert parse(*order) == Outer(steps=2, inner=Inner(rate=0.25))
    files = ["--config", str(tmp_path / "c.yaml"), "--config", str(tmp_path / "d.yaml")]
    assert parse(*files) == Outer(steps=8, inner=Inner(rate=0.25))
    beneath = ["--steps=1", "--name=y"]
    assert parse_config(Outer, tmp_path / "d.yaml", "", [], beneath)[0] == Outer(steps=8, name="y")


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
        (["--steps", "0"], "^--steps 0: expected a whole number of at least 1$"),
        (["--steps", "1e30"], "^--steps 1e\\+30: expected a whole number of at least 1$"),
        (["--steps", "null"], "^--steps None: expected a whole number of at least 1$"),
        (["--steps", ""], "steps"),
        (["--inner.rate", "inf"], r"^--inner\.rate inf: expected a number of at least 0$"),
        (["--inner.rate", "[1]"], "rate"),
        (
            ["--inner.quick", "maybe"],
            r"^option \"inner\.quick\": expected true or false or one of 'auto', found maybe;",
        ),
        (["--inner", "3"], "inner"),
        (["--name", ""], "^--name '': expected text"),
        (["--config"], "--config needs a value"),
    ],
)
def test_wrong_option_is_one_sentence_that_names_it(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as failure:
        parse(*arguments)
    assert "\n" not in str(failure.value) and "Traceback" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inner: {rato: 1}", "rato"),
        ("steps: [", "c.yaml|yaml|parse"),
        ("steps: x", "steps"),
        ("", "c.yaml: expected options by name .*, found None"),
        ("- 1", "c.yaml: expected options by name .*, found .1."),
        ("[" * 3000, "c.yaml is not valid YAML"),
        ("inner:", '^--config .*c.yaml: "inner:" is empty; give it options'),
        ("foo: 1", "^--config .*c.yaml: .*foo"),
        ("\\xff", "c.yaml: expected options by name"),
        ("steps: !!python/name:os.system x", "c.yaml is not valid YAML: could not determine a constructor"),
        ("steps: -1", "^--steps -1: expected"),
        ("steps: 1e30", "steps"),
        ("inner: {rate: .nan}", "--inner.rate nan: expected"),
        ("inner: {rate: null}", "rate"),
        ("inner: {widths: 3}", "widths"),
        ("inner: 7", "inner"),
    ],
)
def test_wrong_file_is_one_sentence_that_names_the_key(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as failure:
        parse("--config", str(tmp_path / "c.yaml"))
    assert "\n" not in str(failure.value)


def test_a_file_that_is_no_text_is_named_and_a_byte_order_mark_is_none_of_its_words(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"--config .*c\.yaml is not valid YAML"):
        parse("--config", str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("\ufeffsteps: 4\n", encoding="utf-8")
    assert parse("--config", str(tmp_path / "c.yaml")) == Outer(steps=4)


def test_help_lists_every_option_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--inner.rate" in printed and "how long; at least 1 (type: int" in printed


def test_help_shows_the_defaults_that_the_files_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\n")
    (tmp_path / "d.yaml").write_text("steps: 8\ninner: {rate: 0.125}\n")
    for more, shown in (([], "type: int, default: 7"), (["--config", str(tmp_path / "d.yaml")], "default: 0.125")):
        with pytest.raises(SystemExit):
            parse("--help", *more, default=tmp_path / "c.yaml")
        assert shown in " ".join(capsys.readouterr().out.split())


def small_program() -> Parser:
    parser = Parser(description="First line.\n\n    an example\n")
    parser.add_argument("--count", type=Count, default=8, help="pictures")
    parser.add_argument("--lr", type=NotNegative, help="rate (default: the run's)")
    parser.add_argument("--out", type=Path, default=Path("a.png"), help="picture to write")
    parser.add_argument("--seeds", type=Count, nargs="+", default=[1, 2], help="of the runs")
    return parser


def test_a_small_program_reads_numbers_of_their_range() -> None:
    given = small_program().parse_args(["--count", "3", "--lr", "1e-3", "--seeds", "4", "5"])
    assert (given.count, given.lr, given.out, given.seeds) == (3, 0.001, Path("a.png"), [4, 5])
    text = " ".join(small_program().format_help().split())
    assert "pictures; at least 1 (default: 8)" in text and "(default: 1 2)" in text and "(default: a.png)" in text
    assert "rate (default: the run's); at least 0" in text and "\n    an example" in small_program().format_help()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "0"], "^--count 0: expected a whole number of at least 1$"),
        (["--count", "nan"], "^--count nan: expected a whole number"),
        (["--count", "1" * 23], "^--count 1{23}: expected a whole number from 1 to 1000000000$"),
        (["--lr", "inf"], "^--lr inf: expected a number of at least 0$"),
        (["--lr", "x"], "^--lr x: expected a number of at least 0$"),
        (["--seeds", "1", "-1"], "^--seeds -1: expected"),
        (["--out", ""], "^--out '': expected text that is not empty"),
        (["--cuont", "1"], "^unknown option --cuont; did you mean --count"),
        (["--coun", "1"], "^unknown option --coun; did you mean --count"),
        (["--count"], "^--count: expected one argument; --help lists every option$"),
    ],
)
def test_a_wrong_option_of_a_small_program_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        small_program().parse_args(arguments)
