"""What a recipe may say of guards: what means nothing where it stands is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plans import recipe_problems

GOOD = "model: {path: gpt2}\ndata: {train: [{path: a.jsonl}], eval: {split: 0.1}}\n"
WITHOUT_ROWS = "model: {path: gpt2}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.mark.parametrize(
    "text",
    [
        "guard: {spikes: skip, most: 3}",
        "guard: {spikes: warn, deviations: 4, window: 16}",
        "evaluate: {early_stopping: {patience: 2}}",
        "evaluate: {retain: {sources: [{path: b.jsonl}], action: stop}}",
        "export: {checkpoint: best}",
    ],
)
def test_what_makes_sense_is_taken(tmp_path: Path, text: str) -> None:
    assert recipe_problems(tmp_path, GOOD + text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            GOOD + "guard: {most: 3}",
            "guard.most: means nothing with guard.spikes warn; leave it out, or set guard.spikes to skip or rollback",
        ),
        (
            GOOD + "evaluate: {retain: {sources: []}}",
            "evaluate.retain.sources: empty; such as `sources: [{path: earlier.jsonl}]`",
        ),
        (
            GOOD.replace("eval:", "replay: {sources: [{path: b.jsonl, weight: 2}]}, eval:"),
            "data.replay.sources.0.weight: how many rows are replayed is data.replay.share of all; leave it out; "
            "`limit` takes fewer of a source",
        ),
        (
            WITHOUT_ROWS + "evaluate: {early_stopping: {patience: 2}}",
            "evaluate.early_stopping: needs data.eval: the best is the one of lowest held-out loss; such as `eval: "
            "{split: 0.05}`, or another evaluate.metric",
        ),
        (
            WITHOUT_ROWS + "export: {checkpoint: best}",
            "export.checkpoint: needs data.eval: the best is the one of lowest held-out loss; such as `eval: {split: "
            "0.05}`, or another evaluate.metric",
        ),
        (
            GOOD + "evaluate: {early_stopping: {}}\ncheckpoint: {keep_best: 0}",
            "checkpoint.keep_best: with evaluate.early_stopping the best checkpoint is kept; leave it out, or give "
            "1 or more",
        ),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, text: str, found: str) -> None:
    assert recipe_problems(tmp_path, text) == [found]


def test_the_loss_on_what_is_retained_may_say_which_is_best(tmp_path: Path) -> None:
    retain = "{sources: [{path: b.jsonl}]}"
    text = f"evaluate: {{metric: retain_loss, retain: {retain}, early_stopping: {{patience: 2}}}}"
    assert recipe_problems(tmp_path, WITHOUT_ROWS + text) == []
