"""Faults of a cluster, each to a run that trains: it goes on, or ends with the reason, and the losses afterwards are
those of the run that nothing happened to.

The long ones are a campaign: `SLIPWAY_FAULTS=10` kills so many workers and does three of every other fault, and
`SLIPWAY_FAULTS_REPORT=docs/benchmarks/x` writes x.json and x.md.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.train.metrics import _records
from tests.cluster.command import losses, write_recipe
from tests.cluster.faults import (
    Cluster,
    Record,
    Run,
    cut_for_a_while,
    kill_raylet,
    kill_worker,
    measured,
    same_losses,
    stop_worker,
    until_next_step,
)
from tests.cluster.faults_report import Report
from tests.cluster.hosts import Hosts, needs_hosts

pytestmark = [pytest.mark.cluster, needs_hosts]
WORKERS_KILLED = int(os.environ.get("SLIPWAY_FAULTS", "10"))
OTHERS = max(1, WORKERS_KILLED * 3 // 10)
Losses = dict[int, tuple[float, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and its rows."""
    folder = tmp_path_factory.mktemp("faults")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Hosts(3) as hosts, Cluster(hosts, folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    report = Report()
    yield report
    report.conclude(os.environ.get("SLIPWAY_FAULTS_REPORT"))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path, report: Report) -> Losses:
    """Of the run that nothing happens to."""
    with Run(cluster, folder / "undisturbed") as run:
        assert run.end() == 0, run.text()
    return losses(run.run_dir)


def test_what_a_killed_raylet_costs_is_repeated_to_the_last_bit(tmp_path: Path) -> None:
    """The campaign's small sample, on two hosts; its workers die with it, and the machine comes back."""
    write_recipe(tmp_path)
    with Hosts(2) as hosts, Cluster(hosts, tmp_path) as cluster:
        with Run(cluster, tmp_path / "run", "cluster.workers=2", "train.max_steps=20") as run:
            fault = kill_raylet(run, run.trains(), hosts[2])
            assert run.end() == 0, run.text()
        assert any("host2 is gone: Ray does not reach it any more" in line for line in fault["said"]), fault
        assert fault["repeated"] >= 0
        by_step: dict[int, set[float]] = {}
        for record in _records(run.run_dir / "metrics.jsonl"):
            if record["kind"] == "step":
                by_step.setdefault(record["step"], set()).add(record["loss"])
        assert sorted(by_step) == list(range(1, 21))
        assert all(len(same) == 1 for same in by_step.values())


@pytest.mark.long
def test_killed_workers(cluster: Cluster, folder: Path, undisturbed: Losses, report: Report) -> None:
    with Run(cluster, folder / "workers-killed") as run:
        start: Record | None = None
        for number in range(WORKERS_KILLED):
            start = run.trains(start)
            report.add(kill_worker(run, start, rank=number % 3))
        assert run.end() == 0, run.text()
    same_losses(run.run_dir, undisturbed)
    report.passed("worker killed")


@pytest.mark.long
def test_killed_raylets(cluster: Cluster, folder: Path, undisturbed: Losses, report: Report) -> None:
    """The keeper starts Ray again, and the run waits for the machine."""
    with Run(cluster, folder / "raylets-killed") as run:
        start: Record | None = None
        for number in range(OTHERS):
            start = run.trains(start)
            report.add(kill_raylet(run, start, cluster.hosts[3 - number % 2]))
        assert run.end() == 0, run.text()
    same_losses(run.run_dir, undisturbed)
    report.passed("raylet killed")


@pytest.mark.long
def test_cut_links_are_pauses(cluster: Cluster, folder: Path, undisturbed: Losses, report: Report) -> None:
    with Run(cluster, folder / "links-cut") as run:
        start = run.trains()
        for number in range(OTHERS):
            report.add(cut_for_a_while(run, start, cluster.hosts[3 - number % 2]))
        assert run.end() == 0, run.text()
        assert run.start(after=start) is None, "the same workers from beginning to end"
    same_losses(run.run_dir, undisturbed)
    report.passed("link cut for 20 s")


@pytest.mark.long
def test_stopped_ranks_are_named(cluster: Cluster, folder: Path, undisturbed: Losses, report: Report) -> None:
    with Run(cluster, folder / "ranks-stopped", "cluster.hang_timeout_s=10") as run:
        start: Record | None = None
        for number in range(OTHERS):
            start = run.trains(start)
            report.add(stop_worker(run, start, rank=2 - number % 3))
        assert run.end() == 0, run.text()
    same_losses(run.run_dir, undisturbed)
    report.passed("rank stopped")


@pytest.mark.long
def test_a_killed_launcher_can_be_resumed_at_once(
    cluster: Cluster, folder: Path, undisturbed: Losses, report: Report
) -> None:
    run_dir = folder / "launchers-killed"
    start: Record | None = None
    at, ranks = 0.0, list[int]()
    for number in range(OTHERS + 1):
        with Run(cluster, run_dir) as run:
            if start is not None:
                report.add(measured(run, "launcher killed", "slipway on host1", at, start))
                assert not any(psutil.pid_exists(pid) for pid in ranks), "the workers end with their launcher"
            if number == OTHERS:
                assert run.end() == 0, run.text()
                break
            start = run.trains(start)
            at, ranks = time.time(), [run.worker(start, rank)[1] for rank in range(3)]
            run.kill()
    same_losses(run_dir, undisturbed)
    report.passed("launcher killed")


