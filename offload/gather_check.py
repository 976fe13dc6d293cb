"""Proves that ranks which share slots and one schedule keep out of each other's way. Pure.

Each rank carries out the list at its own pace; what it waits for is all that orders it with the
others. Checked, in whatever order the ranks move: nobody computes with a slot into which anybody
has begun to load another unit, nor before every rank has loaded its piece; and there is always one
that can go on, so none waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.ops import Op, OpKind, Schedule
from offload.schedule_check import ScheduleError

Choose = Callable[[Sequence[int]], int]
"""Which of the ranks that can go on goes on next."""


def check_gathering(schedule: Schedule, num_ranks: int, cycles: int, choose: Choose) -> None:
    """Raise `ScheduleError` unless the ranks get through so many cycles, moving as `choose` says.

    A load waits for all ranks to have evicted what was in the slot, a gather for all to have loaded
    (reads end at once: a later end only makes a gather wait longer).
    """
    ops = [*schedule.prologue, *(schedule.cycle * cycles)]
    ranks = [_Rank(schedule.num_slots) for _ in range(num_ranks)]
    while any(rank.at < len(ops) for rank in ranks):
        able = [
            index
            for index, rank in enumerate(ranks)
            if rank.at < len(ops) and _can(ops[rank.at], rank, ranks)
        ]
        if not able:
            stuck = ", ".join(str(ops[rank.at]) for rank in ranks if rank.at < len(ops))
            raise ScheduleError(f"every rank waits for another: {stuck}")
        _move(ops, ranks[choose(able)], ranks)


class _Rank:
    def __init__(self, num_slots: int) -> None:
        self.at = 0
        self.loads = [0] * num_slots
        """Into each slot so far."""
        self.evictions = [0] * num_slots


def _can(op: Op, rank: _Rank, ranks: Sequence[_Rank]) -> bool:
    match op.kind:
        case OpKind.LOAD:
            return all(other.evictions[op.slot] >= rank.loads[op.slot] for other in ranks)
        case OpKind.GATHER:
            return all(other.loads[op.slot] >= rank.loads[op.slot] for other in ranks)
        case OpKind.COMPUTE | OpKind.EVICT:
            return True


def _move(ops: Sequence[Op], rank: _Rank, ranks: Sequence[_Rank]) -> None:
    op = ops[rank.at]
    rank.at += 1
    match op.kind:
        case OpKind.LOAD:
            rank.loads[op.slot] += 1
        case OpKind.COMPUTE:
            _check_whole(op, rank, ranks)
        case OpKind.EVICT:  # until then it was computed with
            _check_whole(op, rank, ranks)
            rank.evictions[op.slot] += 1
        case OpKind.GATHER:
            pass


def _check_whole(op: Op, rank: _Rank, ranks: Sequence[_Rank]) -> None:
    if any(other.loads[op.slot] != rank.loads[op.slot] for other in ranks):
        raise ScheduleError(f"{op}: the slot does not hold this unit's piece of every rank")
