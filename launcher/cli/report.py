"""`slipway report`: a run on one page, also while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import RunFolder


def command(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there, and not to report.html in the run")
    ] = None,
) -> None:
    """Write a run's page: curves, events, where the time went, answers, data, settings. Opens without a network."""
    from launcher.driver.resume import existing_plan
    from launcher.driver.start import writable
    from launcher.recipe.origin import shown
    from launcher.report.ending import ending
    from launcher.report.fetch import read_history
    from launcher.report.markup import write
    from launcher.report.run_page import FILE, keep, page
    from launcher.store.location import is_url

    plan = existing_plan(run)
    history = read_history(plan)
    content, file = page(plan, history, ending(plan, history)), out or Path(plan.run_dir) / FILE
    if out is None and is_url(plan.location):
        with writable(plan.location):
            keep(plan, content)
    else:
        write(file, content, "--out")
    print(shown(file))
