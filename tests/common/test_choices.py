"""Choices between equal forms: measured once, kept in the run folder, the same for every process."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.choices import Choices
from common.errors import UserError


def never() -> dict[str, float]:
    raise AssertionError("measured although the choice is on record")


def test_the_default_stays_unless_another_form_wins_by_the_margin(tmp_path: Path) -> None:
    choices = Choices(tmp_path)
    assert choices.choose("near", lambda: {"a": 1.0, "b": 0.92}, default="a", margin=0.1) == "a"
    assert choices.choose("far", lambda: {"a": 1.0, "b": 0.9}, default="a", margin=0.1) == "b"
    assert choices.choose("slow", lambda: {"a": 1.0, "b": 2.0}, default="a") == "a"


def test_a_later_start_takes_the_choice_on_record_without_measuring(tmp_path: Path) -> None:
    Choices(tmp_path).choose("form", lambda: {"a": 2.0, "b": 1.0}, default="a")
    assert Choices(tmp_path).choose("form", never, default="a") == "b"
    record = json.loads((tmp_path / "choices.json").read_text())["form"]
    assert record["chosen"] == "b" and record["seconds"] == {"a": 2.0, "b": 1.0} and record["cpu"]


def test_without_a_folder_a_choice_is_kept_for_the_process() -> None:
    choices = Choices()
    choices.choose("form", lambda: {"a": 2.0, "b": 1.0}, default="a")
    assert choices.choose("form", never, default="a") == "b"


def test_another_process_reads_what_the_main_one_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Choices(tmp_path).choose("form", lambda: {"a": 2.0, "b": 1.0}, default="a")
    monkeypatch.setenv("RANK", "1")
    assert Choices(tmp_path).choose("form", never, default="a") == "b"
    with pytest.raises(UserError, match="has not written its choice of other"):
        Choices(tmp_path, patience=0.1).choose("other", never, default="a")


def test_what_processes_meet_at_other_times_is_measured_by_whichever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process would wait for the other one in a collective operation, and that one for its choice."""
    monkeypatch.setenv("RANK", "1")
    given = {"default": "a", "together": False}
    other = Choices(tmp_path / "run", patience=0.1)
    assert other.choose("form", lambda: {"a": 2.0, "b": 1.0}, **given) == "b"
    monkeypatch.setenv("RANK", "0")
    main = Choices(tmp_path / "run")
    assert main.choose("form", never, **given) == "b"
    main.choose("next", lambda: {"a": 1.0}, **given)
    assert other.choose("next", never, **given) == "a"
    assert set(json.loads((tmp_path / "run" / "choices.json").read_text())) == {"form", "next"}


def test_of_processes_that_ask_at_once_one_measures(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        time.sleep(0.05)
        return {"a": 1.0}

    with ThreadPoolExecutor(4) as asking:  # each with a handle of its own, which is what the lock goes by
        asked = [
            asking.submit(Choices(tmp_path).choose, "form", measure, default="a", together=False) for _ in range(4)
        ]
        assert [choice.result() for choice in asked] == ["a"] * 4
    assert len(calls) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"form": 3}', "[" * 100_000, '{"form": {}}'])
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "choices.json").write_text(text)
    with pytest.raises(UserError, match=r"choices\.json is damaged"):
        Choices(tmp_path).choose("form", never, default="a")
