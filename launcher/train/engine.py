"""From a model and a Plan to a DeepSpeed engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from launcher.plan.batch import BatchLayout
from launcher.plan.deepspeed import deepspeed_config
from launcher.plan.plan import Plan

log = logging.getLogger(__name__)


def without_compiler() -> bool:
    """True where DeepSpeed cannot build its C++ ops."""
    return shutil.which("g++") is None and shutil.which("c++") is None


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


def optimizer_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms and biases (one-dimensional) do not."""
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partitioned parameter looks one-dimensional; its whole shape is in ds_shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: Iterable[dict[str, Any]], plan: Plan) -> torch.optim.Optimizer:
    """AdamW over `groups`: bitsandbytes' where its moments are to take 8 bits, DeepSpeed's vectorized one when a GPU
    run offloads and it can be compiled, torch's otherwise."""
    hyper = plan.trajectory.optimizer
    settings: dict[str, Any] = {"lr": hyper.lr, "betas": hyper.betas, "eps": hyper.eps}
    if hyper.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(list(groups), **settings)
    if plan.layout.offload and plan.layout.device == "cuda":
        if not without_compiler():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(list(groups), **settings)
        log.warning(
            "no C++ compiler: the offloaded optimizer is torch's AdamW, several times slower than DeepSpeedCPUAdam"
        )
    return torch.optim.AdamW(list(groups), **settings, fused=True)


def build_engine(model: torch.nn.Module, plan: Plan, batch: BatchLayout) -> Any:
    """A DeepSpeed engine over `model`; the process group must be open.

    Its `module` keeps the model's own parameter names. Collective.
    """
    deepspeed = join_communication()
    config = deepspeed_config(plan.layout, batch, plan.trajectory.dtype, plan.trajectory.optimizer.max_grad_norm)
    optimizer = build_optimizer(optimizer_groups(model, plan.trajectory.optimizer.weight_decay), plan)
    rates = [group["lr"] for group in optimizer.param_groups]
    # DeepSpeed's bf16 optimizer of stage 0 takes a step on zero gradients while it is built. That would decay every
    # weight once and leave Adam's bias correction a step ahead for good (second loss 6e-4 off, measured): the rate is
    # zero meanwhile, and the count is taken back.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"] = state["step"].zero_() if torch.is_tensor(state["step"]) else 0
    return engine


def optimizer_step(engine: Any, plan: Plan) -> float | None:
    """One `engine.step()`; at the end of an accumulation the global gradient norm before clipping, otherwise None."""
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm: Any = None
    if plan.layout.zero == 0 and plan.trajectory.dtype == "fp32":
        # Every rank holds all averaged gradients; without a bound the norm is still worth knowing.
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.trajectory.optimizer.max_grad_norm or float("inf"))
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return float(norm) if norm is not None else None
