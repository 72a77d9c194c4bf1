"""What `run` and `resume` share: connect, train, export, say where the model is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from launcher.checkpoint.lease import Lease, acquire
from launcher.cli import render
from launcher.cli.progress import RunDisplay
from launcher.driver import controller, remote
from launcher.driver.connect import connected
from launcher.driver.resume import (
    continued,
    has_finished,
    latest_verdict,
    ready_again,
    refuse_other_recipe,
    run_recipe,
    run_to_resume,
)
from launcher.driver.shared_folder import shared_by_all
from launcher.driver.signals import ends_on_signals, kept
from launcher.driver.trainer import fit
from launcher.errors import RunFailed, SlipwayError, UserError
from launcher.evaluate.value import figures, spoken
from launcher.evaluate.value import shown as shown_figure
from launcher.plan.facts import ClusterFacts
from launcher.plan.plan import Plan
from launcher.recipe.load import LoadedRecipe
from launcher.recipe.origin import shown
from launcher.report.run_page import FILE as REPORT
from launcher.report.run_page import write_at_end
from launcher.store.location import is_url, open_store
from launcher.train import startup
from launcher.train.metrics import read
from launcher.train.trackers.kept import missed
from launcher.train.verdict import Verdict


def launch(
    lease: Lease, address: str | None, make_plan: Callable[[ClusterFacts], Plan], hint: str | None = None
) -> None:
    """Train as `make_plan` decides once the cluster is known, then export. `hint` is for a stop before training.

    Raises:
        ClusterError: the cluster cannot be reached or cannot hold the run.
        RunFailed: the run failed; Interrupted: it was stopped and saved.
    """
    with ExitStack() as stack:
        with kept():
            cluster = stack.enter_context(connected(address))
        startup.ended("ray.init")
        # Once more: Ray has put a handler of its own in the place of ours.
        stack.enter_context(ends_on_signals("stopped before training began", hint))
        plan = make_plan(cluster)
        introduce(plan)
        with RunDisplay(plan, render.err()) as display:
            try:
                verdict = fit(plan, lease.launch, display)
            except RunFailed as error:
                with suppress(SlipwayError):  # the logs, for whoever looks for the cause on another machine
                    remote.collect(plan)  # or what is older here than in the store would take its place
                write_at_end(plan, error)
                with suppress(SlipwayError):
                    remote.finish(plan)
                raise
            except SlipwayError as error:
                write_at_end(plan, error)
                raise
    with ends_on_signals("stopped before the model was exported", hint=f"slipway export {plan.location}"):
        conclude_training(plan, verdict)


def conclude_training(plan: Plan, verdict: Verdict) -> None:
    """Export what was trained, and say so. Raises what a verdict calls for."""
    try:
        remote.collect(plan)
        for trackers in missed(Path(plan.run_dir)):
            render.note(f"{trackers}; slipway resume {plan.location} tells it the rest")
        settle(verdict)
        if verdict.message != f"finished {verdict.step} steps":
            render.note(verdict.message)
        if verdict.hint is not None:
            render.note(verdict.hint)
        report = None
        if plan.lifecycle.export:
            report = export(plan, Path(plan.run_dir) / remote.MODEL, plan.lifecycle.merge)
    except SlipwayError as error:
        write_at_end(plan, error)
        with suppress(SlipwayError):
            remote.finish(plan)
        raise
    write_at_end(plan)
    remote.finish(plan)
    if report is not None:
        conclude(plan, report)
    if (Path(plan.run_dir) / REPORT).exists():
        print(f"report: {place(plan.location)}/{REPORT}")


def go_on(plan: Plan, address: str | None, make_plan: Callable[[Plan, ClusterFacts], Plan]) -> None:
    """Resume a run, held for as long as this takes; `make_plan` is given its Plan.

    Raises:
        RunFolderError: another launcher holds the run.
        ModelError: its base has changed; DataError: its data is gone. And as `launch`.
    """
    with acquire(open_store(plan.location)) as lease:
        with render.err().status("checking the base model and the data"):
            ready = ready_again(plan)
        startup.ended("model ready")

        def shared(cluster: ClusterFacts) -> Plan:
            resumed = make_plan(ready, cluster)
            startup.ended("plan")
            with shared_by_all(resumed):
                controller.start()
                startup.ended("training imports")
            startup.ended("shared folder")
            return resumed

        launch(lease, address, shared, hint=f"slipway resume {plan.location}")


def go_on_by_itself(loaded: LoadedRecipe, asked_for: str | None, address: str | None) -> bool:
    """`--resume auto`: resume the run that this recipe began, or say that it has finished; False where there is none.

    Raises RecipeError where the recipe has changed in what a resume cannot change. And as `go_on`.
    """
    plan = run_to_resume(loaded, asked_for)
    if plan is None:
        return False
    refuse_other_recipe(plan, loaded)
    if has_finished(plan, loaded):
        verdict = latest_verdict(plan.location)
        early = verdict is not None and verdict.kind == "stopped_early"
        render.note(f"{place(plan.location)} has {verdict.message if verdict and early else 'finished'}")
        finish_again(plan)
        return True
    render.note(f"going on with {place(plan.location)}")
    before, now = run_recipe(plan).cluster, loaded.recipe.cluster
    asks_for_workers = (before.workers, before.cpus_per_worker) != (now.workers, now.cpus_per_worker)
    go_on(plan, address, lambda ready, cluster: continued(ready, loaded, cluster, asks_for_workers))
    return True


def finish_again(plan: Plan) -> None:
    """Say where the model of a finished run is; export it where a launcher was stopped before it had."""
    if not plan.lifecycle.export:
        return
    if "slipway.json" in open_store(plan.location).names(remote.MODEL):
        print(f"model: {place(plan.location)}/{remote.MODEL}")
        return
    with acquire(open_store(plan.location)):
        plan = ready_again(plan)
        report = export(plan, Path(plan.run_dir) / remote.MODEL, plan.lifecycle.merge)
        remote.finish(plan)
        conclude(plan, report)


def place(location: str) -> str:
    """A run's folder or URL as a person would type it."""
    return location if is_url(location) else shown(Path(location))


