"""What a sequence classification predicts of held-out rows, and how good that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from launcher.evaluate import answers
from launcher.evaluate.metrics.classes import class_figures


@dataclass(frozen=True)
class Prediction:
    """Of one row."""

    where: str
    """`file:line`."""
    ids: list[int]
    label: int
    """Number of its class."""
    probabilities: list[float]
    """Of each class, in their order."""

    @property
    def predicted(self) -> int:
        """Number of the likeliest class, the first of equals."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def place(self) -> tuple[str, int, str]:
        """By which rows are in the order of their files."""
        file, _, line = self.where.rpartition(":")
        return file, int(line) if line.isdecimal() else 0, self.where


def class_scores(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, Any]:
    """{accuracy, precision_macro, recall_macro, f1_macro, classes: {name: {precision, recall, f1, rows}}}, 0 to 1, by
    scikit-learn; the means are over the classes that rows are of."""
    said = [classes[one.predicted] for one in predictions]
    figures = class_figures(said, [classes[one.label] for one in predictions], classes)
    return {name: figure for name, figure in figures.items() if name != "of"} | {"classes": figures["of"]}


def as_jsonl(predictions: Sequence[Prediction], classes: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> bytes:
    """A line {where, text, label, predicted, probabilities} each; the text as the model has read it, cut where it is
    cut for it."""
    lines = [
        {
            "where": one.where,
            "text": tokenizer.decode(one.ids, skip_special_tokens=True),
            "label": classes[one.label],
            "predicted": classes[one.predicted],
            "probabilities": dict(zip(classes, one.probabilities, strict=True)),
        }
        for one in predictions
    ]
    return answers.as_jsonl(lines)
