"""How much text a model has positions for. Where they are a table, learned (GPT-2, OPT, BERT) or of sines (GPT-J), it
has an end, beyond which a text is an index out of range; rotary positions and ALiBi go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from launcher.data.loader import TestRow
from launcher.data.store import Documents
from launcher.errors import DataError
from launcher.model.load import CAUSAL_LM, CLASSIFIER, model_class, run_config
from launcher.plan.plan import Plan

TABLES = frozenset({"wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding"})
"""What transformers' models call them: modules, or buffers."""
RESERVED = 2
"""Entries of a table, at most, that a model of the size in its configuration keeps for other than positions."""


def most_tokens(model: nn.Module) -> int | None:
    """Tokens of the longest text that fits into the model's tables of positions; None where there are none."""
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TABLES]
    sizes = [_entries(module) for module in modules if isinstance(module, nn.Embedding)]
    sizes += [len(buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in TABLES]
    return min(sizes, default=None)


def refuse_too_long(plan: Plan, questions: Sequence[TestRow]) -> None:
    """Raise DataError where the model has no positions for a document, or for a question and its longest answer."""
    documents, config, generate = Documents(plan.data.folder), run_config(plan), plan.lifecycle.generate
    most = generate.max_new_tokens if generate is not None else 0
    longest = int(documents.lengths.max(initial=0))
    needed = max(longest, *(_together(row, most) for row in questions)) if questions else longest
    declared = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    if needed + RESERVED <= declared:  # spares a large model's skeleton, 2 s for one of 70B
        return
    auto = CAUSAL_LM if plan.trajectory.task == "causal_lm" else CLASSIFIER
    with torch.device("meta"):
        limit = most_tokens(model_class(plan.trajectory.model, config, auto)(config))
    if limit is not None and longest > limit:
        raise DataError(
            f"{documents.where(int(documents.lengths.argmax()))}: {longest} tokens, and the model has positions for "
            f"{limit}",
            hint=f"set data.max_length to {limit}; data.too_long says what becomes of longer rows",
        )
    refuse_long_answers(limit, questions, most)


def refuse_long_answers(limit: int | None, questions: Sequence[TestRow], max_new_tokens: int) -> None:
    """Raise DataError where a question and an answer of `max_new_tokens` need more than `limit` positions."""
    longest = max(questions, key=lambda row: len(row.prompt_ids), default=None)
    if limit is None or longest is None or _together(longest, max_new_tokens) <= limit:
        return
    asked = len(longest.prompt_ids)
    room = f"set evaluate.generate.max_new_tokens, or --max-new-tokens, to {limit + 1 - asked}"
    raise DataError(
        f"{longest.where}: a question of {asked} tokens and an answer of up to {max_new_tokens}, and the model has "
        f"positions for {limit}",
        hint=room if asked <= limit else "leave the row out",
    )


def _together(row: TestRow, max_new_tokens: int) -> int:
    """Positions of a question and its longest answer, whose last token is not read any more."""
    return len(row.prompt_ids) + max(0, max_new_tokens - 1)


def _entries(table: nn.Embedding) -> int:
    """Positions in a table; OPT's begin at its offset, RoBERTa's after the number of its padding."""
    before = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(before)
