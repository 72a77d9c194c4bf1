"""What Ray runs in every worker: environment, logs, then `train.run`.

Nothing here ends a run because a disk is full or gone: a log line that cannot be written is dropped, a verdict that
cannot be saved still reaches the driver through Ray. And nothing is written to the folder of a run that a later launch
has taken over.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from launcher.checkpoint.lease import current
from launcher.driver import secrets
from launcher.driver.remote import bring_metrics, found_verdict
from launcher.errors import SlipwayError, Superseded
from launcher.plan.plan import Plan
from launcher.store.durable import write_all
from launcher.store.location import is_url, open_store
from launcher.store.spool import pull
from launcher.train import startup
from launcher.train.beat import ENDED, STARTING, mark
from launcher.train.stop import watch_store
from launcher.train.verdict import FILE as VERDICT_FILE
from launcher.train.verdict import Verdict

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

FAILURES = "failures.jsonl"


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """One rank, from Ray's `train_loop_config`: {"plan": Plan as JSON, "launch": int}. Returns the verdict.

    An error that a restart cannot mend becomes a verdict, and the restarted workers end when they find it. Any other
    error is recorded with its time, so that the driver can tell the first from those it caused in other ranks, and
    raised for Ray to count.
    """
    startup.ended("process group")
    startup.go_on(config.get("startup", []))
    secrets.fetch()
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    plan, launch = Plan.model_validate(config["plan"]), int(config["launch"])
    rank = ray.train.get_context().get_world_rank()
    if is_url(plan.location):
        with contextlib.suppress(OSError):  # said by the log, which then is elsewhere
            Path(plan.run_dir).mkdir(parents=True, exist_ok=True)
    redirect_output(Path(plan.run_dir) / "logs" / f"worker-{rank}.log")
    with recording(plan, launch, rank):
        mark(STARTING)
        bring_files(plan)
        if rank == 0 and is_url(plan.location):
            bring_metrics(plan)
        # Rank 0 looks for all: on a network disk another node may not see a new file yet, and a rank that goes on where
        # the others end waits for them half an hour.
        verdict = found_verdict(plan, launch) if rank == 0 else None
        if broadcast_from_rank_zero(verdict is not None):
            return asdict(verdict) if verdict is not None else None
        startup.ended("first lines")
        import deepspeed  # noqa: F401  # here, to tell it from the engine's own time

        from launcher.train.run import train_run

        startup.ended("library imports")

        with stop_requests(plan) if rank == 0 else contextlib.nullcontext():
            verdict = replace(train_run(plan, launch), launch=launch)
        if rank == 0:
            keep_verdict(plan, verdict)
        return asdict(verdict)


@contextlib.contextmanager
def recording(plan: Plan, launch: int, rank: int) -> Iterator[None]:
    """Leave a verdict or a record of what the block raises, and raise it."""
    try:
        yield
    except Superseded as error:
        log.error("%s", error)
        raise
    except SlipwayError as error:
        traceback.print_exception(error)
        keep_verdict(plan, Verdict("error", 0, error.message, error.hint, error.exit_code, launch))
        raise
    except Exception as error:
        record_failure(plan, launch, rank, error)
        raise
    finally:
        mark(ENDED)


def redirect_output(log_file: Path) -> None:
    """Everything this process prints, libraries and C++ included, goes to `log_file` and not to the user's terminal.

    What the disk does not take is dropped. Where the file cannot be opened a temporary one takes its place.
    """
    output, elsewhere = _open_log(log_file)
    if elsewhere is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"warning: {elsewhere}", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout, sys.stderr = sturdy_stream(1), sturdy_stream(2)
    # DeepSpeed 0.19 calls collectives by their old names, and torch 2.13 says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    if elsewhere is not None:
        log.warning("%s", elsewhere)


def _open_log(log_file: Path) -> tuple[int, str | None]:
    """A descriptor to write to, and where that leads if not to `log_file`. The run's folder is never made."""
    try:
        log_file.parent.mkdir(exist_ok=True)
        return os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), None
    except OSError as error:
        why = f"{log_file} cannot be opened ({error.strerror or error}), the output goes to"
    try:
        descriptor, name = tempfile.mkstemp(prefix=f"slipway-{log_file.stem}-", suffix=".log")
    except OSError:
        descriptor, name = os.open(os.devnull, os.O_WRONLY), os.devnull
    return descriptor, f"{why} {name}"


