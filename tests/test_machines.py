"""`make test-machines`: numerical tests are found by their files' names, settings are counted truthfully."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from common.paths import REPOSITORY, papers
from tests import machines
from tests.conftest import NUMERICAL
from tests.machines import Outcome, Setting, read_report, run, table


def test_goldens_and_resume_of_every_paper_kernels_and_metrics_are_numerical() -> None:
    for paper in papers():
        names = {
            path.name for path in (REPOSITORY / "tests" / paper).glob("test_*.py") if NUMERICAL.fullmatch(path.name)
        }
        assert "test_golden.py" in names, paper
        assert names & {"test_train.py", "test_training.py"}, f"{paper}: no tests of going on"
    common = {path.name for path in (REPOSITORY / "tests" / "common").glob("test_*.py")}
    wanted = {name for name in common if name.startswith(("test_kernel", "test_metrics"))}
    assert wanted and all(NUMERICAL.fullmatch(name) for name in wanted)
    assert not NUMERICAL.fullmatch("test_plan.py") and not NUMERICAL.fullmatch("test_smoke.py")


def test_a_setting_reaches_the_tests_and_passes_what_passes() -> None:
    setting = Setting("two threads and a busy core", {"TEST_THREADS": "2"}, busy=True)
    outcome = run(setting, 1, ["tests/common/test_metrics_image.py", "-k", "psnr", "-q"])
    assert outcome.good and outcome.failed == [] and outcome.passed > 0


REPORT = """<testsuites><testsuite time="90">
<testcase classname="tests.a" name="test_one"/><testcase classname="tests.a" name="test_two"><failure/></testcase>
<testcase classname="tests.a" name="test_three"><skipped/></testcase></testsuite></testsuites>"""


def test_failures_are_named_and_nothing_passes_for_lack_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    outcome = read_report(tmp_path / "report.xml", 1)
    assert outcome == Outcome(passed=1, skipped=1, failed=["tests.a::test_two"], seconds=90.0, status=1)
    lines = table({"as-it-is": outcome}).splitlines()
    assert lines[1].split()[:5] == ["as-it-is", "1", "1", "1", "1.5"] and lines[2] == "as-it-is: tests.a::test_two"
    absent = read_report(tmp_path / "nothing.xml", 2)
    assert not outcome.good and not absent.good and absent.failed
    assert not Outcome(0, 4, [], 1.0, 0).good, "a run without a test shows nothing"


def test_unknown_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        machines.main(["--settings", "as-it-is,mars"])
    assert "--settings mars: expected some of as-it-is, aten-default" in capsys.readouterr().err


def test_busy_processes_end_with_their_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with machines.load(True):
        assert started and all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)
