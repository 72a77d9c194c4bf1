"""Conflicts of keys with the task: what a sequence classification has no use for, or cannot do."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.recipe.conflict import Conflict
from launcher.recipe.schema import Recipe


def check_task(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict with `task: sequence_classification`."""
    if recipe.task != "sequence_classification":
        return
    for key, (message, hint) in _out_of_place(recipe).items():
        yield Conflict((key, "task"), message, hint)


def _out_of_place(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """{key that is given: (why it cannot be, what to do)}."""
    model, data, augment = recipe.model, recipe.data, recipe.data.augment
    template = "a sequence classification reads texts alone, without a chat template"
    turns = "a sequence classification has no turns of a conversation"
    padded = "documents of a sequence classification are padded rows, which transformers' own attention and layers read"
    held_out = "held-out rows go to data.eval: each is classified before the first step and after the last"
    found = {
        "model.chat_template": (model.chat_template is not None, template, "leave it out"),
        "model.template_kwargs": (bool(model.template_kwargs), template, "leave it out"),
        "model.add_tokens": (bool(model.add_tokens), template, "leave it out, or add them to the model before"),
        "model.attention": (model.attention not in ("auto", "sdpa"), padded, "leave it out"),
        "model.kernels": (model.kernels == "fused", padded, "leave it out"),
        "method.init": (
            recipe.method.init == "pissa",
            "pissa is not offered for sequence classification",
            "leave it out",
        ),
        "data.packing": (
            data.packing and "packing" in data.model_fields_set,
            "the head of a sequence classification reads one document a row",
            "set it to false, or leave it out",
        ),
        "data.test": (
            bool(data.test.sources or data.test.split or data.test.rows),
            "no row is answered in words",
            held_out,
        ),
        "data.too_long": (
            data.too_long == "split",
            "a part of a text need not be of the text's class",
            "set it to drop, truncate_end or truncate_start",
        ),
        "data.supervise": (data.supervise != "all", turns, "leave it out"),
        "data.system_turns": (data.system_turns != "keep", turns, "leave it out"),
        "data.special_tokens": (data.special_tokens != "text", template, "leave it out"),
        "data.augment.truncate_turns": (augment.truncate_turns > 0, turns, "leave it out"),
        "data.augment.drop_system": (augment.drop_system > 0, turns, "leave it out"),
        "evaluate.generate": (recipe.evaluate.generate is not None, "no row is answered in words", held_out),
    }
    return {key: (message, hint) for key, (given, message, hint) in found.items() if given}
