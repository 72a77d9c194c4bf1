"""What a user may write under `evaluate`: what is measured, when, and what follows from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from launcher.recipe.schema_data import Source
from launcher.recipe.section import Section

METRICS = ("exact_match", "numeric", "classes", "rouge", "bleu")
"""What generated answers can be measured by, beside functions of the user's."""
FIGURES = {
    "classes": ("accuracy", "precision_macro", "recall_macro", "f1_macro"),
    "rouge": ("rouge_1", "rouge_2", "rouge_l"),
}
"""Metrics that give several figures."""


class Generate(Section):
    """Answers in words on `data.test`, compared with the reference."""

    rows: PositiveInt = 200
    """How many of the test rows, the first ones."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    batch_size: PositiveInt = 32
    """Prompts answered at once on one rank."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token; otherwise tokens are drawn, from a seed that is the run's and the row's."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens that have this share of the probability."""
    metrics: tuple[str, ...] = ("exact_match",)
    """What the answers are measured by: `exact_match` (the same words, white space aside), `numeric` (the last number,
    or the one after GSM8K's `####`), `classes` (accuracy, and precision, recall and F1 of each class), `rouge`, `bleu`
    (0 to 100, all others 0 to 1), or `file.py:name` of a function of your own, from a list of answers and a list of
    references to a number or a dictionary of numbers."""
    during: bool = False
    """Also at each evaluation while training, and not only before the first step and after the last."""


class EarlyStopping(Section):
    """When a run has stopped getting better by `evaluate.metric`. Each best one is saved, and becomes the model."""

    patience: PositiveInt = 3
    """So many evaluations in a row without a better one."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Better, as far as patience goes, is better by more than this. The model is the best one by however little."""


class Retain(Section):
    """Forgetting, measured: the loss on rows of what the model could do before, from before the first step on."""

    sources: tuple[Source, ...]
    """Rows such as it was trained on earlier. They are held out: a training row that asks the same is left out."""
    max_rows: PositiveInt | None = 200
    """At most so many of them, the first ones."""
    limit: Annotated[float, Field(gt=0)] = 0.1
    """How far their loss may rise, as a share of what it was before the first step."""
    action: Literal["warn", "stop"] = "warn"
    """What happens beyond it: it is said, or the run ends, and the model is the best one that was within the limit."""


class Evaluate(Section):
    """Measuring on held-out rows while training."""

    every_steps: PositiveInt | None = None
    """Evaluation loss and token accuracy every so many steps, and always at the end. Left out: ten times a run."""
    max_rows: PositiveInt | None = None
    """At most so many evaluation rows."""
    generate: Generate | None = None
    """Answers in words to `data.test`, before the first step and after the last."""
    metric: str = "loss"
    """What the best checkpoint is best by: `loss`, `perplexity`, `accuracy`, `retain_loss`, or with `generate.during`
    one that it measures, such as `exact_match`, `classes.f1_macro` or `rouge.rouge_l`."""
    early_stopping: EarlyStopping | None = None
    """Ends the run when it stops getting better. Left out: it goes on to its end."""
    slices: tuple[str, ...] = ()
    """Columns of the held-out rows, of at most 50 values each, by which the scores are also given, with the gap between
    the best and the worst of the values that 20 rows or more have."""
    retain: Retain | None = None
    """What the model should still be good at afterwards."""
