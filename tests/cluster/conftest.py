"""One run to the end that the tests of a session look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.command import Command, write_recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and its rows."""
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(folder: Path) -> tuple[Path, str, str]:
    """A run's folder, and what it said on stdout and stderr."""
    run_dir = folder / "uninterrupted"
    with Command(folder, "run", "tiny.yaml", "--run-dir", run_dir) as command:
        code, out, err = command.end()
    assert code == 0, err
    return run_dir, out, err
