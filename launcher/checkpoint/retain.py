"""Which checkpoints stay."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.checkpoint.choose import best_first
from launcher.checkpoint.layout import Checkpoint, committed, steps
from launcher.checkpoint.lease import Attempt, fence
from launcher.checkpoint.manifest import commit_of, newest_sound
from launcher.errors import SlipwayError
from launcher.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """What a run keeps; the newest sound checkpoint stays in any case."""

    last: int
    """So many of the newest."""
    best: int = 0
    """So many of the best by `metric`, see `choose.best_first`."""
    every: int | None = None
    """All whose step is a multiple of this."""
    metric: str = "loss"


def retain(store: Store, keep: Keep, attempt: Attempt, trusted: Checkpoint | None = None) -> list[Checkpoint]:
    """Delete what is superseded; the checkpoints deleted are returned.

    Kept beside what `keep` says: the newest one, and the newest that is sound. That is `trusted`, which the caller has
    just written; without it, it is looked for, every byte read, where something is to be deleted. What is newer than
    `trusted` is damaged or an orphan's: it stays, and does not count. What crashes left goes too: whatever `attempt` or
    one before it staged and nobody committed.

    Call it on one rank, where this attempt has no save under way. What cannot be deleted is logged and stays, and
    nothing is deleted where something cannot be read; no run ends for that.
    """
    gone: list[Checkpoint] = []
    with _logged(store):
        there = [checkpoint for checkpoint in committed(store) if trusted is None or checkpoint.step <= trusted.step]
        superseded = _superseded(store, there, keep, trusted)
        for checkpoint in superseded:
            with _logged(checkpoint):
                fence(store, attempt)
                remove(checkpoint)
                gone.append(checkpoint)
        fence(store, attempt)
        for checkpoint in steps(store):
            if trusted is None or checkpoint.step <= trusted.step:
                with _logged(checkpoint):
                    _sweep(checkpoint, attempt)
    return gone


def _superseded(store: Store, there: list[Checkpoint], keep: Keep, trusted: Checkpoint | None) -> list[Checkpoint]:
    """Raises CheckpointError where a manifest cannot be read just now."""
    best = best_first(there, keep.metric)[: keep.best] if keep.best else []
    kept = {*there[-max(keep.last, 1) :], *best}
    kept |= {checkpoint for checkpoint in there if keep.every and checkpoint.step % keep.every == 0}
    superseded = [checkpoint for checkpoint in there if checkpoint not in kept and checkpoint != trusted]
    if superseded and trusted is None:
        sound, _ = newest_sound(store)
        superseded = [checkpoint for checkpoint in superseded if sound is not None and checkpoint != sound]
    return superseded


def remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint. Without COMMIT it is none, so no crash leaves half of one. Raises OSError."""
    checkpoint.store.remove(checkpoint.commit)
    checkpoint.store.remove(checkpoint.folder)


def _sweep(checkpoint: Checkpoint, attempt: Attempt) -> None:
    """Delete what was staged for this step and is no part of a checkpoint. A later attempt's is left to it."""
    attempts = checkpoint.attempts()
    promised = commit_of(checkpoint)  # damaged or unreadable: what of it can be saved is not for us to judge
    for other in attempts:
        if other <= attempt and (promised is None or str(other) != promised.attempt):
            checkpoint.store.remove(checkpoint.staging(other))
    checkpoint.store.prune(checkpoint.folder)  # not more: a later attempt may have come to this step meanwhile


@contextlib.contextmanager
def _logged(place: Store | Checkpoint) -> Iterator[None]:
    """One that cannot be deleted keeps no other from going."""
    try:
        yield
    except (OSError, SlipwayError) as error:
        log.warning("old checkpoints stay in %s: %s", place, error)
