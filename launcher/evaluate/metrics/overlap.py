"""How much of the reference's wording an answer has: ROUGE by rouge-score, BLEU by sacrebleu."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.errors import DataError

_HEARD = re.compile("[a-z0-9]")
"""What rouge-score reads of a text in small letters."""
_KINDS = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{rouge_1, rouge_2, rouge_l}: the mean F-measure over the rows, 0 to 1, of Porter's stems (Lin 2004).

    Raises:
        DataError: a reference of which most letters are not Latin. rouge-score drops those, and would compare what is
            left, such as a year.
    """
    from rouge_score.rouge_scorer import RougeScorer

    for reference in references:
        if 2 * len(_HEARD.findall(reference.lower())) < max(1, sum(map(str.isalnum, reference))):
            raise DataError(
                f"evaluate.generate.metrics: rouge reads Latin letters and digits, and no others: {reference[:60]!r}",
                hint="measure by bleu, or by a function of your own",
            )
    scorer = RougeScorer(list(_KINDS), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[kind].fmeasure for score in scores) / len(scores) for kind, name in _KINDS.items()}


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of all rows together, 0 to 100, as sacrebleu computes it by default (Post 2018, arXiv:1804.08771)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score(list(answers), [list(references)]).score)
