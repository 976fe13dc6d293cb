"""Proves a schedule safe by running it on slots that only remember what they hold. Pure.

Checked: nothing is used before it is loaded, no load into a slot that holds something, nothing
evicted that is not there, no unit larger than a slot, never more bytes in slots than the budget,
never more units under way than the depth, every unit computed once a pass and in order; where
ranks share slots, nothing is used before its pieces are gathered. The slots are the same after a
cycle as before it, so what holds for one cycle holds for all. That several ranks which carry the
list out at their own pace keep out of each other's way is proved in `gather_check.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from offload.ops import Op, OpKind, Schedule


class ScheduleError(Exception):
    """What a schedule does wrong, and at which operation."""


_NONE_HELD: Mapping[str, int] = MappingProxyType({})


def check_schedule(
    schedule: Schedule,
    sizes: Mapping[str, int],
    *,
    slot_bytes: int,
    budget_bytes: int,
    held: Mapping[str, int] = _NONE_HELD,
) -> None:
    """Raise `ScheduleError` unless the schedule is safe.

    Args:
        sizes: bytes of every streamed unit.
        slot_bytes: bytes of one slot.
        budget_bytes: what the ring may take.
        held: bytes of each unit that stay beside the slots, as they are stored.
    """
    held_bytes = sum(held.values())
    if schedule.num_slots * slot_bytes + held_bytes > budget_bytes:
        raise ScheduleError(
            f"{schedule.num_slots} slots of {slot_bytes} bytes and {held_bytes} bytes of records "
            f"exceed {budget_bytes} bytes"
        )
    for unit, num_bytes in held.items():
        if not 0 <= num_bytes <= sizes.get(unit, -1):
            raise ScheduleError(f"{num_bytes} bytes are held of {unit}, which does not stream so")
    ring = _Ring(schedule, sizes, slot_bytes)
    for op in schedule.prologue:
        if op.kind is not OpKind.LOAD:
            raise ScheduleError(f"{op} is not a load and stands before the first pass")
        ring.apply(op)
    before = ring.held()
    for op in schedule.cycle:
        ring.apply(op)
    if ring.held() != before:
        raise ScheduleError("the slots differ after a cycle, so it cannot be repeated")
    if ring.num_computed % max(1, len(schedule.units)):
        raise ScheduleError("a cycle ends in the middle of a pass")
    if schedule.units and not ring.num_computed:
        raise ScheduleError("a cycle computes nothing")


class _Ring:
    def __init__(self, schedule: Schedule, sizes: Mapping[str, int], slot_bytes: int) -> None:
        self._schedule = schedule
        self._sizes = sizes
        self._slot_bytes = slot_bytes
        self._slots: list[str | None] = [None] * schedule.num_slots
        self._whole: set[int] = set()
        # Where every unit has its slot for good, the depth bounds nothing.
        self._most = max(schedule.depth, 0)
        if len(schedule.units) <= schedule.num_slots:
            self._most = schedule.num_slots
        self.num_computed = 0

    def held(self) -> tuple[str | None, ...]:
        return tuple(self._slots)

    def apply(self, op: Op) -> None:
        if not 0 <= op.slot < len(self._slots):
            raise ScheduleError(f"{op}: there is no such slot")
        held = self._slots[op.slot]
        match op.kind:
            case OpKind.LOAD:
                self._load(op, held)
            case OpKind.GATHER:
                if held != op.unit or not self._schedule.gathers:
                    raise ScheduleError(f"{op}: the slot holds {held}, nobody's piece of it")
                self._whole.add(op.slot)
            case OpKind.COMPUTE:
                self._compute(op, held)
            case OpKind.EVICT:
                if held != op.unit:
                    raise ScheduleError(f"{op}: the slot holds {held}")
                self._slots[op.slot] = None
                self._whole.discard(op.slot)

    def _load(self, op: Op, held: str | None) -> None:
        if held is not None:
            raise ScheduleError(f"{op}: the slot still holds {held}")
        if op.unit in self._slots:
            raise ScheduleError(f"{op}: the unit is in another slot already")
        if self._sizes[op.unit] > self._slot_bytes:
            raise ScheduleError(f"{op}: {self._sizes[op.unit]} bytes do not fit {self._slot_bytes}")
        self._slots[op.slot] = op.unit
        if sum(slot is not None for slot in self._slots) > self._most:
            raise ScheduleError(f"{op}: more than {self._most} units are under way")

    def _compute(self, op: Op, held: str | None) -> None:
        if held != op.unit:
            raise ScheduleError(f"{op}: the slot holds {held}")
        if self._schedule.gathers and op.slot not in self._whole:
            raise ScheduleError(f"{op}: it is not gathered")
        expected = self._schedule.units[self.num_computed % len(self._schedule.units)]
        if op.unit != expected:
            raise ScheduleError(f"{op}: {expected} comes next")
        self.num_computed += 1
