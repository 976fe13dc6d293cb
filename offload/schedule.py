"""The schedule of a ring: which unit is loaded into which slot, and when. Pure.

    slots 3, depth 3       pass p                         pass p + 1
    compute                0    1    2    3    4       |  0    1    2 ...
    loading or waiting     1 2  2 3  3 4  4 0  0 1     |  1 2  2 3 ...

Loads run ahead of the computation by `depth - 1` units, across layers and across passes alike: when
the last units of a pass compute, the first ones of the next are being read. Depth 1 loads and
computes in turn.

Ranks that share their slots all carry out the same list. Each loads its piece, and a unit is
gathered, when all pieces are there, before it is computed with:

    rank 0     load 3 (its piece)   gather 1   compute 1   evict 1   load 4 ...
    rank 1     load 3 (its piece)   gather 1   compute 1   evict 1   load 4 ...
                                    both are here            both have evicted what was in the slot
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from offload.ops import Op, OpKind, Schedule


def build_schedule(
    units: Sequence[str], num_slots: int, depth: int, *, gathers: bool = False
) -> Schedule:
    """The schedule that streams `units`, in that order, pass after pass.

    Args:
        units: the streamed ones only; what is resident needs no slot.
        depth: units being computed, loaded or waiting at one time, at most `num_slots`; less than
            that where ranks gather lets the fastest be a unit ahead of the others.
        gathers: several ranks carry it out together, each with its piece of every unit.

    Raises:
        ValueError: a ring that cannot work, or a unit that stands twice.
    """
    units = tuple(units)
    if not 1 <= depth <= num_slots:
        raise ValueError(f"depth {depth} is not between 1 and the {num_slots} slots")
    if len(set(units)) != len(units):
        raise ValueError("a unit stands twice in a pass")
    if len(units) <= num_slots:
        return _everything_stays(units, num_slots, depth, gathers=gathers)
    passes = num_slots // math.gcd(num_slots, len(units))
    prologue = [_load(units, num_slots, position) for position in range(depth)]
    cycle: list[Op] = []
    for position in range(passes * len(units)):
        unit, slot = units[position % len(units)], position % num_slots
        cycle += [*_use(unit, slot, gathers=gathers), Op(OpKind.EVICT, unit, slot)]
        cycle.append(_load(units, num_slots, position + depth))
    return Schedule(
        units=units,
        num_slots=num_slots,
        depth=depth,
        prologue=tuple(prologue),
        cycle=tuple(cycle),
        gathers=gathers,
    )


def _use(unit: str, slot: int, *, gathers: bool) -> list[Op]:
    compute = Op(OpKind.COMPUTE, unit, slot)
    return [Op(OpKind.GATHER, unit, slot), compute] if gathers else [compute]


def _load(units: Sequence[str], num_slots: int, position: int) -> Op:
    return Op(OpKind.LOAD, units[position % len(units)], position % num_slots)


def _everything_stays(
    units: tuple[str, ...], num_slots: int, depth: int, *, gathers: bool
) -> Schedule:
    """As many slots as units: each is loaded once."""
    return Schedule(
        units=units,
        num_slots=num_slots,
        depth=depth,
        prologue=tuple(_load(units, num_slots, position) for position in range(len(units))),
        cycle=tuple(
            op for slot, unit in enumerate(units) for op in _use(unit, slot, gathers=gathers)
        ),
        gathers=gathers,
    )
