"""`slipway stop`: have a run save and end, from another terminal."""

from __future__ import annotations

import time

from launcher.cli import render
from launcher.cli.arguments import JobsAddressOrNone, RunOrJob, SshConfig
from launcher.errors import RunFolderError, UserError

LOOK_EVERY_S = 0.5


def command(run: RunOrJob, address: JobsAddressOrNone = None, ssh_config: SshConfig = None) -> None:
    """Have a run, or with --address a cluster's job, save and end; `slipway resume` goes on."""
    from launcher.driver.signals import ends_on_signals

    with ends_on_signals(f"{run} was asked to stop, and its end not waited for"):
        if address is None:
            stop_run(run)
            return
        from launcher.cluster.jobs import reached

        with reached(address, ssh_config, render.note) as jobs:
            shown = len(jobs.log(run))
            if not jobs.stop(run):
                raise UserError(
                    f"job {run} is not running: it has ended",
                    hint=f"slipway logs {run} --address {address} shows how",
                )
            render.note(f"job {run} was asked to save and end")
            ended = jobs.follow(run, render.print_log, shown)
            print(f"job {run}: {ended.status.lower()}")


def stop_run(run: str) -> None:
    """Ask a run's workers to save and end, wait until their launcher has ended, and say how it did.

    Raises:
        RunFolderError: there is no such run, nobody holds it, or its folder takes no request.
    """
    from launcher.checkpoint.lease import current, held_by
    from launcher.cli.launch import place
    from launcher.driver.resume import existing_plan, latest_verdict
    from launcher.driver.start import writable
    from launcher.store.location import open_store
    from launcher.train.verdict import STOP_FILE

    plan = existing_plan(run)
    store, shown = open_store(plan.location), place(plan.location)
    with writable(plan.location):
        holder, asked = held_by(store), current(store)
        if holder is None:
            ended = latest_verdict(plan.location)
            raise RunFolderError(
                f"{shown} is not running{f': {ended.message}' if ended else ''}", hint=f"slipway resume {shown}"
            )
        render.note(f"asking {holder} to save and end")
        while held_by(store) is not None:
            latest = current(store)
            assert asked is not None
            if latest is None or latest.launch != asked.launch:
                break  # another one goes on with the run already
            # Not once: before its workers begin, a launcher takes what lies there for an earlier launch's.
            if STOP_FILE not in store.names():
                store.write(STOP_FILE, b"slipway stop\n")
            time.sleep(LOOK_EVERY_S)
    verdict = latest_verdict(plan.location)
    said = verdict is not None and asked is not None and verdict.launch == asked.launch
    print(verdict.message if said and verdict else f"{shown} has ended; its launcher says how")
