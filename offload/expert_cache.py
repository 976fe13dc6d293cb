"""Units that are read when they are asked for: routed experts, of which a token visits a few.

The units used most, lately, stay (`offload/cache_slots.py`). A unit that is held is never evicted,
nor is one that was announced and not used yet.

Who knows what a layer visits announces it, and what is missing is read in that order, a few units
ahead of their use: more would evict earlier what others still find. A layer that visits nearly all
of its experts foretells that the next one does too: its experts then stream like a ring's units.
Else the next layer's are guessed, and read once nothing that was announced is left to read; what
such reads may cost `offload/expert_forecast.py` decides. A wrong guess costs bytes, nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.base.errors import InternalError
from offload.cache_slots import CacheSlots
from offload.expert_guesses import Guesses
from offload.link import Link, LinkStats

if TYPE_CHECKING:
    import torch

    from offload.host_experts import HostExperts

_MAX_AHEAD = 8
"""Units that are announced or guessed, read or being read, and not used yet."""
_NEARLY_ALL = 0.9
"""Part of a layer's experts from which on the next layer's are read before they are asked for."""


class ExpertCache:
    """Slots that hold whichever units were useful; one thread calls it.

    Args:
        host: units that may be computed where they lie instead; None: none.
    """

    def __init__(
        self, units: Sequence[str], num_slots: int, link: Link, host: HostExperts | None = None
    ) -> None:
        self._units = frozenset(units)
        self._layers = _by_layer(units)
        self._link = link
        self._host = host
        self._slots = CacheSlots(num_slots, link)
        self._guesses = Guesses()
        self._streams_all = False
        self._announced: set[str] = set()
        self._foretold: set[str] = set()
        self._there: frozenset[str] = frozenset()  # computed by the host
        self._ahead: set[str] = set()
        self._upcoming: deque[str] = deque()
        self.num_hits = 0
        """Visits that found their unit in a slot."""
        self.num_misses = 0
        """Visits that took a read, early or not."""
        self.num_on_host = 0
        """Visits that the host computes."""

    def __contains__(self, unit: str) -> bool:
        return unit in self._units

    @property
    def stats(self) -> LinkStats:
        """What the link has done."""
        return self._link.stats

    @property
    def num_early_useful(self) -> int:
        """Units that were read for a guess, and used."""
        return self._guesses.num_useful

    @property
    def num_early_wasted(self) -> int:
        """Units that were read for a guess, and evicted unused."""
        return self._guesses.num_wasted

    def announce(self, units: Sequence[str], rows: Sequence[int] = ()) -> list[int]:
        """These units come next, each for so many rows: start to read what is missing.

        Returns:
            The order that waits least, as indices into `units`: what is here, what the host
            computes while the link is busy, then the rest as it is read.
        """
        wanted = [unit for unit in units if unit in self._units]
        self._guesses.answer(_layer(wanted[0]) if wanted else "", frozenset(wanted))
        self._foretold = set(wanted)
        self._ahead &= self._foretold
        here = {unit for unit in wanted if unit in self._slots}
        self._announced = set(here)
        self._there = self._left_to_host(dict(zip(units, rows, strict=False)))
        for unit in wanted:
            self._visit(unit)
        self._upcoming = deque(unit for unit in wanted if unit not in here | self._there)
        if wanted:
            layer = _layer(wanted[0])
            self._streams_all = len(wanted) >= _NEARLY_ALL * len(self._layers[layer])
            if self._streams_all and not self._there:
                self._upcoming.extend(self._layers[_next(self._layers, layer)])
        self._read_ahead()
        turn = {unit: 0 if unit in here else 1 if unit in self._there else 2 for unit in wanted}
        return sorted(range(len(units)), key=lambda index: turn.get(units[index], 0))

    def wants_guess(self, layer: str) -> bool:
        """Whether it would help to know what `layer`, the next one, will probably visit."""
        if self._streams_all:
            return False
        is_short = any(unit not in self._slots for unit in self._layers.get(layer, ()))
        return is_short and self._guesses.wants(layer)

    def foresee(self, units: Sequence[str]) -> None:
        """The next layer will probably ask for these, the likeliest first."""
        known = [unit for unit in units if unit in self._units]
        missing = [unit for unit in known if unit not in self._slots]
        self._guesses.take(_layer(known[0]) if known else "", known, missing[:_MAX_AHEAD])
        self._read_ahead()

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors, valid until `release`; reads it first when it is not here.

        Raises:
            InternalError: all slots are held.
            WeightStreamError, CorruptWeightsError: as `Link.wait`.
        """
        self._slots.count(unit)
        if unit not in self._foretold:
            self._visit(unit)
        if self._host is not None and unit in self._there:
            return self._host.tensors(unit)
        slot = self._slots.slot_of(unit)
        if slot is None:
            slot = self._make_room(unit)
            self._load(unit, slot)
        try:
            self._link.wait(unit, slot)
        except BaseException:
            self._slots.forget(unit)
            self._gone(unit)
            raise
        self._announced.discard(unit)
        self._ahead.discard(unit)
        self._guesses.used(unit)
        self._slots.hold(slot)
        return self._link.tensors(unit, slot)

    def release(self, unit: str) -> None:
        """The unit may be evicted again.

        Raises:
            InternalError: the unit is not held.
        """
        if unit not in self._there:
            self._slots.release(unit)
        self._read_ahead()

    def close(self) -> None:
        """Stop; safe to call twice."""
        self._link.close()

    def _read_ahead(self) -> None:
        """Start reads of what is announced, as far ahead as is useful and slots allow."""
        while self._upcoming and len(self._ahead) < _MAX_AHEAD:
            unit = self._upcoming[0]
            if unit not in self._slots:
                slot = self._slots.victim(kept=self._announced, last=self._guesses.expected)
                if slot is None:
                    return
                self._load(unit, slot)
                self._ahead.add(unit)
            self._announced.add(self._upcoming.popleft())
        if not self._upcoming:
            self._read_guesses()

    def _read_guesses(self) -> None:
        """Start reads of what is guessed, as far as that pays."""
        guesses = self._guesses
        while (unit := guesses.next()) is not None:
            if unit in self._slots:
                guesses.skip()
                continue
            slot = self._slots.victim(kept=self._announced | guesses.expected)
            if slot is None or len(self._ahead | guesses.pending) >= _MAX_AHEAD:
                return
            self._load(guesses.reading(), slot)

    def _left_to_host(self, rows: Mapping[str, int]) -> frozenset[str]:
        """Of what is in no slot, what the host computes.

        One that was used more than what would go for it is fetched: it will be found next time.
        """
        if self._host is None:
            return frozenset()
        missing = {unit: count for unit, count in rows.items() if unit not in self._slots}
        chosen = self._host.chosen(missing)
        return frozenset(
            unit for unit in chosen if not self._slots.is_better(unit, kept=self._announced)
        )

    def _visit(self, unit: str) -> None:
        """Count a visit; a read that came early was needed all the same."""
        if unit in self._there:
            self.num_on_host += 1
        elif unit in self._slots and not self._guesses.is_early(unit):
            self.num_hits += 1
        else:
            self.num_misses += 1
            self._guesses.missed()

    def _make_room(self, unit: str) -> int:
        """A slot for what is asked for now, also one that was meant for later."""
        if self._upcoming and self._upcoming[0] == unit:
            self._upcoming.popleft()
        slot = self._slots.victim(kept=self._announced, last=self._guesses.expected)
        if slot is None:
            slot = self._slots.victim(kept=())
        if slot is None:
            raise InternalError("All slots of the expert cache are held at the same time.")
        return slot

    def _load(self, unit: str, slot: int) -> None:
        evicted = self._slots.load(unit, slot)
        if evicted is not None:
            self._gone(evicted)

    def _gone(self, unit: str) -> None:
        self._announced.discard(unit)
        self._ahead.discard(unit)
        self._guesses.gone(unit)


def _layer(unit: str) -> str:
    """`layer.3` of `layer.3.expert.7`."""
    return unit.rpartition(".expert.")[0]


def _by_layer(units: Sequence[str]) -> dict[str, tuple[str, ...]]:
    layers: dict[str, list[str]] = {}
    for unit in units:
        layers.setdefault(_layer(unit), []).append(unit)
    return {name: tuple(members) for name, members in layers.items()}


def _next(layers: Mapping[str, tuple[str, ...]], layer: str) -> str:
    """The layer after; the first after the last."""
    names = list(layers)
    return names[(names.index(layer) + 1) % len(names)]
