"""The names inside a run's folder; what they mean and in which order they appear.

    <run>/checkpoints/.staging-00000200-3/    step 200 while attempt 3 writes it
    <run>/checkpoints/step-00000200/          *.safetensors, manifest.json, and last of all COMMIT
    <run>/checkpoints/.removed-step-00000200/ superseded, being deleted

A folder is a checkpoint if and only if it holds COMMIT; anything else is rubbish of a crash.
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
COMMIT = "COMMIT"
SHARD_SUFFIX = ".safetensors"

_STEP = re.compile(r"step-(\d{8,})")
_REMOVED = re.compile(r"\.removed-step-(\d{8,})")
_STAGING = re.compile(r"\.staging-(\d{8,})-(\d+)")


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """The final folder of the checkpoint taken after `step` optimizer steps."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def staging_dir(run_dir: Path, step: int, attempt: int) -> Path:
    """Where `attempt` writes the checkpoint of `step` before it is renamed to its final folder."""
    return checkpoints_dir(run_dir) / f".staging-{step:08d}-{attempt}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder. Raises ValueError for a folder of another name."""
    match = _STEP.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not a checkpoint's folder")
    return int(match[1])


def is_committed(checkpoint: Path) -> bool:
    """True where COMMIT is there; says nothing about damage."""
    return (checkpoint / COMMIT).is_file()


def committed(run_dir: Path) -> list[Path]:
    """The run's committed checkpoints, oldest first; empty where there is none."""
    return [path for path in _folders(run_dir, _STEP) if is_committed(path)]


def newest_committed(run_dir: Path) -> Path | None:
    """The committed checkpoint of the highest step."""
    return next(reversed(committed(run_dir)), None)


def rubbish(run_dir: Path) -> list[Path]:
    """What a crash left between renaming and committing, or within a removal. Ask where no save is under way."""
    return [path for path in _folders(run_dir, _STEP) if not is_committed(path)] + _folders(run_dir, _REMOVED)


def removed_dir(checkpoint: Path) -> Path:
    """Where a checkpoint is moved to be deleted."""
    return checkpoint.with_name(f".removed-{checkpoint.name}")


def staging(run_dir: Path) -> list[tuple[Path, int]]:
    """The run's staging folders, each with the attempt that made it."""
    return [(path, int(path.name.rpartition("-")[2])) for path in _folders(run_dir, _STAGING)]


def _folders(run_dir: Path, name: re.Pattern[str]) -> list[Path]:
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    matches = ((name.fullmatch(path.name), path) for path in folder.iterdir())
    found = [(int(match[1]), path) for match, path in matches if match and path.is_dir()]
    return [path for _, path in sorted(found)]
