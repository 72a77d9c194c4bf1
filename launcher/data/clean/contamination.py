"""Benchmarks that must stay unseen: does a row share 13 words in a row with one of their texts?

As for GPT-3 (Brown et al. 2020, appendix C): lower case, without punctuation, 13 words. A benchmark's text of fewer
words is found where a whole row has the same words and no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.data.clean.words import ngrams, words

NUM_WORDS = 13
_BITS_A_RUN = 16
"""At least, of the table that is asked first: of 16 runs of words that no benchmark has, one goes on to the search."""


@dataclass(frozen=True, eq=False)
class Contamination:
    """The runs of 13 words in all benchmarks; 10 to 12 bytes each. Picklable."""

    hashes: NDArray[np.uint64]
    """[H] of each run, sorted, each once."""
    present: NDArray[np.uint8]
    """Bit b is set where a hash begins with the bits b. Hardly any of a row's 100 runs is there, and searching for all
    of them among 40 million hashes takes 180 microseconds; with this table, about 20."""

    def shared(self, text: str) -> str | None:
        """The first 13 words in a row of `text` that a benchmark has too; None if there are none."""
        row = words(text)
        runs = ngrams(row, NUM_WORDS)
        first_bits = runs >> np.uint64(64 - _log2(len(self.present) * 8))
        maybe = np.flatnonzero(self.present[first_bits >> np.uint64(3)] >> (first_bits & np.uint64(7)) & np.uint64(1))
        if len(maybe) == 0 or len(self.hashes) == 0:
            return None
        candidates = runs[maybe]
        found = maybe[self.hashes.take(np.searchsorted(self.hashes, candidates), mode="clip") == candidates]
        return " ".join(row[found[0] : found[0] + NUM_WORDS]) if len(found) else None


def build(texts: Iterable[str]) -> Contamination:
    """The runs of words of all `texts`, read once."""
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *(ngrams(words(text), NUM_WORDS) for text in texts)])
    hashes.sort()
    hashes = hashes[_firsts(hashes)]
    num_bits = 1 << max(10, _log2(max(len(hashes), 1)) + _log2(_BITS_A_RUN) + 1)
    first_bits = hashes >> np.uint64(64 - _log2(num_bits))
    bytes_ = first_bits >> np.uint64(3)
    starts = _firsts(bytes_)
    present = np.zeros(num_bits // 8, dtype=np.uint8)
    if len(hashes):
        bits = np.uint8(1) << (first_bits & np.uint64(7)).astype(np.uint8)
        present[bytes_[starts]] = np.bitwise_or.reduceat(bits, starts)
    return Contamination(hashes, present)


def _firsts(ascending: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each value stands first. (`np.unique` of 31 million hashes takes NumPy 2.4 a minute, sorting 3 s.)"""
    return np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])[: len(ascending)])


def _log2(number: int) -> int:
    return number.bit_length() - 1
