"""Running a task over many pieces on this machine: in this process, or in several. Results come in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from launcher.errors import RunFailed

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the rows done and, where known, the rows in all."""


class Spread(Protocol):
    """Runs `task` on every item, anywhere, and `keep` on its number and result where the prepared folder is.

    Yields what `keep` returns, in the order of the items.
    """

    def __call__(
        self, task: Callable[[Any], Any], items: Sequence[tuple[int, Any]], keep: Callable[[int, Any], Any]
    ) -> Iterator[Any]: ...


def processes(num_workers: int) -> Spread:
    """`num_workers` processes of this machine, or this process itself where that is one.

    Raises RunFailed from the iterator where a process dies.
    """

    def spread(
        task: Callable[[Any], Any], items: Sequence[tuple[int, Any]], keep: Callable[[int, Any], Any]
    ) -> Iterator[Any]:
        if min(num_workers, len(items)) <= 1:
            for number, item in items:
                yield keep(number, task(item))
            return
        # pyarrow imports pandas with the first array that it makes: once here, not in every process. Imported here,
        # because finding data that is prepared costs neither.
        import pyarrow

        pyarrow.array([0])
        pool = ProcessPoolExecutor(min(num_workers, len(items)), _context(), _adopt, (task, keep))
        try:
            yield from pool.map(_work, items)
        except BrokenProcessPool as error:
            raise RunFailed(
                "a process that prepares the data died",
                hint="mostly the machine ran out of memory: set data.workers to fewer, and start again: what is done "
                "is kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    return spread


def _context() -> Any:
    # A fork has everything loaded at once, but must not happen beside running threads: a lock that one of them holds
    # stays locked in the child for ever.
    return multiprocessing.get_context("fork" if threading.active_count() == 1 else "forkserver")


_adopted: tuple[Callable[[Any], Any], Callable[[int, Any], Any]] | None = None


def _adopt(task: Callable[[Any], Any], keep: Callable[[int, Any], Any]) -> None:
    global _adopted
    _adopted = task, keep
    # The processes share out the cores; threads in each would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(item: tuple[int, Any]) -> Any:
    assert _adopted is not None
    task, keep = _adopted
    return keep(item[0], task(item[1]))
