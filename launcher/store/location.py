"""What a user calls a run, a folder or the URL of an object store, and the folder on this machine that goes with it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from launcher.store.folder import FolderStore
from launcher.store.store import Store

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(location: str) -> bool:
    """Whether `location` names an object store, such as s3://bucket/runs/first."""
    return _URL.match(location) is not None


def run_url(location: str) -> str:
    """A URL as it is kept: its protocol in small letters, without a slash at its end."""
    protocol, _, path = location.partition("://")
    return f"{protocol.lower()}://{path.rstrip('/')}"


def local_folder(location: str) -> Path:
    """The absolute folder of a run on this machine: itself, or the spool of a run in an object store.

    The spool holds what the workers need as files (prepared data, a scratch model's base) and what goes up with each
    checkpoint (metrics, logs). Losing it loses nothing that a checkpoint has.
    """
    if not is_url(location):
        return Path(location).expanduser().resolve()
    url = run_url(location)
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return spools() / f"{url.rpartition('/')[2]}-{digest}"


def spools() -> Path:
    """Where the spools of runs in object stores are: SLIPWAY_SPOOL, or a folder of the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SLIPWAY_SPOOL") or cache / "slipway" / "runs").expanduser().absolute()


def open_store(location: str) -> Store:
    """The store of a run's files.

    Raises:
        RunFolderError: a URL whose kind of store is unknown or needs a package that is missing. Nothing is asked of the
            server yet: `ObjectStore.check` does that.
    """
    if is_url(location):
        from launcher.store.objects import ObjectStore

        return ObjectStore(run_url(location))
    return FolderStore(local_folder(location))
