"""Files that are whole or absent, and mistakes of the user as one sentence."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from common.errors import UserError, run_main
from common.files import checked_file, sweep, unfinished, write_atomically, write_json
from common.stopping import Stopped


def test_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*result.txt: .*No space left.*the earlier result.txt is kept"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_nothing_half_written(tmp_path: Path) -> None:
    def stops(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new.txt", stops)
    assert not list(tmp_path.iterdir())


def test_sweeping_takes_what_the_dead_left_and_bears_what_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, going = tmp_path / "deep" / ".left.part", tmp_path / ".going.part"
    for folder in (left, going):
        folder.mkdir(parents=True)
    (left / "half.txt").write_text("half")
    with unfinished(tmp_path / "new.txt") as temporary:
        temporary.write_text("a living process writes this")
        scandir = os.scandir

        def another_finishes_first(folder: object) -> object:
            if str(folder) == str(going):
                going.rmdir()
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", another_finishes_first)
        sweep(tmp_path)
        assert not left.exists() and not going.exists() and temporary.exists()


def test_folders_are_made_and_files_are_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomically(path, lambda temporary: temporary.write_text("text"))
    assert path.read_text() == "text" and path.stat().st_mode & 0o777 == 0o644


def test_path_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as failure:
        write_json(tmp_path / "file" / "x.json", {})
    assert "\n" not in str(failure.value)


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": {"c": float("inf")}, "é": (1, 2)})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": None}, "é": [1, 2]} and "é" in text


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("x.png: not an image"), 2, "error: x.png: not an image\n"),
        (UserError("Caught UserError in DataLoader worker\nTraceback\ncommon.errors.UserError: x\n"), 2, "error: x\n"),
        (Stopped(signal.SIGTERM, [1], "step 3 is saved"), 143, "stopped by SIGTERM sent to rank 1; step 3 is saved. "),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C. To go on: "),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.pt"),
            2,
            "error: cannot use x.pt: No space left on device",
        ),
        (
            RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
            2,
            "error: cannot use a file",
        ),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), 75, "error: rank 0 lost another"),
    ],
)
def test_program_ends_with_a_sentence_and_a_status(
    error: BaseException, status: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    said = capsys.readouterr().err
    assert stopped.value.code == status and said.startswith(printed) and said.count("\n") == 1


def test_file_of_the_cache_is_made_anew_when_damaged_or_of_before_checksums(tmp_path: Path) -> None:
    path, made = tmp_path / "a.txt", []

    def make(place: Path) -> None:
        made.append(place)
        place.write_text("right")

    path.write_text("of before")
    for _ in range(2):
        assert checked_file(path, make).read_text() == "right" and len(made) == 1
    path.write_text("wrong")
    with pytest.warns(UserWarning, match=r"a.txt: damaged .* made again"):
        assert checked_file(path, make).read_text() == "right"
