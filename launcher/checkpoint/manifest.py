"""What a checkpoint says about itself, and whether it is true.

manifest.json lists every shard with its size and SHA-256; COMMIT holds the SHA-256 of manifest.json. So one flipped
byte anywhere is found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.checkpoint.layout import COMMIT, MANIFEST, SHARD_SUFFIX, committed
from launcher.errors import CheckpointError

_BLOCK_BYTES = 1 << 20


class ShardFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """A checkpoint in words."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    format: int = 1
    step: int
    """Optimizer steps taken."""
    attempt: int
    """The lease's attempt that wrote it."""
    trajectory: str
    """Hash of the Plan's trajectory: the checkpoint fits this and no other."""
    layout: dict[str, Any]
    """The Plan's layout at the time; a load may differ."""
    world_size: int
    optimizer_step: int
    """Adam's own counter, for its bias correction."""
    parameters: dict[str, tuple[int, ...]]
    """Whole shape of every trainable parameter; the shards hold them flattened."""
    progress: dict[str, Any]
    """The loop's own words: data position, losses, `eval_loss` where it was measured."""
    files: dict[str, ShardFile]

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def read(checkpoint: Path) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises CheckpointError where COMMIT or the manifest is missing, or does not fit the other.
    """
    damage = f"{checkpoint} is damaged"
    try:
        promised = (checkpoint / COMMIT).read_text(encoding="utf-8").strip()
        content = (checkpoint / MANIFEST).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{damage}: {error}", hint="use an older checkpoint of the run") from error
    if hashlib.sha256(content).hexdigest() != promised:
        raise CheckpointError(
            f"{damage}: {MANIFEST} is not the one {COMMIT} names", hint="use an older checkpoint of the run"
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint} was written by another version of Slipway",
            hint="use the version named in the run's plan.json",
        ) from error


def measure(path: Path) -> ShardFile:
    """Size and SHA-256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        return ShardFile(bytes=file.tell(), sha256=digest.hexdigest())


def measure_all(paths: Iterable[Path]) -> dict[str, ShardFile]:
    """`measure` of each, by name; several at once, because hashing releases the interpreter's lock."""
    paths = list(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((path.name for path in paths), pool.map(measure, paths), strict=True))


def damage(checkpoint: Path, manifest: Manifest, part: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint's files, a line each; empty where all is well.

    Names and sizes of all files are compared; contents of those in `part` of the sorted names, so that ranks can share
    the reading.
    """
    wrong = []
    there = {path.name: path for path in checkpoint.iterdir() if path.suffix == SHARD_SUFFIX}
    # A loader reads every shard it sees, so a stray one is as bad as a missing one.
    wrong += [f"{name}: not in the manifest" for name in sorted(there.keys() - manifest.files.keys())]
    whole = []
    for name, promised in sorted(manifest.files.items()):
        if name not in there:
            wrong.append(f"{name}: missing")
        elif (size := there[name].stat().st_size) != promised.bytes:
            wrong.append(f"{name}: {size} bytes instead of {promised.bytes}")
        else:
            whole.append(name)
    names = set(sorted(manifest.files)[part])
    measured = measure_all(there[name] for name in whole if name in names)
    return wrong + [f"{name}: content changed" for name, found in measured.items() if found != manifest.files[name]]


def verify(checkpoint: Path) -> Manifest:
    """Read all of a checkpoint and compare it with its manifest, which is returned.

    Raises CheckpointError that names every damaged file.
    """
    manifest = read(checkpoint)
    try:
        wrong = damage(checkpoint, manifest)
    except OSError as error:
        wrong = [str(error)]
    if wrong:
        raise damaged(checkpoint, wrong)
    return manifest


def damaged(checkpoint: Path, wrong: Iterable[str]) -> CheckpointError:
    """The error for a checkpoint with these wrongs."""
    return CheckpointError(f"{checkpoint} is damaged: {'; '.join(wrong)}", hint="use an older checkpoint of the run")


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest committed checkpoint that is whole, and a message for each newer, damaged one.

    Reads the checkpoint's every byte: ask once, on one rank.
    """
    messages = []
    for checkpoint in reversed(committed(run_dir)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            messages.append(error.message)
        else:
            return checkpoint, messages
    return None, messages
