"""Documents on their way to the tokenizer: their strings, and which of the tokens that come back are learned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from launcher.data.masks.turns import Turn
from launcher.data.masks.verbatim import Verbatim
from launcher.errors import DataError

Masked = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""[T] token ids and [T] 1 where a token is learned."""


class Sheet:
    """Collects documents, and tokenizes them all at once."""

    def __init__(self, verbatim: Verbatim) -> None:
        self._verbatim = verbatim
        self._documents: list[list[str]] = []
        self._num_strings = 0
        self._whole: list[int] = []
        """Strings of which every token is learned."""
        self._ends: list[tuple[int, int, int]] = []
        """Strings that are learned up to an end of turn, how many control tokens come before it there, and its id."""

    def __len__(self) -> int:
        return len(self._documents)

    def add(self, turns: Sequence[Turn]) -> None:
        """A document with the text of the last of `turns`, in which the others stand too.

        Its strings are what comes before an answer and the answer, in turn. The end of turn begins what comes before
        the next answer, since some take the white space behind them; the last answer and what follows are one string.
        """
        text, done, strings = turns[-1].text, 0, []
        for turn in turns[:-1]:
            strings += [text[done : turn.start], text[turn.start : turn.end]]
            self._whole.append(self._num_strings + len(strings) - 1)
            self._ends.append((self._num_strings + len(strings), 0, self._id(turn)))
            done = turn.end
        last = turns[-1]
        strings += [text[done : last.start], text[last.start :]]
        self._ends.append((self._num_strings + len(strings) - 1, last.num_marks, self._id(last)))
        self._push(strings)

    def add_text(self, begin: str, text: str) -> None:
        """A document of which all but its `begin` is learned."""
        self._whole.append(self._num_strings + 1)
        self._push([begin, text])

    def tokenize(self) -> list[Masked | DataError]:
        """Ids and mask of each document, or why it has none. The arrays are views of one for all."""
        tokens = self._verbatim.tokenize(self._documents)
        ids, starts = tokens.ids, tokens.starts
        whole = np.array(self._whole, dtype=np.int64)
        strings, num_before, expected = np.array(self._ends, dtype=np.int64).reshape(-1, 3).T
        controls = self._verbatim.positions(ids)
        places = np.searchsorted(controls, starts[strings]) + num_before
        ends = np.append(controls, -1)[np.minimum(places, len(controls))]
        lost = (ends < starts[strings]) | (np.append(ids, -1)[ends] != expected)
        edges = np.zeros(len(ids) + 1, dtype=np.int8)
        np.add.at(edges, np.concatenate([starts[whole], starts[strings]]), 1)
        np.add.at(edges, np.concatenate([starts[whole + 1], np.where(lost, starts[strings], ends + 1)]), -1)
        mask = np.cumsum(edges[:-1], dtype=np.int8).view(np.uint8)
        borders = np.cumsum([0, *map(len, self._documents)])
        refused = tokens.refused
        for document in np.searchsorted(borders, strings[lost], "right") - 1:
            refused.setdefault(int(document), _no_end())
        at = starts[borders].tolist()
        return [
            refused[number] if number in refused else (ids[begin:end], mask[begin:end])
            for number, (begin, end) in enumerate(pairwise(at))
        ]

    def _push(self, strings: list[str]) -> None:
        self._documents.append(strings)
        self._num_strings += len(strings)

    def _id(self, turn: Turn) -> int:
        return self._verbatim.id_of[turn.text[turn.end : turn.after]]


def _no_end() -> DataError:
    return DataError(
        "the tokenizer does not read the end of the turn as the control token that the chat template writes",
        hint="its tokenizer.json does not fit its chat template: give another as model.tokenizer",
    )
