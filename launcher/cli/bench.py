"""`slipway bench`: tokens per second of a recipe on this machine, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import Json, Overrides, RecipeName
from launcher.errors import RunFailed
from launcher.units import format_bytes


def command(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps to measure, after three to warm up")] = 20,
    as_json: Json = False,
) -> None:
    """Measure tokens per second of a recipe's training step on this machine, and where the time goes."""
    from launcher.cli.progress import preparing
    from launcher.driver.start import base_model_process, create_run_folder, decide, planned
    from launcher.plan.facts import this_machine
    from launcher.recipe.load import load

    loaded = load(recipe, overrides or ())
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as scratch:
        with preparing(render.err()) as report:
            decided = decide(loaded, Path(scratch) / "run", report)
        plan = planned(decided, this_machine())
        Path(plan.run_dir).mkdir()
        with closing(base_model_process(decided)) as base_model:
            base_model.wait()
        create_run_folder(plan, loaded)
        with render.err().status("measuring"):
            result = run_torchrun(Path(plan.run_dir) / "plan.json", plan.layout.workers, steps)
    if as_json:
        render.print_json(result)
        return
    rows = [("tokens/s", f"{result['tokens_per_s']:,.0f}"), ("step", f"{result['step_s'] * 1e3:.1f} ms")]
    rows += [(f"  {part}", f"{seconds * 1e3:.1f} ms") for part, seconds in result["parts_s"].items()]
    rows += [("memory", format_bytes(result["memory_bytes"]))]
    render.print_columns(rows)


def run_torchrun(plan_file: Path, workers: int, steps: int) -> dict[str, Any]:
    """The measurement in processes of its own: one a worker, on the loopback.

    Raises:
        RunFailed: with the last line that a worker printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += ["-m", "launcher.bench.throughput", str(plan_file), str(steps)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    results = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_s"')]
    if not results:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RunFailed(f"the benchmark failed: {last[0]}", hint="run the recipe with slipway run to see its logs")
    found: dict[str, Any] = json.loads(results[-1])
    return found
