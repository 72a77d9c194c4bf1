"""Real file systems for tests, small enough to be filled."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(where: Path, size: str) -> Iterator[Path]:
    """A file system of its own, `size` as mount takes it, in the new folder `where`; skips where it may not."""
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield where
    finally:
        # Again and again: a test may have mounted something else over it.
        while subprocess.run(["umount", "--lazy", where], capture_output=True).returncode == 0:
            pass


def fill(disk: Path) -> Path:
    """Take all space that is left; the file that has it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    return filler
