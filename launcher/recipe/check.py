"""What no single key shows to be wrong: keys that exclude or need one another, and text with a form of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.errors import UserError
from launcher.recipe.schema import Recipe
from launcher.units import parse_bytes, parse_seconds


@dataclass(frozen=True)
class Conflict:
    """A mistake in how keys go together. The first key is where it is reported."""

    keys: tuple[str, ...]
    message: str
    hint: str | None


def check(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict in a recipe whose single values are all well-formed."""
    yield from _model(recipe)
    yield from _data(recipe)
    yield from _numbers(recipe)
    yield from _texts(recipe)


def _model(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    both = ("model.path", "model.scratch")
    if model.path and model.scratch:
        yield Conflict(both, "given together with model.scratch", "keep one; `scratch: null` drops an inherited one")
    if model.path is None and model.scratch is None:
        yield Conflict(both, "missing", "give a model folder or hub id, or model.scratch to start from random weights")
    if model.path == "":
        yield Conflict(("model.path",), "empty", "give a model folder or hub id")
    if model.scratch is not None and not isinstance(model.scratch.get("model_type"), str):
        yield Conflict(("model.scratch",), "needs model_type", "such as `model_type: llama`")
    if model.scratch and model.revision:
        yield Conflict(("model.revision", "model.scratch"), "a scratch model has no revision", "leave it out")
    if recipe.method.targets == ():
        yield Conflict(("method.targets",), "empty", "name linear layers, or leave it out for all-linear")


def _data(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if not data.train:
        yield Conflict(("data.train",), "nothing to train on", "such as `train: [{path: train.jsonl}]`")
    if data.eval.split is not None and data.eval.sources:
        keys = ("data.eval.split", "data.eval.sources")
        yield Conflict(keys, "given together with data.eval.sources", "hold out a share or name files, not both")
    if data.eval.split in (0.0, 1.0):
        left = "nothing would be held out" if data.eval.split == 0 else "nothing would be left to train on"
        yield Conflict(("data.eval.split",), left, "give a share between 0 and 1, or null for no evaluation")
    if recipe.evaluate.generate and not data.test.sources and not data.test.split and not data.test.rows:
        keys = ("evaluate.generate", "data.test")
        yield Conflict(keys, "needs data.test", "name a file of held-out rows there, or set evaluate.generate to null")


def _numbers(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.schedule.warmup > 1 and not recipe.schedule.warmup.is_integer():
        message = f"{recipe.schedule.warmup:g} is neither a share of the steps nor a whole number of them"
        yield Conflict(("schedule.warmup",), message, "below 1 it is a share, otherwise a number of steps")
    if 1.0 in recipe.optimizer.betas:
        yield Conflict(("optimizer.betas",), "a beta of 1 never forgets its first value", "such as [0.9, 0.999]")
    if recipe.parallel.zero == 0 and recipe.parallel.offload == "cpu":
        keys = ("parallel.offload", "parallel.zero")
        yield Conflict(keys, "ZeRO 0 has nothing to offload", "set parallel.zero to 1, 2, 3 or auto")


def _texts(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.train.max_time is not None:
        yield from _parsed("train.max_time", recipe.train.max_time, parse_seconds)
    yield from _parsed("export.max_shard_size", recipe.export.max_shard_size, parse_bytes)
    if recipe.name is not None and (not recipe.name.strip(".") or "/" in recipe.name):
        yield Conflict(("name",), f"'{recipe.name}' cannot name a folder", "give a word without slashes")


def _parsed(key: str, text: str, parse: Callable[[str], float]) -> Iterator[Conflict]:
    try:
        if parse(text) <= 0:
            yield Conflict((key,), f"'{text}' is nothing", "give more than zero")
    except UserError as error:
        yield Conflict((key,), error.message, error.hint)
