"""`slipway runs`: the runs in a folder, with how far each is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import Json
from launcher.recipe.origin import shown


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs are")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: steps done, last losses, how they ended."""
    from launcher.plan.plan import Plan
    from launcher.train.metrics import last_of_each_step
    from launcher.train.verdict import Verdict

    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*/plan.json")):
        plan, run_dir = Plan.load(file), file.parent
        steps, evals = last_of_each_step(run_dir), last_of_each_step(run_dir, "eval")
        verdict = Verdict.load(run_dir)
        found.append(
            {
                "run": shown(run_dir),
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
        render.note(f"no runs in {shown(folder)}")
    else:
        header = ("run", "step", "loss", "held-out loss", "end")
        rows = [
            (r["run"], f"{r['step']}/{r['total_steps']}", _number(r["loss"]), _number(r["eval_loss"]), r["end"])
            for r in found
        ]
        render.print_columns([header, *rows])


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"
