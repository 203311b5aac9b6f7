"""Independent jobs: in this process, in processes of this machine, or on a Ray cluster, with equal results.

    jobs = [Job("common.campaign.measure", {"paper": "ldm", "claim": "L1", "rung": 4, "seed": 0})]
    for number, result in run_jobs(jobs, engine="processes", workers=2): ...

A job is a function of its options and of nothing else: it can be imported by its dotted name, its options and what it
returns are JSON. What it has to leave behind it writes itself, atomically, so that a second run of it is harmless: one
whose worker dies is run again. Populations of a search are such jobs, and so are the arms of a campaign.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from common.errors import UserError
from common.paths import REPOSITORY

Engine = Literal["here", "processes", "ray"]
ENGINES: tuple[Engine, ...] = ("here", "processes", "ray")
TRIES = 4  # of a job whose worker dies each time
INSTALL = "make setup EXTRAS=dev,cluster"


class JobError(RuntimeError):
    """A job ended with an error of its own, whose traceback is the message, or its worker died `TRIES` times."""


@dataclass(frozen=True)
class Job:
    """A call of `function` ("package.module.name") with `options`, which are JSON."""

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)


def run_jobs(jobs: Sequence[Job], engine: Engine = "here", workers: int = 0) -> Iterator[tuple[int, Any]]:
    """(number of the job, what it returned), as jobs end; they are begun in their order.

    Args:
        workers: that work at the same time, of the engine `processes`; 0 is one for each core.

    Raises:
        UserError: a job's; or Ray is asked for and not installed.
        JobError: a job failed otherwise.
    """
    if engine == "here":
        for number, job in enumerate(jobs):
            yield number, _json(perform(job.function, dict(job.options)))
    elif engine == "processes":
        yield from _in_processes(jobs, workers or _cores())
    elif engine == "ray":
        yield from _on_ray(jobs)
    else:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")


def perform(function: str, options: dict[str, Any]) -> Any:
    """Call a function by its dotted name."""
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)(**options)


def _json(value: Any) -> Any:
    """As it comes back from another process."""
    return json.loads(json.dumps(value))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _answer(function: str, options: str) -> tuple[str, str]:
    """("done", the result as JSON), ("mistake", a UserError's sentence) or ("failed", a traceback)."""
    try:
        return "done", json.dumps(perform(function, json.loads(options)))
    except UserError as error:
        return "mistake", str(error)
    except Exception:
        return "failed", traceback.format_exc()


def _result(job: Job, answer: tuple[str, str]) -> Any:
    kind, text = answer
    if kind == "mistake":
        raise UserError(text)
    if kind == "failed":
        raise JobError(f"{job.function} {dict(job.options)}:\n{text}")
    return json.loads(text)


def _again(job: Job, tries: int) -> int:
    """One more try of a job whose worker died."""
    if tries + 1 >= TRIES:
        raise JobError(f"{job.function} {dict(job.options)}: its worker died {TRIES} times")
    return tries + 1


# Processes of this machine -------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """A worker's life: it takes jobs until there are none, and ends with the process that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    while (job := connection.recv()) is not None:
        connection.send(_answer(*job))


class _Worker:
    """A process and the number of the job that it is at, with the tries before."""

    def __init__(self) -> None:
        # A fresh interpreter: what torch has started in this process does not live on in a copy.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()
        self.job: tuple[int, int] | None = None

    def give(self, number: int, tries: int, job: Job) -> None:
        self.job = (number, tries)
        try:
            self.connection.send((job.function, json.dumps(dict(job.options))))
        except OSError:  # it is dead; its connection says so to the one who waits
            return

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _in_processes(jobs: Sequence[Job], count: int) -> Iterator[tuple[int, Any]]:
    todo = [(number, 0) for number in range(len(jobs))]
    workers: list[_Worker] = []
    try:
        while todo or any(worker.job for worker in workers):
            while todo and len(workers) < count:
                workers.append(_Worker())
            for worker in workers:
                if todo and worker.job is None:
                    number, tries = todo.pop(0)
                    worker.give(number, tries, jobs[number])
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.job is not None
                number, tries = worker.job
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    todo.insert(0, (number, _again(jobs[number], tries)))
                    worker.end()
                    workers.remove(worker)
                    continue
                worker.job = None
                yield number, _result(jobs[number], answer)
    finally:
        for worker in workers:
            worker.end()


# A Ray cluster -------------------------------------------------------------------------------------------------------


def _on_ray(jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
    """On the cluster that RAY_ADDRESS names or that this machine belongs to; without one, on this machine alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    try:
        import ray
    except ImportError:
        raise UserError(f"--engine ray needs the package ray, which is not installed; {INSTALL} brings it") from None
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": variables()})
    try:
        answer: Any = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_answer)
        todo = list(enumerate(jobs))
        running: dict[Any, int] = {}
        while todo or running:
            # No more than there are places: a machine that joins finds jobs that are not yet given away.
            while todo and len(running) < max(1, int(ray.cluster_resources().get("CPU", 1))):
                number, job = todo.pop(0)
                running[answer.remote(job.function, json.dumps(dict(job.options)))] = number
            done, _ = ray.wait(list(running), num_returns=1, timeout=5.0)
            for reference in done:
                number = running.pop(reference)
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise JobError(f"{jobs[number].function} {dict(jobs[number].options)}: {error}") from None
                yield number, _result(jobs[number], found)
    finally:
        if own:
            ray.shutdown()


def variables() -> dict[str, str]:
    """What a worker on another machine needs to find this code and to work as one of this machine does."""
    path = os.environ.get("PYTHONPATH", "")
    ours = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{path}" if path else str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    passed = ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "REPRO_CACHE")
    return ours | {name: os.environ[name] for name in passed if name in os.environ}
