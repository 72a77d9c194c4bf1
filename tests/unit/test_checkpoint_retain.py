"""Which checkpoints stay, in a folder and in an object store; and that no crash while one goes leaves half of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.lease import Attempt, begin
from launcher.checkpoint.manifest import newest_sound, verify
from launcher.checkpoint.retain import Keep, retain
from launcher.store.folder import FolderStore
from launcher.store.store import Store
from tests.checkpoints import FIRST, STORES, opened, write_checkpoint


@pytest.fixture(scope="module", params=STORES)
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with opened(request.param, tmp_path_factory.mktemp("run")) as store:
        yield store


@pytest.fixture
def store(stores: Store) -> Iterator[Store]:
    """An empty store in which the attempt FIRST has begun."""
    assert begin(stores, 0) == FIRST
    yield stores
    for name in stores.names():
        stores.remove(name)


def steps(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in committed(store)]


def write(store: Store, *steps: int, **eval_losses: float | None) -> None:
    for step in steps:
        write_checkpoint(store, step, ranks=1, progress={"step": step, "eval_loss": eval_losses.get(f"step{step}")})


def damage(store: Store, step: int) -> None:
    shard = f"{Checkpoint(store, step).staging(FIRST)}/shard-00000.safetensors"
    content = store.read(shard)
    store.write(shard, content[:-1] + bytes([content[-1] ^ 1]))


def test_the_last_stay(store: Store) -> None:
    write(store, 1, 2, 3, 4)
    assert [checkpoint.step for checkpoint in retain(store, Keep(last=2), FIRST)] == [1, 2]
    assert steps(store) == [3, 4]
    assert store.names("checkpoints") == ["step-00000003", "step-00000004"]
    assert retain(store, Keep(last=2), FIRST) == []


def test_the_best_stay_and_a_loss_that_is_none_is_not_among_them(store: Store) -> None:
    write(store, 1, 2, 3, 4, 5, 6, step1=3.0, step2=1.0, step3=2.0, step4=None, step5=float("nan"), step6=2.5)
    assert [checkpoint.step for checkpoint in retain(store, Keep(last=2, best=2), FIRST)] == [1, 4]
    assert steps(store) == [2, 3, 5, 6]


def test_of_two_equally_good_the_earlier_stays(store: Store) -> None:
    write(store, 1, 2, 3, 4, step1=2.0, step2=1.0, step3=1.0, step4=3.0)
    retain(store, Keep(last=1, best=1), FIRST)
    assert steps(store) == [2, 4]


def test_each_so_many_steps_one_stays(store: Store) -> None:
    write(store, 4, 5, 8, 10, 11, 12)
    retain(store, Keep(last=1, every=4), FIRST)
    assert steps(store) == [4, 8, 12]
    write(store, 13)
    retain(store, Keep(last=1, every=5), FIRST)
    assert steps(store) == [13]


def test_the_newest_stays_whatever_is_to_be_kept(store: Store) -> None:
    write(store, 1, 2)
    retain(store, Keep(last=0), FIRST)
    assert steps(store) == [2]


def test_the_newest_sound_one_stays(store: Store) -> None:
    write(store, 1, 2, 3, 4, 5)
    for step in (4, 5):
        damage(store, step)
    assert [checkpoint.step for checkpoint in retain(store, Keep(last=2), FIRST)] == [1, 2]
    assert steps(store) == [3, 4, 5]
    assert newest_sound(store)[0] == Checkpoint(store, 3)


def test_what_is_newer_than_the_trusted_one_stays_beside_it(store: Store) -> None:
    """As where a run has gone back to an older checkpoint, and saves one that is not the newest."""
    write(store, 1, 2, 3, 4)
    damage(store, 4)
    retain(store, Keep(last=1), FIRST, trusted=Checkpoint(store, 2))
    assert steps(store) == [2, 3, 4]
    assert newest_sound(store)[0] == Checkpoint(store, 3)


def test_damaged_best_ones_do_not_stand_for_sound_ones(store: Store) -> None:
    write(store, 1, 2, 3, step1=2.0, step2=1.0, step3=3.0)
    store.write(Checkpoint(store, 2).commit, b"")  # its loss cannot be read any more
    retain(store, Keep(last=1, best=1), FIRST)
    assert steps(store) == [1, 3]


def test_the_one_just_written_is_not_read_again(store: Store) -> None:
    """A terabyte would be; that it is taken at its word shows where it is damaged."""
    write(store, 1, 2)
    damage(store, 2)
    retain(store, Keep(last=1), FIRST, trusted=Checkpoint(store, 2))
    assert steps(store) == [2]


def test_what_crashes_left_goes_and_what_a_later_attempt_writes_stays(store: Store) -> None:
    for _ in range(2):
        now = begin(store, 0)
    assert now == Attempt(0, 3)
    earlier, later = Attempt(0, 2), Attempt(1, 1)
    write(store, 3)
    for attempt in (earlier, now, later):  # a checkpoint's own folder may have what others have staged for its step
        write_checkpoint(store, 3, attempt, commit=False)
    write_checkpoint(store, 4, FIRST, commit=False)
    write_checkpoint(store, 4, now, commit=False)
    write_checkpoint(store, 5, earlier, commit=False)
    write_checkpoint(store, 5, later, commit=False)
    write(store, 2)
    store.remove(Checkpoint(store, 2).commit)  # as a crash leaves it that came while it was removed
    assert retain(store, Keep(last=1), now) == []
    assert store.names("checkpoints") == ["step-00000003", "step-00000005"]
    assert Checkpoint(store, 3).attempts() == [FIRST, later]
    assert Checkpoint(store, 5).attempts() == [later]
    assert verify(Checkpoint(store, 3)).step == 3
    assert f"attempt-{later}" in store.names("checkpoints/step-00000005")


def test_an_attempt_that_was_taken_over_deletes_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    write(store, 1, 2, 3)
    write_checkpoint(store, 4, FIRST, commit=False)
    begin(store, 0)
    assert retain(store, Keep(last=1), FIRST) == []
    assert steps(store) == [1, 2, 3]
    assert Checkpoint(store, 4).attempts() == [FIRST]
    assert "attempt 0.1 may no longer train or save" in caplog.text


def test_a_damaged_one_keeps_all_that_lies_with_it(store: Store) -> None:
    write(store, 1)
    write_checkpoint(store, 1, Attempt(0, 0), commit=False)
    store.write(Checkpoint(store, 1).commit, b"")
    retain(store, Keep(last=1), FIRST)
    assert Checkpoint(store, 1).attempts() == [Attempt(0, 0), FIRST]


def test_a_folder_that_cannot_be_deleted_stays_and_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An NFS server refuses to delete a folder from which somebody reads."""
    store = FolderStore(tmp_path)
    begin(store, 0)
    write(store, 1, 2, 3)
    delete = shutil.rmtree

    def refuse(path: Path) -> None:
        if "step-00000001" in path.parts:
            raise OSError(16, "Device or resource busy", str(path))
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert [checkpoint.step for checkpoint in retain(store, Keep(last=1), FIRST)] == [2]
    assert steps(store) == [3]
    assert store.names("checkpoints") == ["step-00000001", "step-00000003"]
    assert "Device or resource busy" in caplog.text
    monkeypatch.undo()
    retain(store, Keep(last=1), FIRST)
    assert store.names("checkpoints") == ["step-00000003"]


