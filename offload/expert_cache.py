"""Units that are read when they are asked for: routed experts, of which a token visits a few.

The units used most, lately, stay: each use counts one and all counts halve from time to time (least
frequently used with aging, as in the web caches of Arlitt et al., 2000). A unit that is held is
never evicted, nor is one that was announced and not used yet.

Who knows what a layer visits announces it, and what is missing is read in that order, a few units
ahead of their use: more would evict earlier what others still find. A layer that visits nearly all
of its experts foretells that the next one does too: its experts then stream like a ring's units.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.base.errors import InternalError
from offload.link import Link, LinkStats

if TYPE_CHECKING:
    import torch

_MAX_AHEAD = 8
"""Units that are announced, read or being read, and not used yet."""
_NEARLY_ALL = 0.9
"""Part of a layer's experts from which on the next layer's are read before they are asked for."""
_AGE_EVERY_SLOTS = 16
"""Counts halve after so many uses per slot."""


class ExpertCache:
    """Slots that hold whichever units were useful; one thread calls it."""

    def __init__(self, units: Iterable[str], num_slots: int, link: Link) -> None:
        units = tuple(units)
        self._units = frozenset(units)
        self._next_layer = _next_layers(units)
        self._link = link
        self._where: dict[str, int] = {}
        self._unit_in: list[str | None] = [None] * num_slots
        self._holders = [0] * num_slots
        self._announced: set[str] = set()
        self._foretold: set[str] = set()
        self._ahead: set[str] = set()
        self._upcoming: deque[str] = deque()
        self._counts: dict[str, float] = {}
        self._uses_until_aging = _AGE_EVERY_SLOTS * num_slots
        self.num_hits = 0
        self.num_misses = 0

    def __contains__(self, unit: str) -> bool:
        return unit in self._units

    @property
    def stats(self) -> LinkStats:
        """What the link has done."""
        return self._link.stats

    def announce(self, units: Iterable[str]) -> None:
        """These units come next, in this order: start to read what is missing."""
        wanted = [unit for unit in units if unit in self._units]
        self._foretold = set(wanted)
        self._ahead &= self._foretold
        self._announced = {unit for unit in wanted if unit in self._where}
        self.num_hits += len(self._announced)
        self.num_misses += len(wanted) - len(self._announced)
        self._upcoming = deque(unit for unit in wanted if unit not in self._where)
        if wanted:
            layer = _layer(wanted[0])
            members, following = self._next_layer[layer]
            if len(wanted) >= _NEARLY_ALL * members:
                self._upcoming.extend(following)
        self._read_ahead()

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors, valid until `release`; reads it first when it is not here.

        Raises:
            InternalError: all slots are held.
            WeightStreamError, CorruptWeightsError: as `Link.wait`.
        """
        self._count(unit)
        slot = self._where.get(unit)
        if unit not in self._foretold:
            self.num_hits += slot is not None
            self.num_misses += slot is None
        if slot is None:
            if self._upcoming and self._upcoming[0] == unit:
                self._upcoming.popleft()
            slot = self._victim()
            if slot is None:
                slot = self._revoke()
            self._load(unit, slot)
        try:
            self._link.wait(unit, slot)
        except BaseException:
            self._forget(unit)
            raise
        self._announced.discard(unit)
        self._ahead.discard(unit)
        self._holders[slot] += 1
        return self._link.tensors(unit, slot)

    def release(self, unit: str) -> None:
        """The unit may be evicted again.

        Raises:
            InternalError: the unit is not held.
        """
        slot = self._where.get(unit)
        if slot is None or not self._holders[slot]:
            raise InternalError(f"{unit} is released and not held.")
        self._holders[slot] -= 1
        self._read_ahead()

    def close(self) -> None:
        """Stop; safe to call twice."""
        self._link.close()

    def _read_ahead(self) -> None:
        """Start reads of what is announced, as far ahead as is useful and slots allow."""
        while self._upcoming and len(self._ahead) < _MAX_AHEAD:
            unit = self._upcoming[0]
            if unit not in self._where:
                slot = self._victim()
                if slot is None:
                    return
                self._load(unit, slot)
                self._ahead.add(unit)
            self._announced.add(self._upcoming.popleft())

    def _load(self, unit: str, slot: int) -> None:
        if (held := self._unit_in[slot]) is not None:
            self._forget(held)
        self._link.submit(unit, slot)
        self._where[unit] = slot
        self._unit_in[slot] = unit

    def _forget(self, unit: str) -> None:
        slot = self._where.pop(unit)
        self._unit_in[slot] = None
        self._announced.discard(unit)
        self._ahead.discard(unit)
        self._link.evict(slot)

    def _victim(self) -> int | None:
        """An empty slot, else the one whose unit was useful least; None: all are needed."""
        free = [
            slot
            for slot, unit in enumerate(self._unit_in)
            if not self._holders[slot] and unit not in self._announced
        ]
        return min(free, key=self._worth, default=None)

    def _revoke(self) -> int:
        """A slot that was announced for later: what is asked for now goes first."""
        free = [slot for slot, holders in enumerate(self._holders) if not holders]
        if not free:
            raise InternalError("All slots of the expert cache are held at the same time.")
        return min(free, key=self._worth)

    def _worth(self, slot: int) -> float:
        unit = self._unit_in[slot]
        return -1.0 if unit is None else self._counts.get(unit, 0.0)

    def _count(self, unit: str) -> None:
        self._counts[unit] = self._counts.get(unit, 0.0) + 1.0
        self._uses_until_aging -= 1
        if self._uses_until_aging <= 0:
            self._uses_until_aging = _AGE_EVERY_SLOTS * len(self._unit_in)
            self._counts = {name: count / 2 for name, count in self._counts.items() if count > 0.1}


def _layer(unit: str) -> str:
    return unit.rpartition(".")[0]


def _next_layers(units: Sequence[str]) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Of each layer its number of units and the units of the one that comes after it."""
    layers: dict[str, list[str]] = {}
    for unit in units:
        layers.setdefault(_layer(unit), []).append(unit)
    names = list(layers)
    following = names[1:] + names[:1]
    return {
        name: (len(layers[name]), tuple(layers[after]))
        for name, after in zip(names, following, strict=True)
    }
