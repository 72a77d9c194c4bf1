"""Conflicts in what is measured: metrics that there are not, and keys that would do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from launcher.recipe.conflict import Conflict
from launcher.recipe.schema import Recipe
from launcher.recipe.schema_data import HeldOut
from launcher.recipe.schema_evaluate import FIGURES, METRICS, Generate

_OWN = "or file.py:name of a function of your own"
_TAKEN = ("step", "rows", "cut", "slices", "kind", "time", "attempt")
"""What a line `answers` says beside its metrics."""


def check_evaluate(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict in `evaluate.generate`, `evaluate.metric` and `evaluate.slices`."""
    if recipe.evaluate.generate is not None:
        yield from check_generate(recipe.evaluate.generate)
    yield from _metric(recipe)
    yield from _slices(recipe)


def check_generate(generate: Generate) -> Iterator[Conflict]:
    """Every conflict in `evaluate.generate` itself; `slipway evaluate` asks for those of its `--metrics`."""
    section = "evaluate.generate"
    if generate.top_p < 1 and generate.temperature == 0:
        keys = (f"{section}.top_p", f"{section}.temperature")
        yield Conflict(keys, "nothing is drawn at temperature 0", "leave it out, or set temperature to 1")
    if not generate.metrics:
        hint = "such as [exact_match]; `generate: null` answers nothing"
        yield Conflict((f"{section}.metrics",), "nothing to measure the answers by", hint)
    figures = [name.rpartition(":")[2] for name in generate.metrics]
    for number, (name, figure) in enumerate(zip(generate.metrics, figures, strict=True)):
        key = (f"{section}.metrics.{number}",)
        if name not in METRICS and ":" not in name:
            near = get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}, {_OWN}"
            yield Conflict(key, f"unknown metric {name!r}", hint)
        elif figure in figures[:number]:
            yield Conflict(key, f"a second metric called {figure}", "name each metric once")
        elif ":" in name and figure in (*METRICS, *_TAKEN):
            yield Conflict(key, f"a function called {figure}, which means something else", "give it another name")


def _metric(recipe: Recipe) -> Iterator[Conflict]:
    metric, generate = recipe.evaluate.metric, recipe.evaluate.generate
    keys = ("evaluate.metric", "evaluate.generate")
    of_loss = _of_loss(recipe)
    if metric in of_loss:
        if metric not in ("loss", "retain_loss") and not _given(recipe.data.eval):
            yield Conflict(("evaluate.metric", "data.eval"), "needs data.eval", "such as `eval: {split: 0.05}`")
        return
    measured = [figure for name in (generate.metrics if generate else ()) for figure in _figures(name)]
    if _found(metric, measured) and generate and not generate.during:
        hint = "set evaluate.generate.during to true"
        yield Conflict(keys, f"{metric} is measured only before the first step and after the last", hint)
    elif not _found(metric, measured):
        there = of_loss + (measured if generate and generate.during else [])
        hint = f"there is {', '.join(name.rstrip('*') for name in there)}"
        if metric.partition(".")[0] in METRICS:
            hint += "; answers are measured by evaluate.generate.metrics, while training with during: true"
        elif metric == "retain_loss":
            hint += "; name rows in evaluate.retain.sources"
        yield Conflict(keys, f"'{metric}' is not measured", hint)


def _of_loss(recipe: Recipe) -> list[str]:
    """What an evaluation measures without answers in words."""
    found = ["loss", "accuracy"]
    found += FIGURES["classes"][1:] if recipe.task == "sequence_classification" else ["perplexity"]
    return found + (["retain_loss"] if recipe.evaluate.retain else [])


def _figures(name: str) -> list[str]:
    """What `evaluate.metric` may name of a metric of answers; a function's ends in a star, it may give several."""
    if name not in METRICS:
        return [name.rpartition(":")[2] + "*"]
    return [f"{name}.{part}" for part in FIGURES.get(name, ())] or [name]


def _found(metric: str, measured: list[str]) -> bool:
    return metric in measured or f"{metric.partition('.')[0]}*" in measured


def _slices(recipe: Recipe) -> Iterator[Conflict]:
    slices = recipe.evaluate.slices
    for number, column in enumerate(slices):
        if column in slices[:number]:
            yield Conflict((f"evaluate.slices.{number}",), f"'{column}' is given twice", "name each column once")
    if slices and not _given(recipe.data.eval) and recipe.evaluate.generate is None:
        hint = "hold rows out with data.eval, or with data.test and evaluate.generate"
        yield Conflict(("evaluate.slices", "data.eval", "evaluate.generate"), "no row is measured", hint)


def _given(held_out: HeldOut) -> bool:
    return bool(held_out.sources or held_out.split or held_out.rows)
