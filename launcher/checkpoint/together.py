"""All ranks succeed, or all fail with the same words."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launcher.errors import CheckpointError, RunFolderError, SlipwayError

Result = TypeVar("Result")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


def together(doing: str, action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """`action()` on every rank of `group`; all ranks' results. Collective.

    Where it raises on any rank, all raise the same: the first failing rank's own SlipwayError, RunFolderError for what
    the run's folder is to blame for (full, read-only, gone), otherwise CheckpointError. `doing` begins the message.
    """
    try:
        mine: tuple[SlipwayError | None, Result | None] = (None, action())
    except CheckpointException as error:  # DCP's own, a BaseException, names its rank itself
        mine = (explained(doing, error), None)
    except Exception as error:
        alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        mine = (explained(doing if alone else f"{doing} (rank {dist.get_rank(group)})", error), None)
    everyone: list[tuple[SlipwayError | None, Result | None]] = [mine]
    if dist.is_initialized():
        everyone = [mine] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    for failure, _ in everyone:
        if failure is not None:
            raise failure
    return [result for _, result in everyone]  # type: ignore[misc]


def explained(doing: str, error: BaseException) -> SlipwayError:
    """`error` in our words; one of ours is left as it is."""
    if isinstance(error, CheckpointException):
        rank = min(error.failures)
        doing, error = f"{doing} (rank {rank})", error.failures[rank][0]
    if isinstance(error, SlipwayError):
        return error
    if isinstance(error, OSError) and error.errno in _FULL | _UNUSABLE:
        where = f": {error.filename}" if error.filename else ""
        hint = "free some space there" if error.errno in _FULL else "check that the run's folder is there and writable"
        return RunFolderError(f"{doing}: {error.strerror}{where}", hint=hint)
    return CheckpointError(f"{doing}: {type(error).__name__}: {error}")
