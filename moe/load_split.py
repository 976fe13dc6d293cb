"""How the rows of experts with several copies are divided, so that the busiest rank is least busy.

Minimising the sum of squared rank loads over all divisions is a convex problem whose constraints
separate by expert, so giving one expert after another its best division, the others held fixed,
converges to the optimum; that optimum also has the smallest maximum. The best division of one
expert is water-filling: raise the emptiest of its ranks to a common level until its rows are used
up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_SWEEPS = 200
_TOLERANCE = 1e-5


def split_load(
    load_E: Sequence[float] | npt.NDArray[np.float64],
    homes: Sequence[Sequence[int]],
    num_ranks: int,
    *,
    start: Sequence[Sequence[float]] | None = None,
    sweeps: int = _SWEEPS,
) -> tuple[tuple[float, ...], ...]:
    """Shares of each expert's copies, parallel to `homes`; each row sums to 1.

    Args:
        load_E: rows per expert, not negative.
        homes: distinct ranks of each expert, at least one.
        start: shares to begin with; None: equal ones.
        sweeps: rounds over all experts at most; the first few do most of the work.
    """
    load = [float(value) for value in load_E]
    filled = np.zeros(num_ranks)
    begin = start or [[1.0 / len(ranks)] * len(ranks) for ranks in homes]
    parts = [np.asarray(row) * rows for row, rows in zip(begin, load, strict=True)]
    for part, ranks in zip(parts, homes, strict=True):
        filled[list(ranks)] += part
    movable = [expert for expert, ranks in enumerate(homes) if len(ranks) > 1 and load[expert]]
    scale = max(float(filled.mean()), 1e-300)
    for _ in range(sweeps):
        moved = 0.0
        for expert in movable:
            ranks = list(homes[expert])
            others = filled[ranks] - parts[expert]
            level = _fill(others, load[expert])
            moved = max(moved, float(np.abs(level - parts[expert]).max()))
            parts[expert] = level
            filled[ranks] = others + level
        if moved < _TOLERANCE * scale:
            break
    return tuple(_shares(part, rows) for part, rows in zip(parts, load, strict=True))


def source_shares(
    homes: Sequence[int], shares: Sequence[float], nodes: Sequence[int], source: int
) -> tuple[float, ...]:
    """What `source`'s own rows of one expert should take of each copy, if all nodes send alike.

    Every node serves itself first, as far as the total shares allow; the rest goes to where room
    is left. Summed over the nodes this gives exactly `shares`: balance is kept, fewer rows travel.
    """
    all_nodes = sorted(set(nodes))
    quota = 1.0 / len(all_nodes)
    at_home = {
        node: sum(share for rank, share in zip(homes, shares, strict=True) if nodes[rank] == node)
        for node in all_nodes
    }
    own = {node: min(quota, total) for node, total in at_home.items()}
    unserved = sum(quota - own[node] for node in all_nodes)
    taken = []
    for rank, share in zip(homes, shares, strict=True):
        node, total = nodes[rank], at_home[nodes[rank]]
        part = share / total if total else 0.0
        mine = own[node] * part if node == source else 0.0
        left = (total - own[node]) * part
        mine += left * (quota - own[source]) / unserved if unserved > 1e-12 else 0.0
        taken.append(mine / quota)
    whole = sum(taken)
    return tuple(value / whole for value in taken) if whole else tuple(shares)


def _fill(others: npt.NDArray[np.float64], rows: float) -> npt.NDArray[np.float64]:
    """Water-filling: add `rows` in all so that the lowest levels become equal."""
    order = np.argsort(others, kind="stable")
    levels = others[order]
    sums = np.cumsum(levels)
    counts = np.arange(1, len(levels) + 1)
    heights = (sums + rows) / counts
    # As many copies as lie below the water level that they themselves give.
    used = int(np.flatnonzero(levels <= heights)[-1])
    added: npt.NDArray[np.float64] = np.maximum(heights[used] - others, 0.0)
    return added


def _shares(part: npt.NDArray[np.float64], rows: float) -> tuple[float, ...]:
    total = float(part.sum())
    # Rows that drown in the rounding of a rank's load leave nothing to divide by.
    if len(part) == 1 or total < 0.5 * rows or not total:
        return tuple([1.0 / len(part)] * len(part))
    return tuple(float(value) for value in part / total)