@pytest.mark.long
def test_a_head_that_begins_anew_between_two_runs(
    cluster: Cluster, folder: Path, undisturbed: Losses, report: Report
) -> None:
    """Its Ray is killed, which the keeper mends; the cluster goes down and up; its machine is off and on again."""
    run_dir = folder / "heads-restarted"
    start: Record | None = None
    at, target = 0.0, ""
    for number in range(OTHERS + 1):
        with Run(cluster, run_dir) as run:
            if start is not None:
                report.add(measured(run, "head restarted", target, at, start))
            if number == OTHERS:
                assert run.end() == 0, run.text()
                break
            start = run.trains(start)
            assert run.stop() == 143, run.text()
        at = time.time()
        target = begin_anew(cluster, number)
    same_losses(run_dir, undisturbed)
    report.passed("head restarted")


def begin_anew(cluster: Cluster, number: int) -> str:
    """Have the head's Ray start again, in a way that depends on `number`; says which."""
    head = cluster.hosts[1]
    if number % 3 == 0:
        for process in [*head.processes("gcs_server"), *head.processes("/raylet/raylet ")]:
            process.kill()
    elif number % 3 == 1:
        cluster.slipway("down")
    else:
        head.power_off()
        head.mend()
        head.boot()
        cluster.settle(head)
    cluster.up()
    return ("Ray on it killed", "cluster down and up", "off and on")[number % 3]


@pytest.mark.long
def test_a_host_cut_for_good_ends_a_run_that_needs_it_with_the_reason(
    cluster: Cluster, folder: Path, undisturbed: Losses, report: Report
) -> None:
    """It comes back with its old workers alive: they end, and change nothing."""
    run_dir, start = folder / "hosts-lost", None
    for number in range(OTHERS):
        with Run(cluster, run_dir, "cluster.wait_s=5") as run:
            start = run.trains(start)
            host = cluster.hosts[3 - number % 2]
            rank = next(rank for rank, worker in enumerate(start["workers"]) if worker["host"] == host.name)
            orphan = run.worker(start, rank)[1]
            at = time.time()
            host.cut()
            assert run.end() == 1, run.text()
            ended = time.time()
            error = run.line("error: ")[1]
            assert re.search(rf"{host.name} \({host.address}\) is gone since \d\d:\d\d:\d\d", error), error
            assert psutil.pid_exists(orphan)
            host.mend()
            cluster.up()
            psutil.wait_procs([psutil.Process(orphan)] if psutil.pid_exists(orphan) else [], timeout=30)
            assert not psutil.pid_exists(orphan)
        lost = {"fault": "host cut for good, not elastic", "target": host.name, "workers": 0, "said": [error]}
        report.add(lost | {"repeated": 0, "seconds": ended - at, "noticed": run.line(" is gone")[0] - at})
    with Run(cluster, run_dir) as run:
        assert run.end() == 0, run.text()
    same_losses(run_dir, undisturbed)
    report.passed("host cut for good, not elastic", "to the last bit, once resumed")


@pytest.mark.long
def test_a_host_cut_for_good_makes_an_elastic_run_smaller(
    cluster: Cluster, folder: Path, undisturbed: Losses, report: Report
) -> None:
    """That it grows again when the host is back is shown in test_elastic."""
    run_dir = folder / "elastic"
    size = f"cluster={{workers: {{min: 2, max: 3}}, cpus_per_worker: {os.cpu_count()}, max_failures: 20}}"
    start: Record | None = None
    for number in range(OTHERS + 1):
        with Run(cluster, run_dir, size) as run:
            if number == OTHERS:
                assert run.end() == 0, run.text()
                break
            start = run.trains(start)
            assert start["world_size"] == 3
            host = cluster.hosts[3 - number % 2]
            fault = until_next_step(run, "host cut for good, elastic", host.name, host.cut, start)
            assert fault["workers"] == 2
            report.add(fault)
            assert run.stop() == 143, run.text()
            start = run.start()
        host.mend()
        cluster.up()
    same_losses(run_dir, undisturbed, relative=1e-5)
    report.passed("host cut for good, elastic", "to 1e-5")


@pytest.mark.long
def test_a_head_killed_under_a_run_ends_it_and_it_goes_on_with_the_next_head(
    cluster: Cluster, folder: Path, undisturbed: Losses, report: Report
) -> None:
    run_dir = folder / "head-killed"
    with Run(cluster, run_dir) as run:
        start = run.trains()
        at = time.time()
        for process in [*cluster.hosts[1].processes("gcs_server"), *cluster.hosts[1].processes("/raylet/raylet ")]:
            process.kill()
        code = run.end()
        print(code, f"{time.time() - at:.1f} s", run.text()[-3000:])
    assert code not in (0, 2)
    cluster.up()
    with Run(cluster, run_dir) as run:
        report.add(measured(run, "head killed under a run", "Ray on it killed", at, start))
        assert run.end() == 0, run.text()
    same_losses(run_dir, undisturbed)
    report.passed("head killed under a run")
