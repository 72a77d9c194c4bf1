"""What a user sees of guards: a run that stops early and is exported from its best, one that ends for a spike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.checkpoint.layout import committed
from launcher.store.folder import FolderStore
from launcher.train.metrics import read
from tests.cluster.command import Command, write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.long]

OVERFITS = """
extends: tiny.yaml
evaluate: {every_steps: 6, max_rows: null, generate: null, early_stopping: {patience: 2}}
data: {train: [{path: few.jsonl}], test: {sources: []}, packing: false, eval: {split: 0.25}}
train: {max_steps: 400, global_batch_size: 8, micro_batch_size: 8}
optimizer: {lr: 1.0e-2}
schedule: {kind: constant}
parallel: {zero: 0}
cluster: {workers: 1}
checkpoint: {every_steps: 100, keep_last: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows whose answers cannot be guessed, only learned by heart."""
    folder = tmp_path_factory.mktemp("guards")
    write_recipe(folder)
    rows = [{"instruction": f"the number of {i}", "output": str(7919 * i % 10007)} for i in range(64)]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "overfits.yaml").write_text(OVERFITS)
    return folder


def test_a_run_stops_early_and_gives_its_best_model(folder: Path) -> None:
    run_dir = folder / "run"
    with Command(folder, "run", "overfits.yaml", "--run-dir", run_dir) as command:
        code, out, err = command.end(600)
    assert code == 0, err
    said = re.search(
        r"stopped early at step (\d+): loss was best \(([\d.]+)\) at step (\d+), and no better in 2 evaluations; the "
        r"model is that of step (\d+)",
        err,
    )
    assert said is not None, err
    print(err, out, sep="\n")
    stopped, best = int(said[1]), int(said[3])
    assert stopped == best + 12 == int(said[4]) + 12 < 400
    evaluated = {record["step"]: record["loss"] for record in read(run_dir) if record["kind"] == "eval"}
    assert best == min(evaluated, key=evaluated.__getitem__)
    assert float(said[2]) == pytest.approx(evaluated[best], abs=1e-4)
    assert f"slipway resume {run_dir} evaluate.early_stopping.patience=4" in err
    assert f"held-out loss: {evaluated[6]:.4f} first, {evaluated[best]:.4f} last" in out
    assert "checked: plain transformers gives the trained model's logits" in out  # by the probe of the best
    assert f"at step {best}" in (run_dir / "model" / "README.md").read_text()
    assert [checkpoint.step for checkpoint in committed(FolderStore(run_dir))] == [best, stopped]
    with Command(folder, "export", run_dir, "--checkpoint", "last", "--out", "last", "--json") as command:
        code, out, err = command.end()
    assert (code, json.loads(out)["step"]) == (0, stopped), err
    with Command(folder, "export", run_dir, "--checkpoint", "7", "--out", "seventh") as command:
        code, _, err = command.end()
    assert code == 2
    assert "has no checkpoint of step 7" in err
    assert f"hint: give best, last or a step of {best}, {stopped}" in err


def test_a_spike_ends_a_run_that_is_to_stop_for_one(folder: Path) -> None:
    run_dir = folder / "spiked"
    guard = "guard={spikes: stop, window: 4, deviations: 0.01}"  # the first loss above the mean of four
    with Command(folder, "run", "overfits.yaml", guard, "optimizer.lr=1e-9", "--run-dir", run_dir) as command:
        code, _, err = command.end()
    assert code == 1, err
    first = next(line for line in err.splitlines() if line.startswith("error:"))
    assert re.fullmatch(
        r"error: the loss of step \d+ is [\d.]+, [\d.]+ standard deviations above the mean of the 4 steps before it "
        r"\([\d.]+\); rows: \S+few.jsonl:\d+.*",
        first,
    )
    assert "hint: lower optimizer.lr" in err
    assert len([record for record in read(run_dir) if record["kind"] == "start"]) == 1, "and is not started again"
