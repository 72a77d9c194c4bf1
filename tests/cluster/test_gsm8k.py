"""Real input: GSM8K through its recipe on two ranks under ZeRO-3, whole and killed twice. Takes several minutes."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from launcher.train.metrics import last_of_each_step
from tests.cluster.command import Command, losses, workers

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.skipif(not DATA.is_file(), reason="GSM8K's train.jsonl is not beside the repository"),
]
ARGUMENTS = (
    "gsm8k-cpu",
    f"data.train.0.path={DATA}",
    "cluster.workers=2",
    "train.max_steps=40",
    "evaluate.every_steps=4",
    "checkpoint.every_steps=5",
)


def test_killed_twice_and_resumed_equals_uninterrupted_and_the_held_out_loss_falls(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Command(tmp_path, "run", *ARGUMENTS, "--run-dir", whole) as command:
        code, _, err = command.end(timeout_s=1200)
    assert code == 0, err
    with Command(tmp_path, "run", *ARGUMENTS, "--run-dir", killed) as command:
        command.wait_for("step 8:")
        os.kill(workers(killed)[0], signal.SIGKILL)
        command.wait_for("going on from the checkpoint of step")
        command.wait_for("step 20:")
        command.kill_tree()
    with Command(tmp_path, "resume", killed) as command:
        code, _, err = command.end(timeout_s=1200)
    assert code == 0, err
    assert losses(killed) == losses(whole)
    evals = {step: record["loss"] for step, record in last_of_each_step(whole, "eval").items()}
    print(f"held-out loss by step: {evals}")
    assert all(later < earlier for earlier, later in pairwise(evals.values()))
