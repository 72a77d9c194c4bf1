"""What the optimizer keeps of each master, as tensors that a checkpoint can hold.

    AdamW (torch's, DeepSpeed's)   exp_avg, exp_avg_sq             fp32, laid out like the master
    Lion                           exp_avg                         the same
    SGD with momentum              momentum_buffer                 the same
    Adafactor (transformers')      exp_avg_sq_row, exp_avg_sq_col  fp32, sums over the columns and the rows of a matrix;
                                                                   of other parameters exp_avg_sq, like the master
    bitsandbytes' AdamW8bit        exp_avg_8bit, exp_avg_sq_8bit   codes, uint8, one for each value of the master
                                   exp_avg_absmax, ...             a scale for each 256 codes, fp32

Adafactor's are stored by the parameter's name, whole: it runs at ZeRO 0 alone, where a master is a whole parameter.

Codes and scales are stored as they are, whole: ZeRO's padding has codes too, and shares scales with its neighbours.
Dequantizing and quantizing again is exact only where every block gets the values it had, and not even there (the code
book has +1 and no -1). So they fit one cutting of the masters only. Masters of fewer than 4,096 values have moments in
fp32 also there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from launcher.errors import CheckpointError, ClusterError
from launcher.plan.plan import Plan

KINDS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, and of Adafactor where nothing is factored."""
FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")
MOMENTUM = "momentum_buffer"
_BNB = dict(zip(KINDS, ("1", "2"), strict=True))
_NAMES = {
    "AdamW": "adamw",
    "DeepSpeedCPUAdam": "adamw",
    "AdamW8bit": "adamw_8bit",
    "Lion": "lion",
    "SGD": "sgd",
    "Adafactor": "adafactor",
}
"""Of optimizers by their classes."""


def allocated(engine: Any, masters: Sequence[torch.Tensor]) -> dict[torch.Tensor, dict[str, Any]]:
    """The optimizer's state by master, created as the optimizer would at its first step.

    Taking a step instead, even on zero gradients, would decay the weights.

    Raises CheckpointError for an optimizer that is not known.
    """
    optimizer = engine.basic_optimizer
    if type(optimizer).__name__ not in _NAMES:
        raise CheckpointError(
            f"what {type(optimizer).__name__} keeps of the weights is not known and cannot be saved",
            hint="use optimizer.name adamw",
        )
    for master in masters:
        if not optimizer.state[master]:
            _create(optimizer, master, optimizer.state[master])
    return {master: optimizer.state[master] for master in masters}


def state_shapes(name: str, momentum: float, shape: torch.Size) -> dict[str, torch.Size]:
    """{kind: shape} of what the optimizer of that name keeps of a parameter, where nothing is in 8 bits."""
    if name == "adafactor" and len(shape) > 1:
        return dict(zip(FACTORS, (shape[:-1], shape[:-2] + shape[-1:]), strict=True))
    kinds = {"adafactor": ("exp_avg_sq",), "lion": ("exp_avg",), "sgd": (MOMENTUM,) * (momentum > 0)}
    return dict.fromkeys(kinds.get(name, KINDS), shape)


def like_master(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """{kind: tensor} of what is laid out like the master and may be cut anew with it."""
    if "state1" not in state:
        return {kind: state[kind] for kind in (*KINDS, MOMENTUM) if kind in state}
    if state["state1"].dtype == torch.uint8:
        return {}
    return {kind: state[f"state{number}"] for kind, number in _BNB.items()}


def factors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """{kind: tensor} of what is smaller than the master, which is a whole parameter."""
    return {kind: state[kind] for kind in FACTORS if kind in state}


def in_blocks(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """{kind: tensor} of what fits this cut of the master only."""
    if "absmax1" not in state:
        return {}
    codes = {f"{kind}_8bit": state[f"state{number}"] for kind, number in _BNB.items()}
    return codes | {f"{kind}_absmax": state[f"absmax{number}"] for kind, number in _BNB.items()}


def refuse_other_cut(plan: Plan, world_size: int, saved_layout: dict[str, Any], saved_world_size: int) -> None:
    """Raise ClusterError where moments in 8 bits would have to be cut anew."""
    ours, theirs = _cut(plan.layout.zero, world_size), _cut(saved_layout["zero"], saved_world_size)
    if plan.trajectory.optimizer.name == "adamw_8bit" and ours != theirs:
        raise ClusterError(
            f"8-bit moments saved at {theirs} cannot go on at {ours}: each block of 256 shares a scale, and another "
            "cut makes other blocks, all of them rounded once more",
            hint=f"resume at {theirs}; a run with optimizer.name adamw resumes at any number of ranks",
        )


def _cut(zero: int, world_size: int) -> str:
    if zero == 0:  # every rank has all of every parameter
        return "ZeRO 0"
    return f"ZeRO {zero} on {world_size} rank{'s' if world_size > 1 else ''}"


def _create(optimizer: Any, master: torch.Tensor, state: dict[str, Any]) -> None:
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        group = optimizer.param_groups[0]  # size and bits are the same in all
        # It asks the group for its parameter, and ZeRO-3 leaves the groups empty between steps.
        kept, group["params"] = group["params"], [master]
        try:
            optimizer.init_state(group, master, 0, 0)
        finally:
            group["params"] = kept
        return
    name = _NAMES[type(optimizer).__name__]
    # torch's first momentum of sgd is the gradient, and so it is from zeros.
    kept = state_shapes(name, optimizer.defaults.get("momentum", 0.0), master.shape)
    state |= {kind: master.new_zeros(shape) for kind, shape in kept.items()}
    if name == "adafactor":
        state |= {"step": 0, "RMS": 0}
    elif name == "adamw":
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        # DeepSpeedCPUAdam counts in a plain int, torch in a tensor that its fused kernels want beside the weights.
        counter = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
        state["step"] = counter if isinstance(optimizer, torch.optim.AdamW) else 0
