"""Index arithmetic over rows of unequal length; pure numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def ragged_ranges(start_R: IntArray, length_R: IntArray) -> tuple[IntArray, IntArray]:
    """Concatenate `range(start[r], start[r] + length[r])` over all rows r.

    Returns:
        (row of each entry, value of each entry), both of length `sum(length_R)`.
    """
    if (length_R == 1).all():  # a step of decodes
        return np.arange(len(length_R), dtype=np.int64), start_R
    owner = np.repeat(np.arange(len(length_R), dtype=np.int64), length_R)
    first_entry = np.cumsum(length_R) - length_R
    value = np.arange(len(owner), dtype=np.int64) + (start_R - first_entry)[owner]
    return owner, value
