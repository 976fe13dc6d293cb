"""What the next layer will probably visit, and what was read because of that."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from offload.expert_forecast import ExpertForecast


class Guesses:
    """The guess of one layer at a time, and the early reads of all."""

    def __init__(self) -> None:
        self.expected: frozenset[str] = frozenset()
        """Units that were guessed, in a slot or not."""
        self._layer = ""
        self._missing: tuple[str, ...] = ()
        self._queue: deque[str] = deque()
        self._early: set[str] = set()
        self._forecast = ExpertForecast()

    @property
    def num_useful(self) -> int:
        """Units that were read for a guess, and used."""
        return self._forecast.num_useful

    @property
    def num_wasted(self) -> int:
        """Units that were read for a guess, and evicted unused."""
        return self._forecast.num_wasted

    @property
    def pending(self) -> frozenset[str]:
        """Units read for the present guess and not used yet."""
        return self.expected & self._early

    def is_early(self, unit: str) -> bool:
        """Whether the unit was read for a guess, this one or another, and not used since."""
        return unit in self._early

    def wants(self, layer: str) -> bool:
        """Whether the layer should be guessed in this pass."""
        return self._forecast.wants(layer)

    def take(self, layer: str, expected: Collection[str], missing: Sequence[str]) -> None:
        """A guess: what the layer visits, and what of it is in no slot, the likeliest first."""
        self._layer, self.expected, self._missing = layer, frozenset(expected), tuple(missing)
        self._queue = deque(missing)

    def answer(self, layer: str, visited: Collection[str]) -> None:
        """This is what `layer` visits; the guess stands no more."""
        if visited and layer == self._layer:
            self._forecast.judge(layer, self._missing, visited)
        self.take("", (), ())

    def next(self) -> str | None:
        """A unit to read now; None: there is none, or it would not pay."""
        return self._queue[0] if self._queue and self._forecast.may_read(self._layer) else None

    def skip(self) -> None:
        """That unit is here already."""
        self._queue.popleft()

    def reading(self) -> str:
        """That unit is being read."""
        unit = self._queue.popleft()
        self._early.add(unit)
        self._forecast.read_early()
        return unit

    def missed(self) -> None:
        """A visit took a read, early or not."""
        self._forecast.missed()

    def used(self, unit: str) -> None:
        """The unit is used."""
        if unit in self._early:
            self._early.discard(unit)
            self._forecast.used()

    def gone(self, unit: str) -> None:
        """The unit is evicted."""
        if unit in self._early:
            self._early.discard(unit)
            self._forecast.wasted()
