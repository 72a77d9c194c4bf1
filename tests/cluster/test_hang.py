"""Ranks that stand still, on a real Ray of their own: found, named, killed, and the run goes on as if nothing had
been."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.train.metrics import read
from tests.cluster.command import Command, losses, workers, write_recipe
from tests.cluster.faults import Cluster, Run
from tests.cluster.hosts import Hosts, needs_hosts
from tests.cluster.test_run import write_model

pytestmark = pytest.mark.cluster
QUICK = ("evaluate.generate=null", "export.enabled=false", "cluster.hang_timeout_s=6")


def hangs(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read(run_dir) if record["kind"] == "hang"]


def every_loss(run_dir: Path) -> dict[int, set[float]]:
    """{step: its losses}, of all attempts."""
    found: dict[int, set[float]] = {}
    for record in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        if record["kind"] == "step":
            found.setdefault(record["step"], set()).add(record["loss"])
    return found


def test_a_stopped_rank_is_named_and_the_run_goes_on_with_the_same_losses(folder: Path) -> None:
    run_dir = folder / "stopped"
    with Command(folder, "run", "tiny.yaml", *QUICK, "train.max_steps=24", "--run-dir", run_dir) as command:
        command.wait_for("step 8:")
        pid = workers(run_dir)[1]
        os.kill(pid, signal.SIGSTOP)
        said = command.wait_for("hang: ")
        where = command.wait_for("stacks of all ranks: ")
        command.wait_for("after a failed worker, going on from the checkpoint of step ")
        code, _, err = command.end()
    assert code == 0, err
    assert re.match(
        r"hang: rank 1 on \S+ made no progress for \d+ s: stopped \(SIGSTOP\), last heard of .* step \d+, at .*; "
        r"the others waited in \w+ \d+$",
        said,
    )
    assert not psutil.pid_exists(pid)
    found = hangs(run_dir)
    assert [(record["rank"], record["step"] >= 8) for record in found] == [(1, True)], "a busy test is some steps late"
    assert f"hang: {found[0]['what']}\n" == said
    stacks = Path(where.split(": ", 1)[1].strip())
    assert stacks.parent == run_dir / "logs"
    assert stacks.name == f"hang-1.1-{found[0]['step']}.log"
    text = stacks.read_text()
    assert text.count("train_worker (") == 2, "the stacks of both ranks"
    assert f"==== rank 1 on {found[0]['host']}, process {pid}" in text
    repeated = every_loss(run_dir)
    assert sorted(repeated) == list(range(1, 25))
    assert all(len(same) == 1 for same in repeated.values()), "to the last bit"


@pytest.mark.long
def test_the_losses_equal_an_undisturbed_runs(folder: Path, uninterrupted: tuple[Path, str, str]) -> None:
    run_dir = folder / "stopped-late"
    with Command(folder, "run", "tiny.yaml", "cluster.hang_timeout_s=6", "--run-dir", run_dir) as command:
        for step in (7, 13):
            command.wait_for(f"step {step}:")
            os.kill(workers(run_dir)[step % 2], signal.SIGSTOP)
            command.wait_for("hang: ")
            command.wait_for("after a failed worker, going on")
        code, _, err = command.end()
    assert code == 0, err
    assert [record["rank"] for record in hangs(run_dir)] == [1, 1]
    assert losses(run_dir) == losses(uninterrupted[0])


@pytest.mark.long
def test_a_rank_that_loops_in_its_own_code_is_found_and_with_no_failures_left_it_is_the_root_cause(
    folder: Path, uninterrupted: tuple[Path, str, str]
) -> None:
    model, run_dir = folder / "loops", folder / "looped"
    write_model(
        model,
        "import torch\n"
        "class {name}(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        self.calls = getattr(self, 'calls', 0) + torch.is_grad_enabled()\n"
        "        while self.calls > 6 and dist.get_rank() == 1:\n"
        "            pass\n"
        "        return super().forward(*args, **kwargs)\n",
    )
    tokenizer = uninterrupted[0] / "model"
    arguments = [f"model={{path: {model}, trust_remote_code: true, tokenizer: {tokenizer}}}", "parallel.zero=0"]
    arguments += [*QUICK, "audit=off", "evaluate.every_steps=1000", "cluster.max_failures=0"]
    with Command(folder, "run", "tiny.yaml", *arguments, "--run-dir", run_dir) as command:
        code, _, err = command.end()
    assert code == 1, err
    cause = next(line for line in err.splitlines() if line.startswith("error: "))
    assert re.match(
        r"error: the run hung: rank 1 on \S+ made no progress for \d+ s: busy in forward of step \d+, "
        r"at \S+forward \(\S*modeling_loops.py:7\); the others waited in all_\w+ \d+; stacks: .*logs/hang-1.1-\d+.log$",
        cause,
    )
    assert "hint: mend the cause, then: slipway resume" in err
    stacks = Path(cause.rpartition("stacks: ")[2])
    assert stacks.read_text().count("train_worker (") == 2, "also where the run ends by it"
    assert [record["rank"] for record in hangs(run_dir)] == [1]


@pytest.mark.long
def test_a_run_that_nobody_watches_has_no_watch(folder: Path) -> None:
    arguments = ["evaluate.generate=null", "export.enabled=false", "train.max_steps=2", "cluster.hang_timeout_s=null"]
    with Command(folder, "run", "tiny.yaml", *arguments, "--run-dir", folder / "unwatched") as command:
        code, _, err = command.end()
    assert code == 0, err


@needs_hosts
@pytest.mark.long
def test_over_two_hosts_the_stacks_of_both_are_in_one_file(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    settings = ["cluster.workers=2", "cluster.hang_timeout_s=8", "train.max_steps=30"]
    with Hosts(2) as hosts, Cluster(hosts, tmp_path) as cluster, Run(cluster, tmp_path / "run", *settings) as run:
        start = run.trains()
        host, pid = run.worker(start, 1)
        os.kill(pid, signal.SIGSTOP)
        _, said = run.line("hang: ")
        assert said.startswith(f"hang: rank 1 on {host.name} made no progress for ")
        assert "stopped (SIGSTOP)" in said
        assert run.end() == 0, run.text()
        text = next((run.run_dir / "logs").glob("hang-*.log")).read_text()
        assert f"==== rank 1 on {host.name}" in text
        assert f"==== rank 0 on {start['workers'][0]['host']}" in text
        assert text.count("train_worker (") == 2
        assert not psutil.pid_exists(pid)
    assert all(len(same) == 1 for same in every_loss(tmp_path / "run").values()), "to the last bit"
