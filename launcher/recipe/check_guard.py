"""Conflicts in what guards a run: keys that would do nothing, and guards with nothing to look at."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.recipe.conflict import Conflict
from launcher.recipe.schema import Recipe

_OF_SPIKES = {"most": ("skip", "rollback")}
"""Keys of `guard` that not every answer to a spike looks at."""


def check_guard(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict in `guard`, `data.replay`, and the parts of `evaluate` that may end a run."""
    guard, retain, replay = recipe.guard, recipe.evaluate.retain, recipe.data.replay
    for key, actions in _OF_SPIKES.items():
        if key in guard.model_fields_set and guard.spikes not in actions:
            hint = f"leave it out, or set guard.spikes to {' or '.join(actions)}"
            yield Conflict((f"guard.{key}", "guard.spikes"), f"means nothing with guard.spikes {guard.spikes}", hint)
    if retain is not None and not retain.sources:
        yield Conflict(("evaluate.retain.sources",), "empty", "such as `sources: [{path: earlier.jsonl}]`")
    if replay is not None:
        if not replay.sources:
            yield Conflict(("data.replay.sources",), "empty", "such as `sources: [{path: earlier.jsonl}]`")
        for number, source in enumerate(replay.sources):
            if source.weight != 1:
                key = f"data.replay.sources.{number}.weight"
                message = "how many rows are replayed is data.replay.share of all"
                yield Conflict((key, "data.replay.share"), message, "leave it out; `limit` takes fewer of a source")
    yield from _best(recipe)


def _best(recipe: Recipe) -> Iterator[Conflict]:
    evaluate, held_out = recipe.evaluate, recipe.data.eval
    why = {
        "evaluate.early_stopping": evaluate.early_stopping is not None,
        "evaluate.retain.action": evaluate.retain is not None and evaluate.retain.action == "stop",
        "export.checkpoint": recipe.export.checkpoint == "best",
    }
    asks = next((key for key, asked in why.items() if asked), None)
    if asks is None:
        return
    if evaluate.metric == "loss" and not (held_out.sources or held_out.split or held_out.rows):
        hint = "such as `eval: {split: 0.05}`, or another evaluate.metric"
        yield Conflict((asks, "data.eval"), "needs data.eval: the best is the one of lowest held-out loss", hint)
    if recipe.checkpoint.keep_best == 0:
        keys = ("checkpoint.keep_best", asks)
        yield Conflict(keys, f"with {asks} the best checkpoint is kept", "leave it out, or give 1 or more")