def introduce_recipe(loaded: LoadedRecipe, expected: str | None) -> None:
    """One line on the recipe. Raises UserError where it is not the expected one, such as an older copy on the head."""
    render.err().print(f"recipe {shown(loaded.file)}, hash {loaded.hash}", style="dim", markup=False)
    if expected is not None and expected != loaded.hash:
        raise UserError(
            f"{shown(loaded.file)} has the hash {loaded.hash} on this machine, not {expected}",
            hint="on a cluster of `ray up`, send what was edited: ray rsync-up cluster.yaml; `slipway check RECIPE "
            "KEY=VALUE ...` prints the hash, which covers overrides too",
        )


def introduce(plan: Plan) -> None:
    """One paragraph on what is about to run."""
    layout, trajectory, life = plan.layout, plan.trajectory, plan.lifecycle
    model = "a scratch model" if trajectory.model.source == "scratch" else trajectory.model.path
    each = "a GPU" if layout.device == "cuda" else f"{layout.cpus_per_worker} CPU{'s' * (layout.cpus_per_worker > 1)}"
    workers = f"{layout.workers} workers with {each} each" if layout.workers > 1 else f"1 worker with {each}"
    if layout.min_workers < layout.workers:
        workers = f"{layout.min_workers} to {workers}"
    say = render.err().print
    say(plan.name, style="bold", markup=False, end="  ")  # a name may have brackets
    what = f"{trajectory.method.kind} fine-tune of {model}, {trajectory.dtype}, ZeRO {layout.zero}"
    say(what, markup=False)
    say(f"  {workers}; {life.total_steps} steps of {trajectory.global_batch_size} rows")
    dropped = sum(plan.data.dropped.values())
    left_out = f"; {dropped} rows left out, see {shown(Path(plan.data.folder) / 'dropped.jsonl')}" if dropped else ""
    say(
        f"  {plan.data.train_documents:,} documents, {plan.data.train_tokens:,} tokens, "
        f"{plan.data.train_supervised_tokens:,} supervised; {plan.data.eval_documents:,} held out{left_out}"
    )
    for path, format in plan.data.formats.items():
        say(f"  {shown(Path(path)) if Path(path).is_absolute() else path}: {format}", highlight=False, soft_wrap=True)
    say(f"  {'store' if is_url(plan.location) else 'folder'}: {place(plan.location)}")


