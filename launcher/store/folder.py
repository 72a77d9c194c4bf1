"""A folder as a store: a local disk, or one that all nodes share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.store.durable import draft_of, replace_synced, sync_folder, write_all, write_synced
from launcher.store.store import Store, Write

_BLOCK_BYTES = 1 << 20


class FolderStore(Store):
    """Files below `root`, which is never made: where it is missing, its disk is."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FolderStore) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def is_there(self) -> bool:
        """Whether the folder is."""
        return self.root.is_dir()

    def names(self, folder: str = "") -> list[str]:
        """As any store; drafts of files that are being written are left out."""
        with _none_where_missing():
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith(".draft-"))
        return []

    def sizes(self, folder: str) -> dict[str, int]:
        """As any store."""
        found: dict[str, int] = {}
        with _none_where_missing(), os.scandir(self.root / folder) as entries:
            for entry in entries:
                with _none_where_missing():  # one that is deleted meanwhile hides no other
                    if entry.is_file() and not entry.name.startswith(".draft-"):
                        found[entry.name] = entry.stat().st_size
        return found

    def modified(self, name: str) -> float:
        """As any store: the clock is the file system's, on NFS the server's."""
        return (self.root / name).stat().st_mtime

    def read(self, name: str) -> bytes:
        """As any store."""
        return (self.root / name).read_bytes()

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """As any store."""
        with open(self.root / name, "rb", buffering=0) as file:
            while target:
                count = os.preadv(file.fileno(), [target], start)
                if count == 0:
                    raise EOFError(f"{self.root / name} ends at {start}")
                start, target = start + count, target[count:]

    def blocks(self, name: str) -> Iterator[bytes | memoryview]:
        """As any store."""
        block = bytearray(_BLOCK_BYTES)
        with open(self.root / name, "rb", buffering=0) as file:
            while count := file.readinto(block):
                yield memoryview(block)[:count]

    def write(self, name: str, content: bytes) -> None:
        """As any store."""
        replace_synced(self._place(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """As any store: a hard link is made whole or not at all, also on NFS."""
        path = self._place(name)
        draft = draft_of(path)
        try:
            write_synced(draft, content)
            os.link(draft, path)
        except FileExistsError:
            if draft.stat().st_nlink < 2:
                return False
            # NFS: it was made, the answer was lost, and the client asked again.
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            return _create_without_links(path, content)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(path.parent)
        return True

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        """As any store: each piece goes to the kernel as it comes."""
        path = self._place(name)
        with open(path, "wb", buffering=0) as file:
            yield lambda content: write_all(file.fileno(), content)
            os.fsync(file.fileno())
        sync_folder(path.parent)

    def remove(self, name: str) -> None:
        """As any store."""
        path = self.root / name
        with _none_where_missing():
            try:
                path.unlink()
            except (IsADirectoryError, PermissionError):  # macOS says the second of a folder
                if not path.is_dir():
                    raise
                _remove_folder(path)
            sync_folder(path.parent)

    def prune(self, folder: str) -> None:
        """As any store."""
        with contextlib.suppress(OSError):  # not empty, or not there
            (self.root / folder).rmdir()

    def _place(self, name: str) -> Path:
        """The file's path, its folders made."""
        path = self.root / name
        if not path.parent.is_dir():
            if not self.root.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the folder has vanished", str(self.root))
            missing = [folder for folder in path.relative_to(self.root).parents if not (self.root / folder).is_dir()]
            for folder in reversed(missing):
                (self.root / folder).mkdir(exist_ok=True)
                sync_folder((self.root / folder).parent)
        return path


def _create_without_links(path: Path, content: bytes) -> bool:
    """For file systems without hard links: a crash may leave the file empty, which its reader then calls damaged."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)  # or the name is taken by nobody
        raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
    return True


def _remove_folder(path: Path) -> None:
    """Also where others delete in it at the same time, which must not end it half way."""
    for _ in range(50):
        with _none_where_missing():
            shutil.rmtree(path)
        if not path.is_dir():
            return
    shutil.rmtree(path)


@contextlib.contextmanager
def _none_where_missing() -> Iterator[None]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield
