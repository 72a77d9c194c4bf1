"""Which checkpoints stay."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.checkpoint.layout import Checkpoint, committed, steps
from launcher.checkpoint.lease import Attempt, fence
from launcher.checkpoint.manifest import newest_sound, read
from launcher.errors import CheckpointError, SlipwayError
from launcher.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """What a run keeps; the newest sound checkpoint stays in any case."""

    last: int
    """So many of the newest."""
    best: int = 0
    """So many of lowest `progress["eval_loss"]`."""
    every: int | None = None
    """All whose step is a multiple of this."""


def retain(store: Store, keep: Keep, attempt: Attempt, trusted: Checkpoint | None = None) -> list[Checkpoint]:
    """Delete what is superseded; the checkpoints deleted are returned.

    Kept beside what `keep` says: the newest one, and the newest that is sound. That is `trusted`, which the caller has
    just written, if it is the newest; otherwise it is looked for, every byte read, where something is to be deleted.
    What crashes left goes too: whatever `attempt` or one before it staged and nobody committed.

    Call it on one rank, where this attempt has no save under way. What cannot be deleted is logged and stays; no run
    ends for that.
    """
    there = committed(store)
    kept = set(there[-max(keep.last, 1) :]) | set(_best(there, keep.best))
    kept |= {checkpoint for checkpoint in there if keep.every and checkpoint.step % keep.every == 0}
    superseded = [checkpoint for checkpoint in there if checkpoint not in kept]
    if superseded and trusted != there[-1]:
        sound, _ = newest_sound(store)
        superseded = [checkpoint for checkpoint in superseded if checkpoint != sound]
    gone = []
    with _logged(store):
        fence(store, attempt)
        for checkpoint in superseded:
            with _logged(checkpoint):
                fence(store, attempt)
                remove(checkpoint)
                gone.append(checkpoint)
        for checkpoint in steps(store):
            with _logged(checkpoint):
                _sweep(checkpoint, attempt)
    return gone


def remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint. Without COMMIT it is none, so no crash leaves half of one. Raises OSError."""
    checkpoint.store.remove(checkpoint.commit)
    checkpoint.store.remove(checkpoint.folder)


def _sweep(checkpoint: Checkpoint, attempt: Attempt) -> None:
    """Delete what was staged for this step and is no part of a checkpoint. A later attempt's is left to it."""
    attempts = checkpoint.attempts()
    committed_by = None
    if checkpoint.is_committed():
        try:
            committed_by = read(checkpoint).attempt
        except CheckpointError:
            return  # damaged: what of it can be saved is not for us to judge
    for other in attempts:
        if other <= attempt and str(other) != committed_by:
            checkpoint.store.remove(checkpoint.staging(other))
    checkpoint.store.prune(checkpoint.folder)  # not more: a later attempt may have come to this step meanwhile


@contextlib.contextmanager
def _logged(place: Store | Checkpoint) -> Iterator[None]:
    """One that cannot be deleted keeps no other from going."""
    try:
        yield
    except (OSError, SlipwayError) as error:
        log.warning("old checkpoints stay in %s: %s", place, error)


def _best(checkpoints: list[Checkpoint], count: int) -> list[Checkpoint]:
    if not count:
        return []
    scored = [(loss, checkpoint.step) for checkpoint in checkpoints if (loss := _eval_loss(checkpoint)) is not None]
    best = {step for _, step in sorted(scored)[:count]}
    return [checkpoint for checkpoint in checkpoints if checkpoint.step in best]


def _eval_loss(checkpoint: Checkpoint) -> float | None:
    try:
        loss = read(checkpoint).progress.get("eval_loss")
    except CheckpointError:
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None
