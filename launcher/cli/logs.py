"""`slipway logs`: what a run's worker or a cluster's job has printed."""

from __future__ import annotations

import codecs
import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import JobsAddressOrNone, RunOrJob, SshConfig
from launcher.errors import RunFolderError, UserError
from launcher.store.store import Store

LOOK_EVERY_S = 0.5
LOOK_AT_STORE_EVERY_S = 10.0
"""About as often as the workers send their logs there."""


def command(
    run: RunOrJob,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends")] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Which worker of a run; the first one if not given")
    ] = None,
    address: JobsAddressOrNone = None,
    ssh_config: SshConfig = None,
) -> None:
    """Show the log of a run's worker, or with --address the output of a cluster's job."""
    from launcher.driver.signals import ends_on_signals

    if address is None:
        show_worker(run, rank or 0, follow)
        return
    if rank is not None:
        raise UserError(
            "--rank is for a run's folder, and --address for a job", hint=f"on the head: slipway logs RUN --rank {rank}"
        )
    from launcher.cluster.jobs import reached

    with ends_on_signals("stopped looking"), reached(address, ssh_config, render.note) as jobs:
        if follow:
            jobs.follow(run, render.print_log)
        else:
            render.print_log(jobs.log(run))


def show_worker(run: str, rank: int, follow: bool) -> None:
    """A worker's log up to now, and on with `follow` until nobody holds the run.

    Raises:
        RunFolderError: there is no such run, or no such worker's log in it.
    """
    from launcher.driver.resume import existing_plan
    from launcher.store.location import is_url, open_store

    plan = existing_plan(run)
    store, name = open_store(plan.location), f"logs/worker-{rank}.log"
    local, shown = Path(plan.run_dir) / name, 0
    text = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        ended = not follow or _has_ended(store)  # asked first: what is written until its end is shown
        try:
            new = _since(shown, local) if local.exists() else store.read(name)[shown:]
        except FileNotFoundError:
            new = b""
            if ended:
                raise _no_log(store.names("logs"), plan.location, rank) from None
        render.print_log(text.decode(new))
        shown += len(new)
        if ended:
            return
        time.sleep(LOOK_AT_STORE_EVERY_S if is_url(plan.location) and not local.exists() else LOOK_EVERY_S)


def _has_ended(store: Store) -> bool:
    from launcher.checkpoint.lease import held_by

    with contextlib.suppress(OSError):  # who may only read cannot tell: another's run is followed until Ctrl-C
        return held_by(store) is None
    return False


def _since(position: int, file: Path) -> bytes:
    with file.open("rb") as log:
        log.seek(position)
        return log.read()


def _no_log(names: list[str], location: str, rank: int) -> RunFolderError:
    there = sorted(name for name in names if name.startswith("worker-"))
    return RunFolderError(
        f"{location} has no log of rank {rank}", hint=f"there are {', '.join(there)}" if there else "it has not begun"
    )
