"""From a Plan to the model and the engine of one rank."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from launcher.audit import Audit
from launcher.data.loader import MicroBatch
from launcher.model import attention
from launcher.model.adapters import apply_method, enable_gradient_checkpointing
from launcher.model.added_tokens import added_ids
from launcher.model.fuse import fuse
from launcher.model.load import load_model
from launcher.model.regularize import EmbeddingNoise
from launcher.plan.batch import BatchLayout
from launcher.plan.deepspeed import deepspeed_config
from launcher.plan.plan import Plan
from launcher.train import startup
from launcher.train.beat import AUDITING, BUILDING, LOADING, mark
from launcher.train.classification import ClassLoss
from launcher.train.engine import build_engine, join_communication
from launcher.train.evaluate import evaluating
from launcher.train.first_adapters import start_adapters
from launcher.train.loss import SupervisedLoss

log = logging.getLogger(__name__)


def build_network(
    plan: Plan,
    batch: BatchLayout,
    device: torch.device,
    phase: int,
    tokenizer: PreTrainedTokenizerFast,
    audit: Audit | None,
) -> tuple[Any, SupervisedLoss]:
    """The engine over the plan's model, and the loss through it. Collective.

    Args:
        phase: of gradual unfreezing, which decides what is trained
        tokenizer: the run's
        audit: of this start; None where it has been done

    Raises:
        SlipwayError: found on all ranks alike; AuditError where the plan has the audit strict.
    """
    trajectory = plan.trajectory
    ds_config = deepspeed_config(plan.layout, batch, trajectory.dtype, trajectory.optimizer.max_grad_norm)
    join_communication()
    added = added_ids(plan)
    mark(LOADING)
    base = load_model(plan, ds_config, device, added)
    model = apply_method(base, trajectory.method, trajectory.seed, added, phase)
    start_adapters(model, plan)
    classifies = trajectory.task == "sequence_classification"
    flat = attention.supports_packing(type(base), base.config)

    def loss_of(network: Any, language_model: Any, label_smoothing: float = 0.0) -> SupervisedLoss:
        if classifies:
            return ClassLoss(network, language_model, device, label_smoothing)
        return SupervisedLoss(network, language_model, flat, device, label_smoothing)

    startup.ended("model")
    mark(AUDITING)
    if audit is not None:
        audit.before_engine(model, base, tokenizer, loss_of)
    if plan.layout.kernels == "fused":
        log.info("%s", fuse(model))
    if plan.layout.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if trajectory.neftune_alpha is not None:
        EmbeddingNoise(model, trajectory.neftune_alpha)
    # transformers hands a model over in evaluation mode: without dropout, and deaf to gradient checkpointing.
    model.train()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    log.info("%s: %d parameters trained", trajectory.model.path, trained)
    startup.ended("audit")
    mark(BUILDING)
    engine = build_engine(model, plan, batch)
    startup.ended("engine")
    loss = loss_of(engine, base, trajectory.label_smoothing)
    mark(AUDITING)
    if audit is not None:
        audit.through_engine(base, lambda documents: logits_at_rest(loss, documents))
        audit.conclude()
    startup.ended("audit")
    return engine, loss


def logits_at_rest(loss: SupervisedLoss, batch: MicroBatch) -> torch.Tensor:
    """[S, V] logits without dropout or gradients."""
    with evaluating(loss.network):
        return loss.logits(batch)
