"""`ray up` and `ray submit` from outside with the file that `slipway cluster render` writes, onto real hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import launcher.job
from launcher.checkpoint.layout import newest_committed
from launcher.data.tokenizer import train_tokenizer
from launcher.recipe.load import load
from launcher.store.folder import FolderStore
from launcher.train.metrics import read
from tests.cluster.command import losses, write_recipe
from tests.cluster.hosts import Host, Hosts, needs_hosts

pytestmark = [pytest.mark.cluster, needs_hosts]
SHORT = ["train.max_steps=2", "evaluate.generate=null", "export.enabled=false", "cluster.cpus_per_worker=2"]
SCRIPT = Path(launcher.job.__file__)


@dataclass(frozen=True)
class Outside:
    """A user's machine: its own home, a folder with a recipe and a cluster file, Ray's command."""

    bed: Hosts
    folder: Path
    """The hosts see it too: runs are here, and nothing of what is copied to them is read from here."""
    environment: dict[str, str]

    def ray(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), **self.how(), timeout=240)

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "ray.scripts.scripts", *(str(argument) for argument in arguments)]

    def how(self) -> dict[str, Any]:
        return {
            "cwd": self.folder,
            "env": self.environment,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }

    def submit(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.ray("submit", "--no-config-cache", "cluster.yaml", SCRIPT, *arguments)

    @property
    def token(self) -> str:
        return (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """Two hosts, and a user's machine with a cluster file for them."""
    folder, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home")
    write_recipe(folder)
    # What Ray keeps on a user's machine, and would leave there.
    private = {"HOME": str(home), "TMPDIR": str(home), "RAY_TMPDIR": str(home), "NO_COLOR": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | private
    with Hosts(2) as bed:
        outside = Outside(bed, folder, environment)
        render = ["cluster", "render", "--hostfile", bed.hostfile(), "--recipe", "tiny.yaml", "-o", "cluster.yaml"]
        command = [sys.executable, "-m", "launcher", *render, "--ssh-key", bed.folder / "id"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield outside


@pytest.fixture(scope="module")
def up(outside: Outside) -> Outside:
    """With Ray on both."""
    done = outside.ray("up", "-y", "--no-config-cache", "cluster.yaml")
    assert done.returncode == 0, done.stdout
    joined(outside)
    return outside


def joined(outside: Outside) -> None:
    head, worker = outside.bed
    ask = f"python -m launcher.cluster.members {head.address}:6379 60 {head.address} {worker.address}"
    nodes = json.loads(outside.bed[1].run(ask).stdout)
    assert sorted(node["address"] for node in nodes) == [head.address, worker.address]


def test_both_hosts_share_a_token_that_nobody_sees(up: Outside) -> None:
    assert up.token not in (up.folder / "cluster.yaml").read_text()
    for host in up.bed:
        listed = host.run("stat -c '%a %s' ~/.ray/auth_token; stat -c %a ~/.ray").stdout.split()
        assert listed == ["600", "64", "700"]
        assert (host.home / ".ray" / "auth_token").read_text() == up.token
        for process in host.processes("/tmp/ray/"):
            assert up.token not in " ".join(process.cmdline())
            assert up.token not in process.environ().values()
            assert process.environ().get("OMP_NUM_THREADS") != "1"
    assert up.token not in (up.bed[1].home / "ray_bootstrap_config.yaml").read_text()


def test_a_recipe_runs_on_both_and_its_log_comes_back(up: Outside) -> None:
    overrides = [*SHORT, f"runs={up.folder}/runs"]
    wanted = load(str(up.folder / "tiny.yaml"), overrides).hash
    done = up.submit("tiny.yaml", *overrides, "--", "--expect", wanted)
    assert done.returncode == 0, done.stdout
    assert f"recipe tiny.yaml, hash {wanted}" in done.stdout
    assert "2 workers with 2 CPUs each; 2 steps" in done.stdout
    (run_dir,) = (up.folder / "runs").glob("tiny-*")
    assert sorted(losses(run_dir)) == [1, 2]
    (start,) = [record for record in read(run_dir) if record["kind"] == "start"]
    assert sorted(worker["host"] for worker in start["workers"]) == ["host1", "host2"]


def test_an_edited_recipe_is_stale_on_the_head_until_it_is_sent(up: Outside) -> None:
    recipe = up.folder / "tiny.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("lr: 1.0e-3", "lr: 2.0e-3"))
    try:
        wanted = load(str(recipe)).hash
        done = up.submit("tiny.yaml", "--", "--expect", wanted)
        assert done.returncode == 1, "of the job's 2 ray submit makes 1"
        assert f"on this machine, not {wanted}" in done.stdout
        assert up.ray("rsync-up", "cluster.yaml").returncode == 0
        assert up.bed[1].run("slipway check tiny.yaml").stdout.splitlines()[-1].endswith(f"hash {wanted}")
    finally:
        recipe.write_text(before)
        up.ray("rsync-up", "cluster.yaml")


def test_a_word_that_the_shell_split_is_refused(up: Outside) -> None:
    done = up.submit("tiny.yaml", "parallel={zero: 3}")
    assert done.returncode == 1
    assert "'parallel={zero:' did not arrive as it was typed" in done.stdout
    assert "slipway submit" in done.stdout


@pytest.mark.long  # 20 s; that any exit code but 0 comes back as 1 is shown above
def test_a_worker_that_fails_is_a_submit_that_fails(up: Outside) -> None:
    from tests.cluster.test_run import write_raising_model

    model = up.folder / "boom"
    write_raising_model(model)
    tokenizer = up.folder / "tokenizer"
    train_tokenizer(["say please yes " * 9] * 9, 320).save_pretrained(tokenizer)
    arguments = [f"model.path={model}", "model.scratch=null", "model.trust_remote_code=true"]
    arguments += [f"model.tokenizer={tokenizer}", "parallel.zero=0", "cluster.max_failures=0", "audit=off", *SHORT]
    done = up.submit("tiny.yaml", *arguments, f"runs={up.folder}/raises")
    assert done.returncode == 1
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)  # a terminal, for ssh -tt
    assert re.search(r"^error: rank 1 on host2.*: ValueError: boom on rank 1$", said.replace("\r", ""), re.M), said


@pytest.mark.long
def test_a_connection_that_breaks_saves_the_run(up: Outside) -> None:
    run_dir = up.folder / "hung-up"
    arguments = [word for word in SHORT if "max_steps" not in word] + ["train.max_steps=100000"]
    command = up.command("submit", "--no-config-cache", "cluster.yaml", SCRIPT, "tiny.yaml", *arguments)
    with subprocess.Popen([*command, "--", "--run-dir", str(run_dir)], **up.how()) as submit:
        while submit.poll() is None and (not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 3):
            time.sleep(0.1)
        assert submit.poll() is None, submit.stdout.read()
        family = psutil.Process(submit.pid).children(recursive=True)
        next(process for process in family if process.name() == "ssh").kill()
        submit.wait(20)
    deadline = time.monotonic() + 60
    while up.bed[1].processes("job.py") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not up.bed[1].processes("job.py")
    saved = newest_committed(FolderStore(run_dir))
    assert saved is not None
    assert saved.step == max(losses(run_dir))


@pytest.mark.long  # a minute, which the worker waits for its head
def test_down_leaves_no_process_of_rays(up: Outside) -> None:
    assert up.ray("down", "-y", "cluster.yaml").returncode == 0
    head, worker = up.bed
    assert rays(head) == []
    deadline = time.monotonic() + 120
    while rays(worker) and time.monotonic() < deadline:
        time.sleep(1)
    assert rays(worker) == []


def rays(host: Host) -> list[str]:
    """Command lines of Ray's processes there."""
    found = [" ".join(process.cmdline()) for process in host.processes("ray")]
    return [command for command in found if "/tmp/ray" in command or "ray start" in command]
