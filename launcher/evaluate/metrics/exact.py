"""Answers that are right or wrong: the same words, or the same number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from launcher.errors import DataError

_FINAL = "####"
"""Stands before the result of a solution in GSM8K (Cobbe et al. 2021, arXiv:2110.14168)."""
_NUMBER = re.compile(
    r"""
    (?: (?<![\w.)]) [-−] )?                              # after a digit or a word it is a dash
    \$?
    (?: (?: [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )? | \.[0-9]+ )
    """,
    re.VERBOSE,
)
"""With thousands set apart by commas or not, with decimals or without."""


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers with the words of their reference, however they are spaced."""
    return _share([same_words(answer, reference) for answer, reference in zip(answers, references, strict=True)])


def numeric(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers whose number is that of their reference; see `number_of`.

    Raises:
        DataError: a reference without a number.
    """
    wordy = next((reference for reference in references if number_of(reference) is None), None)
    if wordy is not None:
        shown = f"{wordy[:60]}..." if len(wordy) > 60 else wordy
        raise DataError(
            f"evaluate.generate.metrics: numeric: there is no number in the reference {shown!r}",
            hint="leave such rows out of data.test, or measure by exact_match",
        )
    return _share([same_number(answer, reference) for answer, reference in zip(answers, references, strict=True)])


def same_words(answer: str, reference: str) -> bool:
    """Whether both say the same, white space aside."""
    return answer.split() == reference.split()


def same_number(answer: str, reference: str) -> bool:
    """Whether the answer has a number, and it is the reference's: 72, 72.0 and $72 are one, and so are 50 and 50%."""
    found = number_of(answer)
    return found is not None and found == number_of(reference)


def number_of(text: str) -> Decimal | None:
    """The number that a text comes to: the first after its last `####`, otherwise the last; None where it has none."""
    _, final, after = text.rpartition(_FINAL)
    found = (_numbers(after)[:1] if final else []) or _numbers(text)[-1:]
    return found[0] if found else None


def _numbers(text: str) -> list[Decimal]:
    found = [match.group().replace("−", "-") for match in _NUMBER.finditer(text)]
    return [Decimal(re.sub("[$,]", "", number)) for number in found]


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
