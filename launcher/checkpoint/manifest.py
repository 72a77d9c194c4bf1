"""What a checkpoint says about itself, and whether it is true.

manifest.json lists every shard with its size and hash; COMMIT holds the SHA-256 of manifest.json. So one flipped
byte anywhere is found.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict

from launcher.checkpoint.layout import COMMIT, MANIFEST, SHARD_SUFFIX, Checkpoint, committed
from launcher.checkpoint.lease import Attempt
from launcher.errors import CheckpointError, DamagedCheckpoint
from launcher.store.store import Store

FORMAT = 2
_PASSING = {
    *(errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN),
    *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN),
}
"""Errors of a network, of rights, of this process; not of what is stored."""


class ShardFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bytes: int
    xxh3_128: str
    """Of the content; 13 times as fast as SHA-256. It finds what broke, not what was forged."""


class Manifest(BaseModel):
    """A checkpoint in words."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    format: int = FORMAT
    step: int
    """Optimizer steps taken."""
    attempt: str
    """The attempt that wrote it."""
    plan: str
    """Hash of the whole Plan at the time."""
    trajectory: str
    """Hash of the Plan's trajectory: the checkpoint fits this and no other."""
    layout: dict[str, Any]
    """The Plan's layout at the time; a load may differ."""
    world_size: int
    optimizer_step: int
    """Adam's own counter, for its bias correction."""
    optimizer_steps: dict[str, int] = {}
    """Of parameters that have another one, because they were unfrozen later. Written only where there are any: a
    version that knows of none reads all other checkpoints."""
    parameters: dict[str, tuple[int, ...]]
    """Whole shape of every trainable parameter; the shards hold them flattened."""
    progress: dict[str, Any]
    """The loop's own words: data position, losses, `eval_loss` where it was measured."""
    files: dict[str, ShardFile]

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        unused = None if self.optimizer_steps else {"optimizer_steps"}
        return self.model_dump_json(indent=2, exclude=unused).encode() + b"\n"

    @property
    def phase(self) -> int:
        """Of gradual unfreezing: what was trained up to this step."""
        return int(self.progress.get("phase", 0))

    def steps_of(self, name: str) -> int:
        """Adam's counter for one parameter."""
        return self.optimizer_steps.get(name, self.optimizer_step)


class Commit(BaseModel):
    """What COMMIT says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempt: str
    """Whose files the checkpoint is made of."""
    manifest_sha256: str

    @classmethod
    def to(cls, manifest: Manifest) -> bytes:
        """The content of COMMIT for a manifest."""
        digest = hashlib.sha256(manifest.to_json()).hexdigest()
        return cls(attempt=manifest.attempt, manifest_sha256=digest).model_dump_json().encode() + b"\n"


def commit_of(checkpoint: Checkpoint) -> Commit | None:
    """What COMMIT says; None where there is none. Raises as `read`."""
    try:
        promised = Commit.model_validate_json(checkpoint.store.read(checkpoint.commit))
        Attempt.parse(promised.attempt)
    except FileNotFoundError:
        return None
    except ValueError as error:  # pydantic's own is one
        raise damaged(checkpoint, [f"{COMMIT}: content changed"]) from error
    except OSError as error:
        raise damaged(checkpoint, [f"{COMMIT}: {_in_words(checkpoint, error)}"]) from error
    return promised


def read(checkpoint: Checkpoint) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises DamagedCheckpoint where COMMIT or the manifest is missing, or does not fit the other; CheckpointError where
    they cannot be read just now.
    """
    promised = commit_of(checkpoint)
    if promised is None:
        raise damaged(checkpoint, [f"{COMMIT} is missing"])
    try:
        content = checkpoint.store.read(f"{checkpoint.staging(Attempt.parse(promised.attempt))}/{MANIFEST}")
    except FileNotFoundError as error:
        wrong = f"{MANIFEST} of attempt {promised.attempt}, which {COMMIT} names, is missing"
        raise damaged(checkpoint, [wrong]) from error
    except OSError as error:
        raise damaged(checkpoint, [f"{MANIFEST}: {_in_words(checkpoint, error)}"]) from error
    if hashlib.sha256(content).hexdigest() != promised.manifest_sha256:
        raise damaged(checkpoint, [f"{MANIFEST} is not the one that {COMMIT} names"])
    if (found := json.loads(content).get("format")) != FORMAT:
        raise CheckpointError(
            f"{checkpoint} is of format {found}, not {FORMAT}: another version of Slipway wrote it",
            hint="use the version named in the run's plan.json",
        )
    manifest = Manifest.model_validate_json(content)
    if manifest.step != checkpoint.step:
        raise damaged(checkpoint, [f"its manifest is of step {manifest.step}"])
    return manifest


