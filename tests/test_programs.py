"""What the options of every program are held to; programs are found by themselves."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import jsonargparse
import pytest
import yaml

from common.cli import Parser, shown
from common.errors import UserError
from common.paths import REPOSITORY, papers
from common.training import RunFolder
from tests.programs import call, help_of, name_of, numbers_of, options_of, parser_of, programs, shown_defaults, trainers

WRONG = ("-1", "0", "nan", "inf", "1e30", "1" * 23)
WORDS = 2  # of a description at least, beside its range


def test_programs_are_found_in_every_room() -> None:
    assert {f"{paper}.{name}" for paper in papers() for name in ("train", "reproduce", "plan")} <= {*programs()}
    assert {"benchmarks.acceleration.__main__", "common.metrics.evaluate", "report.build"} <= {*programs()}
    assert not any("template" in program for program in programs())


@pytest.mark.parametrize("program", programs())
def test_every_option_says_what_it_is_in_words_of_its_own(program: str) -> None:
    texts = {name_of(action): action.help or "" for action, _ in options_of(program)}
    bare = [name for name, text in texts.items() if len(text.split(";")[0].split()) < WORDS]
    assert not bare, f"{program}: no description for {', '.join(bare)}"
    sections = Counter(
        (name.rpartition(".")[0], text) for name, text in texts.items() if "configuration file" not in text
    )
    assert not [text for (_, text), times in sections.items() if times > 1], program


@pytest.mark.parametrize("program", programs())
def test_every_number_has_a_range_which_refuses_what_no_run_can_use(program: str) -> None:
    text = help_of(program)
    for action, hint in options_of(program):
        name = name_of(action)
        for kind, allowed in numbers_of(hint):
            assert allowed is not None, f"{program} {name}: {kind.__name__} without a range (common/options.py)"
            assert kind(allowed.least) == allowed.least
            for word in WRONG:
                value = float(word) if not word.lstrip("-").isdigit() else int(word)
                inside = math.isfinite(value) and allowed.least <= value <= (allowed.most or 10**9)
                if inside and not (allowed.above and value == allowed.least):
                    allowed.check(name, value, kind)
                    continue
                with pytest.raises(
                    UserError, match=f"^--{name.lstrip('-')} .*expected a (whole )?number (of|from|above)"
                ):
                    allowed.check(name.lstrip("-"), value, kind)
            assert str(allowed) in text, f"{program} {name}"


@pytest.mark.parametrize("program", programs())
def test_a_refused_command_line_is_a_sentence_and_writes_nothing(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needs = any(action.required for action in parser_of(program)._actions) or program == "pc_darts.evaluate"
    numbers = [name_of(a) for a, hint in options_of(program) if [*numbers_of(hint)] and a.option_strings]
    for words in (["--no_such_option"], *([name, "nan"] for name in numbers[:1])):
        with pytest.raises(
            UserError, match=None if needs else rf"{words[0]}.*(did you mean|--help|expected)"
        ) as failure:
            call(program, words)
        assert "\n" not in str(failure.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", trainers())
def test_a_trainer_prints_its_options_as_a_file_and_its_usage_in_few_lines(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(program, ["--print_config", "--seed=12345"])
    assert stopped.value.code in (0, None)
    printed = [*yaml.safe_load_all(capsys.readouterr().out)]  # of each stage, where there are several
    assert [options["seed"] for options in printed] == [12345] * len(printed)
    assert len(parser_of(program).format_usage().splitlines()) <= 3


@pytest.mark.parametrize("program", programs())
def test_help_shows_the_defaults_of_small_programs(program: str) -> None:
    text = help_of(program).replace(" ", "")
    assert isinstance(parser_of(program), (Parser, jsonargparse.ArgumentParser)), "common.cli has the parsers"
    for action, _ in options_of(program) if isinstance(parser_of(program), Parser) else ():
        if action.option_strings and action.default not in (None, False, True, [], ""):
            assert shown(action.default).replace(" ", "") in text, (program, name_of(action))


@pytest.mark.parametrize("program", trainers())
def test_help_shows_the_defaults_that_apply(program: str) -> None:
    told = shown_defaults(program)
    applied = {}

    def stop(parser: object, plain: jsonargparse.Namespace, *_: object, **__: object) -> None:
        applied.update(plain.items())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jsonargparse.ArgumentParser, "instantiate_classes", stop)
        call(program, [])
    assert {name: applied[name] for name in told} == told
    assert len(told) > 10


class Reached(BaseException):
    """Raised where a run's folder would be written."""


@pytest.mark.slow
@pytest.mark.parametrize("program", trainers())
def test_a_number_within_its_range_passes_the_checks_or_is_a_sentence(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(RunFolder, "begin", stop)
    if program == "se_moe.train":  # as one of its processes
        monkeypatch.setenv("WORLD_SIZE", "2")
    smoke = REPOSITORY / program.partition(".")[0] / "configs" / "smoke.yaml"
    given = ["--config", str(smoke)] if smoke.is_file() else []
    reached = 0
    for action, hint in options_of(program):
        for kind, allowed in numbers_of(hint):
            for word in ("0", "1", "-1"):
                try:
                    allowed.check("x", kind(word), kind)
                except UserError:
                    continue
                value = f"[{word}]" if "list" in str(hint) else f"[{word}, {word}]" if "tuple" in str(hint) else word
                try:
                    call(program, [*given, "--run_dir", str(tmp_path / "run"), f"{name_of(action)}={value}"])
                except Reached:
                    reached += 1
                except UserError as error:
                    assert "\n" not in str(error)
                assert not list(tmp_path.iterdir()), name_of(action)
    assert reached > 10
