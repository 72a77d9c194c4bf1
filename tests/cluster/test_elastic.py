"""Machines are lost and come back, one of three real hosts at a time, and the run goes on at the size that is left."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from launcher.train.metrics import read
from tests.cluster.command import losses
from tests.cluster.hosts import Host, Hosts, needs_hosts

pytestmark = [pytest.mark.cluster, needs_hosts]

# Ray takes a machine whose processes are gone for dead after two questions that nobody answers.
ENVIRONMENT = (
    "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 NO_COLOR=1 OMP_NUM_THREADS=1"
    " RAY_health_check_initial_delay_ms=0 RAY_health_check_period_ms=1000 RAY_health_check_failure_threshold=2"
    " RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5; "
)


ELASTIC = ("tiny.yaml", "cluster.workers={min: 2, max: 3}", "cluster.max_failures=0")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts with Ray, one CPU each; host1 is the head."""
    with Hosts(3) as hosts:
        start_ray(hosts[1], hosts)
        others = [threading.Thread(target=start_ray, args=(host, hosts)) for host in (hosts[2], hosts[3])]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()
        yield hosts


def start_ray(host: Host, hosts: Hosts) -> None:
    head = hosts[1]
    role = "--head --port=6379 --include-dashboard=false" if host is head else f"--address={head.address}:6379"
    host.run(f"mkdir -p ~/.ray && printf {'a' * 64} > ~/.ray/auth_token && chmod 600 ~/.ray/auth_token")
    for _ in range(3):  # Ray gives a node 30 s to start, which a busy machine may not have
        done = host.run(
            f"{ENVIRONMENT} ray start {role} --num-cpus=1 --object-store-memory=100000000"
            f" --node-ip-address={host.address}"
        )
        if done.returncode == 0:
            return
        for process in host.processes("/ray/"):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    raise AssertionError(done.stdout + done.stderr)


def crash(host: Host) -> None:
    """It loses power and boots again, without Ray."""
    host.kill_processes()
    host.boot()


class Run:
    """`slipway` on host1, followed line by line; gone at the end of the block."""

    def __init__(self, hosts: Hosts, folder: Path, *arguments: str) -> None:
        self.hosts = hosts
        line = shlex.join(["python", "-m", "launcher", *arguments, "--address", "auto"])
        self.process = hosts[1].popen(f"{ENVIRONMENT}cd {folder}; PYTHONPATH={Path(__file__).parents[2]} {line}")
        self.said: list[str] = []

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for process in self.hosts[1].processes("-m launcher"):
                process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_for(self, words: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"ended without {words!r}:\n{''.join(self.said)}")

    def end(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        self.said += self.process.stdout
        return self.process.wait(), "".join(self.said)


@contextmanager
def slowed(host: Host, share: float) -> Iterator[None]:
    """Within the block the rank on the host computes for a share of the time, and so do all that wait for it."""
    ranks = host.processes("RayTrainWorker")
    assert ranks
    over = threading.Event()

    def send(number: int, for_s: float) -> None:
        for process in ranks:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        over.wait(for_s)

    def pace() -> None:
        while not over.is_set():
            send(signal.SIGSTOP, 0.3 * (1 - share))
            if share:
                send(signal.SIGCONT, 0.3 * share)
        send(signal.SIGCONT, 0)

    thread = threading.Thread(target=pace)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def near(run: Path, reference: Path) -> None:
    """Every step's loss and learning rate as in the other run."""
    ours, theirs = losses(run), losses(reference)
    assert ours.keys() == theirs.keys()
    for step, (loss, lr) in theirs.items():
        assert ours[step][0] == pytest.approx(loss, rel=1e-5), step
        assert ours[step][1] == lr, step


def test_a_run_shrinks_when_a_host_is_lost_and_grows_when_it_is_back(
    hosts: Hosts, folder: Path, uninterrupted: tuple[Path, str, str]
) -> None:
    run_dir = folder / "elastic"
    with Run(hosts, folder, "run", *ELASTIC, "--run-dir", str(run_dir)) as run:
        run.wait_for("step 7:")
        crash(hosts[3])
        run.wait_for("host3 is gone: 2 workers instead of 3, going on from the checkpoint of step ")
        with slowed(hosts[2], share=0):
            start_ray(hosts[3], hosts)
            run.wait_for("there is room for 3 workers now")
        with slowed(hosts[2], share=0.2):  # or the run would end before it has grown
            run.wait_for("host3 joined: 3 workers instead of 2")
        code, said = run.end()
    assert code == 0, said
    records = list(read(run_dir))
    changes = [(record["from"], record["to"], record["why"]) for record in records if record["kind"] == "resize"]
    assert changes == [(3, 2, "host3 is gone"), (2, 3, "host3 joined")]
    starts = [record for record in records if record["kind"] == "start"]
    assert [len({worker["host"] for worker in start["workers"]}) for start in starts] == [3, 2, 3]
    # It grew at a checkpoint that was made for that: hardly a step was repeated.
    steps = [record["step"] for record in records if record["kind"] == "step" and record["attempt"] == "1.2"]
    assert 0 <= steps[-1] - starts[2]["step"] <= 4, (steps, starts[2])
    near(run_dir, uninterrupted[0])


@pytest.mark.long
def test_a_run_of_one_size_waits_for_its_host_and_fails_when_it_stays_away(
    hosts: Hosts, folder: Path, uninterrupted: tuple[Path, str, str]
) -> None:
    run_dir = folder / "fixed"
    arguments = ("tiny.yaml", "cluster.workers=3", "cluster.max_failures=0", "--run-dir", str(run_dir))
    missing = "3 workers are needed, the cluster has room for 2: host3 ("
    with Run(hosts, folder, "run", *arguments, "cluster.wait_s=10") as run:
        run.wait_for("step 7:")
        crash(hosts[3])
        run.wait_for(missing)
        code, said = run.end()
    assert code == 1, said
    assert f"error: {missing}{hosts[3].address}) is gone since " in said
    assert "waited 10 s for more" in said
    assert f"slipway resume {run_dir}" in said

    with Run(hosts, folder, "resume", str(run_dir), "cluster.wait_s=300") as run:
        code, said = run.end()
    assert code == 2, said
    assert "the run needs 3 workers of 1 CPU; there is room for 2: CPUs free are host1 1 of 1, host2 1 of 1" in said

    start_ray(hosts[3], hosts)
    with Run(hosts, folder, "resume", str(run_dir), "cluster.wait_s=300") as run:
        run.wait_for("step 12:")
        crash(hosts[3])
        run.wait_for("waiting for up to 300 s")
        start_ray(hosts[3], hosts)
        code, said = run.end()
    assert code == 0, said
    near(run_dir, uninterrupted[0])


@pytest.mark.long
def test_a_host_that_is_lost_again_and_again_without_progress_counts(hosts: Hosts, folder: Path) -> None:
    run_dir = folder / "flapping"
    with Run(hosts, folder, "run", *ELASTIC, "checkpoint.every_steps=24", "--run-dir", str(run_dir)) as run:
        run.wait_for("step 3:")
        crash(hosts[3])  # the first costs nothing
        run.wait_for("2 workers instead of 3, starting again: there was no checkpoint yet")
        run.wait_for("step 3:")
        crash(hosts[2])
        code, said = run.end()
    for host in (hosts[2], hosts[3]):
        start_ray(host, hosts)
    assert code == 1, said
    assert "error: rank " in said
