"""`slipway run`: from a recipe to a model folder."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import Address, Overrides, RecipeName, Resume


def command(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[
        str | None,
        typer.Option("--run-dir", help="Folder of the run, or a URL such as s3://bucket/run, instead of a new one"),
    ] = None,
    resume: Annotated[
        Resume,
        typer.Option("--resume", help="auto: go on with the run that this command began, for jobs that are preempted"),
    ] = Resume.NEVER,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="HASH", help="End with 2 unless the recipe has the hash that check prints"),
    ] = None,
    say_hash: Annotated[bool, typer.Option("--say-hash", hidden=True)] = False,
) -> None:
    """Fine-tune as a recipe says and export the model. Ctrl-C saves; `slipway resume` goes on."""
    from launcher.cli.launch import go_on_by_itself, introduce_recipe, launch
    from launcher.cli.progress import preparing
    from launcher.driver import controller, remote, secrets
    from launcher.driver.shared_folder import shared_by_all
    from launcher.driver.signals import ends_on_signals
    from launcher.driver.start import (
        base_model_process,
        claimed,
        create_run_folder,
        decide,
        new_run_folder,
        planned,
        with_fingerprint,
    )
    from launcher.plan.facts import ClusterFacts
    from launcher.plan.plan import Plan
    from launcher.recipe.load import load
    from launcher.train import startup
    from launcher.train.trackers.needed import require

    startup.begin()
    startup.ended("command")
    with ends_on_signals("stopped before training began"):
        secrets.receive()
        loaded = load(recipe, overrides or ())
        if say_hash or expect is not None:  # where the recipe was edited on another machine
            introduce_recipe(loaded, expect)
        startup.ended("recipe")
        require(loaded.recipe.logging.trackers)
        remote.check(run_dir or loaded.recipe.runs)
        if resume is Resume.AUTO and go_on_by_itself(loaded, run_dir, address):
            return
        location = new_run_folder(loaded, run_dir)
        with preparing(render.err()) as report:
            decided = decide(loaded, location, report, address)
        startup.ended("data")

        with claimed(location) as lease, closing(base_model_process(decided)) as base_model:

            def make_plan(cluster: ClusterFacts) -> Plan:
                plan = planned(decided, cluster)
                startup.ended("plan")
                with shared_by_all(plan):
                    controller.start()
                    startup.ended("training imports")
                startup.ended("shared folder")
                with render.err().status("making the model ready"):
                    notes, fingerprint = base_model.wait()
                startup.ended("model ready")
                for note in notes:
                    render.note(note)
                plan = with_fingerprint(plan, fingerprint)
                create_run_folder(plan, loaded)
                remote.begin(plan, decided.facts)
                startup.ended("folder")
                return plan

            launch(lease, address, make_plan)
