"""The names of a run's checkpoints, in a folder and in an object store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.checkpoint.layout import Checkpoint, committed, newest_committed, steps
from launcher.checkpoint.lease import Attempt
from launcher.store.folder import FolderStore
from launcher.store.store import Store
from tests.checkpoints import STORES, opened


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with opened(request.param, tmp_path) as store:
        yield store


def test_only_what_holds_commit_is_a_checkpoint_in_the_order_of_steps(store: Store) -> None:
    assert steps(store) == committed(store) == []
    assert newest_committed(store) is None
    for step in (100, 20, 123456789):
        assert store.create(Checkpoint(store, step).commit, b"{}")
    staged = Checkpoint(store, 200000000)
    for attempt in (Attempt(10, 1), Attempt(9, 2), Attempt(9, 10)):
        store.write(f"{staged.staging(attempt)}/shard-00000.safetensors", b"")
    store.write(f"{staged.folder}/COMMIT.txt", b"")
    store.write(f"{staged.folder}/attempt-old/COMMIT", b"")
    for stray in ("step-notes.txt", "step-20/COMMIT", "a-step-00000030/COMMIT", "step-00000030.old/COMMIT", "COMMIT"):
        store.write(f"checkpoints/{stray}", b"")

    assert [checkpoint.step for checkpoint in committed(store)] == [20, 100, 123456789]
    assert newest_committed(store) == Checkpoint(store, 123456789)
    assert [checkpoint.step for checkpoint in steps(store)] == [20, 100, 123456789, 200000000]
    assert staged.attempts() == [Attempt(9, 2), Attempt(9, 10), Attempt(10, 1)]
    assert not staged.is_committed()
    assert Checkpoint(store, 20).attempts() == []


def test_the_names_are_those_that_users_see(tmp_path: Path) -> None:
    checkpoint = Checkpoint(FolderStore(tmp_path), 200)
    assert checkpoint.name == "step-00000200"
    assert str(checkpoint) == f"{tmp_path}/checkpoints/step-00000200"
    assert checkpoint.commit == "checkpoints/step-00000200/COMMIT"
    assert checkpoint.staging(Attempt(3, 1)) == "checkpoints/step-00000200/attempt-3.1"


def test_the_front_rooms_may_use_it_without_torch() -> None:
    script = (
        "import sys, launcher.checkpoint.layout, launcher.checkpoint.lease, launcher.checkpoint.manifest,"
        " launcher.checkpoint.retain; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
