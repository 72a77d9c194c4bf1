"""In which order an epoch goes through its rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[num_rows] row numbers, a pure function of what it is given."""
    # NumPy promises that Philox's raw numbers never change, but not what `permutation` makes of them: sort those.
    draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(draws, kind="stable")
