"""What a report reads of a run, wherever that lies."""

from __future__ import annotations

from pathlib import Path

from launcher.driver import remote
from launcher.driver.start import writable
from launcher.errors import RunFolderError
from launcher.plan.plan import Plan
from launcher.report.history import History
from launcher.store.location import is_url, open_store
from launcher.store.spool import pull
from launcher.store.store import Store


def read_history(plan: Plan) -> History:
    """A run's history, with all that belongs to it on this machine.

    Raises:
        RunFolderError: the store refuses, or a file cannot be read.
    """
    fetch_measured(plan)
    try:
        return History(Path(plan.run_dir))
    except OSError as error:
        raise RunFolderError(
            f"cannot read {error.filename or plan.run_dir}: {error.strerror or error}",
            hint="check that its disk is mounted, and who may read it",
        ) from error


def fetch_measured(plan: Plan) -> None:
    """Have a run's recipe, environment, metrics and answers on this machine; nothing for a run in a folder.

    Raises:
        RunFolderError: the store refuses.
    """
    if not is_url(plan.location):
        return
    remote.fetch(plan)
    store, run_dir = open_store(plan.location), Path(plan.run_dir)
    with writable(plan.location):
        names = _further(store, run_dir, "", ("answers-", "predictions-"))
        names += _further(store, run_dir, "logs", ("system-",))
        pull(store, run_dir, names)


def _further(store: Store, run_dir: Path, folder: str, kinds: tuple[str, ...]) -> list[str]:
    """Files that are longer in the store: what this host has itself may not have gone up yet."""
    sizes = {Path(folder, name): size for name, size in store.sizes(folder).items() if name.startswith(kinds)}
    here = {name: (run_dir / name).stat().st_size if (run_dir / name).exists() else -1 for name in sizes}
    return [name.as_posix() for name, size in sizes.items() if size > here[name]]
