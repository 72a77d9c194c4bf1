"""Tokens per second of a recipe's training step, and where the time goes.

`torchrun --nproc-per-node N -m launcher.bench.throughput PLAN STEPS` or, through `slipway bench`, in one process
group of its own without Ray: placement is not what is measured. Prints one JSON line.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.plan.batch import batch_layout
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.train.loop import optimizer_step
from launcher.train.metrics import MetricsLog
from launcher.train.parts import Parts, Progress
from launcher.train.run import begin_together, build_parts, use_device
from launcher.train.schedule import lr_factor
from launcher.train.throughput import PARTS, Stopwatch, memory_bytes

WARMUP_STEPS = 3


@dataclass(frozen=True)
class StepTime:
    """One optimizer step as this rank saw it."""

    seconds: dict[str, float]
    """By part, with `total` the wall clock."""
    cpu_s: float
    """Processor time of this process, all threads: beside the wall clock it tells a busy machine from a slow step."""
    tokens: int
    """Of the global batch."""
    supervised_tokens: int
    loss: float


def bench_parts(plan: Plan) -> Parts:
    """Model, engine and data of a run that writes no metrics. Collective."""
    device = use_device(plan)
    batch = batch_layout(plan.trajectory.global_batch_size, plan.layout.micro_batch_size, dist.get_world_size())
    store = open_store(plan.location)
    attempt = begin_together(store, launch=0)
    metrics = MetricsLog(Path(plan.run_dir), str(attempt), writes=False)
    parts = build_parts(plan, batch, device, metrics, store, attempt, stopping=lambda: False)
    # A watch that waits for the device after each part, so that a part is charged with its own time.
    return replace(parts, watch=Stopwatch(device, synchronize=True))


def timed_steps(parts: Parts) -> Iterator[StepTime]:
    """Optimizer steps without end, each taken and timed when it is asked for. Collective."""
    plan = parts.plan
    for step in itertools.count():
        parts.watch.lap()
        cpu_s = time.process_time()
        global_batch = parts.train_data.global_batch(step)
        rate = plan.trajectory.optimizer.lr * lr_factor(plan.trajectory.schedule, step, plan.lifecycle.total_steps)
        result = optimizer_step(parts, step, global_batch, rate)
        assert result is not None  # nothing asks it to stop
        seconds = parts.watch.lap()
        yield StepTime(
            seconds, time.process_time() - cpu_s, global_batch.tokens, global_batch.supervised_tokens, result.loss
        )


def measure(plan: Plan, num_steps: int) -> dict[str, Any]:
    """Run `num_steps` optimizer steps after a few to warm up, and one checkpoint. Collective.

    Returns medians: tokens_per_s (all ranks), step_s, and seconds of each part of a step; a step's tokens differ
    where rows do, so tokens_per_s is all tokens over all seconds.
    """
    parts = bench_parts(plan)
    steps = list(itertools.islice(timed_steps(parts), WARMUP_STEPS + num_steps))
    timed = steps[WARMUP_STEPS:]
    with parts.watch.part("checkpoint"):
        parts.saver.begin(num_steps, Progress(step=num_steps).as_dict())
        parts.saver.join()
    parts_s = {name: statistics.median(step.seconds.get(name, 0.0) for step in timed) for name in PARTS[:4]}
    tokens = sum(step.tokens for step in timed)
    return {
        "tokens_per_s": tokens / sum(step.seconds["total"] for step in timed),
        "step_s": statistics.median(step.seconds["total"] for step in timed),
        "cpu_s": statistics.median(step.cpu_s for step in timed),
        "parts_s": parts_s | {"checkpoint": parts.watch.lap()["checkpoint"]},
        "tokens": tokens,
        "steps": num_steps,
        "memory_bytes": memory_bytes(parts.device),
        "losses": [step.loss for step in steps],
    }


def main(plan_file: str, num_steps: str) -> None:
    """Entry for torchrun: every rank measures, rank 0 prints."""
    plan = Plan.load(Path(plan_file))
    dist.init_process_group("nccl" if plan.layout.device == "cuda" else "gloo")
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        folders: list[str | None] = [scratch]
        dist.broadcast_object_list(folders, 0)
        result = measure(plan.model_copy(update=dict.fromkeys(("run_dir", "location"), folders[0])), int(num_steps))
        result["setup_s"] = time.perf_counter() - started - sum(result["parts_s"].values())
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps(result) + "\n")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
