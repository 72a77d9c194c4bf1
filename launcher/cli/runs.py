"""`slipway runs`: the runs in a folder, with how far each is."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import JobsAddressOrNone, Json, SshConfig


def command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where runs are: a folder or a URL")] = "runs",
    address: JobsAddressOrNone = None,
    ssh_config: SshConfig = None,
    as_json: Json = False,
) -> None:
    """List runs: steps done, last losses, how they ended; or with --address a cluster's jobs."""
    if address is None:
        list_runs(folder, as_json)
    else:
        list_jobs(address, ssh_config, as_json)


def list_jobs(address: str, ssh_config: Path | None, as_json: bool) -> None:
    """Print the jobs of a cluster, the oldest first. Raises ClusterError where it does not answer."""
    from launcher.cluster.jobs import exit_code, reached

    with reached(address, ssh_config, render.note) as jobs:
        found = [
            {
                "job": job.submission_id,
                "status": job.status.lower(),
                "exit_code": exit_code(job) if job.status.is_terminal() else None,
                "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000)),
                "run": (job.metadata or {}).get("run"),
            }
            for job in jobs.submitted()
        ]
    if as_json:
        render.print_json(found)
    elif not found:
        render.note(f"no jobs at {address}")
    else:
        rows = [["-" if value is None else render.printable(str(value)) for value in job.values()] for job in found]
        render.print_columns([("job", "status", "exit code", "since", "run"), *rows])


def list_runs(folder: str, as_json: bool) -> None:
    """Print the runs in a folder or below a URL. Raises RunFolderError where it cannot be read."""
    from launcher.cli.launch import place
    from launcher.driver.resume import existing_plan, latest_verdict, names_of_runs
    from launcher.driver.start import whole_location, writable
    from launcher.errors import RunFolderError
    from launcher.store.location import open_store
    from launcher.train.metrics import FILE, last_of_each_step

    runs = whole_location(folder)
    store = open_store(runs)
    found: list[dict[str, Any]] = []
    with writable(runs), tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
        for name in names_of_runs(store):
            run = f"{runs}/{name}"
            try:
                plan = existing_plan(run)
            except RunFolderError as error:
                render.note(error.message)
                continue
            metrics = store.read(f"{name}/{FILE}") if FILE in store.names(name) else b""
            (Path(scratch) / FILE).write_bytes(metrics)
            steps, evals = last_of_each_step(Path(scratch)), last_of_each_step(Path(scratch), "eval")
            verdict = latest_verdict(run)
            found.append(
                {
                    "run": place(run),
                    "step": max(steps, default=0),
                    "total_steps": plan.lifecycle.total_steps,
                    "loss": steps[max(steps)]["loss"] if steps else None,
                    "eval_loss": evals[max(evals)]["loss"] if evals else None,
                    "end": verdict.kind if verdict else "running or killed",
                }
            )
    if as_json:
        render.print_json(found)
    elif not found:
        render.note(f"no runs in {place(runs)}")
    else:
        header = ("run", "step", "loss", "held-out loss", "end")
        rows = [
            (r["run"], f"{r['step']}/{r['total_steps']}", _number(r["loss"]), _number(r["eval_loss"]), r["end"])
            for r in found
        ]
        render.print_columns([header, *rows])


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"
