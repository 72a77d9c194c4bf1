"""Preparing data: hub ids pinned, and with Ray Data over a cluster the same pieces, tasks and order, so the same files.

What is pickled here goes from our own process to our own workers and back.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from launcher.driver import secrets
from launcher.driver.connect import cluster_address, connected
from launcher.errors import RunFailed, SlipwayError
from launcher.plan.facts import ClusterFacts
from launcher.plan.plan import DataPlan, HeldOutPlan

if TYPE_CHECKING:
    from launcher.data.prepare.work import Spread


CLUSTER_BYTES = 8 * 2**30
"""Local training files of more than this are prepared on a cluster that is joined: by docs/benchmarks, text for three
quarters of an hour on two cores."""


def pinned_sources(data: DataPlan) -> DataPlan:
    """Hub ids with their branch or tag resolved to a commit.

    Raises:
        DataError: the hub does not answer and the cache does not have it.
    """
    from launcher.data.sources import pinned as at_commit

    def held_out(plan: HeldOutPlan) -> HeldOutPlan:
        return plan.model_copy(update={"sources": tuple(map(at_commit, plan.sources))})

    contamination = tuple(map(at_commit, data.clean.contamination))
    replay = data.replay and data.replay.model_copy(update={"sources": tuple(map(at_commit, data.replay.sources))})
    return data.model_copy(
        update={
            "train": tuple(map(at_commit, data.train)),
            "eval": held_out(data.eval),
            "test": held_out(data.test),
            "replay": replay,
            "retain": tuple(map(at_commit, data.retain)),
            "clean": data.clean.model_copy(update={"contamination": contamination}),
        }
    )


@contextlib.contextmanager
def cluster_for(
    where: Literal["auto", "machine", "cluster"], data: DataPlan, address: str | None
) -> Iterator[Spread | None]:
    """What prepares `data` on the cluster at `address`, if that is asked for or `auto` says so; None for this machine.

    The cluster is connected when there is work for it, until the block ends: data that is found prepared costs no
    connection.
    """
    joined = cluster_address(address) is not None
    if where == "machine" or (where == "auto" and not (joined and _local_bytes(data) > CLUSTER_BYTES)):
        yield None
        return
    with contextlib.ExitStack() as connection:
        facts: list[ClusterFacts] = []

        def spread(
            task: Callable[[Any], Any], items: Sequence[tuple[int, Any]], keep: Callable[[int, Any], Any]
        ) -> Iterator[Any]:
            if items and not facts:
                facts.append(connection.enter_context(connected(address)))
                connection.enter_context(secrets.offered())
            if items:
                yield from over_cluster(task, items, keep)

        yield spread


def _local_bytes(data: DataPlan) -> int:
    from launcher.data.sources import contents, local_files

    files = [file for source in data.train if source.kind == "local" for file in local_files(source)]
    return sum(path.stat().st_size for file in files for path in contents(file))


def over_cluster(
    task: Callable[[Any], Any], items: Sequence[tuple[int, Any]], keep: Callable[[int, Any], Any]
) -> Iterator[Any]:
    """A `launcher.data.prepare.work.Spread`: `task` runs on the cluster's nodes, `keep` here.

    Only results travel, so the prepared folder needs no shared storage; the sources must be readable on every node.

    Raises:
        SlipwayError: what `task` raised, naming the node.
        RunFailed: Ray gave up.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    cpus = max(1, int(ray.available_resources().get("CPU", 1)))
    rows = ray.data.from_items(
        [{"number": number, "item": pickle.dumps(item)} for number, item in items], override_num_blocks=len(items)
    )
    results = rows.map(
        _Worker, fn_constructor_args=(ray.put(task), socket.gethostname()), concurrency=(1, min(cpus, len(items)))
    )
    try:
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, SlipwayError):
                raise result
            yield keep(row["number"], result)
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"the cluster could not prepare the data: {str(error).strip().splitlines()[-1]}",
            hint="what is done is kept: start again, or set data.prepare_on: machine",
        ) from error


class _Worker:
    """One process on a node: fetches the task once, then works through pieces."""

    def __init__(self, task: Any, driver_host: str) -> None:
        import ray

        secrets.fetch()
        self._task: Callable[[Any], Any] = ray.get(task)
        host = socket.gethostname()
        self._place = f" (on {host})" if host != driver_host else ""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = self._task(pickle.loads(row["item"]))
        except SlipwayError as error:  # Ray would bury it in its own errors, and try again
            result = type(error)(f"{error.message}{self._place}", error.hint)
        return {"number": row["number"], "result": pickle.dumps(result)}
