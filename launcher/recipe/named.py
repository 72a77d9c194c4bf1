"""What a recipe names outside of itself: sources of rows, and other files, each with the key that names it."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.recipe.schema import Recipe
from launcher.recipe.schema_data import Source
from launcher.recipe.schema_evaluate import METRICS


def sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    """Every source of rows, such as `data.train.0`."""
    data, retain = recipe.data, recipe.evaluate.retain
    groups = {
        "data.train": data.train,
        "data.eval.sources": data.eval.sources,
        "data.test.sources": data.test.sources,
        "data.replay.sources": data.replay.sources if data.replay else (),
        "data.clean.contamination": data.clean.contamination,
        "evaluate.retain.sources": retain.sources if retain else (),
    }
    for group, members in groups.items():
        for number, source in enumerate(members):
            yield f"{group}.{number}", source


def files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every other file or folder but the model: its tokenizer, its template, and the user's own functions."""
    generate = recipe.evaluate.generate
    functions = {"data.augment.function": recipe.data.augment.function} | {
        f"evaluate.generate.metrics.{number}": metric
        for number, metric in enumerate(generate.metrics if generate else ())
        if metric not in METRICS
    }
    named = {"model.tokenizer": recipe.model.tokenizer, "model.chat_template": recipe.model.chat_template}
    named |= {key: function and function.rpartition(":")[0] for key, function in functions.items()}
    for key, path in named.items():
        if path:
            yield key, path
