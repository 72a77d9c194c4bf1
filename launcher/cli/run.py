"""`slipway run`: from a recipe to a model folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import Address, Overrides, RecipeName


def command(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of the run, instead of a new one in runs/")
    ] = None,
) -> None:
    """Fine-tune as a recipe says and export the model. Ctrl-C saves; `slipway resume` goes on."""
    from launcher.cli.launch import launch
    from launcher.cli.progress import preparing
    from launcher.driver.start import base_model_process, claimed, create_run_folder, decide, new_run_folder, planned
    from launcher.plan.facts import ClusterFacts
    from launcher.plan.plan import Plan
    from launcher.recipe.load import load

    loaded = load(recipe, overrides or ())
    folder = new_run_folder(loaded, run_dir)
    with preparing(render.err()) as report:
        decided = decide(loaded, folder, report, address)

    with claimed(folder), closing(base_model_process(decided)) as base_model:

        def make_plan(cluster: ClusterFacts) -> Plan:
            plan = planned(decided, cluster)
            for note in base_model.wait():
                render.note(note)
            create_run_folder(plan, loaded)
            return plan

        launch(folder, address, make_plan)
