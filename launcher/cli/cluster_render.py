"""`slipway cluster render`: files that start a cluster, or a run on one of its own, for Ray, KubeRay and Slurm."""

from __future__ import annotations

import getpass
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import render as show
from launcher.errors import ClusterError, UserError


class Target(StrEnum):
    """What the file is for."""

    RAY = "ray"
    KUBERAY = "kuberay"
    SLURM = "slurm"


def render(
    hostfile: Annotated[
        Path, typer.Option("--hostfile", help="ray: the machines, a line each, such as worker-1 slots=8")
    ] = Path("hostfile"),
    target: Annotated[Target, typer.Option("--for", help="ray up and ray submit, a RayJob, or sbatch")] = Target.RAY,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="ray: to copy with what it names, again and again; otherwise: what is run"),
    ] = None,
    mount: Annotated[
        list[str] | None, typer.Option("--mount", help="ray: another file or folder to copy; again and again")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="ray, slurm: Python on the hosts; otherwise this machine's own path")
    ] = None,
    ssh_key: Annotated[
        str | None,
        typer.Option("--ssh-key", help="ray: private key for ssh, which is copied to the head to reach the workers"),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="kuberay, slurm: nodes of the run")] = 2,
    gpus: Annotated[int, typer.Option("--gpus-per-worker", min=0, help="kuberay, slurm: GPUs of each")] = 8,
    image: Annotated[
        str, typer.Option("--image", help="kuberay: of the Dockerfile that comes with Slipway")
    ] = "slipway",
    claim: Annotated[
        str, typer.Option("--claim", help="kuberay: claim of a volume that all pods may write, for runs and data")
    ] = "slipway-runs",
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="slurm: folder of the run that all nodes see")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; otherwise stdout")] = None,
) -> None:
    """Write the file that starts Ray on machines, in Kubernetes or under Slurm; nothing is started."""
    if target is Target.RAY:
        text = _ray(hostfile, recipe or [], mount or [], python, ssh_key, out)
    else:
        if len(recipe or []) != 1:
            raise UserError(f"--for {target} writes one run", hint="name its recipe with --recipe")
        assert recipe is not None
        text = (
            _kuberay(recipe[0], workers, gpus, image, claim, out)
            if target is Target.KUBERAY
            else _slurm(recipe[0], workers, gpus, python, run_dir)
        )
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}", hint="choose another --out") from error


def _ray(
    hostfile: Path, recipes: list[str], paths: list[str], python: str | None, ssh_key: str | None, out: Path | None
) -> str:
    from launcher.cluster.auth_token import new_token, read, write_private
    from launcher.cluster.hostfile import read_hostfile
    from launcher.cluster.mounts import file_mounts, places
    from launcher.cluster.ray_yaml import TOKEN, cluster_file

    key = Path(ssh_key).expanduser() if ssh_key else None
    if key and not key.is_file():
        raise ClusterError(
            f"--ssh-key {ssh_key}: no such file", hint="it is the private key, such as ~/.ssh/id_ed25519"
        )
    mounts, elsewhere = file_mounts(recipes, paths)
    job = Path(sys.modules["launcher"].__path__[0]) / "job.py"
    text = cluster_file(
        read_hostfile(hostfile),
        python or sys.executable,
        mounts,
        ssh_user=getpass.getuser(),
        ssh_private_key=str(key.absolute()) if key else None,
        file=str(out or "cluster.yaml"),
        job=str(job),
    )
    if elsewhere:
        show.note(f"not copied, since not below this folder: {places(elsewhere)}")
    token = Path(TOKEN).expanduser()
    if read() is None:
        token.parent.mkdir(mode=0o700, exist_ok=True)
        write_private(token, new_token())
        show.note(f"made the token that the nodes share: {TOKEN}")
    else:
        token.chmod(0o600)  # Ray makes its own readable by all
    return text


def _kuberay(recipe: str, workers: int, gpus: int, image: str, claim: str, out: Path | None) -> str:
    from launcher.cluster.kuberay import ray_job
    from launcher.driver.start import run_name
    from launcher.recipe.load import load

    loaded = load(recipe)
    return ray_job(loaded, recipe, run_name(loaded), image, workers, gpus, claim, str(out or "rayjob.yaml"))


def _slurm(recipe: str, workers: int, gpus: int, python: str | None, run_dir: str | None) -> str:
    from launcher.cluster.slurm import batch_script
    from launcher.driver.start import run_name
    from launcher.recipe import catalog
    from launcher.recipe.load import load

    loaded = load(recipe)
    name = run_name(loaded)
    there = recipe if loaded.file.is_relative_to(catalog.folder()) else str(loaded.file)
    place = run_dir or str(Path(loaded.recipe.runs).absolute() / name)
    return batch_script(loaded, there, place, name, python or sys.executable, workers, gpus)
