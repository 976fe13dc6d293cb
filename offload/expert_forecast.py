"""Whether a guess of the experts that a layer will visit is good enough to read them early. Pure.

A layer's gate, applied to the hidden state of the layer before it, guesses most of what it will
choose (Eliseev and Mazur, arXiv 2312.17238, section 3.2). How much of it differs by model and by
layer, so it is measured, first without reading anything. Two rules keep the bytes down:

- a layer's experts are read early only while most of what was guessed there, and was not in a slot
  anyway, was then visited;
- every visit that takes a read earns a sixteenth of an early read that may turn out useless, and
  one that was useful gives its price back. So useless reads are never more than 6 % of the needed
  ones, which leaves room for what they evict.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

WASTE_SHARE = 0.06
"""Useless reads for each needed one."""
MAX_CREDIT = 8.0
"""Early reads that a long good time allows to waste afterwards."""
LEAST_PRECISION = 0.75
"""Below it an early read delays what is needed more often than it helps."""
LEAST_JUDGED = 8.0
"""Guesses to have been judged before the first early read of a layer."""
LOOK_EVERY = 16
"""A layer whose guesses were bad is guessed again, without reading, once in so many passes."""
_KEEP = 0.97
"""What each judged pass leaves of the earlier ones' weight."""


@dataclass(slots=True)
class _Record:
    """How a layer's guesses did, the latest counting most."""

    judged: float = 0.0
    right: float = 0.0
    passes_until_look: int = 0

    @property
    def is_good(self) -> bool:
        return self.judged < LEAST_JUDGED or self.right >= LEAST_PRECISION * self.judged


class ExpertForecast:
    """Keeps the score of guesses and the account of early reads."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._credit = 0.0
        self.num_useful = 0
        """Units read early that were used."""
        self.num_wasted = 0
        """Units read early that were evicted unused."""

    def wants(self, layer: str) -> bool:
        """Whether the layer's experts should be guessed in this pass."""
        record = self._records.setdefault(layer, _Record())
        if record.is_good:
            return True
        record.passes_until_look -= 1
        if record.passes_until_look > 0:
            return False
        record.passes_until_look = LOOK_EVERY
        return True

    def may_read(self, layer: str) -> bool:
        """Whether a guessed expert of the layer may be read now."""
        record = self._records.get(layer, _Record())
        return record.judged >= LEAST_JUDGED and record.is_good and self._credit >= 1

    def judge(self, layer: str, guessed: Collection[str], visited: Collection[str]) -> None:
        """What was guessed of a layer and was in no slot then, against what it visits."""
        if not guessed:
            return
        record = self._records.setdefault(layer, _Record())
        record.judged = _KEEP * record.judged + len(guessed)
        record.right = _KEEP * record.right + sum(unit in visited for unit in guessed)

    def missed(self) -> None:
        """A visit took a read, early or not."""
        self._earn(WASTE_SHARE)

    def read_early(self) -> None:
        """A guessed unit is being read."""
        self._credit -= 1

    def used(self) -> None:
        """A unit that was read early is used."""
        self.num_useful += 1
        self._earn(1.0)

    def wasted(self) -> None:
        """A unit that was read early is evicted unused."""
        self.num_wasted += 1

    def _earn(self, credit: float) -> None:
        self._credit = min(MAX_CREDIT, self._credit + credit)
