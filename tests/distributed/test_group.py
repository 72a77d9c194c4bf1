"""The process groups that the other tests stand on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from launcher.errors import CheckpointError
from tests.distributed.group import RankTraceback, run_group

pytestmark = pytest.mark.distributed


def _sum_of_ranks(start: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + start)])
    dist.all_reduce(total)
    return dist.get_rank(), total


def _one_fails() -> None:
    if dist.get_rank() == 1:
        raise CheckpointError("no such shard", hint="look elsewhere")
    dist.barrier()


def _one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def _hangs(pid_file: str) -> None:
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def test_results_come_back_in_order() -> None:
    results = run_group(2, _sum_of_ranks, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.item() == 21.0 for _, total in results)


def test_a_ranks_error_is_raised_again_with_its_traceback() -> None:
    with pytest.raises(CheckpointError, match="no such shard") as caught:
        run_group(2, _one_fails)
    assert caught.value.hint == "look elsewhere"
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert "_one_fails" in str(caught.value.__cause__)


def test_a_dead_rank_is_named() -> None:
    # Which rank is heard of first is a race: the dead one, or the one whose barrier broke.
    with pytest.raises(RuntimeError, match=r"rank 1 died with exit code 9|[Cc]onnection"):
        run_group(2, _one_dies)


@pytest.mark.long  # waits out its own time limit
def test_a_hanging_rank_is_killed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pid_file = tmp_path / "pid"
    with pytest.raises(TimeoutError):
        run_group(1, _hangs, str(pid_file), timeout_s=8)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
