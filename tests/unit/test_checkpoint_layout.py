"""The names inside a run's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.checkpoint import layout


def test_only_committed_folders_are_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert layout.committed(tmp_path) == []
    assert layout.newest_committed(tmp_path) is None
    for step in (100, 20, 123456789):
        folder = layout.checkpoint_dir(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / layout.COMMIT).touch()
    halfway = layout.checkpoint_dir(tmp_path, 300)
    halfway.mkdir()
    staging = layout.staging_dir(tmp_path, 400, 7)
    staging.mkdir()
    removed = layout.removed_dir(layout.checkpoint_dir(tmp_path, 10))
    removed.mkdir()
    (removed / layout.COMMIT).touch()
    (layout.checkpoints_dir(tmp_path) / "step-notes.txt").touch()

    assert [layout.step_of(path) for path in layout.committed(tmp_path)] == [20, 100, 123456789]
    assert layout.newest_committed(tmp_path) == layout.checkpoint_dir(tmp_path, 123456789)
    assert layout.staging(tmp_path) == [(staging, 7)]
    assert layout.rubbish(tmp_path) == [halfway, removed]


def test_the_names_are_those_of_the_design(tmp_path: Path) -> None:
    assert layout.checkpoint_dir(tmp_path, 200) == tmp_path / "checkpoints" / "step-00000200"
    with pytest.raises(ValueError, match="not a checkpoint"):
        layout.step_of(tmp_path)


def test_the_front_rooms_may_use_it_without_torch() -> None:
    script = (
        "import sys, launcher.checkpoint.layout, launcher.checkpoint.lease, launcher.checkpoint.manifest,"
        " launcher.checkpoint.retain; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
