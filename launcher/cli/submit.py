"""`slipway submit`: run a recipe on a cluster from outside of it, as a Ray job."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import JobsAddress, Overrides, RecipeName, SshConfig

if TYPE_CHECKING:
    from launcher.cluster.jobs import Jobs
    from launcher.cluster.submit import Job


def command(
    recipe: RecipeName,
    address: JobsAddress,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None,
        typer.Option("--run-dir", help="Folder of the run on the cluster, or a URL, instead of a new one in ~/runs"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="What to send instead of the recipe's own folder")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the job and its run's folder")] = None,
    follow: Annotated[bool, typer.Option(help="Show what the job says until it ends")] = True,
    secrets: Annotated[bool, typer.Option(help="Over ssh, send HF_TOKEN, WANDB_API_KEY, AWS_* and such along")] = True,
    python: Annotated[str | None, typer.Option("--python", help="The cluster's Python, if not the one of Ray")] = None,
    ssh_config: SshConfig = None,
) -> None:
    """Send a recipe and its folder to a cluster and run it there. Ends as the run does, with its exit code."""
    from launcher.cluster.submit import prepare
    from launcher.driver.signals import ends_on_signals
    from launcher.recipe.load import load

    with ends_on_signals("stopped before the job was sent"):
        job = prepare(load(recipe, overrides or ()), overrides or (), folder, run_dir, name)
        from launcher.cluster.jobs import reached  # with Ray, which takes a second

        with reached(address, ssh_config, render.note) as jobs:
            secrets_file = send(jobs, job, python, secrets)
            if not follow:
                print(job.name)
                return
            same = shlex.join(["--address", address, *(["--ssh-config", str(ssh_config)] if ssh_config else [])])
            hint = f"slipway logs {job.name} -f {same}; to stop it: slipway stop {job.name} {same}"
            with ends_on_signals(f"job {job.name} goes on without this terminal", hint):
                conclude(jobs, job.name, secrets_file)


def send(jobs: Jobs, job: Job, python: str | None, with_secrets: bool) -> str | None:
    """Start the job; the file on the head in which the user's secrets wait for it, if any were sent."""
    from launcher.cluster.submit import entrypoint, leave, pack, take_back
    from launcher.driver.secrets import OF_THE_USER, collect

    found, head, secrets_file = collect(OF_THE_USER) if with_secrets else {}, jobs.head, None
    if found and head is None:
        render.note(f"{', '.join(found)} not sent: only ssh:// is a way for secrets; without, set them on the cluster")
    elif found and head is not None:
        secrets_file = leave(head.ssh, head.host, found)
        render.note(f"{', '.join(found)} sent along, over ssh and in memory")
    interpreter = python or (head.python if head is not None else None) or "python"
    try:
        with tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
            package = pack(job, Path(scratch) / "package.zip")
            size = f", {package.stat().st_size / 2**10:.0f} KiB" if package is not None else ""
            jobs.submit(
                job.name,
                entrypoint(job, interpreter, secrets_file),
                package,
                {"RAY_JOB_STOP_WAIT_TIME_S": str(job.stop_wait_s)},
                {"run": job.run_dir, "recipe": job.recipe},
            )
    except BaseException:
        if secrets_file is not None and head is not None:
            take_back(head.ssh, head.host, secrets_file)
        raise
    where = "" if "://" in job.run_dir else " on the cluster's head"
    render.err().print(f"[bold]{job.name}[/]  {len(job.files)} files sent{size}; the run is in {job.run_dir}{where}")
    return secrets_file


def conclude(jobs: Jobs, job: str, secrets_file: str | None = None, shown: int = 0) -> None:
    """Show what a job says, after the first `shown` characters, until it ends; ends as it does.

    Raises:
        RunFailed: it could not say itself what became of it. typer.Exit: with its exit code, if that is not 0.
    """
    from launcher.cluster.jobs import exit_code, unsaid
    from launcher.cluster.submit import take_back

    ended = jobs.follow(job, render.print_log, shown)
    code, failure = exit_code(ended), unsaid(ended)
    if code and secrets_file is not None and jobs.head is not None:  # it may have ended before it took them
        take_back(jobs.head.ssh, jobs.head.host, secrets_file)
    if failure is not None:
        raise failure
    if code:
        render.note(f"job {job} {'was stopped' if code == 143 else f'ended with exit code {code}'}")
        raise typer.Exit(code)
