"""Runs any schedule on any link: the ring of slots through which streamed units pass.

One thread acquires and releases. A forward pass may leave a unit out (no logits in a step that
samples nothing) or ask twice; the ring then takes up the schedule where that unit is computed, and
keeps what already lies or arrives in the right slot. Only speed depends on the guess: a unit is
used when its slot holds it, whole, and at no other time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.base.errors import InternalError
from offload.link import Link, LinkStats
from offload.ops import Op, OpKind, Schedule

if TYPE_CHECKING:
    import torch


class Ring:
    """The slots, and where in the schedule they are; reading begins at once."""

    def __init__(self, schedule: Schedule, link: Link) -> None:
        self._link = link
        self._cycle = schedule.cycle
        self._slots: list[str | None] = [None] * schedule.num_slots
        self._computes, self._expected = _computations(schedule)
        self._units = frozenset(schedule.units)
        self._held: str | None = None
        self._at = 0
        self.num_jumps = 0
        """How often a pass went on elsewhere than foreseen."""
        for op in schedule.prologue:
            self._apply(op)

    def __contains__(self, unit: str) -> bool:
        return unit in self._units

    @property
    def stats(self) -> LinkStats:
        """What the link has done."""
        return self._link.stats

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors, valid until `release`; waits for them.

        Raises:
            InternalError: another unit of the ring has not been released.
            WeightStreamError, CorruptWeightsError: as `Link.wait`.
        """
        if self._held is not None:
            raise InternalError(f"{self._held} is not released and {unit} is asked for.")
        slot = self._place(unit)
        try:
            self._link.wait(unit, slot)
        except BaseException:
            self._slots[slot] = None
            raise
        self._held = unit
        return self._link.tensors(unit, slot)

    def release(self, unit: str) -> None:
        """The slot is free; what comes next starts to load.

        Raises:
            InternalError: the unit is not held.
        """
        if self._held != unit:
            raise InternalError(f"{unit} is released and not held.")
        self._held = None
        while True:
            self._at = (self._at + 1) % len(self._cycle)
            op = self._cycle[self._at]
            if op.kind is OpKind.COMPUTE:
                return
            self._apply(op)

    def close(self) -> None:
        """Stop; safe to call twice."""
        self._link.close()

    def _place(self, unit: str) -> int:
        """The slot where the schedule computes `unit` next; jumps there when it is not its turn."""
        op = self._cycle[self._at]
        if op.unit != unit or self._slots[op.slot] != unit:
            self._jump(unit)
        return self._cycle[self._at].slot

    def _jump(self, unit: str) -> None:
        """Go on where `unit` is computed, in the pass whose slots are most like the present."""
        self.num_jumps += 1
        candidates = self._computes[unit]
        self._at = max(candidates, key=lambda at: self._likeness(self._expected[at]))
        wanted = self._expected[self._at]
        for slot, held in enumerate(self._slots):
            if held is not None and held != wanted[slot]:
                self._apply(Op(OpKind.EVICT, held, slot))
        for op in self._upcoming(sum(name is not None for name in wanted)):
            if self._slots[op.slot] is None:
                self._apply(Op(OpKind.LOAD, op.unit, op.slot))

    def _upcoming(self, count: int) -> list[Op]:
        """The next computations: what the slots should hold, the most urgent first."""
        order = [*range(self._at, len(self._cycle)), *range(self._at)]
        computes = [self._cycle[at] for at in order if self._cycle[at].kind is OpKind.COMPUTE]
        return computes[:count]

    def _likeness(self, wanted: tuple[str | None, ...]) -> int:
        return sum(held == want for held, want in zip(self._slots, wanted, strict=True))

    def _apply(self, op: Op) -> None:
        if op.kind is OpKind.LOAD:
            self._link.submit(op.unit, op.slot)
            self._slots[op.slot] = op.unit
        else:
            self._link.evict(op.slot)
            self._slots[op.slot] = None


def _computations(
    schedule: Schedule,
) -> tuple[dict[str, list[int]], dict[int, tuple[str | None, ...]]]:
    """Where each unit is computed in the cycle, and what the slots hold then."""
    slots: list[str | None] = [None] * schedule.num_slots
    for op in schedule.prologue:
        slots[op.slot] = op.unit
    computes: dict[str, list[int]] = {unit: [] for unit in schedule.units}
    expected: dict[int, tuple[str | None, ...]] = {}
    for at, op in enumerate(schedule.cycle):
        if op.kind is OpKind.COMPUTE:
            computes[op.unit].append(at)
            expected[at] = tuple(slots)
        else:
            slots[op.slot] = op.unit if op.kind is OpKind.LOAD else None
    return computes, expected
