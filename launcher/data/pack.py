"""Putting documents into rows of fixed capacity with little room left over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.integer], capacity: int) -> list[NDArray[np.int32]]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still has room for it.

    `lengths` [D] in tokens, each from 1 to `capacity`. Returns for each row the indices of its documents, ascending;
    rows are ordered by their first document. Every document is in exactly one row, whole. Deterministic: equal lengths
    go by index, equal rows by the latest used. At most 11/9 of the fewest rows possible, plus one (Johnson, 1974).

    The rows with room r are a stack, and the set of such r is the bits of one integer: the fullest row with room for n
    tokens is its lowest set bit from n up. D documents cost O(D log D + D * capacity / 64).
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be 1 to {capacity}, got {int(lengths.min())} to {int(lengths.max())}")
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        if left := room - length:
            rows_by_room[left].append(row)
            rooms |= 1 << left
    return [np.array(sorted(row), dtype=np.int32) for row in sorted(rows, key=min)]
