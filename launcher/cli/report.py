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
    from launcher.report.fetch import fetch_measured
    from launcher.report.history import History
    from launcher.report.markup import write
    from launcher.report.run_page import FILE, keep, page

    plan = existing_plan(run)
    fetch_measured(plan)
    with writable(plan.location):
        history = History(Path(plan.run_dir))
        content = page(plan, history, ending(plan, history))
        if out is None:
            keep(plan, content)
    if out is not None:
        write(out, content, "--out")
    print(shown(out or Path(plan.run_dir) / FILE))
