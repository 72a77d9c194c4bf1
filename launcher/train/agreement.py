"""What all ranks have to decide alike, because all leave a loop together or none does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.train.parts import Parts


@dataclass(frozen=True)
class Limits:
    """What rank 0's clock says, for all."""

    over: bool
    """`train.max_time` has passed."""
    slow: bool
    """A step takes so much of the grace time that a stop cannot wait for its end."""


def agreed_on_time(parts: Parts, elapsed_s: float, step_s: float) -> Limits:
    """Rank 0's clock decides for all; no collective where nothing depends on it."""
    life = parts.plan.lifecycle
    if life.max_time_s is None and parts.batch.num_micro_steps == 1:
        return Limits(False, False)
    over = life.max_time_s is not None and elapsed_s >= life.max_time_s
    said = torch.tensor([over, step_s > life.grace_s / 4], device=parts.device, dtype=torch.float64)
    dist.broadcast(said, 0)
    over_time, slow = said.tolist()
    return Limits(bool(over_time), bool(slow))


def agreed(wish: bool, device: torch.device) -> bool:
    """Whether any rank wishes so: the same on all. Collective."""
    wishes = torch.tensor(float(wish), device=device)
    dist.all_reduce(wishes)
    return bool(wishes.item())
