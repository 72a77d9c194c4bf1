"""The real `slipway` command in a process tree of its own, followed line by line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from launcher.train.metrics import read

RECIPE = """
model:
  scratch: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
            num_key_value_heads: 1, vocab_size: 320, max_position_embeddings: 256, tie_word_embeddings: true}
data: {train: [{path: rows.jsonl}], test: {sources: [{path: rows.jsonl}]}, eval: {split: 0.1},
       clean: {overlap: keep}, max_length: 128}
train: {max_steps: 24, global_batch_size: 4, micro_batch_size: 1}
optimizer: {lr: 1.0e-3}
parallel: {zero: 3}
cluster: {workers: 2, cpus_per_worker: 1}
evaluate: {every_steps: 1, max_rows: 2, generate: {rows: 5, max_new_tokens: 4, batch_size: 2}}
checkpoint: {every_steps: 5}
"""


def write_recipe(folder: Path, num_rows: int = 160) -> Path:
    """A recipe whose model is made in a second, and its rows, of very different lengths."""
    rng = random.Random(3)
    rows = []
    for i in range(num_rows):
        length = rng.randint(1, 12)
        rows.append({"instruction": f"say {i % 9} " + "please " * length, "output": " ".join(["yes"] * length)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    return recipe


class Command:
    """`slipway ARGUMENTS`, started in `folder`; everything it started is gone at the end of the block."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.folder = folder
        self.err: list[str] = []

    def __enter__(self) -> Command:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *self.arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group of its own, as a terminal gives it
            env=os.environ | {"NO_COLOR": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill_tree()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    def wait_for(self, words: str) -> str:
        """The next line on stderr that has `words` in it. Fails where the command ends without one."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.err.append(line)
            if words in line:
                return line
        raise AssertionError(f"ended without {words!r}:\n{''.join(self.err)}")

    def end(self, timeout_s: float = 240) -> tuple[int, str, str]:
        """Exit code, stdout and all of stderr, once it has ended."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, "".join(self.err) + err

    def kill_tree(self) -> None:
        """SIGKILL to the command and all that descends from it, at once."""
        family = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=10)


def workers(run_dir: Path) -> list[int]:
    """Process ids of the run's ranks, as the latest start wrote them down."""
    starts: list[dict[str, Any]] = [record for record in read(run_dir) if record["kind"] == "start"]
    return [worker["pid"] for worker in starts[-1]["workers"]]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """{step: (loss, learning rate)}, of each step the line that counts."""
    return {record["step"]: (record["loss"], record["lr"]) for record in read(run_dir) if record["kind"] == "step"}
