"""Which parameters are updated together, at which share of the learning rate, and by what."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from launcher.model.adapters import is_norm
from launcher.model.depth import layers_above
from launcher.plan.plan import Plan
from launcher.train.lion import Lion

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Group:
    """What the parameters of an optimizer group have in common.

    ZeRO flattens a group into one master, which has one count of steps.
    """

    phase: int
    """The unfreezing that they are trained from; 0: from the start."""
    rate: float
    """Their share of the learning rate."""
    kept: bool
    """Without weight decay, as norms, biases and all that has one dimension."""


def parameter_groups(model: torch.nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """The trainable parameters, in groups: `params`, `weight_decay`, `rate`, the share of the learning rate, and
    `phase`, which `model.adapters.unfreeze_to` has told each parameter.

    Parameters of a group are in the model's order; groups of a later phase come after those of earlier ones.

    Raises:
        ModelError: rates fall from layer to layer and the model has no list of layers.
    """
    optimizer = plan.trajectory.optimizer
    above = layers_above(model) if optimizer.layer_decay < 1 else {}
    members = defaultdict[Group, list[torch.nn.Parameter]](list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partitioned parameter looks one-dimensional; its whole shape is in ds_shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            rate = optimizer.layer_decay ** above.get(name, 0)
            if "lora_B" in name or "lora_embedding_B" in name:
                rate *= optimizer.lora_plus_ratio
            # Experts' biases in one tensor and Cohere's norm of each head have two dimensions.
            owner, _, own_name = name.rpartition(".")
            kept = len(shape) <= 1 or own_name.endswith("bias") or is_norm(model.get_submodule(owner))
            members[Group(getattr(parameter, "phase", 0), rate, kept)].append(parameter)
    return [
        {
            "params": members[group],
            "weight_decay": 0.0 if group.kept else optimizer.weight_decay,
            "rate": group.rate,
            "phase": group.phase,
        }
        for group in sorted(members)
    ]


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group of an optimizer, or of DeepSpeed's around it, its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def build_optimizer(groups: Iterable[dict[str, Any]], plan: Plan) -> torch.optim.Optimizer:
    """The plan's optimizer over `groups`.

    AdamW is DeepSpeed's vectorized one when a GPU run offloads and it can be compiled, torch's otherwise; the learning
    rate of Adafactor is the recipe's, not relative to the weights (transformers' `scale_parameter` is off).
    """
    hyper, groups = plan.trajectory.optimizer, list(groups)
    if hyper.name == "lion":
        return Lion(groups, lr=hyper.lr, betas=hyper.betas)
    if hyper.name == "sgd":
        return torch.optim.SGD(groups, lr=hyper.lr, momentum=hyper.momentum, nesterov=hyper.momentum > 0)
    if hyper.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=hyper.lr, scale_parameter=False, relative_step=False)
    settings: dict[str, Any] = {"lr": hyper.lr, "betas": hyper.betas, "eps": hyper.eps}
    if hyper.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    if plan.layout.offload and plan.layout.device == "cuda":
        if not without_compiler():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, **settings)
        log.warning(
            "no C++ compiler: the offloaded optimizer is torch's AdamW, several times slower than DeepSpeedCPUAdam"
        )
    return torch.optim.AdamW(groups, **settings, fused=True)


def without_compiler() -> bool:
    """True where DeepSpeed cannot build its C++ ops."""
    return shutil.which("g++") is None and shutil.which("c++") is None
