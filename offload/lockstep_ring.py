"""Runs a schedule that gathers: one rank's part of the slots that several ranks share.

The ranks of a replica in lock-step take part in every step, whether they have rows or not. All of
them carry out the whole schedule, one pass a step: what a rank does not ask for (embedding and head
where it has no rows) it passes over, loading its piece and giving the slot back like the others. So
a schedule that all ranks hold orders all they do, and nothing has to be agreed on while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from cluster.base.errors import InternalError
from offload.link import Link, LinkStats
from offload.ops import Op, OpKind, Schedule

if TYPE_CHECKING:
    import torch


class GatheringLink(Link, Protocol):
    """Fills a rank's pieces of slots that others fill too."""

    def gather(self, unit: str, slot: int) -> None:
        """Return when the pieces of all ranks are in the slot.

        Raises:
            WeightStreamError, CorruptWeightsError: a rank could not read its own.
            WorkerDiedError, CollectiveTimeoutError: a rank is lost, or late.
        """
        ...


class LockstepRing:
    """The slots, and where in the pass the rank is; reading begins at once.

    A unit's slot is given back when the next one is asked for, so that one may be asked for again
    as long as none after it has been.
    """

    def __init__(self, schedule: Schedule, link: GatheringLink) -> None:
        self._link = link
        self._cycle = schedule.cycle
        self._number_of = {unit: number for number, unit in enumerate(schedule.units)}
        self._at = 0
        self._next = 0
        """Number in the pass of the unit whose operations come next."""
        self._current: Op | None = None
        """What was computed with last, and is still in its slot."""
        self._held: str | None = None
        for op in schedule.prologue:
            link.submit(op.unit, op.slot)

    def __contains__(self, unit: str) -> bool:
        return unit in self._number_of

    @property
    def num_jumps(self) -> int:
        """None: all ranks keep to the schedule."""
        return 0

    @property
    def stats(self) -> LinkStats:
        """What the link has done."""
        return self._link.stats

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors, valid until `release`; waits for all ranks' pieces.

        Raises:
            InternalError: another unit is held, or a later one was asked for in this step.
            Others as `GatheringLink.gather`.
        """
        if self._held is not None:
            raise InternalError(f"{self._held} is not released and {unit} is asked for.")
        if self._current is None or self._current.unit != unit:
            number = self._number_of[unit]
            if number < self._next:
                raise InternalError(f"{unit} is asked for after what follows it in a step.")
            while self._next < number:
                self._step_on()
            self._step_on()
        op = self._current
        assert op is not None
        self._held = unit
        self._link.wait(unit, op.slot)
        return self._link.tensors(unit, op.slot)

    def release(self, unit: str) -> None:
        """The rank has done with the unit for now.

        Raises:
            InternalError: the unit is not held.
        """
        if self._held != unit:
            raise InternalError(f"{unit} is released and not held.")
        self._held = None

    def end_pass(self) -> None:
        """The step has ended here: pass over what is left of it, as all ranks do.

        Raises:
            As `GatheringLink.gather`.
        """
        while self._next < len(self._number_of):
            self._step_on()
        self._give_back()
        self._next = 0

    def close(self) -> None:
        """Stop; safe to call twice."""
        self._link.close()

    def _step_on(self) -> None:
        """Give back the unit before, and gather the next one."""
        self._give_back()
        while (op := self._cycle[self._at]).kind is OpKind.GATHER:
            self._link.gather(op.unit, op.slot)
            self._at = (self._at + 1) % len(self._cycle)
        self._current = op
        self._at = (self._at + 1) % len(self._cycle)
        self._next += 1

    def _give_back(self) -> None:
        """Evict the last unit and load what the schedule says; where all stay there is neither."""
        if self._current is None:
            return
        self._current = None
        while (op := self._cycle[self._at]).kind in (OpKind.EVICT, OpKind.LOAD):
            if op.kind is OpKind.EVICT:
                self._link.evict(op.slot)
            else:
                self._link.submit(op.unit, op.slot)
            self._at = (self._at + 1) % len(self._cycle)
