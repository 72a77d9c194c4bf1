"""What grows with the number of ranks, counted: for 1,000 of them nobody may wait on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from launcher.checkpoint.layout import Checkpoint, newest_committed
from launcher.checkpoint.lease import Attempt, acquire, begin, current, fence
from launcher.checkpoint.manifest import folder_of, misplaced, read, verify
from launcher.checkpoint.retain import Keep, retain
from launcher.checkpoint.save import is_sound
from launcher.checkpoint.shards import FlatShard
from launcher.checkpoint.storage import Range, ShardReader, ranges_of
from launcher.store.folder import FolderStore
from launcher.store.store import Store
from tests.checkpoints import values, write_checkpoint

SHAPES = {"up.weight": (60, 10), "norm.weight": (100,)}


class Counting(FolderStore):
    """A folder that counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()


def counting(name: str) -> Callable[..., Any]:
    def ask(self: Counting, *args: Any) -> Any:
        self.asked[name] += 1
        return getattr(FolderStore, name)(self, *args)

    return ask


for operation in Store.__abstractmethods__ - {"__str__"}:
    setattr(Counting, operation, counting(operation))


def asked(store: Counting, action: Callable[[], object]) -> Counter[str]:
    store.asked.clear()
    action()
    return Counter(store.asked)


def of_a_checkpoint(folder: Path, ranks: int) -> dict[str, Counter[str]]:
    """What rank 0 asks of the store for each thing it does alone with checkpoints of so many shards."""
    folder.mkdir()
    store = Counting(folder)
    attempt = begin(store, 0)
    checkpoints = [write_checkpoint(store, step, attempt, ranks, SHAPES) for step in (1, 2, 3)]
    newest = checkpoints[-1]
    manifest = read(newest)
    return {
        "find": asked(store, lambda: newest_committed(store)),
        "read": asked(store, lambda: read(newest)),
        "look": asked(store, lambda: misplaced(newest, manifest)),
        "fence": asked(store, lambda: fence(store, attempt)),
        "retain": asked(store, lambda: retain(store, Keep(last=1, best=1), attempt, trusted=newest)),
        "not there": asked(store, lambda: is_sound(Checkpoint(store, 4))),
    }


def test_what_rank_0_does_alone_does_not_grow_with_the_ranks(tmp_path: Path) -> None:
    few, many = of_a_checkpoint(tmp_path / "few", 2), of_a_checkpoint(tmp_path / "many", 40)
    assert few == many
    assert sum(many["find"].values()) <= 2
    assert sum(many["retain"].values()) <= 25


def test_verifying_reads_each_shard_once(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    checkpoint = write_checkpoint(store, 1, ranks=40, shapes=SHAPES)
    assert asked(store, lambda: verify(checkpoint)) == {"read": 2, "sizes": 1, "blocks": 40}


@pytest.mark.parametrize("starts", [1, 50])
def test_a_lease_costs_the_same_after_many_restarts(tmp_path: Path, starts: int) -> None:
    store = Counting(tmp_path)
    with acquire(store) as lease:
        for _ in range(starts):
            attempt = begin(store, lease.launch)
        assert asked(store, lambda: fence(store, attempt)) == {"names": 1}
        assert asked(store, lambda: current(store)) == {"names": 1}
        assert asked(store, lambda: begin(store, lease.launch)) == {"is_there": 1, "names": 2, "create": 1}
    assert current(store) == Attempt(1, starts + 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_rank_makes_only_its_own_part_known_to_dcp(tmp_path: Path) -> None:
    """Of the ranges that 100 ranks wrote, three ranks need a third each, and not the table of all."""
    store = FolderStore(tmp_path)
    checkpoint = write_checkpoint(store, 7, ranks=100, shapes=SHAPES)
    manifest = read(checkpoint)
    folder = folder_of(checkpoint, manifest)
    ranges: list[Range] = [one for file in manifest.files for one in ranges_of(store, folder, file)]
    known = 0
    for rank in range(3):
        state = {
            f"master.{name}": FlatShard(torch.zeros(numel), 0, numel, replicated=True).share(rank, 3)
            for name, numel in (("up.weight", 600), ("norm.weight", 100))
        }
        wanted = {name: (shard.start, shard.start + shard.held.numel()) for name, shard in state.items()}
        reader = ShardReader(store, folder, ranges, wanted)
        metadata = reader.read_metadata()
        assert set(metadata.state_dict_metadata) == {one.name for one in ranges}
        known += len(metadata.storage_data)
        dcp_load(dict(state), storage_reader=reader, no_dist=True)
        for name, shard in state.items():
            whole = values(name, shard.full_numel, 7)
            assert torch.equal(shard.held, whole[shard.start : shard.start + shard.held.numel()])
    # 600 values are cut in 100 ranges, and so are 100: two tensors, each range once, at most one shared at each border.
    assert 200 <= known <= 200 + 2 * 2
