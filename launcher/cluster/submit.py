"""A recipe as a Ray job: its folder packed, the command line that runs it there, the user's secrets beside it."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster.hostfile import Host
from launcher.cluster.ssh import Ssh
from launcher.driver import secrets
from launcher.driver.start import run_name
from launcher.errors import ClusterError, Problem, RecipeError, SlipwayError, UserError
from launcher.plan.resolve_data import find_source
from launcher.recipe import catalog, named
from launcher.recipe.load import LoadedRecipe
from launcher.recipe.origin import Origin, resolve_path, shown
from launcher.store.location import is_url
from launcher.units import parse_seconds

PACKAGE_BYTES = 90 * 2**20
"""Most that is sent. Ray's dashboard takes 100 MiB, and every node fetches the package from the head."""
LEFT_OUT = ("runs", "__pycache__")
"""Folders that are not sent. Nor is anything whose name begins with a dot, nor a virtual environment."""
RUNS = "~/runs"
"""On the head: where a job's runs are. Not beside the recipe, whose copy there Ray deletes after the job."""
STOP_MARGIN_S = 20.0
"""After `checkpoint.grace`: for Ray, and the processes that a launcher has, to end before Ray kills them."""
_LEAVE = """
umask 077
folder=/dev/shm
[ -w "$folder" ] || { folder="$HOME/.slipway/secrets"; mkdir -p "$folder"; }
file=$(mktemp "$folder/slipway-XXXXXXXXXXXX") && cat > "$file" && echo "slipway secrets $file"
"""
_SHARED = "put it on storage that every node sees and give its absolute path or URL"


@dataclass(frozen=True)
class Job:
    """A recipe that can run elsewhere."""

    name: str
    """Of the job and of its run's folder."""
    run_dir: str
    """As the head reads it: absolute, from its `~`, or a URL."""
    recipe: str
    """Relative to the package, or the name of a packaged recipe."""
    overrides: tuple[str, ...]
    root: Path | None
    """The folder that is sent; None for a packaged recipe, which is there already."""
    files: tuple[Path, ...]
    """Of `root`, what is sent."""
    hash: str
    """As it was read here; a cluster with other packaged recipes ends the job."""
    stop_wait_s: int
    """How long Ray has to wait after SIGTERM before it kills."""


def prepare(
    loaded: LoadedRecipe, overrides: Sequence[str], folder: Path | None, run_dir: str | None, name: str | None
) -> Job:
    """What to send of a recipe: `folder`, or the one that it lies in.

    Raises:
        RecipeError: every file it needs that would not be there.
        UserError: the folder is too large, or holds more than a recipe.
    """
    packaged = _is_packaged(loaded.file)
    root = folder if folder is not None or packaged else loaded.file.parent
    root = root.resolve() if root is not None else None
    if root is not None and not packaged and not loaded.file.resolve().is_relative_to(root):
        raise UserError(f"{shown(loaded.file)} is not in {shown(root)}", hint="--folder must hold the recipe")
    files = tuple(sent(root)) if root is not None else ()
    if problems := [*_missing_layers(loaded, files), *_missing_files(loaded, root, files)]:
        raise RecipeError(problems)
    own = f"{_plain(name or run_name(loaded))}-{time.strftime('%Y%m%d-%H%M%S')}"
    grace_s = parse_seconds(loaded.recipe.checkpoint.grace)
    below = catalog.folder().resolve() if packaged or root is None else root
    return Job(
        name=own,
        run_dir=_run_dir(loaded.recipe.runs, run_dir, own),
        recipe=loaded.file.resolve().relative_to(below).as_posix(),
        overrides=tuple(overrides),
        root=root,
        files=files,
        hash=loaded.hash,
        stop_wait_s=int(grace_s + STOP_MARGIN_S),
    )


def _plain(name: str) -> str:
    """As a job's id and a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "run"


def _run_dir(runs: str, run_dir: str | None, own: str) -> str:
    """Where the run will be: never in the job's working directory, which Ray deletes."""
    place = run_dir if run_dir is not None else f"{runs.rstrip('/')}/{own}" if _is_whole(runs) else own
    return place if _is_whole(place) else f"{RUNS}/{place}"


def _is_whole(path: str) -> bool:
    """Whether a path means the same wherever the launcher is started."""
    return is_url(path) or path.startswith(("/", "~"))


def sent(root: Path) -> Iterator[Path]:
    """The files below `root` that are sent, absolute, in an order of their own.

    Raises:
        UserError: they are more than PACKAGE_BYTES, or `root` is a home or the root folder.
    """
    if root in (Path.home().resolve(), Path(root.anchor)):
        raise UserError(f"{root} would be sent as a whole", hint="put the recipe in a folder of its own, with its data")
    size, largest = 0, (0, root)
    for folder, folders, names in os.walk(root):
        if "pyvenv.cfg" in names:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("."))
        for path in (Path(folder) / name for name in sorted(names) if not name.startswith(".")):
            if not path.is_file():  # a socket, a broken link
                continue
            here = path.stat().st_size
            size, largest = size + here, max(largest, (here, path))
            if size > PACKAGE_BYTES:
                raise UserError(
                    f"{shown(root)} holds more than the {PACKAGE_BYTES / 2**20:.0f} MiB that can be sent, "
                    f"such as {shown(largest[1])} of {largest[0] / 2**20:.0f} MiB",
                    hint=f"large data: {_SHARED}; {', '.join(LEFT_OUT)} and what begins with a dot are not sent",
                )
            yield path


