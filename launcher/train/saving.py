"""Checkpoints, as the loop sees them: begun, reported, and at the end of a run insisted on."""

from __future__ import annotations

import time

import torch.distributed as dist

from launcher.errors import CheckpointError, SlipwayError, Superseded
from launcher.train.agreement import agreed
from launcher.train.parts import Parts, Progress
from launcher.train.verdict import Verdict

PATIENCE_S = 600.0
"""How long the end of a run is tried to be saved: long enough to free some space, short beside what it cost."""
AGAIN_S = 15.0


def checkpoint(parts: Parts, progress: Progress) -> None:
    """Begin to save; the writing goes on beside the next steps."""
    with parts.watch.part("checkpoint"):
        parts.saver.begin(progress.step, progress.as_dict())


def report_saves(parts: Parts) -> SlipwayError | None:
    """A line for each save that has ended since; why the last of them failed, if it did."""
    failure = None
    for saved in parts.saver.finished():
        failure = saved.error
        if failure is None:
            parts.log.write("checkpoint", step=saved.step, path=f"step-{saved.step:08d}", seconds=saved.seconds)
        else:
            parts.log.write(
                "checkpoint_failed",
                step=saved.step,
                message=failure.message,
                hint=failure.hint,
                newest=parts.saver.newest,
            )
    return failure


def save_last(parts: Parts, progress: Progress, patience_s: float) -> Verdict | None:
    """Save and wait for it, again and again for `patience_s`; a verdict where it cannot be done.

    Raises Superseded.
    """
    deadline = time.monotonic() + patience_s
    while True:
        with parts.watch.part("checkpoint"):
            parts.saver.begin(progress.step, progress.as_dict())
            parts.saver.join()
        failure = report_saves(parts)
        # Equal on all ranks, unless one of them was cut off in the middle of it.
        if not agreed(failure is not None, parts.device):
            return None
        failure = failure or CheckpointError("another rank could not write its part")
        if agreed(isinstance(failure, Superseded), parts.device):
            raise failure
        # Rank 0's clock decides; a stop request of any rank ends the waiting.
        over = dist.get_rank() == 0 and time.monotonic() + AGAIN_S > deadline
        if agreed(over or parts.stopping(), parts.device):
            break
        parts.log.write("last_save_waits", step=progress.step, message=failure.message, hint=failure.hint)
        time.sleep(AGAIN_S)
    newest = parts.saver.newest
    left = f"the newest checkpoint is of step {newest}" if newest is not None else "there is no checkpoint"
    return Verdict(
        "unsaved",
        progress.step,
        f"trained to step {progress.step}, which could not be saved: {failure.message}; {left}",
        failure.hint,
        exit_code=1,
    )
