"""pydantic's validation errors in plain words: the key as written, what was expected, what was given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launcher.recipe.document import Key, dotted
from launcher.recipe.schema import Recipe

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "too_long": "{max_length} values",
}
"""pydantic's error types, in words. The schema meets no others but `missing`, `extra_forbidden`, `literal_error`."""

ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "lr_scheduler_type": "schedule.kind",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "use_dora": "method.dora",
    "use_rslora": "method.rslora",
    "init_lora_weights": "method.init",
    "datasets": "data.train",
    "num_gpus": "cluster.workers",
}
"""What other launchers call our keys: no spelling distance finds `optimizer.lr` from `learning_rate`."""


def explain(error: ValidationError, values: dict[str, Any]) -> Iterator[tuple[Key, str, str | None]]:
    """Key, message and hint of each mistake. A value that fits no branch of a union is one mistake, not several."""
    grouped: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_key(detail, values), []).append(detail)
    for key, details in grouped.items():
        if any(other[: len(key)] == key and other != key for other in grouped):
            continue  # `targets: [1]` is no `all-linear` either, but its author meant the list
        message, hint = _words(key, details)
        yield key, message, hint


def _key(detail: ErrorDetails, values: dict[str, Any]) -> Key:
    """The error's place without the names of union branches that pydantic mixes into it."""
    here: Any = values
    key: Key = ()
    for step in detail["loc"]:
        inside = here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        if step in inside:
            here = here[step]
            key = (*key, step)
    missing = detail["loc"][-1]
    # A list that is too short is one mistake, of the list.
    return (*key, missing) if detail["type"] == "missing" and isinstance(missing, str) else key


def _words(key: Key, details: list[ErrorDetails]) -> tuple[str, str | None]:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return "unknown key", _did_you_mean(key)
    if first["type"] == "missing" and isinstance(first["input"], list):
        return f"expected {len(first['input']) + len(details)} values, got {describe(first['input'])}", None
    if first["type"] == "missing":
        return "missing", f"give {key[-1]}"

    given = first["input"]
    choices = [choice for detail in details for choice in _choices(detail)]
    kinds = [words for detail in details if (words := _expected(detail))]
    expected = _either([*kinds, *(f"`{choice}`" for choice in choices)]) or first["msg"].lower()
    return f"expected {expected}, got {describe(given)}", _hint(given, kinds, choices)


def _expected(detail: ErrorDetails) -> str | None:
    template = EXPECTED.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else None


def _choices(detail: ErrorDetails) -> list[str]:
    """`'auto', 0, 1, 2 or 3` as pydantic writes it, taken apart."""
    expected = str(detail.get("ctx", {}).get("expected", "")) if detail["type"] == "literal_error" else ""
    return [choice.strip("'") for choice in re.split(r", | or ", expected) if choice]


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def describe(value: Any) -> str:
    """A value as its author would name it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"the text '{value}'"
        case dict():
            return "a section of keys"
        case list():
            return f"a list of {len(value)}"
        case _:
            return f"{value}"


def _hint(given: Any, kinds: list[str], choices: list[str]) -> str | None:
    if isinstance(given, str):
        close = get_close_matches(given, choices, n=1)
        if close:
            return f"did you mean {close[0]}?"
        if any("number" in kind for kind in kinds) and re.fullmatch(r"[-+.\deE]+", given):
            return "write it without quotes"
    if kinds == ["text"] and isinstance(given, bool | int | float):
        return f"put it in quotes: '{describe(given)}'"
    return None


def _did_you_mean(key: Key) -> str | None:
    name = str(key[-1])
    section = _section(key[:-1])
    siblings = list(section.model_fields) if section else []
    # A name that begins with a key's name (`lr_rate`) is further from it than difflib's cutoff.
    close = get_close_matches(name, siblings, n=1) or [s for s in siblings if name.startswith(s) or s.startswith(name)]
    if close:
        return f"did you mean {close[0]}?"
    everywhere = {leaf.rpartition(".")[2]: leaf for leaf in leaves(Recipe)}
    far = ELSEWHERE.get(name) or next((everywhere[m] for m in get_close_matches(name, everywhere, 1, 0.8)), None)
    if far:
        return f"did you mean {far}?"
    if section and len(key) > 1:
        return f"the keys of {dotted(key[:-1])} are {', '.join(siblings)}"
    return "`slipway recipes schema` lists every key"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the schema that is not a section, dotted; keys of list elements are left out."""
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _section(key: Key) -> type[BaseModel] | None:
    """The part of the schema that a key leads to; steps into lists included."""
    here: type[BaseModel] | None = Recipe
    for step in key:
        if isinstance(step, str):
            field = here.model_fields.get(step) if here else None
            here = _model(field.annotation) if field else None
    return here


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model(part))), None)
