"""A run in an object store, from the launcher's side: what goes up when it begins and ends, what comes down when it
goes on elsewhere. All of this does nothing for a run in a folder.

    <url>/recipe.yaml  environment.json  plan.json (last: makes it a run)  base.json
    <url>/base/        a scratch model      data/   the prepared data      model/   once exported
    <url>/metrics.jsonl  logs/  answers-*  predictions-*  probe-*  verdict.json  stop     by the workers

The spool has the same files under the same names; its `data` is a link where the data was prepared on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.checkpoint.lease import current
from launcher.driver.start import DATA, clear, writable
from launcher.errors import SlipwayError
from launcher.model.fingerprint import STAMPS
from launcher.plan.plan import DataFacts, Plan
from launcher.store.durable import replace_synced
from launcher.store.location import is_url, open_store
from launcher.store.store import Store
from launcher.train.metrics import FILE as METRICS_FILE
from launcher.train.metrics import latest_start
from launcher.train.trackers.kept import FILE as TRACKERS_FILE
from launcher.train.verdict import FILE as VERDICT_FILE
from launcher.train.verdict import STOP_FILE, Verdict, request_stop

MODEL = "model"
MIRROR_EVERY_S = 10.0


def check(location: str) -> None:
    """Refuse a store that cannot be used, before anything is done for a run in it.

    Raises:
        RunFolderError: no credentials, no bucket, no server, no permission.
    """
    if is_url(location):
        from launcher.store.objects import ObjectStore

        ObjectStore(location).check()


def begin(plan: Plan, prepared: DataFacts) -> None:
    """Send a new run's files up; `prepared` says where its data is on this machine.

    Raises:
        RunFolderError: the store refuses.
    """
    if not is_url(plan.location):
        return
    run_dir = Path(plan.run_dir)
    try:
        with writable(plan.location):
            (run_dir / DATA).symlink_to(prepared.folder, target_is_directory=True)
            base = ["base"] if plan.trajectory.model.source == "scratch" else []
            _push(plan, ["recipe.yaml", "environment.json", STAMPS, *base, DATA])
            _push(plan, ["plan.json"])
    except BaseException:
        (run_dir / "plan.json").unlink(missing_ok=True)  # there is no run
        raise


def fetch(plan: Plan, *folders: str) -> None:
    """Have in the spool what a launcher reads of a run, and those `folders` of it that it has.

    What is large and there already is taken as it is, unless it is of another run that was at this URL before. Whoever
    reads a base compares its fingerprint.

    Raises:
        RunFolderError: the store refuses.
    """
    if not is_url(plan.location):
        return
    store, run_dir = open_store(plan.location), Path(plan.run_dir)
    with writable(plan.location):
        if run_dir.is_dir() and not _is_spool_of(run_dir, plan):
            clear(run_dir)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        there = set(store.names())
        for name in there.intersection(("recipe.yaml", "environment.json", METRICS_FILE)):
            content = store.read(name)
            if name != METRICS_FILE or not _is_newer(run_dir / name, content):
                replace_synced(run_dir / name, content)
        once = {STAMPS, *(name for name in there if name.startswith("probe-"))}
        _pull(store, run_dir, [name for name in once & there if not (run_dir / name).exists()])
        for folder in there.intersection(folders):
            if folder == MODEL and not _same_model(store, run_dir / MODEL):
                shutil.rmtree(run_dir / MODEL, ignore_errors=True)
            if not (run_dir / folder).exists():
                (run_dir / folder).unlink(missing_ok=True)  # a link to data that was since deleted
                _pull_folder(store, run_dir, folder)
        if not (run_dir / "plan.json").exists():
            plan.save(run_dir / "plan.json")


def _is_spool_of(run_dir: Path, plan: Plan) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Plan.load(run_dir / "plan.json").trajectory.hash() == plan.trajectory.hash()
    return False


def bring_metrics(plan: Plan) -> None:
    """On the first rank's node, before it goes on writing: take the store's metrics where they go further.

    Raises OSError, and RunFolderError where the store cannot be opened.
    """
    store, local = open_store(plan.location), Path(plan.run_dir) / METRICS_FILE
    try:
        content = store.read(METRICS_FILE)
    except FileNotFoundError:
        return
    if not _is_newer(local, content):
        replace_synced(local, content)
        with contextlib.suppress(FileNotFoundError):
            replace_synced(local.with_name(TRACKERS_FILE), store.read(TRACKERS_FILE))


def _is_newer(local: Path, remote: bytes) -> bool:
    """Whether this machine's metrics go further than the store's: to a later attempt, or on in the same."""
    with contextlib.suppress(OSError):
        content = local.read_bytes()
        return (_last_attempt(content), len(content)) > (_last_attempt(remote), len(remote))
    return False


def _last_attempt(metrics: bytes) -> list[int]:
    for line in reversed(metrics.splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a torn line
            return [int(part) for part in json.loads(line)["attempt"].split(".")]
    return []


def _same_model(store: Store, local: Path) -> bool:
    """Whether a model folder is the one that was exported last: its card tells the step and every figure."""
    files, card = store.sizes(MODEL), local / "README.md"
    there = {path.name: path.stat().st_size for path in local.glob("*")}
    return card.is_file() and files == there and store.read(f"{MODEL}/{card.name}") == card.read_bytes()


def refresh(plan: Plan) -> None:
    """Send up what a resume was told. Raises RunFolderError where the store refuses."""
    if is_url(plan.location):
        with writable(plan.location):
            _push(plan, ["recipe.yaml", "plan.json"])


def collect(plan: Plan) -> None:
    """After training: bring down what the first rank measured, where it ran on another node.

    Raises RunFolderError where the store refuses.
    """
    fetch(plan)


def send_model(plan: Plan) -> None:
    """Send the exported folder up, in the place of an earlier one. Raises RunFolderError where the store refuses."""
    if is_url(plan.location) and (Path(plan.run_dir) / MODEL).is_dir():
        with writable(plan.location):
            open_store(plan.location).remove(MODEL)  # shards of an earlier export may have other names
            _push(plan, [MODEL])


def finish(plan: Plan) -> None:
    """Send up what the end of a run made. Raises RunFolderError where the store refuses."""
    if not is_url(plan.location):
        return
    run_dir = Path(plan.run_dir)
    kinds = ("logs/*", "probe-*", "answers-*", "predictions-*")
    made = (path for kind in kinds for path in sorted(run_dir.glob(kind)))
    with writable(plan.location):
        _push(plan, [VERDICT_FILE, METRICS_FILE, *(path.relative_to(run_dir).as_posix() for path in made)])
    send_model(plan)


def forget_end(plan: Plan) -> None:
    """Clear the store's verdict and stop request of an earlier launch. Raises RunFolderError where it refuses."""
    if is_url(plan.location):
        store = open_store(plan.location)
        with writable(plan.location):
            for name in (VERDICT_FILE, STOP_FILE):
                store.remove(name)


