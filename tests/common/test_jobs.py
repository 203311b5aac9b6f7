"""Independent jobs: equal results whichever engine runs them, and what happens when a worker or a node dies."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from common.jobs import Engine, Job, JobError, run_jobs
from tests.refusals import refused

HERE = "tests.common.job_functions"


def squares(folder: Path, count: int, engine: Engine, seconds: float = 0.0, workers: int = 2) -> list[object]:
    """Results by the jobs' order; each must also have written its own."""
    jobs = [Job(f"{HERE}.square", {"number": n, "folder": str(folder), "seconds": seconds}) for n in range(count)]
    found = dict(run_jobs(jobs, engine, workers))
    assert {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")} == {
        n: n * n for n in range(count)
    }
    return [found[number] for number in range(count)]


def test_processes_give_what_this_process_gives_and_a_dead_workers_job_is_run_again(tmp_path: Path) -> None:
    expected = [{"square": n * n, "pair": [n, 0.1 * n]} for n in range(5)]
    assert squares(tmp_path / "here", 5, "here") == expected
    assert squares(tmp_path / "processes", 5, "processes") == expected
    (tmp_path / "died").mkdir()
    jobs = [Job(f"{HERE}.dies", {"folder": str(tmp_path / "died"), "times": 2})]
    assert list(run_jobs(jobs, "processes", 1)) == [(0, 3)]
    with pytest.raises(JobError, match="its worker died 4 times"):
        list(run_jobs([Job(f"{HERE}.dies", {"folder": str(tmp_path / "died"), "times": 99})], "processes", 1))


def test_a_users_mistake_is_one_in_every_engine_and_other_errors_carry_their_traceback() -> None:
    for engine in ("here", "processes"):
        mistake = [Job(f"{HERE}.mistaken", {"name": "tea"})]
        refused("tea: no such thing", lambda jobs, engine: list(run_jobs(jobs, engine, 1)), mistake, engine)
    with pytest.raises(JobError, match="by design"):
        list(run_jobs([Job(f"{HERE}.broken")], "processes", 1))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_cluster_engine_names_the_command_that_installs_it() -> None:
    refused("make setup EXTRAS=dev,cluster", lambda: list(run_jobs([Job(f"{HERE}.broken")], "ray")))
