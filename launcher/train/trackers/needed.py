"""What a tracker needs before a run starts: its package, and for a service where it is and who is asking."""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Iterable
from importlib import metadata
from urllib.parse import urlsplit

from launcher.errors import UserError

PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow-skinny", "mlflow")}
"""Of which one must be there."""


def require(trackers: Iterable[str]) -> None:
    """Raise UserError where one of `trackers` could not be told anything."""
    for tracker in trackers:
        if not any(map(_is_installed, PACKAGES[tracker])):
            raise UserError(
                f"logging.trackers names {tracker}, and its package is not installed",
                hint=f"pip install 'slipway[{tracker}]'",
            )
    if "wandb" in trackers and os.environ.get("WANDB_MODE", "online") == "online" and not _has_wandb_key():
        raise UserError(
            "logging.trackers names wandb, and there is no key for it",
            hint="set WANDB_API_KEY, or WANDB_MODE=offline to keep its files in the run's folder",
        )
    if "mlflow" in trackers and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "logging.trackers names mlflow, and nobody says where it is",
            hint="set MLFLOW_TRACKING_URI, such as http://tracking:5000",
        )


def _is_installed(package: str) -> bool:
    # Not by find_spec: a folder `wandb`, which it makes wherever it runs, would pass for the package.
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):  # where `wandb login` puts it
        return host is not None and netrc.netrc().authenticators(host) is not None
    return False
