"""Later values over earlier ones: a recipe over the one it extends, the command line over both."""

from __future__ import annotations

from typing import Any

import yaml

from launcher.recipe.document import Document, Finding, Key, parse_value
from launcher.recipe.origin import Origin


def overlay(below: Document, above: Document) -> None:
    """Put `above` over `below`, in place: mappings are merged, everything else (lists too) is replaced."""
    _merge(below, below.values, above.values, above, ())
    below.findings.extend(above.findings)


def _merge(below: Document, target: dict[str, Any], new: dict[str, Any], above: Document, prefix: Key) -> None:
    for name, value in new.items():
        key = (*prefix, name)
        old = target.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            below.origins[key] = above.origins[key]
            _merge(below, old, value, above, key)
        else:
            target[name] = value
            _forget(below, key)
            below.origins.update({k: origin for k, origin in above.origins.items() if k[: len(key)] == key})


def override(document: Document, text: str, position: int) -> None:
    """Apply one `key.path=value` of the command line, in place; `position` counts them from 1.

    The value is YAML and replaces what was there. A number in the path is a position in a list; the first free one
    appends.
    """
    origin = Origin("command line", line=position)
    path, equals, literal = text.partition("=")
    if not equals or not path.strip():
        hint = "write key=value, such as optimizer.lr=1e-4"
        document.findings.append(Finding(origin, (), f"`{text}` is no override", hint))
        return
    steps = [int(part) if part.isdecimal() else part for part in path.strip().split(".")]
    try:
        value = parse_value(literal)
    except yaml.YAMLError:
        hint = "quote it for YAML inside the shell's quotes: 'key=\"value\"'"
        document.findings.append(Finding(origin, tuple(steps), f"`{literal}` is not a YAML value", hint))
        return
    _assign(document, steps, value, origin)


def _assign(document: Document, steps: list[int | str], value: Any, origin: Origin) -> None:
    """Walk to the place, making sections and lists that are not there yet, and put the value."""
    here: Any = document.values
    key: Key = ()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(here, dict):
            step = str(step)
            child = here.get(step)
        elif isinstance(step, int) and step <= len(here):
            here.extend([None] * (step + 1 - len(here)))
            child = here[step]
        else:
            message, hint = f"no such element: the list has {len(here)}", f"count from 0; {len(here)} appends"
            document.findings.append(Finding(origin, (*key, step), message, hint))
            return
        key = (*key, step)
        if following is None or not isinstance(child, dict | list):
            child = value if following is None else [] if isinstance(following, int) else {}
            here[step] = child
            _forget(document, key)
            document.origins[key] = origin
        here = child
    _note_inside(document, key, value, origin)


def _note_inside(document: Document, key: Key, value: Any, origin: Origin) -> None:
    """`train.0={path: x}` gives `train.0.path` its origin too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, child in inside:
        document.origins[(*key, step)] = origin
        _note_inside(document, (*key, step), child, origin)


def _forget(document: Document, key: Key) -> None:
    for old in [k for k in document.origins if k[: len(key)] == key]:
        del document.origins[old]
