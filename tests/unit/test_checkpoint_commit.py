"""What is committed is never touched by a save that fails, is repeated, or cannot see for a moment."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.lease import Attempt, acquire, begin
from launcher.checkpoint.manifest import Manifest, newest_sound, verify
from launcher.checkpoint.retain import Keep, retain
from launcher.checkpoint.save import write
from launcher.checkpoint.shards import FlatShard
from launcher.errors import CheckpointError, DamagedCheckpoint, SlipwayError
from launcher.store.folder import FolderStore

FIRST = Attempt(0, 1)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    file = tmp_path_factory.mktemp("group") / "store"
    store = dist.FileStore(str(file), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Unsteady(FolderStore):
    """A folder on a server with bad moments."""

    answer_lost = False
    refused: frozenset[str] = frozenset()
    error = errno.ETIMEDOUT

    def create(self, name: str, content: bytes) -> bool:
        made = super().create(name, content)
        if self.answer_lost:
            raise OSError(errno.EIO, "the answer was lost", name)
        return made

    def read(self, name: str) -> bytes:
        if any(part in name for part in self.refused):
            raise OSError(self.error, "just now", name)
        return super().read(name)


class Forgetful(Unsteady):
    """Says of a file that it has just made that it was there."""

    def create(self, name: str, content: bytes) -> bool:
        return super().create(name, content) and "COMMIT" not in name


def save(store: FolderStore, step: int, attempt: Attempt = FIRST, **progress: object) -> Checkpoint:
    described = Manifest(
        step=step,
        attempt=str(attempt),
        plan="",
        trajectory="",
        layout={},
        world_size=1,
        optimizer_step=step,
        parameters={"p": (10,)},
        progress={"step": step} | progress,
        files={},
    )
    values = torch.arange(10.0) + step
    return write(store, {"master.p": FlatShard(values, 0, 10)}, attempt, described)


def test_a_commit_whose_answer_was_lost_stays_a_checkpoint(tmp_path: Path) -> None:
    store = Unsteady(tmp_path)
    begin(store, 0)
    save(store, 1)
    store.answer_lost = True
    with pytest.raises(SlipwayError, match="the answer was lost"):
        save(store, 2)
    store.answer_lost = False
    for checkpoint in committed(store):
        verify(checkpoint)
    assert newest_sound(store) == (Checkpoint(store, 2), [])
    retain(store, Keep(last=5), FIRST, trusted=Checkpoint(store, 2))
    assert newest_sound(store) == (Checkpoint(store, 2), [])


def test_a_commit_that_seems_to_have_been_there_is_ours(tmp_path: Path) -> None:
    store = Forgetful(tmp_path)
    begin(store, 0)
    verify(save(store, 1))
    assert newest_sound(store) == (Checkpoint(store, 1), [])


def test_a_bad_moment_is_no_damage(tmp_path: Path) -> None:
    store = Unsteady(tmp_path)
    begin(store, 0)
    first = save(store, 1)
    store.refused = frozenset({"manifest.json"})
    for looking in (lambda: save(store, 1), lambda: verify(first), lambda: newest_sound(store)):
        with pytest.raises(CheckpointError, match="cannot be read: just now") as caught:
            looking()
        assert not isinstance(caught.value, DamagedCheckpoint)
    store.refused = frozenset()
    verify(first)


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EIO])
def test_nothing_is_deleted_for_want_of_seeing(tmp_path: Path, error: int) -> None:
    store = Unsteady(tmp_path)
    begin(store, 0)
    for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4)):
        newest = save(store, step, eval_loss=loss, eval_step=step)
    store.error, store.refused = error, frozenset({"manifest.json"})
    retain(store, Keep(last=1), FIRST)
    assert newest in committed(store)
    if error == errno.ETIMEDOUT:
        assert retain(store, Keep(last=1, best=1), FIRST, trusted=newest) == []
        assert len(committed(store)) == 3


def test_what_was_just_written_stays_beside_a_newer_one_that_is_damaged(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    begin(store, 0)
    for step in (1, 2, 9):
        save(store, step)
    shard = next((tmp_path / Checkpoint(store, 9).staging(FIRST)).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    written = save(store, 3)
    assert [checkpoint.step for checkpoint in retain(store, Keep(last=1), FIRST, trusted=written)] == [1, 2]
    assert newest_sound(store)[0] == written


def test_an_orphan_whose_files_were_swept_commits_nothing(tmp_path: Path) -> None:
    class Swept(FolderStore):
        """A successor sweeps right before the orphan's COMMIT."""

        def create(self, name: str, content: bytes) -> bool:
            if name.endswith("COMMIT"):
                self.remove(Checkpoint(self, 5).staging(FIRST))
            return super().create(name, content)

    store = FolderStore(tmp_path)
    begin(store, 0)
    save(store, 4)
    with pytest.raises(DamagedCheckpoint):
        save(Swept(tmp_path), 5)
    assert committed(store) == [Checkpoint(store, 4)]


def test_a_sweep_leaves_what_lies_ahead(tmp_path: Path) -> None:
    """There an orphan may be about to commit what it has staged."""
    store = FolderStore(tmp_path)
    begin(store, 0)
    store.write(f"{Checkpoint(store, 9).staging(FIRST)}/shard-00000.safetensors", b"half")
    store.write(f"{Checkpoint(store, 2).staging(FIRST)}/shard-00000.safetensors", b"half")
    with acquire(store) as lease:
        attempt = begin(store, lease.launch)
        retain(store, Keep(last=1), attempt, trusted=save(store, 5, attempt))
    assert Checkpoint(store, 9).attempts() == [FIRST]
    assert Checkpoint(store, 2).attempts() == []


def test_the_best_are_ranked_by_evaluations_and_not_by_what_carries_them(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    begin(store, 0)
    for step, loss, measured in ((100, 0.1, 100), (150, 0.1, 100), (200, 0.2, 200), (250, 0.2, 200), (300, 0.3, 300)):
        newest = save(store, step, eval_loss=loss, eval_step=measured)
    retain(store, Keep(last=1, best=2), FIRST, trusted=newest)
    assert [checkpoint.step for checkpoint in committed(store)] == [100, 200, 300]
