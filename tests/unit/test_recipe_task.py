"""What a sequence classification has no use for is refused where it is written, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.plan.facts import ClusterFacts, NodeFacts
from launcher.plan.layout import resolve_layout
from launcher.plan.resolve_data import resolve_data
from launcher.recipe.load import LoadedRecipe, load

RECIPE = """\
task: sequence_classification
model: {scratch: {model_type: bert, vocab_size: 300}}
data:
  train: [{path: rows.jsonl}]
  eval: {split: 0.2}
"""


def loaded(folder: Path, *overrides: str) -> LoadedRecipe:
    (folder / "rows.jsonl").touch()
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return load(str(folder / "r.yaml"), overrides)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("data.packing=true", "reads one document a row", "set it to false"),
        ("data.test.rows=5", "no row is answered in words", "data.eval"),
        ("data.too_long=split", "a part of a text need not be of the text's class", "truncate_end"),
        ("data.supervise=last", "no turns of a conversation", "leave it out"),
        ("data.system_turns=drop", "no turns of a conversation", "leave it out"),
        ("data.special_tokens=strip", "without a chat template", "leave it out"),
        ("data.augment.drop_system=0.5", "no turns of a conversation", "leave it out"),
        ("data.augment.truncate_turns=0.5", "no turns of a conversation", "leave it out"),
        ("model.add_tokens=['<a>']", "without a chat template", "add them to the model before"),
        ("model.template_kwargs={thinking: false}", "without a chat template", "leave it out"),
        ("model.attention=flash", "padded rows", "leave it out"),
        ("model.kernels=fused", "padded rows", "leave it out"),
        ("evaluate.metric=perplexity", "'perplexity' is not measured", "f1_macro"),
    ],
)
def test_what_would_do_nothing_is_refused(override: str, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, override)
    [problem] = caught.value.problems
    assert override.startswith(problem.key)
    assert message in problem.message
    assert hint in str(problem.hint)


def test_answers_in_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, "evaluate.generate={}", "data.test.rows=5")
    assert {problem.key for problem in caught.value.problems} == {"evaluate.generate", "data.test"}


def test_what_is_measured_can_be_chosen_by(tmp_path: Path) -> None:
    for metric in ("loss", "accuracy", "f1_macro", "precision_macro", "recall_macro"):
        assert loaded(tmp_path, f"evaluate.metric={metric}").recipe.evaluate.metric == metric
    with pytest.raises(RecipeError, match="f1_macro"):
        loaded(tmp_path, "evaluate.metric=f1_macro", "task=causal_lm")


def test_the_planner_decides_what_is_left(tmp_path: Path) -> None:
    """Also classes for strata without data.label: a prompt's answer may be one."""
    recipe = loaded(tmp_path, "data.stratify=true", "data.train.0.format=prompt_completion")
    data, reasons = resolve_data(recipe), dict[str, str]()
    assert (data.packing, data.head) == (False, ())
    gpus = ClusterFacts((NodeFacts("a", 8, 2),))
    layout = resolve_layout(recipe.recipe, gpus, "bf16", 10**8, reasons)
    assert (layout.attention, layout.kernels) == ("sdpa", "eager")
    assert "padding mask" in reasons["model.attention"]
    assert "transformers" in reasons["model.kernels"]
    assert resolve_data(loaded(tmp_path, "task=causal_lm")).head is None
