"""A run on three hosts and what can happen to it: each fault is done to a run that trains, and measured by its
metrics."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from launcher.train.metrics import read
from tests.cluster.command import losses
from tests.cluster.hosts import Host, Hosts

Record = dict[str, Any]
PATIENCE_S = 600
"""For whatever must come; the slowest, a machine that is off, is found after a minute."""
STEPS = 160
SETTINGS = (
    f"train.max_steps={STEPS}",
    "checkpoint.every_steps=5",
    "evaluate={every_steps: 10000, max_rows: 2, generate: null}",
    "export.enabled=false",
    # One worker fills a host.
    f"cluster={{workers: 3, cpus_per_worker: {os.cpu_count()}, max_failures: 20}}",
)


class Cluster:
    """`slipway cluster up` on a bed of hosts; `folder` is seen by all of them, and has tiny.yaml."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.hostfile = hosts.hostfile()
        for host in hosts:
            self.settle(host)

    def settle(self, host: Host) -> None:
        """After each boot. The hosts share the CPUs: a thread that spins while it waits takes them from the others."""
        (host.home / ".bashrc").write_text("export GOMP_SPINCOUNT=0\n")

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.slipway("down")

    def up(self) -> None:
        """Also brings back hosts that are not in it; all are when this returns."""
        self.slipway("up")

    def slipway(self, verb: str) -> None:
        command = [sys.executable, "-m", "launcher", "cluster", verb, "--hostfile", str(self.hostfile)]
        command += ["--ssh-config", str(self.hosts.ssh_config)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=PATIENCE_S)
        assert done.returncode == 0, f"slipway cluster {verb}: {done.stderr}"

    def host_of(self, address_or_name: str) -> Host:
        return next(host for host in self.hosts if address_or_name in (host.name, host.address))


class Run:
    """`slipway run` or `slipway resume` on the head, followed by what it says and by its metrics."""

    def __init__(self, cluster: Cluster, run_dir: Path, *arguments: str) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.said: list[tuple[float, str]] = []
        """Each line, and when it came."""
        new = not (run_dir / "plan.json").exists()
        what = ["run", "tiny.yaml", *SETTINGS, "--run-dir", str(run_dir)] if new else ["resume", str(run_dir)]
        words = shlex.join([*what, *arguments, "--address", "auto"])
        line = f"cd {shlex.quote(str(cluster.folder))} && NO_COLOR=1 exec slipway {words}"
        self.began = time.time()
        self.process = cluster.hosts[1].popen(line)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.time(), line.rstrip()))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """It has ended, or is made to."""
        if self.process.poll() is None:
            self.kill()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def launcher(self) -> list[psutil.Process]:
        """The command's own process on the head."""
        return self.cluster.hosts[1].processes(f" {self.run_dir}")

    def kill(self) -> None:
        """SIGKILL to the launcher."""
        for launcher in self.launcher():
            launcher.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM to the launcher; its exit code."""
        for launcher in self.launcher():
            launcher.terminate()
        return self.end()

    def text(self) -> str:
        return "\n".join(line for _, line in self.said)

    def records(self, kind: str) -> list[Record]:
        """Those of its metrics that count."""
        return [record for record in read(self.run_dir) if record["kind"] == kind]

    def wait(self, what: str, found: Callable[[], Any]) -> Any:
        """What `found` returns, as soon as that is something. Fails where the command ends or the time is over."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if result := found():
                return result
            assert not ended, f"ended before {what}:\n{self.text()}"
            time.sleep(0.05)
        raise AssertionError(f"no {what} in {PATIENCE_S} s:\n{self.text()}")

    def line(self, words: str, since: float = 0.0) -> tuple[float, str]:
        """The first line since then that has `words` in it, and when it came."""

        def found() -> Any:
            return next(((at, line) for at, line in self.said if at >= since and words in line), None)

        at, line = self.wait(repr(words), found)
        return at, line

    def trains(self, start: Record | None = None) -> Record:
        """Its latest start, later than `start`, once it has saved a checkpoint."""

        def found() -> Record | None:
            latest = self.start(start)
            saved = latest is not None and any(
                record["attempt"] == latest["attempt"] for record in self.records("checkpoint")
            )
            return latest if saved else None

        result: Record = self.wait("a checkpoint", found)
        return result

    def start(self, after: Record | None = None) -> Record | None:
        """Its latest start, if that is not `after`."""
        starts = self.records("start") if self.run_dir.exists() else []
        return starts[-1] if starts and (after is None or starts[-1]["attempt"] != after["attempt"]) else None

    def steps(self, attempt: str) -> list[Record]:
        return [record for record in self.records("step") if record["attempt"] == attempt]

    def step(self) -> int:
        """The last that was taken."""
        taken = self.records("step")
        return taken[-1]["step"] if taken else 0

    def worker(self, start: Record, rank: int) -> tuple[Host, int]:
        """Where a rank runs, and this machine's number for its process."""
        worker = start["workers"][rank]
        host = self.cluster.host_of(worker["host"])
        return host, host.pid_here(worker["pid"])

    def end(self) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(10)
        return code


