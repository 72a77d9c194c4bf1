"""From outside of a cluster, over ssh: a recipe submitted as a job, followed, stopped; and where its secrets are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.checkpoint.layout import newest_committed
from launcher.cli.app import main
from launcher.data.tokenizer import train_tokenizer
from launcher.store.folder import FolderStore
from tests.cluster.command import Command, workers, write_recipe
from tests.cluster.hosts import Host, Hosts, needs_hosts
from tests.cluster.test_run import write_model

pytestmark = [pytest.mark.cluster, needs_hosts]
ONE = ["cluster.workers=1", "parallel.zero=0", "evaluate.generate=null", "evaluate.every_steps=100000"]
SHORT = [*ONE, "train.max_steps=3"]
LONG = [*ONE, "train.max_steps=100000", "checkpoint.every_steps=100000"]
AWKWARD = "description=it's {a} [b, 'c'] \"d\" $HOME `id` \\ ~"
START = "ray start --head --num-cpus=2 --disable-usage-stats --object-store-memory=120000000 --dashboard-host=0.0.0.0"
SAID = "the token of this process: "


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """host1 is the head of a cluster, host2 has no Ray."""
    with Hosts(2) as hosts:
        token = "umask 077; mkdir ~/.ray; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > ~/.ray/auth_token"
        address = f"--node-ip-address={hosts[1].address}"
        # Ray's daemons keep open what they are given: nothing of ssh's.
        begun = hosts[1].run(f"{token}; RAY_AUTH_MODE=token {START} {address} > ~/start.log 2>&1 < /dev/null")
        assert begun.returncode == 0, hosts[1].run("cat ~/start.log").stdout
        yield hosts


@pytest.fixture(scope="module")
def head(hosts: Hosts) -> Host:
    return hosts[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and its rows; beside it, on storage that all hosts see, a tokenizer and two models."""
    shared = tmp_path_factory.mktemp("shared")
    train_tokenizer(["say please yes " * 9] * 9, 320).save_pretrained(shared / "tokenizer")
    digest = "hashlib.sha256(os.environ.get('HF_TOKEN', '').encode()).hexdigest()"
    report = f"import hashlib, os\nprint({SAID!r} + {digest})\n"
    write_model(shared / "tells", f"{report}class {{name}}(LlamaForCausalLM):\n    pass\n")
    write_model(
        shared / "fails",
        "class {name}(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        if dist.is_initialized():\n"
        "            raise ValueError('boom')\n"
        "        return super().forward(*args, **kwargs)\n",
    )
    (shared / "project").mkdir()
    write_recipe(shared / "project")
    return shared / "project"


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("NO_COLOR", "1")


def model(project: Path, name: str) -> str:
    shared = project.parent
    return f"model={{path: {shared / name}, trust_remote_code: true, tokenizer: {shared / 'tokenizer'}}}"


def way(host: Host) -> list[str]:
    return ["--address", f"ssh://{host.address}", "--ssh-config", str(host.bed.ssh_config)]


def submitted(head: Host, project: Path, *arguments: str) -> Command:
    return Command(project, "submit", "tiny.yaml", *way(head), *arguments)


def sent(command: Command) -> str:
    """The job's name, as soon as it runs."""
    return command.wait_for(" files sent").split()[0]


def heard(command: Command, words: str) -> str:
    """The next line on stdout that has `words` in it."""
    assert command.process.stdout is not None
    lines = []
    for line in command.process.stdout:
        lines.append(line)
        if words in line:
            return line
    raise AssertionError(f"ended without {words!r}:\n{''.join(lines)}")


