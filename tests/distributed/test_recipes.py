"""The packaged recipes for real data, each on its own files, shortened: a figure before training and one after."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.evaluate.value import figures
from launcher.train.metrics import last_of_each_step
from tests.distributed.group import run_group

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not DATA.exists(), reason="real data is not here: ../shared/data"),
]
FILES = {
    "gsm8k-cpu": ("gsm8k/train.jsonl",),
    "seed-tasks-cpu": ("seed-tasks/seed_tasks.jsonl",),
    "sentiment-cpu": ("sentiment/rotten_tomatoes.jsonl", "sentiment/imdb.jsonl", "sentiment/amazon_polarity.jsonl"),
    "summarize-cpu": ("summarization/gigaword.jsonl",),
    "pretrain-cpu": ("gsm8k/test.jsonl",),
}
METRICS = {
    "gsm8k-cpu": {"numeric"},
    "seed-tasks-cpu": {"rouge.rouge_1", "rouge.rouge_2", "rouge.rouge_l"},
    "sentiment-cpu": {"classes.accuracy", "classes.precision_macro", "classes.recall_macro", "classes.f1_macro"},
    "summarize-cpu": {"rouge.rouge_1", "rouge.rouge_2", "rouge.rouge_l", "bleu"},
}
SHORTER = ("train.max_steps=3", "evaluate.max_rows=8", "audit=off", "checkpoint.background=false")


def overrides(recipe: str, *more: str) -> list[str]:
    files = [f"data.train.{number}.path={DATA / file}" for number, file in enumerate(FILES[recipe])]
    answers = ["evaluate.generate.rows=4", "evaluate.generate.max_new_tokens=3"] * (recipe in METRICS)
    columns = ["data.train.0.columns={text: question}"] * (recipe == "pretrain-cpu")
    return [*files, *answers, *columns, *SHORTER, *more]


def trained(recipe: str, changes: list[str], folder: str) -> str:
    """What `slipway run` does, without Ray, and in one process that has everything imported; how it ended."""
    from launcher.driver.start import create_run_folder, decide, planned
    from launcher.model.ready import Request, make_ready
    from launcher.plan.facts import this_machine
    from launcher.recipe.load import load
    from launcher.train.run import train_run

    loaded = load(recipe, changes)
    decided = decide(loaded, folder, None)
    plan = planned(decided, this_machine())
    Path(folder).mkdir()
    make_ready(
        Request(
            model=decided.model,
            tokenizer_folder=Path(decided.facts.folder) / "tokenizer",
            seed=plan.trajectory.seed,
            packing=decided.data.packing,
            classes=decided.facts.classes,
            stamps=None,
        )
    )
    create_run_folder(plan, loaded)
    return train_run(plan, launch=0).kind


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=pytest.mark.long) for name in FILES])
def test_a_recipe_measures_before_and_after(tmp_path: Path, recipe: str) -> None:
    [end] = run_group(1, trained, recipe, overrides(recipe), str(tmp_path / "run"), timeout_s=900)
    assert end == "finished"
    answers = last_of_each_step(tmp_path / "run", "answers")
    if recipe in METRICS:
        assert sorted(answers) == [0, 3]
        assert set(figures(answers[0])) >= METRICS[recipe]
        assert set(figures(answers[3])) >= METRICS[recipe]
    first = last_of_each_step(tmp_path / "run", "eval")[1]
    last = last_of_each_step(tmp_path / "run", "eval")[3]
    print(recipe, figures(first), figures(last), file=sys.stderr)
    assert 1 < last["perplexity"] < first["perplexity"]


def test_summaries_are_measured_and_tensorboard_has_the_run(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    small = ("model.scratch.hidden_size=64", "model.scratch.intermediate_size=128", "model.scratch.vocab_size=512")
    changes = overrides("summarize-cpu", "logging.trackers=[tensorboard]", "data.train.0.limit=100", *small)
    [end] = run_group(1, trained, "summarize-cpu", changes, str(tmp_path / "run"), timeout_s=300)
    assert end == "finished"
    steps, answers = (last_of_each_step(tmp_path / "run", kind) for kind in ("step", "answers"))
    assert sorted(answers) == [0, 3]
    assert set(figures(answers[0])) == METRICS["summarize-cpu"]
    reader = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    found = {point.step: point.value for point in reader.Scalars("step/loss")}
    assert found == pytest.approx({step: line["loss"] for step, line in steps.items()}, rel=1e-6)
    told = {point.step: point.value for point in reader.Scalars("answers/rouge/rouge_l")}
    assert told == pytest.approx({step: line["rouge"]["rouge_l"] for step, line in answers.items()}, rel=1e-6)
