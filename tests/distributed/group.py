"""Real process groups for tests: gloo over the loopback, one process a rank, none left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


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
    spawn = multiprocessing.get_context("spawn")
    ranks: list[Any] = []
    readers: list[Connection] = []
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                reader, writer = spawn.Pipe(duplex=False)
                process = spawn.Process(
                    target=_rank, args=(rank, world_size, folder, writer, function, args), daemon=True
                )
                with _environment(rank, world_size):
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


@contextlib.contextmanager
def _environment(rank: int, world_size: int) -> Iterator[None]:
    """What a started process inherits: its rank, one thread, the loopback."""
    wanted = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    wanted |= {"GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank(
    rank: int, world_size: int, folder: str, writer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
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
