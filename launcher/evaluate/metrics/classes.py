"""Accuracy, precision, recall and F1 by class, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.errors import DataError

NONE_OF_THEM = "(none of them)"
"""The class of an answer that names no class: always wrong, and no part of the means."""
MOST_CLASSES = 200
"""Beyond it the references are answers and no classes."""


def class_figures(answers: Sequence[str], references: Sequence[str], labels: Sequence[str] = ()) -> dict[str, Any]:
    """{accuracy, precision_macro, recall_macro, f1_macro, of: {class: {precision, recall, f1, rows}}}, 0 to 1.

    The classes are `labels`, to the letter, or where none are given the references themselves, white space aside.
    Macro is the plain mean over the classes that a reference has. A precision or recall of nothing at all counts as 0.

    Raises:
        DataError: more different references than classes can be.
    """
    truth, said = (list(texts) if labels else list(map(_tidy, texts)) for texts in (references, answers))
    names = list(labels) or sorted(set(truth))
    if not labels and len(names) > MOST_CLASSES:
        raise DataError(
            f"evaluate.generate.metrics: classes: {len(names)} different references are no classes",
            hint=f"at most {MOST_CLASSES}; measure by exact_match",
        )
    # Imported here: scikit-learn brings SciPy, a second of a start that may not need it.
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    known = set(names)
    found = [answer if answer in known else NONE_OF_THEM for answer in said]
    columns = precision_recall_fscore_support(truth, found, labels=names, average=None, zero_division=0.0)
    present = [name for name in names if name in set(truth)]
    macro = precision_recall_fscore_support(truth, found, labels=present, average="macro", zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(truth, found)),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
        "of": {
            name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
            for name, precision, recall, f1, rows in zip(names, *columns, strict=True)
        },
    }


def _tidy(text: str) -> str:
    return " ".join(text.split())
