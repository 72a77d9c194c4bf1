"""Parameters that a pattern keeps from being trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from launcher.errors import ModelError
from launcher.model.token_rows import vocabulary_layers

ROWS = "trainable_tokens_delta"
"""In the names of rows that are trained alone, those of added tokens: no pattern freezes them."""


def freeze_matching(model: nn.Module, patterns: Sequence[str], added_ids: Sequence[int] = ()) -> None:
    """Freeze every parameter in whose name, that of `named_parameters`, one of the regular expressions is found.

    Called when all that the method trains is marked, in `model` or in peft's wrapper around it; what gradual
    unfreezing trains only later stays frozen then.

    Raises:
        ModelError: a pattern freezes nothing, nothing is left to train, or rows for `added_ids` would be frozen.
    """
    if not patterns:
        return
    names = [name for name, _ in model.named_parameters()]
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ROWS not in name and (parameter.requires_grad or hasattr(parameter, "phase"))
    }
    found: list[nn.Parameter] = []
    for number, pattern in enumerate(patterns):
        matching = [name for name in trained if re.search(pattern, name)]
        if not matching:
            anyway = any(re.search(pattern, name) for name in names)
            raise ModelError(
                f"method.frozen.{number}: '{pattern}' is found "
                + ("only in names of parameters that are frozen anyway" if anyway else "in no parameter's name"),
                hint="names of what is trained are " + ", ".join(_some(list(trained))),
            )
        found += [trained[name] for name in matching]
    vocabulary: Any = vocabulary_layers(model) if added_ids else {}
    if rows := [name for name, layer in vocabulary.items() if any(layer.weight is one for one in found)]:
        raise ModelError(
            f"method.frozen: rows of {rows[0]} are new, for model.add_tokens, and would stay as they start",
            hint=f"leave {rows[0]} out of method.frozen, or use method.kind lora, which trains such rows alone",
        )
    for parameter in found:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("method.frozen freezes all that would be trained", hint="name fewer parameters")


def _some(names: list[str]) -> list[str]:
    """The first, one in the middle and the last."""
    return list(dict.fromkeys(names[i] for i in (0, len(names) // 2, -1)))
