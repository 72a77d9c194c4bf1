"""Real process groups for tests: gloo over the loopback, one process a rank, none left behind.

The ranks are forked from a process that has everything imported: a group is there in two seconds instead of twenty.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class RankTraceback(Exception):
    """The traceback of a rank as text, shown as the cause of the exception that `run_group` raises again."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"\nrank {rank}:\n{text}")


def run_group(world_size: int, function: Callable[..., Result], *args: Any, timeout_s: float = 120.0) -> list[Result]:
    """`function(*args)` on `world_size` ranks of a gloo group; the ranks' results in order.

    `function` lives at the top level of a module, finds the default process group open and asks
    `torch.distributed.get_rank()` who it is. Arguments and results are pickled (tensors too, by value).

    Raises what the first failing rank raised, with that rank's traceback as its cause; TimeoutError after `timeout_s`;
    RuntimeError where a rank died without a word.
    """
    forks = forking()
    ranks: list[Any] = []
    readers: list[Connection] = []
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                reader, writer = forks.Pipe(duplex=False)
                environment = rank_environment(rank, world_size)
                process = forks.Process(
                    target=_rank, args=(rank, world_size, folder, writer, environment, function, args), daemon=True
                )
                process.start()
                writer.close()  # so that a rank that dies is seen as the end of its pipe
                ranks.append(process)
                readers.append(reader)
            return _collect(readers, ranks, deadline, timeout_s)
        finally:
            for process in ranks:
                process.join(max(0.0, min(2.0, deadline - time.monotonic())))
                process.kill()
                process.join()


def _collect(readers: list[Connection], ranks: list[Any], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} have no result after {timeout_s} s")
        for reader in ready:
            rank = waiting[reader]  # type: ignore[index]
            try:
                error, text, result = pickle.loads(reader.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ranks[rank].join()
                raise RuntimeError(f"rank {rank} died with exit code {ranks[rank].exitcode}") from None
            if error is not None:
                # Leave at once: the other ranks' errors are only "connection closed by peer", or they hang.
                for other in ranks:
                    other.kill()
                raise error from RankTraceback(rank, text)
            results[rank] = result
    return [results[rank] for rank in range(len(readers))]


def forking() -> Any:
    """A context of `multiprocessing` whose processes begin with everything imported and one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """What a rank finds in its environment: this process's own, and its place on the loopback."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo"}
    return dict(os.environ) | ONE_THREAD | place | {"HF_HUB_OFFLINE": "1"}


def take_environment(environment: dict[str, str]) -> None:
    """In a forked process: the environment of the test that started it, not of the one that began the forking."""
    os.environ.clear()
    os.environ.update(environment)


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    writer: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    take_environment(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    error: BaseException | None = None
    text, result = "", None
    try:
        # A file as the store: no port that another test could take between choosing and opening it.
        store = dist.FileStore(str(Path(folder) / "store"), world_size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = function(*args)
        message = pickle.dumps((None, "", result))
        dist.destroy_process_group()
    except BaseException as caught:  # everything a rank can end with belongs to the test
        error, text = caught, traceback.format_exc()
        try:
            message = pickle.dumps((error, text, None))
            pickle.loads(message)  # an exception may pickle and still not come back
        except Exception:
            message = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text, None))
    writer.send_bytes(message)
    writer.close()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
