"""Two nodes on this machine, the second in a mount namespace of its own, where an empty disk hides the folder of
runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.command import Command, losses, write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.long]
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", f"--object-store-memory={100 * 2**20}"]


def may_mount() -> bool:
    """Whether this user may have a mount namespace of its own, and mount in it."""
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return tried.returncode == 0


@contextlib.contextmanager
def two_nodes(hidden: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes with a CPU each; the second sees an empty folder at `hidden`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    quiet = os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    head = [*RAY, "--head", f"--port={port}", "--include-dashboard=false"]
    node = [*RAY, f"--address={address}"]
    if hidden is not None:
        node = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(hidden), *node]
    before = set(psutil.pids())
    try:
        for command in (head, node):
            # No pipes: Ray's daemons would keep them open for as long as they live.
            subprocess.run(command, env=quiet, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield address
    finally:
        ours = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and address in started_with(p)]
        for process in ours:
            process.kill()
        psutil.wait_procs(ours, timeout=10)


def started_with(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a file system in a namespace of its own")
def test_a_folder_that_a_node_does_not_see_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    with two_nodes(runs, monkeypatch) as address:
        with Command(tmp_path, "run", "tiny.yaml", "--address", address, "--run-dir", runs / "mine") as command:
            code, out, err = command.end()
        assert (code, out) == (2, "")
        host = socket.gethostname()
        assert (
            f"error: {runs}/mine is not shared: {host} does not see it, and every rank writes its part of each "
            "checkpoint there\nhint: put runs on storage that all nodes share, or in an object store: "
            "--run-dir s3://bucket/..\n"
        ) in err
        assert not (runs / "mine").exists()
        # Another folder of the same two nodes is seen by both: there the run goes to its end, a rank on each. What Ray
        # Train keeps of its own (TMPDIR) needs to be seen by the driver's node alone.
        shared = tmp_path / "shared"
        (runs / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(runs / "tmp"))
        run = ["run", "tiny.yaml", "train.max_steps=2", "checkpoint.every_steps=1", "--address", address]
        with Command(tmp_path, *run, "--run-dir", shared) as command:
            code, out, err = command.end()
        assert code == 0, err
        assert "checked: plain transformers" in out
        assert len(losses(shared)) == 2
        assert not list(shared.glob(".seen-by-all-*"))
        assert not list((runs / "tmp").glob("slipway-*"))
        # A run that was begun where all see it and then moved to where they do not is refused as well.
        shared.rename(runs / "moved")
        with Command(tmp_path, "resume", runs / "moved", "train.max_steps=4", "--address", address) as command:
            code, _, err = command.end()
        assert code == 2
        assert f"{runs}/moved is not shared: {host} does not see it" in err
