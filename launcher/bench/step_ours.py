"""Our own training step for `step`: the pieces of `train.run` and `train.loop`, around a model that was made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launcher.data.loader import MicroBatch
from launcher.model import attention
from launcher.model.adapters import apply_method, enable_gradient_checkpointing
from launcher.model.fuse import fuse
from launcher.model.nf4 import train_through_zero
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import Plan
from launcher.train.engine import build_engine, join_communication, optimizer_step
from launcher.train.loop import seed_step
from launcher.train.loss import SupervisedLoss


def our_step(
    plan: Plan, device: torch.device, make: Callable[[str], Any]
) -> tuple[Callable[[int, MicroBatch], float], dict[str, Any]]:
    """A function that takes optimizer step n on a micro batch and returns its loss, and what was put together.

    `make` is given the attention's name and returns a transformers model on `device`, quantized where the method is
    QLoRA. The process group must be open.
    """
    join_communication()
    attention.register()
    base = make(attention.NAMES[plan.layout.attention])
    if plan.trajectory.method.kind == "qlora":
        train_through_zero(base)
    model = apply_method(base, plan.trajectory.method, plan.trajectory.seed)
    fusion = fuse(model) if plan.layout.kernels == "fused" else None
    if plan.layout.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    engine = build_engine(model, plan, BatchLayout(world_size=1, micro_batch_size=1, num_micro_steps=1))
    loss = SupervisedLoss(engine, base, attention.supports_packing(type(base), base.config), device)
    engine.train()

    def step(number: int, batch: MicroBatch) -> float:
        seed_step(plan.trajectory.seed, number, 0)
        loss_sum, _ = loss(batch)
        mean = loss_sum / len(batch.targets)
        engine.backward(mean)
        optimizer_step(engine, plan)
        return float(mean.detach())

    facts = {
        "attention": plan.layout.attention,
        "kernels": str(fusion) if fusion is not None else "PyTorch's own",
        "optimizer": f"AdamW, ZeRO stage {plan.layout.zero}, fp32 masters",
    }
    return step, facts
