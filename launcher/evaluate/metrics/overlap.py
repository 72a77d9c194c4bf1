"""How much of the reference's wording an answer has: ROUGE by rouge-score, BLEU by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.errors import DataError

_KINDS = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{rouge_1, rouge_2, rouge_l}: the mean F-measure over the rows, 0 to 1, of Porter's stems (Lin 2004).

    Raises:
        DataError: a reference without a Latin letter or digit. rouge-score drops all others, and the row could only
            score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=True)
    for reference in references:
        if not tokenizer.tokenize(reference):
            raise DataError(
                f"evaluate.generate.metrics: rouge: no Latin letter or digit in the reference {reference[:60]!r}",
                hint="measure by bleu, or by a function of your own",
            )
    scorer = RougeScorer(list(_KINDS), tokenizer=tokenizer)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[kind].fmeasure for score in scores) / len(scores) for kind, name in _KINDS.items()}


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of all rows together, 0 to 100, as sacrebleu computes it by default (Post 2018, arXiv:1804.08771)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score(list(answers), [list(references)]).score)
