"""What a streaming rank does, as data: a sequence of operations on the slots of a ring."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class OpKind(enum.StrEnum):
    """What happens to a slot."""

    LOAD = "load"
    """Start to fill the slot with the unit; the slot must be empty. With several ranks: with this
    one's piece, once all of them have evicted what was there."""
    GATHER = "gather"
    """Wait until the pieces of all ranks are in the slot; only with several ranks."""
    COMPUTE = "compute"
    """Wait for the unit and use it."""
    EVICT = "evict"
    """The unit is not used again; the slot is empty, or this rank has done with it."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation."""

    kind: OpKind
    unit: str
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`prologue` once, then `cycle` for ever.

    A cycle is one pass over the units or, where the ring and the number of units do not divide,
    the few passes after which every unit is back in its slot.
    """

    units: tuple[str, ...]
    """The streamed units in the order of a pass."""
    num_slots: int
    depth: int
    prologue: tuple[Op, ...]
    cycle: tuple[Op, ...]
    gathers: bool = False
    """Several ranks carry it out on the same slots, each with its piece of every unit."""
