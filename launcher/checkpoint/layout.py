"""The names of a run's checkpoints; what they mean and in which order they appear.

    checkpoints/step-00000200/attempt-3.1/    staged by start 1 of launch 3: shard-*.safetensors, then manifest.json
    checkpoints/step-00000200/COMMIT          names that attempt and its manifest's hash; made last, by one attempt only

A step's folder is a checkpoint if and only if it holds COMMIT. Nothing is ever renamed or written twice: so the same
order holds on a disk and in an object store, and what an orphan of an earlier attempt writes lies beside, not over,
what its successor wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.checkpoint.lease import Attempt
from launcher.store.store import Store

MANIFEST = "manifest.json"
COMMIT = "COMMIT"
SHARD_SUFFIX = ".safetensors"
FOLDER = "checkpoints"
GROUP = "checkpoint"
"""Description of the process group that they are written on: whoever looks for a hang tells it from training's."""

_STEP = re.compile(r"step-(\d{8,})")
_ATTEMPT = re.compile(r"attempt-(\d+\.\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """The place of one step's checkpoint; whether there is one is another question."""

    store: Store
    step: int
    """Optimizer steps taken."""

    def __str__(self) -> str:
        return f"{self.store}/{self.folder}"

    @property
    def name(self) -> str:
        """As the user sees it."""
        return f"step-{self.step:08d}"

    @property
    def folder(self) -> str:
        """Its folder in the store."""
        return f"{FOLDER}/{self.name}"

    @property
    def commit(self) -> str:
        """The file that makes it a checkpoint."""
        return f"{self.folder}/{COMMIT}"

    def staging(self, attempt: Attempt) -> str:
        """Where `attempt` writes shards and manifest."""
        return f"{self.folder}/attempt-{attempt}"

    def attempts(self) -> list[Attempt]:
        """Those that wrote here, committed or not, oldest first."""
        matches = (_ATTEMPT.fullmatch(name) for name in self.store.names(self.folder))
        return sorted(Attempt.parse(match[1]) for match in matches if match)

    def is_committed(self) -> bool:
        """True where COMMIT is there; says nothing about damage."""
        return COMMIT in self.store.names(self.folder)


def steps(store: Store) -> list[Checkpoint]:
    """Every step's folder, committed or not, oldest first."""
    matches = (_STEP.fullmatch(name) for name in store.names(FOLDER))
    return [Checkpoint(store, step) for step in sorted(int(match[1]) for match in matches if match)]


def committed(store: Store) -> list[Checkpoint]:
    """The run's committed checkpoints, oldest first; empty where there is none."""
    return [checkpoint for checkpoint in steps(store) if checkpoint.is_committed()]


def newest_committed(store: Store) -> Checkpoint | None:
    """The committed checkpoint of the highest step."""
    return next((checkpoint for checkpoint in reversed(steps(store)) if checkpoint.is_committed()), None)
