"""Which checkpoints stay."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from launcher.checkpoint.durable import sync_folder
from launcher.checkpoint.layout import committed, removed_dir, rubbish, staging
from launcher.checkpoint.lease import current_attempt
from launcher.checkpoint.manifest import newest_sound, read
from launcher.errors import CheckpointError, SlipwayError

log = logging.getLogger(__name__)


def retain(run_dir: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Delete what is superseded; the checkpoints deleted are returned.

    Kept: the `keep_last` newest, the `keep_best` of lowest `progress["eval_loss"]`, always the newest one, and always
    the newest that is sound, which is looked for (every byte read) only where something is to be deleted. What crashes
    left goes too: half-deleted and never committed checkpoints, and staging folders of attempts before the current one.

    Call it on one rank, where no save is under way. What cannot be deleted is logged and stays; no run ends for that.
    """
    there = committed(run_dir)
    kept = set(there[-max(keep_last, 1) :]) | set(_best(there, keep_best))
    superseded = [checkpoint for checkpoint in there if checkpoint not in kept]
    if superseded:
        sound, _ = newest_sound(run_dir)
        superseded = [checkpoint for checkpoint in superseded if checkpoint != sound]
    try:
        for checkpoint in superseded:
            remove(checkpoint)
        for folder in rubbish(run_dir):
            shutil.rmtree(folder)
        sweep_staging(run_dir, before=current_attempt(run_dir) or 0)
    except (OSError, SlipwayError) as error:
        log.warning("old checkpoints stay: %s", error)
    return superseded


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. One renaming makes it none, so no crash leaves half of it committed. Raises OSError."""
    grave = removed_dir(checkpoint)
    if grave.exists():
        shutil.rmtree(grave)
    checkpoint.rename(grave)
    sync_folder(grave.parent)
    shutil.rmtree(grave)


def sweep_staging(run_dir: Path, before: int) -> None:
    """Delete the staging folders of attempts lower than `before`. Raises OSError."""
    for folder, attempt in staging(run_dir):
        if attempt < before:
            # An orphan of that attempt may still be writing there: what it adds meanwhile goes next time.
            shutil.rmtree(folder, ignore_errors=True)


def _best(checkpoints: list[Path], count: int) -> list[Path]:
    scored = [(loss, checkpoint) for checkpoint in checkpoints if (loss := _eval_loss(checkpoint)) is not None]
    return [checkpoint for _, checkpoint in sorted(scored)[:count]]


def _eval_loss(checkpoint: Path) -> float | None:
    try:
        loss = read(checkpoint).progress.get("eval_loss")
    except CheckpointError:
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None
