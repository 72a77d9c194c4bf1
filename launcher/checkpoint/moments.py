"""What the optimizer keeps of each master, as tensors that a checkpoint can hold.

    AdamW (torch's, DeepSpeed's)   exp_avg, exp_avg_sq             fp32, laid out like the master
    bitsandbytes' AdamW8bit        exp_avg_8bit, exp_avg_sq_8bit   codes, uint8, one for each value of the master
                                   exp_avg_absmax, ...             a scale for each 256 codes, fp32

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
_BNB = dict(zip(KINDS, ("1", "2"), strict=True))


def allocated(engine: Any, masters: Sequence[torch.Tensor]) -> dict[torch.Tensor, dict[str, Any]]:
    """The optimizer's state by master, created as the optimizer would at its first step.

    Taking a step instead, even on zero gradients, would decay the weights.

    Raises CheckpointError for an optimizer that keeps anything else.
    """
    optimizer = engine.basic_optimizer
    states = {}
    for master in masters:
        state = optimizer.state[master]
        if not state:
            _create(optimizer, master, state)
        if not _known(state, master):
            raise CheckpointError(
                f"the state of {type(optimizer).__name__} is not laid out like the weights and cannot be re-cut",
                hint="use optimizer.name adamw",
            )
        states[master] = state
    return states


def like_master(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """{kind: tensor} of what is laid out like the master and may be cut anew with it."""
    if "exp_avg" in state:
        return {kind: state[kind] for kind in KINDS}
    if state["state1"].dtype == torch.uint8:
        return {}
    return {kind: state[f"state{number}"] for kind, number in _BNB.items()}


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
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    # DeepSpeedCPUAdam counts in a plain int, torch in a tensor that its fused kernels want beside the weights.
    counter = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
    state["step"] = counter if isinstance(optimizer, torch.optim.AdamW) else 0
    state |= {kind: torch.zeros_like(master, requires_grad=False) for kind in KINDS}


def _known(state: dict[str, Any], master: torch.Tensor) -> bool:
    names = KINDS if "exp_avg" in state else ("state1", "state2")
    return all(name in state and state[name].shape == master.shape for name in names)
