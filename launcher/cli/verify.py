"""`slipway verify`: every checkpoint of a run against the hashes it was committed with."""

from __future__ import annotations

from launcher.cli import render
from launcher.cli.arguments import RunFolder
from launcher.errors import CheckpointError


def command(run: RunFolder) -> None:
    """Check every checkpoint of a run against its hashes; exit 1 where one is damaged."""
    from launcher.checkpoint.layout import committed
    from launcher.checkpoint.manifest import verify
    from launcher.driver.resume import existing_plan

    run_dir = run.expanduser().resolve()
    existing_plan(run_dir)
    checkpoints = committed(run_dir)
    damaged = []
    rows = []
    for checkpoint in checkpoints:
        try:
            verify(checkpoint)
            rows.append((checkpoint.name, "sound"))
        except CheckpointError as error:
            damaged.append(checkpoint.name)
            rows.append((checkpoint.name, error.message))
    if rows:
        render.print_columns(rows)
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(checkpoints)} checkpoints are damaged", hint="a resume takes the newest sound one"
        )
    print(f"{len(checkpoints)} checkpoints are sound")
