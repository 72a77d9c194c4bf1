"""Tokens and keys of the launcher's environment, given to every worker in memory.

Never in runtime_env or train_loop_config, which Ray writes down and shows: an actor on the launcher's own node is told
them in a call and tells them to whoever asks within the same job. Workers that start late or again ask like the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

OF_THE_USER = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)
"""Secrets, and the addresses without which they are of no use."""
OF_THE_MACHINE = ("AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS")
"""These name files: they mean something on machines that have those, so `slipway submit` sends none."""
FILE = "SLIPWAY_SECRETS"
"""Names the file in which `slipway submit` has left the user's secrets for this launcher."""
_ACTOR = "slipway-secrets"


def collect(names: tuple[str, ...] = (*OF_THE_USER, *OF_THE_MACHINE)) -> dict[str, str]:
    """Those of the environment that are set."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def receive() -> None:
    """Take what `slipway submit` has left for this launcher into its environment, and remove the file."""
    place = os.environ.pop(FILE, None)
    if place is None:
        return
    try:
        found = json.loads(Path(place).read_bytes())
        os.environ.update({name: value for name, value in found.items() if name in OF_THE_USER})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        # Not the content: it would be in the job's log.
        print(
            f"warning: the secrets that were sent along cannot be read ({type(error).__name__} at {place})",
            file=sys.stderr,
        )
    with contextlib.suppress(OSError):
        Path(place).unlink()


@contextlib.contextmanager
def offered() -> Iterator[None]:
    """Within the block workers of the connected job may `fetch` the secrets of this process.

    Nothing is started where there are none, nor on a Ray of our own: its workers inherit our environment.
    """
    import ray
    from ray._private import worker

    secrets = collect()
    if not secrets or (worker._global_node is not None and worker._global_node.is_head()):
        yield
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # What an actor is made with goes through Ray's tables; what it is called with goes straight to its process.
    keeper = ray.remote(num_cpus=0)(_Keeper).options(name=_ACTOR, scheduling_strategy=here).remote()
    keeper.keep.remote(secrets)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # a cluster that is gone: what the block raised says so
            ray.kill(keeper)


def fetch() -> None:
    """In a worker or the controller, before any library looks: have the launcher's secrets in the environment, if it
    has any."""
    import ray

    try:
        keeper = ray.get_actor(_ACTOR)
    except ValueError:
        return
    try:
        os.environ.update(ray.get(keeper.give.remote()))
    except ray.exceptions.RayError as error:
        log.warning("the launcher's secrets cannot be had: %s", type(error).__name__)


class _Keeper:
    def __init__(self) -> None:
        self._told = asyncio.Event()
        self._secrets: Mapping[str, str] = {}

    async def keep(self, secrets: Mapping[str, str]) -> None:
        self._secrets = secrets
        self._told.set()

    async def give(self) -> Mapping[str, str]:
        await self._told.wait()  # a worker may ask before the launcher has told
        return self._secrets
