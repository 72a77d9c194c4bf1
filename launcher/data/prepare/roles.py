"""What each source of rows is for."""

from __future__ import annotations

from typing import Literal

from launcher.data.store import Set
from launcher.plan.plan import DataPlan

Role = Literal["train", "replay", "eval", "test", "retain"]
SETS: dict[Role, Set] = {
    "train": Set.TRAIN,
    "replay": Set.REPLAY,
    "eval": Set.EVAL,
    "test": Set.TEST,
    "retain": Set.RETAIN,
}


def roles(data: DataPlan) -> tuple[Role, ...]:
    """Of each of `data.sources`, in their order."""
    replay = data.replay.sources if data.replay else ()
    sizes: dict[Role, int] = {"train": len(data.train), "replay": len(replay), "eval": len(data.eval.sources)}
    sizes |= {"test": len(data.test.sources), "retain": len(data.retain)}
    return tuple(role for role, size in sizes.items() for _ in range(size))
