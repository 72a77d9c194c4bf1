"""Seconds from `slipway run` to the end of the first step, by part, and whose they are.

    python -m launcher.bench.startup                    one worker, on a Ray that the command starts
    python -m launcher.bench.startup --address auto --workers 3       on a node of a cluster

Each run is the real command on a tiny scratch model and its own prepared data; the parts are those that the run writes
to its metrics.jsonl, see `launcher.train.startup`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.bench.against_trl import machine
from launcher.train.metrics import read

VERSIONS_OF = ("ray", "torch", "deepspeed")
OURS, RAY, PACKAGES, WEIGHTS, TRAINING = "ours", "Ray", "packages", "weights", "training"
PARTS = {
    "command": (OURS, "the interpreter, the command line and what they import"),
    "recipe": (OURS, "read and checked"),
    "data imports": (PACKAGES, "tokenizers, pyarrow"),
    "data": (OURS, "found prepared"),
    "ray.init": (RAY, "Ray started here, or a cluster joined"),
    "plan": (OURS, "everything decided"),
    "training imports": (PACKAGES, "Ray Train and torch, in the launcher"),
    "shared folder": (OURS, "every other node has looked for a file in it, begun before the imports"),
    "model ready": (WEIGHTS, "what is left of making the base ready, begun before Ray"),
    "folder": (OURS, "the run's folder written"),
    "worker process": (RAY, "placed, and a process started"),
    "worker group": (RAY, "Ray Train and torch imported in the worker, its context"),
    "process group": (RAY, "gloo's or NCCL's"),
    "first lines": (OURS, "logs, verdicts, secrets"),
    "library imports": (PACKAGES, "DeepSpeed, transformers, peft, and our own modules"),
    "model": (WEIGHTS, "loaded, adapters put in"),
    "audit": (OURS, "before the first step"),
    "engine": (PACKAGES, "deepspeed.initialize"),
    "checkpoint": (OURS, "looked for"),
    "clean-up": (OURS, "garbage of half a million objects, once"),
    "answers before training": (TRAINING, "where the recipe asks for them"),
    "first step": (TRAINING, "forward, backward, optimizer"),
}
"""Whose each part is, and what happens in it, in order."""
RECIPE = """
model:
  scratch: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
            num_key_value_heads: 1, vocab_size: 320, max_position_embeddings: 256, tie_word_embeddings: true}
data: {train: [{path: rows.jsonl}], max_length: 128}
train: {max_steps: 2, global_batch_size: 6, micro_batch_size: 1}
parallel: {zero: 3}
cluster: {cpus_per_worker: 1}
export: {enabled: false}
"""


def one_run(folder: Path, name: str, workers: int, address: str | None) -> dict[str, Any]:
    """The startup record of one run. Raises RuntimeError with what a run that failed said."""
    command = [sys.executable, "-m", "launcher", "run", "startup.yaml", f"cluster.workers={workers}", "--run-dir", name]
    command += ["--address", address] if address else []
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    found = [record for record in read(folder / name) if record["kind"] == "startup"]
    if done.returncode or not found:
        raise RuntimeError(done.stderr)
    return found[-1]


def by_owner(parts: dict[str, float]) -> dict[str, float]:
    """Seconds of each owner."""
    sums = dict.fromkeys((OURS, RAY, PACKAGES, WEIGHTS, TRAINING), 0.0)
    for part, seconds in parts.items():
        sums[PARTS[part][0]] += seconds
    return sums


def page(found: dict[str, Any]) -> str:
    """Markdown: every part, then the sum of each owner's."""
    runs = [run["parts"] for run in found["runs"]]
    lines = ["| part | whose | seconds, median (least to most) | |", "|---|---|---|---|"]
    for part, (owner, what) in PARTS.items():
        seconds = [run[part] for run in runs if part in run]
        if seconds and max(seconds) >= 0.0005:
            lines.append(f"| {part} | {owner} | {_spread(seconds)} | {what} |")
    sums = [by_owner(run) for run in runs]
    for owner in sums[0]:
        lines.append(f"| **{owner}** | | **{_spread([each[owner] for each in sums])}** | |")
    lines.append(f"| **all** | | **{_spread([run['seconds'] for run in found['runs']])}** | |")
    where = f"{found['workers']} worker{'s' * (found['workers'] > 1)}, " + (
        "a cluster that is joined" if found["joined"] else "a Ray that the command starts"
    )
    load = f", load {found['machine']['load_before']:.1f} when it began" if "load_before" in found["machine"] else ""
    return f"{where}; {len(runs)} runs after one to warm up{load}.\n\n" + "\n".join(lines) + "\n"


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=3, help="counted, after one to warm up")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--address", help="of the Ray cluster to join; otherwise one is started here for each run")
    parser.add_argument("--folder", type=Path, help="where the runs are, seen by all nodes; otherwise a temporary one")
    parser.add_argument("--out", type=Path, help="file for the raw numbers")
    chosen = parser.parse_args(arguments)
    rows = [{"instruction": f"say {number % 9}", "output": "yes " * (1 + number % 5)} for number in range(64)]
    with tempfile.TemporaryDirectory(prefix="slipway-startup-", dir=chosen.folder) as scratch:
        folder = Path(scratch)
        (folder / "startup.yaml").write_text(RECIPE, encoding="utf-8")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        records = [one_run(folder, f"run-{n}", chosen.workers, chosen.address) for n in range(chosen.runs + 1)]
    found = {
        "machine": machine(VERSIONS_OF),
        "workers": chosen.workers,
        "joined": chosen.address is not None,
        "runs": [{"seconds": record["seconds"], "parts": record["parts"]} for record in records[1:]],
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(page(found))


if __name__ == "__main__":
    main()
