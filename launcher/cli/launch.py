"""What `run` and `resume` share: connect, hold the run's lease, train, export, say where the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.checkpoint.lease import acquire
from launcher.cli import render
from launcher.cli.progress import RunDisplay
from launcher.driver.connect import connected
from launcher.driver.trainer import fit
from launcher.errors import RunFailed, SlipwayError
from launcher.plan.facts import ClusterFacts
from launcher.plan.plan import Plan
from launcher.recipe.origin import shown
from launcher.train.metrics import read
from launcher.train.verdict import Verdict


def launch(run_dir: Path, address: str | None, make_plan: Callable[[ClusterFacts], Plan]) -> None:
    """Train in `run_dir` as `make_plan` decides once the cluster is known, then export.

    Raises:
        RunFolderError: another launcher holds the run.
        ClusterError: the cluster cannot be reached or cannot hold the run.
        RunFailed: the run failed; Interrupted: it was stopped and saved.
    """
    with acquire(run_dir) as lease:
        with connected(address) as cluster:
            plan = make_plan(cluster)
            introduce(plan)
            with RunDisplay(plan, render.err()) as display:
                verdict = fit(plan, lease.attempt, display)
        settle(verdict)
        if verdict.kind == "out_of_time":
            render.note(verdict.message)
        if plan.lifecycle.export:
            report = export(plan, run_dir / "model", plan.lifecycle.merge)
            conclude(plan, report)


def introduce(plan: Plan) -> None:
    """One paragraph on what is about to run."""
    layout, trajectory, life = plan.layout, plan.trajectory, plan.lifecycle
    model = "a scratch model" if trajectory.model.source == "scratch" else trajectory.model.path
    place = "a GPU" if layout.device == "cuda" else f"{layout.cpus_per_worker} CPU{'s' * (layout.cpus_per_worker > 1)}"
    workers = f"{layout.workers} workers with {place} each" if layout.workers > 1 else f"1 worker with {place}"
    say = render.err().print
    say(f"[bold]{plan.name}[/]  {trajectory.method.kind} fine-tune of {model}, {trajectory.dtype}, ZeRO {layout.zero}")
    say(f"  {workers}; {life.total_steps} steps of {trajectory.global_batch_size} rows")
    dropped = sum(plan.data.dropped.values())
    left_out = f"; {dropped} rows left out, see {shown(Path(plan.data.folder) / 'dropped.jsonl')}" if dropped else ""
    say(
        f"  {plan.data.train_documents:,} documents, {plan.data.train_tokens:,} tokens, "
        f"{plan.data.train_supervised_tokens:,} supervised; {plan.data.eval_documents:,} held out{left_out}"
    )
    for path, format in plan.data.formats.items():
        say(f"  {shown(Path(path)) if Path(path).is_absolute() else path}: {format}", highlight=False, soft_wrap=True)
    say(f"  folder: {shown(Path(plan.run_dir))}")


def settle(verdict: Verdict) -> None:
    """Raise what a deterministic end calls for."""
    if verdict.kind == "not_finite":
        raise RunFailed(verdict.message, verdict.hint)
    if verdict.kind == "error":
        error = SlipwayError(verdict.message, verdict.hint)
        error.exit_code = verdict.exit_code
        raise error


def export(plan: Plan, out: Path, merge: bool) -> dict[str, Any]:
    """Export in a process of its own and return its report.

    Raises:
        SlipwayError: with the exporter's message, hint and exit code.
    """
    command = [sys.executable, "-m", "launcher.export.folder", plan.run_dir, str(out), "merge" if merge else "adapters"]
    with render.err().status("writing the model folder"):
        result = subprocess.run(command, capture_output=True, text=True)
    (Path(plan.run_dir) / "logs" / "export.log").write_text(result.stderr, encoding="utf-8")
    try:
        report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = result.stderr.strip().splitlines()[-1:] or [f"the exporter ended with {result.returncode}"]
        raise RunFailed(
            f"the model could not be exported: {last[0]}",
            hint=f"see {plan.run_dir}/logs/export.log; the checkpoints are safe",
        ) from None
    if "error" in report:
        error = SlipwayError(report["error"], report["hint"])
        error.exit_code = report["exit_code"]
        raise error
    return report


def conclude(plan: Plan, report: dict[str, Any]) -> None:
    """Where the model is, how good it is, how to talk to it: the result, on stdout."""
    scores = [record for record in read(Path(plan.run_dir)) if record["kind"] == "exact_match"]
    if len(scores) > 1:
        print(f"exact match on held-out answers: {scores[0]['score']:.1%} before, {scores[-1]['score']:.1%} after")
    losses = [record["loss"] for record in read(Path(plan.run_dir)) if record["kind"] == "eval"]
    if losses:
        print(f"held-out loss: {losses[0]:.4f} first, {losses[-1]:.4f} last")
    agreement = report["agreement"]
    if agreement:
        print(
            f"checked: plain transformers gives the trained model's logits, off by at most {agreement['largest']:.1e}"
        )
    if report["drift"] is not None:
        print(f"merging changed a logit by at most {report['drift']:.1e}")
    print(f"model: {shown(Path(report['folder']))}")
    print(f"talk to it: slipway chat {shown(Path(plan.run_dir))}")