def jobs(head: Host, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", *way(head), "--json"]) == 0
    return {job["job"]: job for job in json.loads(capsys.readouterr().out)}


def files_with(words: str, *folders: Path) -> list[str]:
    """Files below the folders that contain `words`."""
    found = []
    for folder in folders:
        for path in (Path(place) / name for place, _, names in os.walk(folder) for name in names):
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink() and words.encode() in path.read_bytes():
                    found.append(str(path.relative_to(folder)))
    return found


@contextlib.contextmanager
def command_lines() -> Iterator[set[str]]:
    """Every command line that a process of this machine, and so of its hosts, has within the block."""
    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(process.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_a_job_runs_to_its_end_with_secrets_that_nobody_wrote_down(
    head: Host, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sesame = f"hf_{secrets.token_hex(16)}"
    monkeypatch.setenv("HF_TOKEN", sesame)
    arguments = [model(project, "tells"), AWKWARD, *SHORT, "export.enabled=false", "--name", "told"]
    with command_lines() as seen, submitted(head, project, *arguments) as command:
        job = sent(command)
        code, out, err = command.end()
    assert code == 0, out + err
    assert "note: HF_TOKEN sent along, over ssh and in memory" in err
    assert f"the run is in ~/runs/{job} on the cluster's head" in err
    assert "step 3/3" in out
    run = head.home / "runs" / job
    assert FolderStore(run).names("checkpoints") != []
    assert AWKWARD.partition("=")[2] in (run / "environment.json").read_text().replace('\\"', '"').replace("\\\\", "\\")

    worker = (run / "logs" / "worker-0.log").read_text()
    assert SAID + hashlib.sha256(sesame.encode()).hexdigest() in worker
    token = head.run("cat ~/.ray/auth_token").stdout
    assert len(token) == 64
    own = Path(f"/proc/{head.shell_pid()}/root{head.folder}")  # all that the host has written to its HOME and /tmp/ray
    here = [own / "up", own / "ray", project.parent, Path("/dev/shm")]
    assert files_with(sesame, *here) == []
    assert files_with(token, *here) == [".ray/auth_token"]
    assert any("-m launcher run --address auto" in line for line in seen)
    assert not [line for line in seen if sesame in line or token in line]
    listed = jobs(head, capsys)[job]
    assert (listed["status"], listed["exit_code"], listed["run"]) == ("succeeded", 0, f"~/runs/{job}")


def test_what_cannot_be_reached_is_named(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*address: str) -> str:
        capsys.readouterr()
        assert main(["submit", "tiny.yaml", *address]) == 2
        return capsys.readouterr().err

    head = hosts[1]
    said = refused(*way(hosts[2]))
    assert said.splitlines()[0] == f"error: {hosts[2].address}: no Ray runs there"
    assert "slipway cluster up" in said
    assert "No route to host" in refused("--address", f"ssh://10.77.{hosts.number}.99", *way(head)[2:])
    assert "Permission denied" in refused("--address", f"ssh://nobody@{head.address}", *way(head)[2:])
    head.run("cp -p ~/.ray/auth_token ~/kept; head -c 64 /dev/zero | tr '\\0' a > ~/.ray/auth_token")
    try:
        said = refused(*way(head))
    finally:
        head.run("cp -p ~/kept ~/.ray/auth_token; rm ~/kept")
    assert said.startswith(f"error: ssh://{head.address} takes another token: ~/.ray/auth_token of {head.address} is ")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    said = refused("--address", f"http://{head.address}:8265")
    assert f"error: http://{head.address}:8265 takes another token" in said
    assert f"note: the token goes to http://{head.address}:8265 unencrypted; ssh://HEAD hides it" in said
    assert "b" * 64 not in capsys.readouterr().err


def test_a_job_that_is_not_there_is_said(head: Host, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("stop", "logs"):
        assert main([verb, "nowhere", *way(head)]) == 2
        assert f"error: ssh://{head.address} has no job nowhere" in capsys.readouterr().err


@pytest.mark.long
def test_followed_dropped_left_and_stopped_from_another_terminal(
    head: Host, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with submitted(head, project, *LONG, "--name", "long") as command:
        job = sent(command)
        heard(command, "/100000")
        tunnel = next(p for p in psutil.Process(command.process.pid).children() if "exec cat" in " ".join(p.cmdline()))
        tunnel.kill()
        command.wait_for("is lost")
        command.wait_for("connected again")
        with Command(project, "logs", job, "-f", *way(head)) as other:
            heard(other, "/100000")
            os.kill(command.process.pid, signal.SIGINT)
            code, _, err = command.end()
            assert code == 130, err
            assert f"job {job} goes on without this terminal" in err
            again = f"--address ssh://{head.address} --ssh-config {head.bed.ssh_config}"
            assert f"hint: slipway logs {job} -f {again}; to stop it: slipway stop {job} {again}" in err
            assert jobs(head, capsys)[job]["status"] == "running"
            assert main(["stop", job, *way(head)]) == 0
            out, err = capsys.readouterr()
            code, _, _ = other.end()
            assert code == 0
    saved = re.search(r"stopped and saved at step (\d+)", out)
    assert saved is not None, out
    assert out.splitlines()[-1] == f"job {job}: stopped"
    newest = newest_committed(FolderStore(head.home / "runs" / job))
    assert newest is not None
    assert newest.step == int(saved[1])
    assert jobs(head, capsys)[job]["exit_code"] == 143
    assert main(["stop", job, *way(head)]) == 2
    assert f"job {job} is not running: it has ended" in capsys.readouterr().err


@pytest.mark.long
def test_stopped_while_followed_ends_with_143(head: Host, project: Path) -> None:
    with submitted(head, project, *LONG, "--name", "stopped") as command:
        job = sent(command)
        heard(command, "/100000")
        assert main(["stop", job, *way(head)]) == 0
        code, out, _ = command.end()
    assert code == 143
    assert "stopped and saved at step" in out


@pytest.mark.long
def test_a_worker_that_raises_ends_with_1_and_its_root_cause(head: Host, project: Path) -> None:
    arguments = [model(project, "fails"), *SHORT, "audit=off", "cluster.max_failures=0"]
    with submitted(head, project, *arguments) as command:
        code, out, err = command.end()
    assert code == 1, out + err
    assert f"error: rank 0 on {head.name} failed: ValueError: boom" in out
    assert "ended with exit code 1" in err


@pytest.mark.long
def test_workers_that_start_again_have_the_secrets_too(
    head: Host, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_again")
    arguments = [model(project, "tells"), *ONE, "train.max_steps=100000", "checkpoint.every_steps=5"]
    with submitted(head, project, *arguments, "--name", "again") as command:
        job = sent(command)
        run = head.home / "runs" / job
        heard(command, "/100000")
        heard(command, "/100000")  # some seconds later
        os.kill(head.pid_here(workers(run)[0]), signal.SIGKILL)
        heard(command, "going on from the checkpoint of step")
        assert main(["stop", job, *way(head)]) == 0
        assert command.end()[0] == 143
    digest = hashlib.sha256(b"hf_again").hexdigest()
    said = [line for line in (run / "logs" / "worker-0.log").read_text().splitlines() if line.startswith(SAID)]
    assert said == [SAID + digest] * 2


@pytest.mark.long
def test_a_mistake_that_only_the_cluster_can_find_ends_with_2(head: Host, project: Path) -> None:
    with submitted(head, project, *SHORT, "cluster.workers=64") as command:
        code, out, _ = command.end()
    assert code == 2
    assert "the run needs 64 workers of 1 CPU" in out


@pytest.mark.long
def test_a_launcher_that_is_killed_is_no_success(head: Host, project: Path) -> None:
    with submitted(head, project, *LONG, "--name", "killed") as command:
        heard(command, "/100000")
        for process in head.processes("launcher run --address auto"):
            with contextlib.suppress(psutil.Error):
                if "exec" not in process.cmdline():
                    process.kill()
        code, _, err = command.end()
    assert code == 1, err
    assert re.search(r"error: the launcher of job killed-\S+ was killed by signal 9", err)


@pytest.mark.long
def test_over_http_no_secrets_are_sent(
    head: Host, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stays_here")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.run("cat ~/.ray/auth_token").stdout)
    address = ["--address", f"http://{head.address}:8265"]
    assert main(["submit", "tiny.yaml", *address, *SHORT, "cluster.workers=64", "--no-follow"]) == 0
    out, err = capsys.readouterr()
    job = out.strip()
    assert "note: HF_TOKEN not sent: only ssh:// is a way for secrets" in err
    assert main(["logs", "-f", job, *address]) == 0
    assert "the run needs 64 workers" in capsys.readouterr().out
    assert jobs(head, capsys)[job]["exit_code"] == 2


@pytest.mark.long
def test_a_run_of_this_machine_is_stopped_and_looked_at(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Command(project, "run", "tiny.yaml", *LONG, "--run-dir", "local") as command:
        command.wait_for("/100000")
        with Command(project, "logs", "local", "-f") as follower:
            heard(follower, "INFO")
            assert main(["stop", "local"]) == 0
            out, err = capsys.readouterr()
            assert follower.end()[0] == 0
        code, _, _ = command.end()
    assert code == 130
    assert re.fullmatch(r"stopped and saved at step \d+\n", out)
    assert re.search(r"note: asking a launcher on \S+, pid \d+, since \S+ to save and end", err)
    assert main(["stop", "local"]) == 2
    assert "local is not running: stopped and saved at step" in capsys.readouterr().err
    assert main(["logs", "local"]) == 0
    assert "INFO" in capsys.readouterr().out
    assert main(["logs", "local", "--rank", "7"]) == 2
    assert "hint: there are worker-0.log" in capsys.readouterr().err
