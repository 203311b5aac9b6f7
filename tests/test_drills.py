"""Every trainer, stopped and killed and fed damaged files: the short form of `make drills`."""

from __future__ import annotations

import signal

import pytest

from common.paths import papers
from tests.drills import DAMAGES, Drill, drilled, records


@pytest.fixture(scope="module", params=drilled())
def drill(request: pytest.FixtureRequest, cache: None, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(request.param, tmp_path_factory.mktemp(request.param))


def test_every_paper_takes_part() -> None:
    assert drilled() == list(papers())


def test_a_run_stopped_twice_and_killed_while_it_exports_ends_as_one_that_nothing_befell(drill: Drill) -> None:
    drill.stopped("run", signal.SIGTERM, 3)
    drill.stopped("run", signal.SIGINT, 2)
    drill.killed("run", drill.product)
    drill.equal("run")


def test_damaged_records_are_named_or_made_anew(drill: Drill) -> None:
    for file, damage in zip(records(drill.whole), DAMAGES.values()):
        drill.damaged(file, damage)
