"""The slots of an expert cache: what is where, who holds it, how useful it was.

Each use counts one and all counts halve from time to time: least frequently used with aging, as in
the web caches of Arlitt et al., 2000.
"""

from __future__ import annotations

from collections.abc import Collection

from cluster.base.errors import InternalError
from offload.link import Link

_AGE_EVERY_SLOTS = 16
"""Counts halve after so many uses per slot."""


class CacheSlots:
    """Fills and empties slots through a link; which unit goes, its user decides by constraints."""

    def __init__(self, num_slots: int, link: Link) -> None:
        self._link = link
        self._where: dict[str, int] = {}
        self._unit_in: list[str | None] = [None] * num_slots
        self._holders = [0] * num_slots
        self._counts: dict[str, float] = {}
        self._uses_until_aging = _AGE_EVERY_SLOTS * num_slots

    def __contains__(self, unit: str) -> bool:
        """Whether a slot holds the unit, or is being filled with it."""
        return unit in self._where

    def slot_of(self, unit: str) -> int | None:
        """Where the unit is."""
        return self._where.get(unit)

    def hold(self, slot: int) -> None:
        """The slot's unit is not to be evicted."""
        self._holders[slot] += 1

    def release(self, unit: str) -> None:
        """One holder less.

        Raises:
            InternalError: the unit is not held.
        """
        slot = self._where.get(unit)
        if slot is None or not self._holders[slot]:
            raise InternalError(f"{unit} is released and not held.")
        self._holders[slot] -= 1

    def load(self, unit: str, slot: int) -> str | None:
        """Start to fill the slot; the unit that had to go for it."""
        if (evicted := self._unit_in[slot]) is not None:
            self.forget(evicted)
        self._link.submit(unit, slot)
        self._where[unit] = slot
        self._unit_in[slot] = unit
        return evicted

    def forget(self, unit: str) -> None:
        """The slot of the unit is empty."""
        slot = self._where.pop(unit)
        self._unit_in[slot] = None
        self._link.evict(slot)

    def victim(self, *, kept: Collection[str], last: Collection[str] = ()) -> int | None:
        """An empty slot, else the one whose unit was useful least; None: all are needed.

        Args:
            kept: units that stay.
            last: units that go only when nothing else can.
        """
        free = [
            slot
            for slot, unit in enumerate(self._unit_in)
            if not self._holders[slot] and unit not in kept
        ]
        return min(free, key=lambda slot: self._worth(slot, last), default=None)

    def is_better(self, unit: str, *, kept: Collection[str]) -> bool:
        """Whether the unit was used more than the one that would go for it."""
        slot = self.victim(kept=kept)
        return slot is not None and (False, self._counts.get(unit, 0.0)) > self._worth(slot, ())

    def count(self, unit: str) -> None:
        """The unit is used."""
        self._counts[unit] = self._counts.get(unit, 0.0) + 1.0
        self._uses_until_aging -= 1
        if self._uses_until_aging <= 0:
            self._uses_until_aging = _AGE_EVERY_SLOTS * len(self._unit_in)
            self._counts = {name: count / 2 for name, count in self._counts.items() if count > 0.1}

    def _worth(self, slot: int, last: Collection[str]) -> tuple[bool, float]:
        unit = self._unit_in[slot]
        if unit is None:
            return False, -1.0
        return unit in last, self._counts.get(unit, 0.0)