REMOVING = """
import os, sys
from pathlib import Path
from launcher.checkpoint.layout import committed
from launcher.checkpoint.retain import remove
from launcher.store.folder import FolderStore

unlink, unlinked = os.unlink, 0

def pause_before_one(*args, **kwargs):
    global unlinked
    unlinked += 1
    if unlinked == int(sys.argv[2]):
        print("here", flush=True)
        sys.stdin.readline()
    unlink(*args, **kwargs)

os.unlink = pause_before_one
for checkpoint in committed(FolderStore(Path(sys.argv[1])))[:-1]:
    remove(checkpoint)
"""


@pytest.mark.parametrize(("file", "half"), [(1, False), (2, True), (8, True), (9, False), (30, True)])
def test_a_kill_in_the_middle_of_a_removal_leaves_no_half_checkpoint(file: int, half: bool, tmp_path: Path) -> None:
    """SIGKILL just before the removal of one of five checkpoints, of eight files each, gets to its n-th file."""
    last = 6
    for step in range(1, last + 1):
        write_checkpoint(FolderStore(tmp_path), step, ranks=5, shapes={f"p{i}": (50,) for i in range(4)})
    store = FolderStore(tmp_path)
    command = [sys.executable, "-c", REMOVING, str(tmp_path), str(file)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
    finally:
        child.kill()
        child.communicate()
    left = steps(store)
    assert left == list(range(last + 1 - len(left), last + 1))
    for step in left:
        verify(Checkpoint(store, step))
    assert newest_sound(store) == (Checkpoint(store, last), [])
    assert len(store.names("checkpoints")) - len(left) == half
    retain(store, Keep(last=last), begin(store, 0))
    assert store.names("checkpoints") == [Checkpoint(store, step).name for step in left]
