"""How a running group follows a drifting load: new shares at once, a few experts moved at a time.

Pure: from the recent load and the present placement to the next one and the moves that lead there.
Shares cost nothing (a table), so they are always solved anew. Weights move only when shares alone
do not level the load, at most `max_moves` of a layer at a time, and only copies that the move can
do without are given up: every expert keeps a home at every moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe.load_split import split_load
from moe.node_packing import ExpertRanks
from moe.placement import LayerPlacement, with_shares

Loads = npt.NDArray[np.float64]
_CANDIDATES = 4
_QUICK_SWEEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert's weights to bring to a rank, into a slot that is free or given up."""

    expert: int
    target: int
    gives_up: int | None
    """The expert whose copy on `target` makes room; None: a free slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do about one layer."""

    placement: LayerPlacement
    """After the moves; with the old homes when there are none."""
    moves: tuple[Move, ...]
    before: float
    """Imbalance as it is, with the old shares."""
    after: float
    """Imbalance to expect."""


def follow(
    load_E: Sequence[float] | Loads,
    current: LayerPlacement,
    ranks: ExpertRanks,
    *,
    max_moves: int,
    tolerance: float = 0.03,
    min_gain: float = 0.01,
) -> Step:
    """The next placement of one layer.

    Args:
        load_E: recent rows per expert.
        max_moves: slabs that may travel now.
        tolerance: imbalance over 1 that is left alone.
        min_gain: how much of the imbalance one slab must take away to be worth its journey.
    """
    load = np.asarray(load_E, dtype=np.float64)
    before = current.imbalance(load, ranks.num_ranks)
    best = with_shares(load, current.homes, ranks.num_ranks)
    peak = best.imbalance(load, ranks.num_ranks)
    moves: list[Move] = []
    while len(moves) < max_moves and peak > 1 + tolerance:
        found = _best_move(load, best, ranks)
        if found is None:
            break
        move, placement = found
        lower = placement.imbalance(load, ranks.num_ranks)
        if lower > peak - min_gain:
            break
        best, peak = placement, lower
        moves.append(move)
    return Step(placement=best, moves=tuple(moves), before=before, after=peak)


def apply_move(homes: Sequence[Sequence[int]], move: Move) -> list[list[int]]:
    """The homes after one move."""
    after = [list(ranks) for ranks in homes]
    if move.gives_up is not None:
        after[move.gives_up].remove(move.target)
    after[move.expert].append(move.target)
    return after


def _best_move(
    load: Loads, placement: LayerPlacement, ranks: ExpertRanks
) -> tuple[Move, LayerPlacement] | None:
    """The best copy of something on the busiest rank for one of the idlest ranks."""
    filled = placement.rank_loads(load, ranks.num_ranks)
    busy = int(filled.argmax())
    hottest = sorted(
        (expert for expert, homes in enumerate(placement.homes) if busy in homes),
        key=lambda expert: -_part(load, placement, expert, busy),
    )[:_CANDIDATES]
    # Ranks of the busy node first: a copy there adds no traffic.
    idlest = sorted(
        (rank for rank in range(ranks.num_ranks) if filled[rank] < filled.mean()),
        key=lambda rank: filled[rank] * (1.0 if ranks.nodes[rank] == ranks.nodes[busy] else 1.02),
    )[:_CANDIDATES]
    best: tuple[float, Move] | None = None
    for rank in idlest:
        for gives_up in _room(load, placement, rank, ranks.slots[rank]):
            for expert in hottest:
                if rank in placement.homes[expert] or expert == gives_up:
                    continue
                move = Move(expert=expert, target=rank, gives_up=gives_up)
                peak = _peak_after(load, placement, move, filled)
                if best is None or peak < best[0]:
                    best = (peak, move)
    if best is None:
        return None
    homes = apply_move(placement.homes, best[1])
    return best[1], with_shares(load, homes, ranks.num_ranks)


def _peak_after(load: Loads, placement: LayerPlacement, move: Move, filled: Loads) -> float:
    """Imbalance after a move, from a few rounds of re-splitting: good enough to rank moves."""
    homes = apply_move(placement.homes, move)
    start = [list(shares) for shares in placement.shares]
    start[move.expert].append(0.0)
    if move.gives_up is not None:
        index = placement.homes[move.gives_up].index(move.target)
        lost = start[move.gives_up].pop(index)
        rest = len(start[move.gives_up])
        start[move.gives_up] = [share + lost / rest for share in start[move.gives_up]]
    shares = split_load(load, homes, len(filled), start=start, sweeps=_QUICK_SWEEPS)
    after = LayerPlacement(homes=tuple(map(tuple, homes)), shares=shares)
    return after.imbalance(load, len(filled))


def _room(load: Loads, placement: LayerPlacement, rank: int, slots: int) -> list[int | None]:
    """What a rank could give up for a newcomer: nothing, or copies it has the least use of."""
    held = placement.experts_of(rank)
    if len(held) < slots:
        return [None]
    spare = [expert for expert in held if len(placement.homes[expert]) > 1]
    spare.sort(key=lambda expert: (_part(load, placement, expert, rank), expert))
    return list(spare[:2])


def _part(load: Loads, placement: LayerPlacement, expert: int, rank: int) -> float:
    """Rows of an expert that one of its ranks takes."""
    index = placement.homes[expert].index(rank)
    return float(load[expert]) * placement.shares[expert][index]
