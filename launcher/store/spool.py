"""The spool: what a run keeps as local files and its store is to hold too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from launcher.store.durable import sync_folder
from launcher.store.folder import FolderStore
from launcher.store.store import Store

_THREADS = 8
_WHOLE_BYTES = 8 << 20
"""Up to this size a file is written at once, so that a reader never sees a part of it."""
_DRAFT = ".draft-"


class Spool:
    """Sends files below `folder` to `store`, each when it is new or has changed since this object sent it last.

    `needed` is False where the store is that folder itself: then nothing is done.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.needed = _is_needed(store, folder)
        self._store = store
        self._folder = folder
        self._sent: dict[str, tuple[int, int]] = {}

    def push(self, names: Iterable[str]) -> None:
        """Send files and folders, given relative to the folder, with all that is in them; missing ones are skipped.

        A file that grows meanwhile is sent as long as it was, and again the next time. All are tried, then the first
        error is raised.

        Raises:
            OSError: what a file or the store refuses.
        """
        if not self.needed:
            return
        files = dict.fromkeys(file for name in names for file in _local(self._folder, name))
        _each(self._push, files)

    def _push(self, name: str) -> None:
        try:
            file = open(self._folder / name, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            state = os.fstat(file.fileno())
            seen = (state.st_size, state.st_mtime_ns)
            if self._sent.get(name) == seen:
                return
            if state.st_size <= _WHOLE_BYTES:
                self._store.write(name, b"".join(_pieces(file, state.st_size)))
            else:
                with self._store.writing(name) as write:
                    for piece in _pieces(file, state.st_size):
                        write(piece)
        self._sent[name] = seen


def pull(store: Store, folder: Path, names: Iterable[str]) -> None:
    """Fetch files and folders from `store` that are not below `folder`, or there in another size.

    What is not in the store is skipped. Each file appears whole. Of several processes on this machine, one fetches and
    the others wait for it.

    Raises:
        OSError: what the store or the disk refuses, or a file that is not as long as it was listed.
    """
    if not _is_needed(store, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".pull.lock"):
        sizes = {file: size for name in names for file, size in _stored(store, name)}
        _each(
            lambda name: _fetch(store, folder / name, name, sizes[name]),
            [name for name, size in sizes.items() if not _is_as_long(folder / name, size)],
        )


def _is_needed(store: Store, folder: Path) -> bool:
    return not (isinstance(store, FolderStore) and store.root.resolve() == folder.resolve())


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    """All of them, some at once; then the first error."""
    with ThreadPoolExecutor(_THREADS, "slipway-spool") as pool:
        tasks = [pool.submit(do, name) for name in names]
    for task in tasks:
        task.result()


def _local(folder: Path, name: str) -> Iterator[str]:
    """The files that `name` is or holds, relative to `folder`."""
    if not (folder / name).is_dir():
        yield name
        return
    for place, _, files in os.walk(folder / name):
        for file in sorted(files):
            if not file.startswith(_DRAFT):
                yield (Path(place) / file).relative_to(folder).as_posix()


def _pieces(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """The first `num_bytes` of a file, or what it still has of them."""
    while num_bytes and (piece := file.read(min(num_bytes, 1 << 20))):
        num_bytes -= len(piece)
        yield piece


def _stored(store: Store, name: str) -> Iterator[tuple[str, int]]:
    """Name and size of the files that `name` is or holds."""
    parent, _, last = name.rpartition("/")
    beside = store.sizes(parent)
    if last in beside:
        yield name, beside[last]
    else:
        yield from _stored_below(store, name)


def _stored_below(store: Store, folder: str) -> Iterator[tuple[str, int]]:
    sizes = store.sizes(folder)
    for entry in store.names(folder):
        if entry in sizes:
            yield f"{folder}/{entry}", sizes[entry]
        elif entry not in (".", ".."):  # which a key may hold, and which would lead out of the folder
            yield from _stored_below(store, f"{folder}/{entry}")


def _is_as_long(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _fetch(store: Store, path: Path, name: str, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{_DRAFT}{path.name}.pull")
    try:
        with open(draft, "wb") as file:
            for block in store.blocks(name):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != num_bytes:
                raise OSError(f"{store}/{name} had {num_bytes} bytes and now has {file.tell()}: it is being written")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
