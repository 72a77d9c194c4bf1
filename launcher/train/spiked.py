"""What follows from a spike: its rows are named, and the step is left out, the run rolled back, or ended.

Going back to a checkpoint and leaving the batches since out is how PaLM was carried past its spikes (Chowdhery et al.,
2022, section 5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.load import load_newest
from launcher.data.loader import MicroBatch
from launcher.train.parts import Parts, Progress
from launcher.train.saving import report_saves
from launcher.train.spikes import Spike
from launcher.train.unfreeze import load_checkpoint
from launcher.train.verdict import Verdict

SHOWN = 8
"""Rows that are named."""
HINT = "lower optimizer.lr, lengthen schedule.warmup, or look at these rows with slipway data"


def suspects(losses: torch.Tensor, seen: Sequence[MicroBatch]) -> list[str]:
    """Where the rows come from that a spike is blamed on: those of every micro batch whose loss is no number, otherwise
    of the one with the highest mean loss. Collective.

    Args:
        losses: [micro steps] loss sums of this rank
        seen: its micro batches
    """
    bad = ~torch.isfinite(losses)
    means = [loss / max(1, len(batch.targets)) for loss, batch in zip(losses.tolist(), seen, strict=True)]
    worst = max(range(len(means)), key=means.__getitem__)
    mine = [where for ill, batch in zip(bad.tolist(), seen, strict=True) if ill for where in batch.where]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (mine, means[worst], list(seen[worst].where)))
    not_finite = [where for rows, _, _ in found for where in rows]
    highest: list[str] = max(found, key=lambda rank: rank[1])[2]
    return not_finite or highest


def named(rows: Sequence[str]) -> str:
    """The first of `rows` as a clause."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"; rows: {', '.join(rows[:SHOWN])}{more}"


def respond(parts: Parts, progress: Progress, spike: Spike) -> Verdict | None:
    """Do what a spike calls for, once its step is over; a verdict where it ends the run. Collective.

    Raises CheckpointError where the run is to go back to a checkpoint, and none of those that are there is whole.
    """
    most = parts.plan.lifecycle.guard.most
    too_often = spike.left_out and progress.spikes >= most
    parts.log.write(
        "spike",
        step=spike.step,
        loss=spike.loss if spike.finite else None,
        mean=spike.mean,
        deviations=spike.deviations,
        action="stop" if too_often else spike.action,
        message=spike.message,
    )
    if spike.action == "warn":
        return None
    if spike.action == "stop":
        return _ended(parts, spike, spike.message)
    if too_often:
        times = f"{most} time{'s' * (most > 1)}"
        return _ended(parts, spike, f"{spike.message}; steps were left out {times} before, which is guard.most")
    progress.spikes += 1
    if spike.action == "rollback":
        _roll_back(parts, progress, spike)
    else:
        progress.skipped.append(spike.step)
    return None


def _roll_back(parts: Parts, progress: Progress, spike: Spike) -> None:
    """Take the newest checkpoint's weights and memory, and keep the place in the data; where there is none yet, the
    step alone is left out."""
    saver = parts.saver
    with parts.watch.part("checkpoint"):
        saver.join()  # the newest may still be written
        report_saves(parts)
        checkpoint, before, damaged = load_newest(saver.store, lambda one: load_checkpoint(parts, one), saver.group)
    for message in damaged:
        parts.log.write("damaged_checkpoint", message=message)
    if checkpoint is None or before is None:
        progress.skipped.append(spike.step)
        return
    lost = range(checkpoint.step + 1, spike.step + 1)
    goes_on = {"step": spike.step - 1, "elapsed_s": progress.elapsed_s, "spikes": progress.spikes}
    vars(progress).update(vars(before) | goes_on | {"skipped": before.skipped + list(lost)})
    saver.newest = checkpoint.step
    parts.log.write(
        "rollback",
        step=spike.step,
        to_step=checkpoint.step,
        skipped=len(lost),
        message=f"gone back to the checkpoint of step {checkpoint.step}, and on after step {spike.step}",
    )


def _ended(parts: Parts, spike: Spike, message: str) -> Verdict:
    parts.saver.join()
    report_saves(parts)
    return Verdict("diverged" if spike.finite else "not_finite", spike.step - 1, message, HINT, exit_code=1)
