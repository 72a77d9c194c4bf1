"""Conflicts in how a model is trained: keys that would do nothing, and what cannot be done together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from launcher.recipe.conflict import Conflict, in_pattern
from launcher.recipe.schema import Recipe
from launcher.recipe.schema_train import Method, Optimizer

OWN_KEYS = {"betas": ("adamw", "adamw_8bit", "lion"), "eps": ("adamw", "adamw_8bit"), "momentum": ("sgd",)}
"""Keys of optimizers that not all have."""


def check_train(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict in `method`, `train` and `optimizer`."""
    yield from _method(recipe)
    yield from _optimizer(recipe)


def _method(recipe: Recipe) -> Iterator[Conflict]:
    for number, pattern in enumerate(recipe.method.frozen):
        yield from in_pattern(f"method.frozen.{number}", pattern)
    yield from _adapters(recipe.method)
    yield from _unfreezing(recipe.method)


def _adapters(method: Method) -> Iterator[Conflict]:
    asked_for = {
        "dropout": method.dropout > 0,
        "dora": method.dora,
        "rslora": method.rslora,
        "init": method.init != "default",
    }
    if method.kind not in ("lora", "qlora"):
        for key in (key for key, asked in asked_for.items() if asked):
            keys = (f"method.{key}", "method.kind")
            yield Conflict(keys, f"there are no adapters with method.kind {method.kind}", "leave it out, or use lora")
    elif method.init == "pissa" and method.kind == "qlora":
        message = "pissa leaves a part of the base, and in 4 bits that part is another base than adapters come back to"
        hint = "set method.kind to lora, or leave method.init out"
        yield Conflict(("method.init", "method.kind"), message, hint)


def _unfreezing(method: Method) -> Iterator[Conflict]:
    if method.unfreeze and method.kind != "freeze":
        message = f"method.kind {method.kind} has no layers that wait"
        yield Conflict(("method.unfreeze", "method.kind"), message, "set method.kind to freeze, or leave it out")
        return
    at = 0.0
    layers: int | Literal["all"] = method.train_last_layers
    for number, stage in enumerate(method.unfreeze):
        key = f"method.unfreeze.{number}"
        if stage.at > 1 and not stage.at.is_integer():
            message = f"{stage.at:g} is neither a share of the steps nor a whole number of them"
            yield Conflict((f"{key}.at",), message, "below 1 it is a share, otherwise a number of steps")
        elif (stage.at < 1) == (at < 1) and stage.at <= at:  # a share and a number are compared once there is a plan
            yield Conflict((f"{key}.at",), f"{stage.at:g} is no later than the stage before", "put the earliest first")
        if layers == "all" or (stage.last_layers != "all" and stage.last_layers <= layers):
            message = f"{stage.last_layers} is no more than {layers}, which {_trained_before(number)}"
            yield Conflict((f"{key}.last_layers",), message, "give more layers, or `all` as the last stage")
        at, layers = stage.at, stage.last_layers


def _trained_before(number: int) -> str:
    return "the stage before trains" if number else "method.train_last_layers trains from the start"


def _optimizer(recipe: Recipe) -> Iterator[Conflict]:
    optimizer, method = recipe.optimizer, recipe.method
    if optimizer.betas is not None and 1.0 in optimizer.betas:
        yield Conflict(("optimizer.betas",), "a beta of 1 never forgets its first value", "such as [0.9, 0.999]")
    for key, names in OWN_KEYS.items():
        if getattr(optimizer, key) != Optimizer.model_fields[key].default and optimizer.name not in names:
            keys = (f"optimizer.{key}", "optimizer.name")
            yield Conflict(keys, f"{optimizer.name} has none", f"leave it out; it is of {', '.join(names)}")
    if optimizer.lora_plus_ratio != 1 and method.kind not in ("lora", "qlora"):
        keys = ("optimizer.lora_plus_ratio", "method.kind")
        yield Conflict(keys, f"there are no adapters with method.kind {method.kind}", "leave it out, or use lora")
    if optimizer.layer_decay != 1 and method.kind == "freeze" and method.train_last_layers == 1 and not method.unfreeze:
        keys = ("optimizer.layer_decay", "method.train_last_layers")
        yield Conflict(keys, "only the last layer is trained, none below it", "train more layers, or leave it out")
    if optimizer.name == "adafactor" and (recipe.parallel.zero not in ("auto", 0) or recipe.parallel.offload == "cpu"):
        parts = ("optimizer.name", "parallel.zero", "parallel.offload")
        message = "adafactor keeps sums over the rows and columns of whole matrices, which ZeRO 1 to 3 cut to pieces"
        hint = "set parallel.zero to 0 and offload to none, or use adamw_8bit or lion, which need little memory too"
        yield Conflict(parts, message, hint)
