"""`slipway data`: the rows of a recipe as the model will see them, supervised tokens marked, and what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import Json, Overrides, RecipeName

if TYPE_CHECKING:
    from launcher.data.loader import MicroBatch


def command(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", help="How many rows to show")] = 3,
    as_json: Json = False,
) -> None:
    """Show rows as the model will see them: what it learns is green, or between >> and << without colour."""
    from launcher.cli.progress import preparing
    from launcher.driver.start import decide, new_run_folder
    from launcher.recipe.load import load

    loaded = load(recipe, overrides or ())
    with preparing(render.err()) as report:
        facts = decide(loaded, new_run_folder(loaded, None), report).facts
    if as_json:
        render.print_json(facts.model_dump(mode="json"))
        return

    from transformers import AutoTokenizer

    from launcher.data.loader import TrainData
    from launcher.plan.batch import BatchLayout

    tokenizer = AutoTokenizer.from_pretrained(Path(facts.folder) / "tokenizer")
    shown = min(rows, facts.train_rows)
    batches = TrainData(facts.folder, 1, loaded.recipe.train.seed)
    for step in range(shown):
        show(tokenizer, next(batches.micro_batches(step, BatchLayout(1, 1, 1), 0)))
    render.print_columns(
        [
            ("documents", f"{facts.train_documents:,}"),
            ("rows", f"{facts.train_rows:,}"),
            ("tokens", f"{facts.train_tokens:,}"),
            ("supervised", f"{facts.train_supervised_tokens / facts.train_tokens:.1%}"),
            ("held out", f"{facts.eval_documents:,}"),
            *((f"left out: {reason}", f"{count:,}") for reason, count in facts.dropped.items()),
            *((f"format of {path}", kind) for path, kind in facts.formats.items()),
            ("prepared in", facts.folder),
        ]
    )


def show(tokenizer: Any, batch: MicroBatch) -> None:
    """One row: each document under its place, its supervised tokens marked."""
    from rich.text import Text

    learned = set((batch.supervised_index + 1).tolist())
    bounds = batch.cu_seqlens.tolist()
    console = render.out()
    marks = ("", "") if console.is_terminal and not console.no_color else (">>", "<<")
    for where, start, stop in zip(batch.where, bounds, bounds[1:], strict=False):
        text = Text(f"--- {where}, {stop - start} tokens\n", style="dim")
        for supervised, ids in runs(batch.input_ids[0, start:stop].tolist(), start, learned):
            words = tokenizer.decode(ids, skip_special_tokens=False)
            text.append(f"{marks[0]}{words}{marks[1]}" if supervised else words, style="green" if supervised else "")
        console.print(text)


def runs(ids: list[int], start: int, learned: set[int]) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens of one kind together: (supervised, token ids)."""
    found: list[tuple[bool, list[int]]] = []
    for position, token in enumerate(ids, start):
        supervised = position in learned
        if not found or found[-1][0] != supervised:
            found.append((supervised, []))
        found[-1][1].append(token)
    return found