def ask_to_stop(plan: Plan, reason: str) -> bool:
    """Ask the workers to save and end, wherever the first of them runs; False where nobody can be asked."""
    asked = request_stop(Path(plan.run_dir), reason)
    if not is_url(plan.location):
        return asked

    def send() -> None:
        with contextlib.suppress(OSError, SlipwayError):
            open_store(plan.location).write(STOP_FILE, reason.encode() + b"\n")

    # Beside: a server that does not answer would hold up the driver.
    threading.Thread(target=send, name="ask-to-stop", daemon=True).start()
    return True


def has_begun(plan: Plan, launch: int) -> bool:
    """Whether workers of this launch train in a place that this machine does not see."""
    if not is_url(plan.location):
        return False
    with contextlib.suppress(OSError, SlipwayError):
        latest = current(open_store(plan.location))
        return latest is not None and latest.launch == launch and latest.start > 0
    return True  # in doubt there is something to save


@contextlib.contextmanager
def mirrored_metrics(plan: Plan, launch: int) -> Iterator[None]:
    """Within the block: where the first rank runs on another node, have its metrics in the spool here as they go up."""
    ended = threading.Event()
    if is_url(plan.location):
        threading.Thread(target=_mirror, args=(plan, launch, ended), name="mirror-metrics", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _mirror(plan: Plan, launch: int, ended: threading.Event) -> None:
    local, elsewhere = Path(plan.run_dir) / METRICS_FILE, False
    while not ended.wait(MIRROR_EVERY_S):
        with contextlib.suppress(OSError, SlipwayError):
            # Not by its last line: that a run hung is written here, wherever the first rank is.
            started = (latest_start(local.parent) or {}) if not elsewhere else {}
            if str(started.get("attempt")).partition(".")[0] == str(launch):
                return  # the first rank writes it, on this node
            content = open_store(plan.location).read(METRICS_FILE)
            if _last_attempt(content)[:1] == [launch] and not ended.is_set():
                elsewhere = True
                replace_synced(local, content)


def found_verdict(plan: Plan, launch: int) -> Verdict | None:
    """The verdict of this launch, from the run's folder or its store."""
    verdict = Verdict.load(Path(plan.run_dir), launch)
    if verdict is None and is_url(plan.location):
        with contextlib.suppress(OSError, SlipwayError):
            return Verdict.parse(open_store(plan.location).read(VERDICT_FILE), launch)
    return verdict


def _push(plan: Plan, names: Sequence[str]) -> None:
    from launcher.store.spool import Spool

    Spool(open_store(plan.location), Path(plan.run_dir)).push(names)


def _pull(store: Store, run_dir: Path, names: Sequence[str]) -> None:
    from launcher.store.spool import pull

    pull(store, run_dir, names)


def _pull_folder(store: Store, run_dir: Path, name: str) -> None:
    """Whole or not at all: what is there is not fetched again."""
    staging = run_dir / f".fetch-{os.getpid()}"
    try:
        _pull(store, staging, [name])
        (staging / name).rename(run_dir / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
