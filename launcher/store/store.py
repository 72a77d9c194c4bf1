"""Where a run's files are kept, whatever keeps them: names with slashes below one root."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Write = Callable[[bytes | memoryview], None]


class Store(ABC):
    """Files by name below a root. What a call has written when it returns survives a power cut.

    All raise FileNotFoundError for a file that is missing, and OSError for what the disk or the server refuses. Folders
    need no making; one without files is none. `str` of a store is what the user calls it.
    """

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def is_there(self) -> bool:
        """Whether the root can be seen: False where its disk is not mounted any more. Raises OSError."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Files and folders directly in `folder`, sorted; empty where there is none."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """{name in `folder`: bytes} of the files directly in it."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file was written last, in seconds by the store's own clock."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content."""

    @abstractmethod
    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a file from `start` on. Raises EOFError where the file ends before.

        Several threads may call it at once.
        """

    @abstractmethod
    def blocks(self, name: str) -> Iterator[bytes | memoryview]:
        """A file's content piece by piece; a piece is good until the next is asked for."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file. A reader sees the old content or the new, never a part."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Make a file that must not be there yet; False where it is. Of several that try at once, one succeeds."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[Write]:
        """Write a file piece by piece. It is there once the block has ended; after an error a part may be."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing where there is none."""

    @abstractmethod
    def prune(self, folder: str) -> None:
        """Forget a folder in which nothing is left; one that holds something stays."""
