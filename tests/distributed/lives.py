"""Whole runs without a launcher, in processes that a test may kill, stop or starve: forked ones, or torchrun's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from launcher.plan.plan import Plan
from launcher.train.metrics import last_of_each_step, read
from tests.distributed.group import forking, rank_environment, take_environment

ENDS_WITHIN_S = 90.0
"""A life that is left alone has ended by then, and so has a rank whose neighbour was killed."""


def rank_of(
    plan: Plan, environment: dict[str, str], store_file: str, log_file: str, elsewhere: bool, dead_after_s: float
) -> None:
    """One rank of one life, in a process forked from one that has everything imported.

    `elsewhere`: the lease takes it for a process of another machine, whose end only a silent heartbeat can tell.
    `dead_after_s`: how long a silence it takes for one.
    """
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    take_environment(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    import torch
    import torch.distributed as dist

    from launcher.checkpoint import lease
    from launcher.train.run import train_alone

    lease.HEARTBEAT_S, lease.DEAD_AFTER_S = 0.1, dead_after_s
    if elsewhere:
        lease._machine = lambda: "another machine"
    torch.set_num_threads(1)
    store = dist.FileStore(store_file, world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    code = train_alone(plan)
    dist.destroy_process_group()
    sys.exit(code)


class Forked:
    """The ranks of one life, forked: a second after this they train, instead of ten."""

    def __init__(
        self, plan: Plan, world_size: int, scratch: Path, elsewhere: bool = False, dead_after_s: float = 1.0
    ) -> None:
        self.log = scratch / "log"
        rest = (str(scratch / "store"), str(self.log), elsewhere, dead_after_s)
        self.ranks = [
            forking().Process(target=rank_of, args=(plan, rank_environment(rank, world_size), *rest))
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            rank.start()

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]

    def running(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def end(self, kill: bool) -> list[int]:
        """Wait for all ranks, after killing the ones that are left if asked; their exit codes."""
        for rank in self.ranks:
            if kill and rank.is_alive():
                rank.kill()
            rank.join(ENDS_WITHIN_S)
            assert rank.exitcode is not None, f"still running:\n{self.log.read_text()[-3000:]}"
        return [rank.exitcode for rank in self.ranks]


class Torchrun:
    """The same under torchrun, which ends the other ranks itself when one dies."""

    def __init__(self, plan: Plan, world_size: int, scratch: Path) -> None:
        self.log = scratch / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "launcher.train.run", str(Path(plan.run_dir) / "plan.json")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=rank_environment(0, world_size)
            )

    @property
    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self, kill: bool) -> list[int]:
        return [self.process.wait(ENDS_WITHIN_S)]


def losses(plan: Plan) -> list[float]:
    """Of each step up to the first that is missing."""
    found = last_of_each_step(Path(plan.run_dir))
    return [found[step]["loss"] for step in range(1, len(found) + 1)]


def starts(run_dir: Path) -> list[int]:
    """The step that each start of the run went on from."""
    return [record["step"] for record in read(run_dir) if record["kind"] == "start"]