def until_next_step(run: Run, fault: str, target: str, act: Callable[[], object], start: Record) -> Record:
    """Do `act` to a run that trains since `start`; what it cost until a later start has taken its first step."""
    at = time.time()
    act()
    return measured(run, fault, target, at, start)


def measured(run: Run, fault: str, target: str, at: float, start: Record) -> Record:
    """What a fault at `at` cost that the workers since `start` did not survive: waits for those that follow.

    Seconds are from the fault on: `noticed` until the run said so, `process` until the last of its new processes was
    made, `loaded` until all had the checkpoint, `seconds` until the end of the first step.
    """
    again: Record = run.wait("the next start", lambda: run.start(after=start))
    made = [psutil.Process(run.worker(again, rank)[1]).create_time() for rank in range(again["world_size"])]
    first: Record = run.wait("the next step", lambda: next(iter(run.steps(again["attempt"])), None))
    step = max(taken["step"] for taken in run.steps(start["attempt"]))
    said = [(when, line) for when, line in run.said if at <= when <= first["time"] + 1 and not line.startswith("step ")]
    signs = ("failed: ", " is gone", "hang: ")
    return {
        "fault": fault,
        "target": target,
        "step": step,
        "repeated": step - again["step"],
        "seconds": first["time"] - at,
        "workers": again["world_size"],
        "noticed": next((when - at for when, line in said if any(sign in line for sign in signs)), None),
        "process": max(made) - at,
        "loaded": again["time"] - at,
        "said": [line.replace(f"{run.run_dir}/", "") for _, line in said],
    }


def kill_worker(run: Run, start: Record, rank: int) -> Record:
    """SIGKILL."""
    host, pid = run.worker(start, rank)
    return until_next_step(
        run, "worker killed", f"rank {rank} on {host.name}", lambda: os.kill(pid, signal.SIGKILL), start
    )


def stop_worker(run: Run, start: Record, rank: int) -> Record:
    """SIGSTOP: it must be found, named and killed."""
    host, pid = run.worker(start, rank)
    target = f"rank {rank} on {host.name}"
    fault = until_next_step(run, "rank stopped", target, lambda: os.kill(pid, signal.SIGSTOP), start)
    hang = next(line for line in fault["said"] if line.startswith("hang: "))
    assert hang.startswith(f"hang: {target} made no progress for"), hang
    assert "stopped (SIGSTOP)" in hang, hang
    assert not psutil.pid_exists(pid)
    return fault


def kill_raylet(run: Run, start: Record, host: Host) -> Record:
    """SIGKILL to Ray's daemon on a host: its workers end with it, and the keeper starts it again."""

    def act() -> None:
        for process in host.processes("/raylet/raylet "):
            if process.name() == "raylet":
                process.kill()

    return until_next_step(run, "raylet killed", host.name, act, start)


def cut_for_a_while(run: Run, start: Record, host: Host, seconds: float = 20) -> Record:
    """Pull a host's cable and put it back: the same workers must go on with the next step, and nothing be repeated."""
    at = time.time()
    host.cut()
    try:
        time.sleep(seconds)  # the fault itself
        step = run.step()
    finally:
        host.mend()
    first: Record = run.wait(
        "the next step", lambda: next((taken for taken in run.records("step") if taken["time"] > at + seconds), None)
    )
    assert first["step"] == step + 1, f"step {first['step']} follows upon step {step}:\n{run.text()}"
    assert first["attempt"] == start["attempt"]
    fault = {"fault": f"link cut for {seconds:g} s", "target": host.name, "step": step, "repeated": 0}
    return fault | {"seconds": first["time"] - at, "workers": start["world_size"], "said": []}


def same_losses(run_dir: Path, undisturbed: Mapping[int, tuple[float, float]], relative: float = 0.0) -> None:
    """Every step's learning rate and loss are the undisturbed run's: to the last bit unless `relative` says how far off
    a loss may be."""
    found = losses(run_dir)
    assert sorted(found) == sorted(undisturbed)
    for step, (loss, rate) in undisturbed.items():
        assert found[step][1] == rate
        assert abs(found[step][0] - loss) <= relative * abs(loss), f"step {step}: {found[step][0]} instead of {loss}"
