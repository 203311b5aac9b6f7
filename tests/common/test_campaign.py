"""The ladder of budgets: the order of the queue, kills at any moment, other machines, ledgers made from notes."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import campaign, reproduction
from common.errors import UserError
from common.files import write_json
from common.ledger import provenance, read_claims, read_ledger, record, write_claims
from common.paths import REPOSITORY
from tests.common.made_up_paper import CLAIMS, write_paper
from tests.refusals import refused


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository whose one paper is `toy`; programs work in it and nobody's priority changes."""
    write_paper(tmp_path)
    for name in ("common.ledger.REPOSITORY", "common.campaign.REPOSITORY"):
        monkeypatch.setattr(name, tmp_path)
    monkeypatch.setattr("common.reproduction.RUNS", tmp_path / "runs")
    monkeypatch.setattr("common.ledger.commit", lambda: "none")
    monkeypatch.setattr("common.campaign.lower_priority", lambda: None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def climb(results: Path, *options: str) -> None:
    campaign.main(["--results", str(results), *options])


def run(results: Path, kill_at: int = 0, kill_after: float = 0.0, pace: float = 0.0) -> int:
    """A campaign in a process of its own, killed at its n-th write (before it is in place) or after some seconds.

    Returns:
        its exit code: 0, or -9.
    """

    def child() -> None:
        reproduction.RUNS = results / "runs"
        importlib.import_module("toy.reproduce").PACE = pace  # type: ignore[attr-defined]
        place, writes = os.replace, [0]

        def replace(*arguments: Any, **options: Any) -> None:
            writes[0] += 1
            if writes[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            place(*arguments, **options)

        os.replace = replace  # type: ignore[assignment]
        climb(results)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    if kill_after:
        process.join(kill_after)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def ledger_of(results: Path) -> list[dict[str, Any]]:
    """The ledger without what differs between two runs of equal programs."""

    def facts(entry: dict[str, Any]) -> dict[str, Any]:
        return {
            key: [facts(part) for part in value] if key == "rungs" else value
            for key, value in entry.items()
            if key not in ("seconds", "peak_memory_bytes")
        }

    return [facts(entry) for entry in read_ledger(results / "toy.json")]


@pytest.mark.parametrize(
    ("writes", "moments", "pace"), [((9, 20, 6), 0, 0.0), pytest.param((), 10, 0.05, marks=pytest.mark.slow)]
)
def test_a_campaign_killed_again_and_again_ends_with_the_ledger_of_one_that_was_not(
    root: Path, writes: tuple[int, ...], moments: int, pace: float
) -> None:
    steps = root / "steps.log"
    assert run(root / "whole") == 0
    once = len(steps.read_text().splitlines())
    assert once == 3 * (2 + 8) * 2  # three seeds, two rungs, two arms, which two claims share
    steps.unlink()
    assert [run(root / "cut", kill_at=at) for at in writes] == [-9] * len(writes)
    chance, kills = random.Random(0), len(writes)
    while moments > kills:
        kills += run(root / "cut", kill_after=chance.uniform(0.3, 1.2), pace=pace) != 0
    assert run(root / "cut") == 0
    assert ledger_of(root / "cut") == ledger_of(root / "whole")
    assert [entry["rung"] for entry in ledger_of(root / "cut")[0]["rungs"]] == [4]
    # A kill costs no more than the step that it meets: the arm goes on from its last checkpoint.
    assert once <= len(steps.read_text().splitlines()) <= once + kills
    assert (root / "cut" / "figures" / "toy" / "ladder.png").is_file()
    arm = json.loads((root / "cut" / "arms" / "toy" / "arms" / "rung4" / "fast-seed1.json").read_text())
    assert arm["settings"] == {"steps": 8} and arm["values"]["steps"] == 8
    assert arm["precision"] == "32-true" and arm["cpu"] and arm["versions"]["torch"] and arm["commit"] == "none"


def noted(root: Path, claim: str, rung: int, seed: int, value: float) -> None:
    """A measurement as another machine has left it."""
    known = read_claims("toy", "small", rung)[claim]
    wanted = {condition.metric: value for condition in known.target.all_conditions()}
    entry = {"values": wanted, "seconds": 60.0, "peak": 1, "made": {**provenance(), "cpu": "another"}}
    notes = root / "results" / "arms" / "toy"
    write_json(reproduction.note_of(notes, known, seed, "another"), reproduction.noted(known, seed, None, entry))


def test_lowest_rungs_come_first_and_of_a_rung_the_claims_that_fail_below(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = root / "results"
    order = [(step.claim, step.rung, step.seed) for step in campaign.queue(["toy"], results)]
    assert order == [(claim, rung, seed) for rung in (1, 4) for claim in ("T1", "T2") for seed in range(3)]
    for claim, value in (("T1", 2.6), ("T2", -1.0)):  # T1 holds, T2 does not
        for seed in range(3):
            noted(root, claim, 1, seed, value)
    noted(root, "T2", 4, 1, 1.0)
    climb(results, "--rebuild")
    queue = campaign.queue(["toy"], results)
    assert [(step.claim, step.seed) for step in queue] == [("T2", 0), ("T2", 2), ("T1", 0), ("T1", 1), ("T1", 2)]
    assert [step.seconds for step in queue] == [4 * 60.0] * 5
    capsys.readouterr()
    climb(results, "--plan")
    assert capsys.readouterr().out.splitlines() == [
        "5 measurements to go, about 20 min of one core; next: toy T2 rung 4 seed 0 (about 4 min)",
        "rung 4: 5 measurements, about 20 min",
        "  toy T2: seeds 0, 2, about 8 min",
        "  toy T1: seeds 0, 1, 2, about 12 min",
    ]


def test_a_ledger_is_made_anew_from_what_is_noted(root: Path) -> None:
    results = root / "results"
    for rung, value in ((1, 2.4), (4, 2.6)):
        for seed in range(3):
            noted(root, "T1", rung, seed, value)
    for seed in range(2):
        noted(root, "T2", 1, seed, 1.0)  # one seed is missing
    climb(results, "--rebuild")
    (made,) = read_ledger(results / "toy.json")
    assert made["id"] == "T1" and not made["holds"] and made["cpu"] == "another" and made["seconds"] == 180.0
    assert [(entry["rung"], entry["holds"], entry["mean"]) for entry in made["rungs"]] == [(4, True, 2.6)]
    before = (results / "toy.json").stat().st_mtime_ns
    climb(results, "--rebuild")
    assert (results / "toy.json").stat().st_mtime_ns == before
    # With another budget they are measurements of something else.
    (root / "toy" / "claims.yaml").write_text(CLAIMS.replace("steps: 2", "steps: 3"))
    assert len([step for step in campaign.queue(["toy"], results) if step.rung == 4]) == 6


def test_what_an_older_ledger_holds_counts_as_measured_and_is_noted(root: Path) -> None:
    results, claims = root / "results", read_claims("toy", "small")
    rows: list[dict[str, float]] = [
        {"gain": 1.0, "weight": 2.0},
        {"gain": 2.0, "weight": 2.0},
        {"gain": 4.0, "weight": 2},
    ]
    old = record(claims["T2"], rows, seconds=30.0, peak_memory_bytes=5)
    for key in ("precision", "cpu", "within_noise"):
        del old[key]
    write_claims(results / "toy.json", [old])
    assert [step.claim for step in campaign.queue(["toy"], results) if step.rung == 1] == ["T1"] * 3
    assert reproduction.adopt(results / "toy.json", "toy") == 3
    assert reproduction.adopt(results / "toy.json", "toy") == 0
    assert reproduction.rebuild(results / "toy.json", "toy") == []  # it says the same already
    (results / "toy.json").unlink()
    assert reproduction.rebuild(results / "toy.json", "toy") == ["T2 rung 1"]
    (new,) = read_ledger(results / "toy.json")
    assert {key: new[key] for key in old} == old


def test_claims_about_time_keep_a_record_for_every_kind_of_cpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, claim = root / "results" / "toy.json", read_claims("toy", "small")["T3"]
    toy = importlib.import_module("toy.reproduce")
    for cpu in ("one", "two", "one"):
        monkeypatch.setattr("common.ledger.cpu_kind", lambda cpu=cpu: cpu)
        monkeypatch.setattr("common.study.cpu_kind", lambda cpu=cpu: cpu)
        toy.main(["--claims", "T3", "--output", str(ledger)])
    (made,) = read_ledger(ledger)
    assert made["cpu"] == "one" and [machine["cpu"] for machine in made["machines"]] == ["two"]
    assert made["measured"] == made["machines"][0]["measured"]
    assert set(reproduction.measurements(reproduction.notes_of(ledger), claim)) == {"one", "two"}
    assert "T3" not in {step.claim for step in campaign.queue(["toy"], root / "results")}


def test_the_hours_end_a_campaign_within_an_arm_and_what_cannot_be_measured_is_said_at_its_end(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = importlib.import_module("toy.reproduce")
    monkeypatch.setattr(toy, "PACE", 60.0)
    started = time.monotonic()
    climb(root / "results", "--hours", "0.0002")
    assert time.monotonic() - started < 30 and "hours are over" in capsys.readouterr().out
    monkeypatch.setattr(toy, "PACE", 0.0)

    def fails(study: Any, seed: int) -> None:
        raise UserError("no such text") if seed else ValueError("by design\nand more")

    fails.__name__ = "t2"
    monkeypatch.setattr(toy, "t2", fails)
    said = r"6 could not be measured: toy T2 rung 1 seed 0.*: ValueError: by design; toy T2 .*seed 1.*: no such text"
    refused(said, climb, root / "results")
    assert [entry["id"] for entry in read_ledger(root / "results" / "toy.json")] == ["T1"]


def test_mistakes_on_the_command_line_are_named(root: Path) -> None:
    refused("--papers tea: expected some of toy", climb, root, "--papers", "toy,tea")
    refused("--hours 0.0: expected a number above 0", climb, root, "--hours", "0")
    refused("--workers -1: expected a whole number of at least 0", climb, root, "--workers", "-1")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", pytest.param("ray", marks=pytest.mark.cluster)])
def test_other_engines_end_with_the_ledger_of_this_process_although_a_node_dies(
    tmp_path: Path, short_path: Path, engine: str
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    write_paper(tmp_path)
    # A repository of its own: processes that are started anew know no other.
    shutil.copytree(REPOSITORY / "common", tmp_path / "common")
    (tmp_path / "on_two_nodes.py").write_text(ON_TWO_NODES)
    code = tmp_path / "common" / "campaign.py"
    text = code.read_text()
    assert "    os.nice(19)\n" in text
    code.write_text(text.replace("    os.nice(19)\n", "    return\n"))  # this test would wait for all others
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "PACE": "0.2", "RAY_TMPDIR": str(short_path)}

    def start(name: str, *command: str) -> subprocess.CompletedProcess[str]:
        options = ["--results", str(tmp_path / name), "--papers", "toy"]
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        return subprocess.run(
            [sys.executable, *command, *options],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # its priority is not this session's
        )

    whole = start("whole", "-m", "common.campaign", "--engine", "here")
    assert whole.returncode == 0, whole.stderr
    program = ["-m", "common.campaign", "--workers", "2"] if engine == "processes" else ["on_two_nodes.py"]
    other = start("other", *program, "--engine", engine)
    assert other.returncode == 0, other.stderr
    assert engine == "processes" or "a node is gone" in other.stdout
    assert ledger_of(tmp_path / "other") == ledger_of(tmp_path / "whole")


ON_TWO_NODES = """
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from common import campaign
from common.jobs import variables

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
second = cluster.add_node(num_cpus=1, object_store_memory=10**8)
settings = {"runtime_env": {"env_vars": {**variables(), "PACE": "0.2"}}}
ray.init(address=cluster.address, log_to_driver=False, **settings)
assert ray.cluster_resources()["CPU"] == 2


def kill():
    while not list(Path("runs").glob("reproduce/toy-small/arms/*/checkpoints/last.ckpt")):
        time.sleep(0.1)  # until arms are under way
    time.sleep(1)
    cluster.remove_node(second, allow_graceful=False)


killer = threading.Thread(target=kill)
killer.start()
campaign.main(sys.argv[1:])
killer.join()
time.sleep(2)
assert sorted(node["Alive"] for node in ray.nodes()) == [False, True]
ray.shutdown()
cluster.shutdown()
print("a node is gone")
"""


SESSIONS = Path("/proc/sys/kernel/sched_autogroup_enabled")


@pytest.mark.skipif(
    not SESSIONS.is_file() or SESSIONS.read_text().strip() != "1", reason="this kernel does not schedule by sessions"
)
def test_the_terminal_has_its_priority_back_after_a_campaign() -> None:
    program = """
import time
from common import campaign
print(campaign.GROUP.read_text().split()[-1])
with campaign.group_as_before():
    campaign.lower_priority()
    print(campaign.GROUP.read_text().split()[-1])
    time.sleep(0.3)  # the kernel takes one such change in 0.1 s from a user
print(campaign.GROUP.read_text().split()[-1])
"""
    command = [sys.executable, "-c", program]
    found = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, start_new_session=True, timeout=120
    )
    before, during, after = found.stdout.split()
    assert (during, after) == ("19", before) and before != "19"


@pytest.mark.parametrize(("kept", "left"), [("/autogroup-305 nice 3\n", "3"), ("", ""), (None, None)])
def test_a_session_without_a_group_of_its_own_has_no_priority_to_give_back(
    kept: str | None, left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "autogroup"
    monkeypatch.setattr("common.campaign.GROUP", group)
    if kept is not None:
        group.write_text(kept)
    with campaign.group_as_before():
        pass
    assert (group.read_text() if group.is_file() else None) == left
