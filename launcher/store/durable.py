"""Files that are there after a power cut: written whole, synced, then named."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # SMB and some FUSE file systems cannot sync a folder and say so in one of these ways.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write `path` and make content and name durable. Raises OSError."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def draft_of(path: Path) -> Path:
    """A name beside `path` that nobody else takes: on a shared disk, a process id alone is not enough."""
    return path.with_name(f".draft-{path.name}.{secrets.token_hex(8)}")


def replace_synced(path: Path, content: bytes) -> None:
    """As `write_synced`, but a reader sees the old content or the new, never a part. Raises OSError."""
    draft = draft_of(path)
    try:
        write_synced(draft, content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)  # on a full disk it holds space
        raise
    sync_folder(path.parent)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """One write call may take less than it is given: 2 GiB at most on Linux, or what a full disk still holds."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
