"""Last touches on a placement: exchange pairs of experts until no rank stands out.

Greedy packing leaves the busiest rank a few percent above the mean when no hot expert's copies
reach it. Exchanging two experts of one node costs no traffic, so those come first; exchanges across
nodes are tried only when the node as a whole is too busy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe.load_split import split_load

Homes = list[list[int]]
_ROUNDS = 48
GOOD_ENOUGH = 1.002


def polish(load: npt.NDArray[np.float64], homes: Homes, nodes: Sequence[int]) -> Homes:
    """The homes after all exchanges that lower the busiest rank; the same number of slots each."""
    num_ranks = len(nodes)
    best = [list(ranks) for ranks in homes]
    best_peak = _peak(load, best, num_ranks)
    for _ in range(_ROUNDS):
        if best_peak <= GOOD_ENOUGH:
            break
        found = _exchange(load, best, nodes)
        if found is None:
            break
        peak = _peak(load, found, num_ranks)
        if peak >= best_peak - 1e-6:
            break
        best, best_peak = found, peak
    return best


def _peak(load: npt.NDArray[np.float64], homes: Homes, num_ranks: int) -> float:
    filled = _rank_loads(load, homes, num_ranks)[0]
    return float(filled.max() / filled.mean()) if filled.any() else 1.0


def _rank_loads(
    load: npt.NDArray[np.float64], homes: Homes, num_ranks: int
) -> tuple[npt.NDArray[np.float64], list[dict[int, float]]]:
    """Load of each rank, and of each expert on it."""
    shares = split_load(load, homes, num_ranks)
    filled = np.zeros(num_ranks)
    parts: list[dict[int, float]] = [{} for _ in range(num_ranks)]
    for expert, (ranks, split) in enumerate(zip(homes, shares, strict=True)):
        for rank, share in zip(ranks, split, strict=True):
            filled[rank] += share * load[expert]
            parts[rank][expert] = share * load[expert]
    return filled, parts


def _exchange(load: npt.NDArray[np.float64], homes: Homes, nodes: Sequence[int]) -> Homes | None:
    """The exchange with the busiest rank that lowers the pair's maximum most; own node first."""
    filled, parts = _rank_loads(load, homes, len(nodes))
    busy = int(filled.argmax())
    for same_node in (True, False):
        best: tuple[float, int, int, int] | None = None
        for other in range(len(nodes)):
            if other == busy or (nodes[other] == nodes[busy]) is not same_node:
                continue
            for given, given_load in parts[busy].items():
                for taken, taken_load in parts[other].items():
                    shift = given_load - taken_load
                    top = max(filled[busy] - shift, filled[other] + shift)
                    if shift <= 0 or top >= filled[busy] * (1 - 1e-4):
                        continue
                    if other in homes[given] or busy in homes[taken]:
                        continue
                    if best is None or top < best[0]:
                        best = (float(top), other, given, taken)
        if best is not None:
            _, other, given, taken = best
            swapped = [list(ranks) for ranks in homes]
            swapped[given] = [other if rank == busy else rank for rank in homes[given]]
            swapped[taken] = [busy if rank == other else rank for rank in homes[taken]]
            return swapped
    return None
