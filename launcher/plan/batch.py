"""The arithmetic of batches: which rows of a global batch go to which rank and micro step.

A global batch is an ordered list of rows, the same for any number of ranks (E3). A layout cuts it into
`num_micro_steps` x `world_size` slots of `micro_batch_size` rows. Where it does not divide, the last slots are short or
empty; an empty slot still runs, with weight zero, because every rank must join every collective.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchLayout:
    """How one optimizer step is cut over `world_size` ranks."""

    world_size: int
    micro_batch_size: int
    num_micro_steps: int
    """Gradient accumulation: forward and backward passes of each rank in one optimizer step."""

    def slot(self, num_rows: int, micro_step: int, rank: int) -> list[int]:
        """Positions within a global batch of `num_rows` rows that `rank` takes at `micro_step`; may be empty.

        Rows come sorted by cost. The ranks take turns, to and fro, so that what each gets in a micro step costs alike:
        of the rows 0 to 5, two ranks take 0, 3, 4 and 1, 2, 5.
        """
        start = micro_step * self.world_size * self.micro_batch_size
        rounds = range(self.micro_batch_size)
        places = (i * self.world_size + (self.world_size - 1 - rank if i % 2 else rank) for i in rounds)
        return [start + place for place in places if start + place < num_rows]


def batch_layout(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchLayout:
    """Cut a global batch of `global_batch_size` rows over `world_size` ranks.

    The micro batch shrinks where the ranks alone would overshoot the global batch, so that no rank idles needlessly.
    """
    per_rank = -(-global_batch_size // world_size)
    micro = min(micro_batch_size, per_rank)
    return BatchLayout(world_size, micro, -(-per_rank // micro))
