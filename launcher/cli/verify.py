"""`slipway verify`: every checkpoint of a run against the hashes it was committed with; with --deep, loaded too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import Json, RunFolder
from launcher.errors import CheckpointError, RunFolderError
from launcher.units import format_bytes

if TYPE_CHECKING:
    from launcher.checkpoint.deep import Expected
    from launcher.checkpoint.layout import Checkpoint
    from launcher.store.store import Store


@dataclass(frozen=True)
class Examined:
    """One checkpoint."""

    checkpoint: str
    step: int
    problem: str | None
    """None where it is sound."""
    loaded: bool = False
    """Whether all of it was loaded, and not only its hashes compared."""
    bytes: int = 0
    parameters: int = 0

    def __str__(self) -> str:
        if self.problem is not None:
            return self.problem
        return f"sound, {format_bytes(self.bytes)}, {self.parameters} parameters loaded" if self.loaded else "sound"


@dataclass(frozen=True)
class Uncommitted:
    """What a save left, or is writing."""

    checkpoint: str
    step: int
    attempt: str
    latest: bool
    """Whether the attempt is the run's latest, which may still be at it."""

    def __str__(self) -> str:
        return f"not committed ({'being written, or ' if self.latest else ''}left by attempt {self.attempt})"


def command(
    run: RunFolder,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also load every parameter and its moments, and look at them")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every checkpoint of a run against its hashes; exit 1 where one is damaged."""
    from launcher.checkpoint.layout import committed
    from launcher.driver.resume import existing_plan
    from launcher.store.location import open_store

    plan = existing_plan(run)
    store = open_store(plan.location)
    try:
        checkpoints = committed(store)
        if checkpoints and plan.trajectory.method.init == "pissa":
            from launcher.model import pissa

            pissa.needed(store, plan, checkpoints[-1].name)  # none is true without
        expected = None
        if deep:
            from launcher.checkpoint.deep import expected_of

            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels it misses is no concern here
            expected = expected_of(plan, checkpoints)
        found = []
        for checkpoint in checkpoints:
            examined = examine(checkpoint, expected)
            if examined.problem is not None and not checkpoint.is_committed():
                continue  # deleted meanwhile by the run, which goes on
            found.append(examined)
            if not as_json:
                print(f"{examined.checkpoint}  {examined}", flush=True)  # a large one takes minutes
        others = list(uncommitted(store))
    except OSError as error:
        raise RunFolderError(
            f"{store} cannot be read: {error.strerror or error}",
            hint="check that its disk is mounted, or the connection and the credentials",
        ) from error
    compared_with = expected.source if expected else None
    if as_json:
        render.print_json(
            {
                "run": plan.location,
                "checkpoints": [asdict(one) for one in found],
                "uncommitted": [asdict(one) for one in others],
                "compared_with": compared_with,
            }
        )
    for one in others if not as_json else ():
        print(f"{one.checkpoint}  {one}")
    complain(found)
    if not as_json:
        print(f"{len(found)} checkpoints are sound")
        if compared_with is not None and found:
            print(f"parameters compared with {compared_with}")


def examine(checkpoint: Checkpoint, expected: Expected | None) -> Examined:
    """Compare all hashes, and load everything where `expected` says what must be there."""
    from launcher.checkpoint.manifest import verify

    read = False
    try:
        manifest = verify(checkpoint)
        if expected is not None:
            from launcher.checkpoint.deep import check

            read = True
            check(checkpoint, manifest, expected)
    except CheckpointError as error:
        return Examined(checkpoint.name, checkpoint.step, error.message, read)
    num_bytes = sum(file.bytes for file in manifest.files.values())
    return Examined(checkpoint.name, checkpoint.step, None, read, num_bytes, len(manifest.parameters))


def uncommitted(store: Store) -> Iterator[Uncommitted]:
    """What lies beside the checkpoints and is none. Raises OSError."""
    from launcher.checkpoint.layout import steps
    from launcher.checkpoint.lease import current
    from launcher.checkpoint.manifest import read

    latest = str(current(store))
    for checkpoint in steps(store):
        taken = None
        if checkpoint.is_committed():
            try:
                taken = read(checkpoint).attempt
            except CheckpointError:
                continue  # damaged, and said to be: nobody knows whose files it was made of
        for attempt in map(str, checkpoint.attempts()):
            if attempt != taken:
                yield Uncommitted(checkpoint.name, checkpoint.step, attempt, attempt == latest)


def complain(found: list[Examined]) -> None:
    """Raise CheckpointError where a checkpoint is damaged."""
    damaged = [one for one in found if one.problem is not None]
    if not damaged:
        return
    hint = "a resume takes the newest sound one"
    if deceptive := [one.checkpoint for one in damaged if one.loaded]:
        hint = f"a resume compares hashes and nothing else: move {deceptive[-1]} out of checkpoints, or it is taken"
    raise CheckpointError(f"{len(damaged)} of {len(found)} checkpoints are damaged", hint=hint)
