"""From a model and a Plan to a DeepSpeed engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from launcher.plan.batch import BatchLayout
from launcher.plan.deepspeed import deepspeed_config
from launcher.plan.plan import Plan
from launcher.train.optimizer import build_optimizer, parameter_groups, set_learning_rate

log = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """`deepspeed`, with the ops switched off that it would compile at start-up and die of where it cannot.

    On CPU DeepSpeed compiles a shared-memory all-reduce as soon as it opens its communication, and raises where there
    is no C++ compiler or ninja is not on PATH. Gloo does the same work a little slower, on any machine.
    """
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible

    if compatible.get("deepspeed_shm_comm"):
        log.info("deepspeed_shm_comm is switched off: gloo carries the collectives on CPU")
    compatible["deepspeed_shm_comm"] = False
    return deepspeed


def join_communication() -> Any:
    """Hand the open process group to DeepSpeed; returns `deepspeed`. Before a model is read under ZeRO-3.

    `zero.Init` cuts parameters by DeepSpeed's own idea of the world, which is one rank until it is told.
    """
    deepspeed = import_deepspeed()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def build_engine(model: torch.nn.Module, plan: Plan, batch: BatchLayout) -> Any:
    """A DeepSpeed engine over `model`; the process group must be open.

    Its `module` keeps the model's own parameter names. Collective.
    """
    deepspeed = join_communication()
    config = deepspeed_config(plan.layout, batch, plan.trajectory.dtype, plan.trajectory.optimizer.max_grad_norm)
    optimizer = build_optimizer(parameter_groups(model, plan), plan)
    # DeepSpeed's bf16 optimizer of stage 0 takes a step on zero gradients while it is built. That would decay every
    # weight once and leave Adam's bias correction a step ahead for good (second loss 6e-4 off, measured), and decay is
    # in sgd's momentum: the rate is zero meanwhile, and the state is forgotten.
    set_learning_rate(optimizer, 0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    set_learning_rate(optimizer, plan.trajectory.optimizer.lr)
    optimizer.state.clear()
    return engine


def destroy_engine(engine: Any) -> None:
    """Remove an engine's hooks and have DeepSpeed forget it. With the caller's own reference the last one to it, to its
    model and to its optimizer's state is gone then, but for those that they hold to each other."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    # ZeRO-3 keeps the model for good in a list of modules that compute, and every module in the keys of an lru_cache,
    # which is inside of a wrapper.
    FWD_MODULE_STACK.clear()
    cached: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in cached.__closure__:
        cell.cell_contents.cache_clear()


def optimizer_step(engine: Any, plan: Plan, update: bool = True) -> float | None:
    """One `engine.step()`; at the end of an accumulation the global gradient norm before clipping, otherwise None.

    Where that is no number, or no `update` is wanted, the gradients are dropped: weights, moments and their counts stay
    as they are.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm: Any = None
    if plan.layout.zero == 0 and plan.trajectory.dtype == "fp32":
        # Every rank holds all averaged gradients; without a bound the norm is still worth knowing.
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.trajectory.optimizer.max_grad_norm or float("inf"))
        update = update and bool(torch.isfinite(norm))  # in all other cases DeepSpeed looks itself
    with contextlib.nullcontext() if update else without_update(engine):
        engine.step()
    if plan.layout.offload and getattr(engine.optimizer, "overflow", False):
        # Offloaded, stages 1 and 2 of DeepSpeed 0.19.8 keep the sums of a bf16 step that they drop, and add to them
        # what comes later: no norm would be a number any more.
        sums = getattr(engine.optimizer, "averaged_gradients", {})
        sums.update(dict.fromkeys(sums))
    norm = engine.get_global_grad_norm() if norm is None else norm
    return float(norm) if norm is not None else None


@contextlib.contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """A step that `engine` takes in the block goes through all its motions, but the innermost optimizer does nothing.

    So every stage clears its gradients and counts its micro batches as it always does, and publishes masters that have
    not changed.
    """
    innermost = engine.basic_optimizer
    innermost.step = lambda *_, **__: None  # hides the method of its class
    try:
        yield
    finally:
        del innermost.step
