"""`slipway export`: a run's model folder, from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import Json, RunFolder


def command(
    run: RunFolder,
    merge: Annotated[
        bool | None, typer.Option("--merge/--adapters", help="Fold adapters into the base, or leave them alone")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="best|last|STEP", help="Which one, instead of what the recipe says"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write, instead of model/ in the run")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's model folder again, checked against the trained model."""
    from launcher.cli import render
    from launcher.cli.launch import conclude, export
    from launcher.driver import remote
    from launcher.driver.resume import existing_plan, ready_again

    plan = existing_plan(run)
    own = Path(plan.run_dir) / remote.MODEL
    folder = out.expanduser().resolve() if out else own
    with render.err().status("checking the base model and the data"):
        plan = ready_again(plan)
    report = export(plan, folder, plan.lifecycle.merge if merge is None else merge, checkpoint)
    if folder == own:
        remote.send_model(plan)
    if as_json:
        render.print_json(report)
    else:
        conclude(plan, report)