def sturdy_stream(descriptor: int) -> io.TextIOWrapper:
    """A text stream whose `write` never raises OSError."""
    return io.TextIOWrapper(
        _Dropping(descriptor),  # type: ignore[arg-type]  # no buffer between, as under `python -u`
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


class _Dropping(io.RawIOBase):
    """A descriptor's bytes; those that its disk does not take are dropped, and their number is written as soon as it
    takes some again."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._dropped = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, content: ReadableBuffer, /) -> int:
        count = memoryview(content).nbytes
        try:
            if self._dropped:
                write_all(self._descriptor, f"\n[{self._dropped} bytes could not be written here]\n".encode())
                self._dropped = 0
            write_all(self._descriptor, memoryview(content))
        except OSError:
            self._dropped += count
        return count


def bring_files(plan: Plan) -> None:
    """On a node that has none, or another run's, make the spool of a run in an object store: base and data that lie in
    it.

    Raises OSError, and RunFolderError where the store cannot be opened.
    """
    if not is_url(plan.location):
        return
    run_dir = Path(plan.run_dir)
    used = {Path(plan.trajectory.model.path), Path(plan.data.folder)}
    names = sorted({path.relative_to(run_dir).parts[0] for path in used if run_dir in path.parents})
    with FileLock(run_dir / ".bring.lock"):  # one of the node's ranks brings them for all
        # plan.json is there once all files are: written last here, and before any worker starts by the driver.
        if not _is_spool_of(plan):
            (run_dir / "plan.json").unlink(missing_ok=True)
            for name in names:
                _clear(run_dir / name)
        missing = [name for name in names if not (run_dir / name).exists()]
        if missing:
            (run_dir / "plan.json").unlink(missing_ok=True)
            log.info("bringing %s from %s", " and ".join(missing), plan.location)
            pull(open_store(plan.location), run_dir, missing)
        if not (run_dir / "plan.json").exists():
            plan.save(run_dir / "plan.json")


def _clear(folder: Path) -> None:
    if folder.is_symlink():  # the driver's data, where it prepared them on this node
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _is_spool_of(plan: Plan) -> bool:
    """Whether the folder's files are those of this very run, and not of one that was at the same URL before."""
    try:
        found = Plan.load(Path(plan.run_dir) / "plan.json")
    except (OSError, ValueError):
        return False
    return found.trajectory == plan.trajectory and found.data == plan.data


def stop_requests(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Takes in the block what the driver asks for through an object store: rank 0 may be on another node."""
    if is_url(plan.location):
        return watch_store(open_store(plan.location), Path(plan.run_dir))
    return contextlib.nullcontext()


def keep_verdict(plan: Plan, verdict: Verdict) -> None:
    """Save it in the run's folder, and in its object store where it has one; raises nothing."""
    if not _is_ours(plan, verdict.launch):
        return
    try:
        verdict.save(Path(plan.run_dir))
    except OSError as error:
        log.error("the verdict (%s) cannot be saved: %s", verdict.message, error)
    if is_url(plan.location):
        try:
            open_store(plan.location).write(VERDICT_FILE, verdict.content())
        except (OSError, SlipwayError) as error:
            log.error("the verdict (%s) cannot be sent to %s: %s", verdict.message, plan.location, error)


def record_failure(plan: Plan, launch: int, rank: int, error: BaseException) -> None:
    """Append what happened, when and where, to logs/failures.jsonl; raises nothing."""
    traceback.print_exception(error)
    line = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "type": type(error).__name__,
        "message": str(error),
    }
    if not _is_ours(plan, launch):
        return
    try:
        with (Path(plan.run_dir) / "logs" / FAILURES).open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line) + "\n")  # half a line may be there, of a rank whose disk was full
    except OSError as refused:
        log.error("the failure cannot be recorded: %s", refused)


def _is_ours(plan: Plan, launch: int) -> bool:
    """Whether the folder may be written to: `launch` holds the run. In doubt it does not."""
    try:
        latest = current(open_store(plan.location))
    except (OSError, SlipwayError) as error:
        log.error("nothing is written to %s: who holds the run cannot be told: %s", plan.run_dir, error)
        return False
    if latest is None or latest.launch < launch:
        log.error("nothing is written to %s: the lease of launch %d has vanished", plan.run_dir, launch)
        return False
    if latest.launch > launch:
        log.error("nothing is written to %s: launch %d has taken the run over", plan.run_dir, latest.launch)
        return False
    return True
