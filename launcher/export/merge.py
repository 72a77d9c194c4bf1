"""The trained model in memory, from a committed checkpoint and the Plan alone; adapters folded in on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.checkpoint.layout import Checkpoint
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import read
from launcher.errors import CheckpointError, ModelError
from launcher.model import pissa
from launcher.model.adapters import apply_method
from launcher.model.added_tokens import added_ids
from launcher.model.load import DTYPES, from_checkpoint, nf4, readable_errors, run_config
from launcher.model.nf4 import train_through_zero
from launcher.model.token_rows import add_rows
from launcher.plan.plan import Plan


def trained_model(plan: Plan, checkpoint: Checkpoint, verified: bool = False) -> nn.Module:
    """The base with the checkpoint's weights, in the training dtype, on the CPU; peft's wrapper for adapters.

    Rows of added tokens are folded in, unless they belong to adapters. Adapters are over the base as it was, also those
    of a run that left only a part of it, see `pissa`.

    Raises:
        CheckpointError: a trained weight is missing in the checkpoint, or has another shape; what PiSSA began with is
            damaged or gone.
        ModelError: the base cannot be loaded.
    """
    trajectory = plan.trajectory
    dtype = DTYPES[trajectory.dtype]
    arguments: dict[str, Any] = {"dtype": dtype}
    if trajectory.method.kind == "qlora":
        arguments |= {"quantization_config": nf4(dtype), "device_map": {"": "cpu"}}
    with readable_errors(trajectory.model):
        base = from_checkpoint(plan, run_config(plan), **arguments)
    # Also without ZeRO: bitsandbytes' own layer repacks its bytes when it is evaluated, and what is dequantized from
    # them afterwards, to merge, is noise (CPUs with AVX512-BF16).
    train_through_zero(base)
    if added := added_ids(plan):
        add_rows(base, added, trajectory.seed, torch.device("cpu"))
    method, weights, started_from = trajectory.method, load_weights(checkpoint, verified), pissa.Factors()
    if method.init == "pissa":
        started_from = pissa.needed(checkpoint.store, plan, checkpoint.name)
        method, weights = pissa.over_original(method, weights, started_from)
    model: Any = apply_method(base, method, trajectory.seed, added, read(checkpoint).phase)
    for name in started_from:  # beside their start, adapters that were frozen have weights too
        model.get_parameter(name).requires_grad_(True)
    fill(model, weights, checkpoint)
    if trajectory.method.kind == "freeze" and model is not base:
        model = model.merge_and_unload()
    trained: nn.Module = model.eval()
    return trained


def fill(model: nn.Module, weights: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Copy fp32 masters into the trained parameters; every one must be there, and nothing else.

    Raises:
        CheckpointError: the checkpoint and the model do not name the same parameters, or shapes differ.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained.keys() != weights.keys():
        different = sorted(trained.keys() ^ weights.keys())
        raise CheckpointError(
            f"{checkpoint.name} and the model differ in {len(different)} weights, first {different[0]}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            value = weights[name]
            if value.numel() != parameter.numel():
                raise CheckpointError(
                    f"{checkpoint.name}: {name} has {value.numel()} numbers, the model {parameter.numel()}"
                )
            parameter.copy_(value.reshape(parameter.shape))


def merged_model(plan: Plan, adapted: nn.Module) -> nn.Module:
    """The adapters folded into the base's weights.

    A 4-bit base cannot hold them: it is dequantized to the training dtype first, and that very dequantized base is
    merged, not the original weights, which the adapters never saw.
    """
    merge: Any = adapted
    if not hasattr(merge, "merge_and_unload"):
        raise ModelError("there are no adapters to merge", hint="leave out --merge")
    if plan.trajectory.method.kind == "qlora":
        merge = with_plain_base(plan, merge)
    merged: nn.Module = merge.merge_and_unload()
    return merged


def with_plain_base(plan: Plan, adapted: Any) -> Any:
    """The same adapters over the dequantized base.

    They are taken off and put on again: peft's 4-bit adapter layers would merge by quantizing the sum once more.
    """
    trained = {name: parameter.detach() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    base = adapted.unload().dequantize(dtype=DTYPES[plan.trajectory.dtype])
    plain = apply_method(base, plan.trajectory.method, plan.trajectory.seed, added_ids(plan))
    plain.load_state_dict(trained, strict=False)
    return plain.eval()


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] fp32 logits of one document [T]."""
    with torch.no_grad():
        output: Any = model(input_ids=ids[None], use_cache=False)
    logits: torch.Tensor = output.logits[0].float()
    return logits