def _missing_layers(loaded: LoadedRecipe, files: Sequence[Path]) -> Iterator[Problem]:
    """Recipe files that would not be there: this one, and those that it extends."""
    there = {file.resolve() for file in files}
    for number, file in enumerate(loaded.files):
        if not _is_packaged(file) and file.resolve() not in there:
            where, key = (shown(loaded.files[number - 1]), "extends") if number else ("", "")
            hint = "put it beside the recipe, or name with --folder a folder that holds both"
            yield Problem(where, key, f"{shown(file)} is not among the files that are sent", hint)


def _is_packaged(file: Path) -> bool:
    return file.resolve().is_relative_to(catalog.folder().resolve())


def _missing_files(loaded: LoadedRecipe, root: Path | None, files: Sequence[Path]) -> Iterator[Problem]:
    """Files that the recipe names by a relative path and that would not be found there."""
    model = loaded.recipe.model
    if model.path and (place := _local(model.path, loaded.origin("model.path"))) and any(place.glob("*config.json")):
        origin, message = loaded.origin("model.path"), f"{shown(place)} would be deleted on the cluster after the job"
        yield Problem(str(origin), "model.path", message, _SHARED)
    for key, value in named.files(loaded.recipe):
        origin = loaded.origin(key)
        if place := _local(value, origin):
            yield from _lost(key, value, origin, place, root, files)
    for source_key, source in named.sources(loaded.recipe):
        key = f"{source_key}.path"
        origin, found = loaded.origin(key), find_source(source.path, loaded.origin(key))
        if _is_whole(source.path):
            continue
        if found is None:
            hint = "data on the cluster's storage is named by its absolute path"
            yield Problem(str(origin), key, f"{source.path} does not exist", hint)
        elif found[0] == "local":
            yield from _lost(key, source.path, origin, Path(found[1]), root, files)


def _local(value: str, origin: Origin) -> Path | None:
    return None if _is_whole(value) else resolve_path(value, origin)


def _lost(
    key: str, value: str, origin: Origin, place: Path, root: Path | None, files: Sequence[Path]
) -> Iterator[Problem]:
    """A problem where the file, folder or pattern that is found at `place` here is not found there."""
    if origin.file is not None and _is_packaged(origin.file) and _is_packaged(place):
        return
    folders = [*([origin.file.parent.resolve()] if origin.file else []), *([root] if root else [])]
    for spot in (Path(os.path.normpath(folder / value)) for folder in folders):
        matching = [spot] if spot.exists() else [Path(path) for path in glob.glob(str(spot), recursive=True)]
        if matching and all(path in files or any(file.is_relative_to(path) for file in files) for path in matching):
            if spot.resolve() != place.resolve():
                message = f"{value} is {shown(place)} here, and would be {shown(spot)} on the cluster"
                yield Problem(str(origin), key, message, "write it as it is seen from the folder that is sent")
            return
    hint = f"put it in that folder, or name with --folder one that holds it and the recipe; large data: {_SHARED}"
    yield Problem(str(origin), key, f"{shown(place)} is not among the files that are sent", hint)


def pack(job: Job, file: Path) -> Path | None:
    """Write what is sent to `file`, the same bytes for the same files: the cluster keeps what it has. None: nothing."""
    if job.root is None:
        return None
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as package:
        for path in job.files:
            entry = zipfile.ZipInfo(path.relative_to(job.root).as_posix())
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, path.read_bytes())
    return file


def entrypoint(job: Job, python: str, secrets_file: str | None) -> str:
    """The shell line that Ray runs: every word of it arrives as it was typed."""
    told = ["env", f"{secrets.FILE}={secrets_file}"] if secrets_file else []
    options = ["--address", "auto", "--run-dir", job.run_dir, "--expect", job.hash]
    # exec: the launcher itself is told to stop, and its exit code is the job's.
    return shlex.join(["exec", *told, python, "-m", "launcher", "run", *options, "--", job.recipe, *job.overrides])


def leave(ssh: Ssh, host: Host, found: Mapping[str, str]) -> str:
    """Have secrets on the head, in memory where it has a place for that, readable by the user alone; the file's path.

    Raises:
        ClusterError: they cannot be written there.
    """
    done = ssh.run(host, ["sh", "-c", _LEAVE], stdin=json.dumps(dict(found)).encode())
    match = re.search(r"^slipway secrets (/.+)$", done.out, re.MULTILINE)
    if done.code or match is None:
        raise ClusterError(
            f"{host.name}: the secrets cannot be left there: {done.err.strip() or 'no answer'}",
            hint="--no-secrets sends none",
        )
    return match[1]


def take_back(ssh: Ssh, host: Host, file: str) -> None:
    """Remove them where no launcher has; raises nothing."""
    with suppress(SlipwayError):
        ssh.run(host, ["rm", "-f", "--", file])
