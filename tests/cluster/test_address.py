"""A Ray that was there before: joined by its address, with its token, and left running."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.command import Command

pytestmark = [pytest.mark.cluster, pytest.mark.long]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head node with two CPUs and a token of its own; its processes end with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    before = set(psutil.pids())
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2"]
    start += ["--include-dashboard=false", f"--object-store-memory={100 * 2**20}"]
    quiet = os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    # A file, not a pipe: Ray's daemons keep it open for as long as they live.
    subprocess.run(start, env=quiet, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and f"{port}" in " ".join(p.cmdline())]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for process in ours:
            process.kill()
        psutil.wait_procs(ours, timeout=10)


def test_a_cluster_is_joined_and_left_as_it_was(head: str, folder: Path) -> None:
    for name in ("first", "second"):  # the second finds the CPUs free again
        run = ["run", "tiny.yaml", "train.max_steps=2", "--address", head, "--run-dir", folder / f"joined-{name}"]
        with Command(folder, *run) as command:
            code, out, err = command.end()
        assert code == 0, err
        assert "checked: plain transformers" in out


def test_without_the_token_it_says_what_is_missing(
    head: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.ray/auth_token either
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with Command(folder, "run", "tiny.yaml", "--address", head, "--run-dir", folder / "no-token") as command:
        code, _, err = command.end()
    assert code == 2, err
    assert "wants a token that this machine does not have" in err
    assert "RAY_AUTH_TOKEN" in err