def folder_of(checkpoint: Checkpoint, manifest: Manifest) -> str:
    """Where the files of a committed checkpoint are."""
    return checkpoint.staging(Attempt.parse(manifest.attempt))


def measure(checkpoint: Checkpoint, manifest: Manifest, name: str) -> str | None:
    """What is wrong with the content of one file; None where it is the one that was committed."""
    digest = xxhash.xxh3_128()
    try:
        for block in checkpoint.store.blocks(f"{folder_of(checkpoint, manifest)}/{name}"):
            digest.update(block)
    except (OSError, EOFError) as error:
        return f"{name}: {_in_words(checkpoint, error)}"
    return None if digest.hexdigest() == manifest.files[name].xxh3_128 else f"{name}: content changed"


def misplaced(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint's files to look at, without reading them: missing, or of another size."""
    there = checkpoint.store.sizes(folder_of(checkpoint, manifest))
    wrong = [
        f"{name}: {there[name]} bytes instead of {promised.bytes}" if name in there else f"{name}: missing"
        for name, promised in sorted(manifest.files.items())
        if there.get(name) != promised.bytes
    ]
    strays = sorted(name for name in there if name.endswith(SHARD_SUFFIX) and name not in manifest.files)
    return wrong + [f"{name}: not in the manifest" for name in strays]


def changed(checkpoint: Checkpoint, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Which of these files do not hold what was committed; several are read at once, hashing releases the
    interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: measure(checkpoint, manifest, name), names)
        return [wrong for wrong in found if wrong is not None]


def verify(checkpoint: Checkpoint) -> Manifest:
    """Read all of a checkpoint and compare it with its manifest, which is returned.

    Raises DamagedCheckpoint that names every damaged file; CheckpointError where they cannot be read just now.
    """
    manifest = read(checkpoint)
    try:
        wrong = misplaced(checkpoint, manifest)
    except OSError as error:
        wrong = [_in_words(checkpoint, error)]
    ill = {line.partition(":")[0] for line in wrong}
    wrong += changed(checkpoint, manifest, [name for name in sorted(manifest.files) if name not in ill])
    if wrong:
        raise damaged(checkpoint, wrong)
    return manifest


def damaged(checkpoint: Checkpoint, wrong: Iterable[str]) -> DamagedCheckpoint:
    """The error for a checkpoint with these wrongs."""
    return DamagedCheckpoint(f"{checkpoint} is damaged: {'; '.join(wrong)}", hint="use an older checkpoint of the run")


def newest_sound(store: Store) -> tuple[Checkpoint | None, list[str]]:
    """The newest committed checkpoint of a store that is whole, and a message for each newer, damaged one.

    Reads the checkpoint's every byte: ask once, on one rank. Raises CheckpointError where they cannot be read just now.
    """
    return first_sound(reversed(committed(store)))


def first_sound(checkpoints: Iterable[Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The first of these that is whole, and a message for each damaged one before it. Raises as `newest_sound`."""
    messages = []
    for checkpoint in checkpoints:
        try:
            verify(checkpoint)
        except DamagedCheckpoint as error:
            messages.append(error.message)
        else:
            return checkpoint, messages
    return None, messages


def _in_words(checkpoint: Checkpoint, error: BaseException) -> str:
    """What is wrong with a file. Raises CheckpointError for what may pass: it says nothing about the checkpoint."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise CheckpointError(
            f"{checkpoint} cannot be read: {error.strerror}", hint="check its disk or server, then try again"
        ) from error
    if isinstance(error, FileNotFoundError):
        return f"{str(error.filename or error).rpartition('/')[2]} is missing"
    return str(error).splitlines()[0]
