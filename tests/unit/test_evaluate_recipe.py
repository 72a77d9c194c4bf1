"""What a recipe may say of evaluation: metrics that there are not, and keys that would do nothing, are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.driver.resume import resumed_plan
from launcher.errors import RecipeError
from launcher.plan.facts import this_machine
from tests.distributed.tiny import tiny_plan
from tests.plans import recipe_problems

GOOD = """
model: {path: gpt2}
data: {train: [{path: a.jsonl}], eval: {split: 0.1}, test: {rows: 50}}
"""
BLIND = "model: {path: gpt2}\ndata: {train: [{path: a.jsonl}], test: {rows: 50}}\n"


@pytest.mark.parametrize(
    "text",
    [
        "{generate: {metrics: [exact_match, numeric, classes, rouge, bleu, own.py:brevity]}, slices: [a, b]}",
        "{generate: {temperature: 0.7, top_p: 0.9}}",
        "{metric: perplexity}",
        "{metric: exact_match, generate: {during: true}}",
        "{metric: rouge.rouge_l, generate: {during: true, metrics: [rouge]}}",
        "{metric: classes.f1_macro, generate: {during: true, metrics: [classes]}}",
        "{metric: brevity, generate: {during: true, metrics: [own.py:brevity]}}",
        "{metric: brevity.words, generate: {during: true, metrics: [own.py:brevity]}}",
    ],
)
def test_what_makes_sense_is_taken(tmp_path: Path, text: str) -> None:
    assert recipe_problems(tmp_path, GOOD + f"evaluate: {text}") == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "{generate: {top_p: 0.9}}",
            "evaluate.generate.top_p: nothing is drawn at temperature 0; leave it out, or set temperature to 1",
        ),
        (
            "{generate: {metrics: []}}",
            "evaluate.generate.metrics: nothing to measure the answers by; such as [exact_match]; `generate: null` "
            "answers nothing",
        ),
        (
            "{generate: {metrics: [bleu, exactmatch]}}",
            "evaluate.generate.metrics.1: unknown metric 'exactmatch'; did you mean exact_match?",
        ),
        (
            "{generate: {metrics: [f2]}}",
            "evaluate.generate.metrics.0: unknown metric 'f2'; known: exact_match, numeric, classes, rouge, bleu, or "
            "file.py:name of a function of your own",
        ),
        (
            "{generate: {metrics: [a.py:own, b.py:own]}}",
            "evaluate.generate.metrics.1: a second metric called own; name each metric once",
        ),
        (
            "{generate: {metrics: [a.py:rows]}}",
            "evaluate.generate.metrics.0: a function called rows, which means something else; give it another name",
        ),
        (
            "{metric: f1}",
            "evaluate.metric: 'f1' is not measured; there is loss, accuracy, perplexity",
        ),
        (
            "{metric: retain_loss}",
            "evaluate.metric: 'retain_loss' is not measured; there is loss, accuracy, perplexity; name rows in "
            "evaluate.retain.sources",
        ),
        (
            "{metric: classes.f1_macro, generate: {metrics: [classes]}}",
            "evaluate.metric: classes.f1_macro is measured only before the first step and after the last; set "
            "evaluate.generate.during to true",
        ),
        (
            "{metric: classes.f1, generate: {metrics: [classes, own.py:brevity], during: true}}",
            "evaluate.metric: 'classes.f1' is not measured; there is loss, accuracy, perplexity, classes.accuracy, "
            "classes.precision_macro, classes.recall_macro, classes.f1_macro, brevity; answers are measured by "
            "evaluate.generate.metrics, while training with during: true",
        ),
        (
            "{slices: [a, b, a]}",
            "evaluate.slices.2: 'a' is given twice; name each column once",
        ),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, text: str, found: str) -> None:
    assert recipe_problems(tmp_path, GOOD + f"evaluate: {text}") == [found]


def test_what_is_measured_needs_rows(tmp_path: Path) -> None:
    assert recipe_problems(tmp_path, BLIND + "evaluate: {metric: accuracy}") == [
        "evaluate.metric: needs data.eval; such as `eval: {split: 0.05}`"
    ]
    assert recipe_problems(tmp_path, BLIND + "evaluate: {slices: [a]}") == [
        "evaluate.slices: no row is measured; hold rows out with data.eval, or with data.test and evaluate.generate"
    ]
    assert recipe_problems(tmp_path, BLIND + "evaluate: {slices: [a], generate: {}}") == []


def test_a_resume_takes_slices_that_the_data_was_prepared_with(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, zero=0)
    data = plan.trajectory.data.model_copy(update={"slices": ("kind",)})
    plan = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"data": data})})
    recipe = "model: {scratch: {model_type: llama}}\ndata: {train: [{path: rows.jsonl}], eval: {split: 0.1}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    plan.save(tmp_path / "plan.json")
    assert resumed_plan(tmp_path, ["evaluate.slices=[kind]"], this_machine()).lifecycle.slices == ("kind",)
    with pytest.raises(RecipeError) as caught:
        resumed_plan(tmp_path, ["evaluate.slices=[kind, language]"], this_machine())
    [problem] = caught.value.problems
    assert (problem.message, problem.hint) == ("the run's data was prepared without language", "it has kind")