def settle(verdict: Verdict) -> None:
    """Raise what a deterministic end calls for."""
    if verdict.kind in ("not_finite", "diverged", "unsaved"):
        raise RunFailed(verdict.message, verdict.hint)
    if verdict.kind == "error":
        error = SlipwayError(verdict.message, verdict.hint)
        error.exit_code = verdict.exit_code
        raise error


def export(plan: Plan, out: Path, merge: bool, wanted: str | None = None) -> dict[str, Any]:
    """Export in a process of its own and return its report; `wanted` as there.

    Raises:
        SlipwayError: with the exporter's message, hint and exit code.
    """
    how = "merge" if merge else "adapters"
    # The plan as it is here: of a run that was moved, the one in its folder still names the place where it began.
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch, render.err().status("writing the model folder"):
        plan.save(Path(scratch) / "plan.json")
        command = [sys.executable, "-m", "launcher.export.folder", scratch, str(out), how]
        command += [wanted] if wanted is not None else []
        result = subprocess.run(command, capture_output=True, text=True)
    with suppress(OSError):
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


def before_and_after(first: dict[str, Any], last: dict[str, Any]) -> str:
    """A line for each figure of the answers, and what makes them doubtful."""
    before, after = figures(first), figures(last)
    lines = [
        f"{spoken(name)} on {last['rows']} held-out answers: {shown_figure(name, before[name])} before, "
        f"{shown_figure(name, value)} after"
        for name, value in after.items()
        if name in before
    ]
    if last["cut"]:
        lines.append(f"{last['cut']} of them were cut off: raise evaluate.generate.max_new_tokens")
    return "\n".join(lines)


def conclude(plan: Plan, report: dict[str, Any]) -> None:
    """Where the model is, how good it is, how to talk to it: the result, on stdout."""
    # The model may be of an earlier step than the last: what came after it is not about it.
    measured = [record for record in read(Path(plan.run_dir)) if record.get("step", 0) <= report["step"]]
    answered = [record for record in measured if record["kind"] == "answers"]
    if len(answered) > 1:
        print(before_and_after(answered[0], answered[-1]))
    evaluated = [record for record in measured if record["kind"] == "eval"]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        for name in ("accuracy", "f1_macro") if plan.data.classes else ():
            rows, change = plan.data.eval_documents, f"{first[name]:.1%} before, {last[name]:.1%} after"
            print(f"{name.replace('_', ' ')} on {rows:,} held-out rows: {change}")
        for name, what in (("loss", "held-out loss"), ("retain_loss", "loss on evaluate.retain")):
            if name in first and name in last:
                print(f"{what}: {first[name]:.4f} first, {last[name]:.4f} last")
    agreement = report["agreement"]
    if agreement:
        print(
            f"checked: plain transformers gives the trained model's logits, off by at most {agreement['largest']:.1e}"
        )
    if report["drift"] is not None:
        print(f"merging changed a logit by at most {report['drift']:.1e}")
    ours = Path(report["folder"]) == Path(plan.run_dir) / remote.MODEL
    print(f"model: {f'{place(plan.location)}/{remote.MODEL}' if ours else shown(Path(report['folder']))}")
    print(f"talk to it: slipway chat {place(plan.location)}")
