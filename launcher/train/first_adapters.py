"""PiSSA's start: the same A0, B0 and rest of the base on every rank, at every start of a run, on any machine."""

from __future__ import annotations

import logging
import time

import torch.distributed as dist
from torch import nn

from launcher.checkpoint.layout import newest_committed
from launcher.checkpoint.together import together
from launcher.model import pissa
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.store.store import Store

log = logging.getLogger(__name__)


def start_adapters(model: nn.Module, plan: Plan) -> None:
    """Where the plan says so, start the adapters of `model` as the principal part of its base. Collective.

    The first rank decomposes the base, unless the run has done so before, and the others get it from there.

    Raises:
        ModelError: an adapter cannot start so.
        CheckpointError: what an earlier start has written is damaged or gone.
        RunFolderError: it cannot be written.
    """
    if plan.trajectory.method.init != "pissa":
        return
    store, first = open_store(plan.location), dist.get_rank() == 0
    factors: pissa.Factors = {}

    def look() -> bool:
        if first:
            factors.update(found_or_none_yet(store, plan))
        return bool(factors)

    doing = f"reading {pissa.FILE} of {store}"
    if not together(doing, look)[0]:
        began = time.monotonic()
        made = pissa.principal_factors(model, plan.trajectory.seed, mine=first)
        if first:
            log.info("%d weights decomposed in %.1f s", len(made) // 2, time.monotonic() - began)
        doing = f"writing {pissa.FILE} to {store}"
        together(doing, lambda: factors.update(pissa.keep(store, plan, made)) if first else None)
    together("starting the adapters", lambda: pissa.start_from(model, factors) if first else None)
    for _, layer in pissa.adapted(model):
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            dist.broadcast(part.weight.data, 0)
    pissa.take_out(model)


def found_or_none_yet(store: Store, plan: Plan) -> pissa.Factors:
    """A0 and B0 of a run; nothing where it is at its very beginning. Raises CheckpointError, OSError."""
    checkpoint = newest_committed(store)
    if checkpoint is None:
        return pissa.kept(store, plan) or {}
    return pissa.needed(store, plan, checkpoint.name)
