"""How long whole layers take beside virtual time: each scheme, with few rows and with many.

The simulator knows of messages, bytes and calls. What processors do besides, which ranks may share,
it does not: how often ranks are woken, how long they queue for a core, which costs of messages are
paid side by side. So a layer's time is a line over its virtual time, through what layers took:

    few rows     mostly calls, wake-ups and messages; says where the line begins
    many rows    bytes and work on rows, and the more the better: says how steep it is

What fits into the budget is timed: few rows once, then many, if need be of the two fastest schemes
only, then both again. How steep a line is has two witnesses, the scheme's own layers and those of
all: work on a row is much the same, and own ones say the more the more rows they had.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe.exchange.calibrate import Stopwatch
from moe.exchange.schemes import Scheme

FEW_ROWS = 4
MANY_ROWS = (192, 128, 96, 64, 48, 32)
_ENDS = (FEW_ROWS, MANY_ROWS[0])
_MOST_ROUNDS = 5
_ENOUGH_ROWS = 48
_SHARED_ROWS = 16
"""With so many rows a line would be as steep as that of all schemes; with twice as many, half."""
_LEAST_SCALE = 0.1
_CAUTION = 1.2
"""A layer that nobody has timed may take so much longer than it should."""
_DOUBT = 0.2
"""Schemes that were timed once, and differ by less than this share, cannot be told apart."""

Virtual = Callable[[Scheme, int], float]
"""Virtual time of a layer: scheme, rows of a rank."""
_Layer = tuple[Sequence[Scheme], int]
"""A layer of each of some schemes, with so many rows."""


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What the layers cost, and what was timed for it."""

    lines: tuple[tuple[str, float, float], ...]
    """See `LinkCosts.layers`."""
    doubt: float
    """See `LinkCosts.doubt`."""
    summary: str


class _Found:
    """The layers timed so far.

    Virtual time is worked out before and after the timings, never between them: ranks that share
    cores would begin at different times.
    """

    def __init__(self, stopwatch: Stopwatch, schemes: Sequence[Scheme], virtual: Virtual) -> None:
        self._stopwatch = stopwatch
        self._took_s: dict[tuple[Scheme, int], list[float]] = {}
        ends = list(itertools.product(schemes, _ENDS))
        end_s = stopwatch.worked_out(lambda: [virtual(*end) for end in ends], len(ends))
        self.virtual_s = dict(zip(ends, end_s, strict=True))
        stopwatch.agree([0.0])

    def time(self, schemes: Sequence[Scheme], rows: int) -> None:
        for scheme in schemes:
            self._took_s.setdefault((scheme, rows), []).append(self._stopwatch.layer(scheme, rows))

    def typical_s(self, scheme: Scheme, rows: int) -> float:
        """Of the timings of a layer the middle one, of two the shorter: first uses are slow."""
        return statistics.median_low(self._took_s[scheme, rows])

    def rounds(self, scheme: Scheme, rows: int) -> int:
        """How often a layer was timed."""
        return len(self._took_s.get((scheme, rows), ()))

    def largest(self, schemes: Sequence[Scheme]) -> _Layer:
        """As many rows as fit, if possible twice, of all schemes or else of the first two."""
        for times, least in ((2, _ENOUGH_ROWS), (1, _ENOUGH_ROWS), (1, MANY_ROWS[-1])):
            sizes = [rows for rows in MANY_ROWS if rows >= least]
            for layer in itertools.product((schemes, schemes[:2]), sizes):
                if self.fits(*layer, times):
                    return layer
        return (), 0

    def needed_s(self, schemes: Sequence[Scheme], rows: int) -> float:
        """What one more timing of each takes."""
        return sum(self._expected_s(scheme, rows) for scheme in schemes)

    def fits(self, schemes: Sequence[Scheme], rows: int, times: int = 1) -> bool:
        return times * self.needed_s(schemes, rows) <= self._stopwatch.left_s

    def _expected_s(self, scheme: Scheme, rows: int) -> float:
        """Of one more timing, ranks meeting and resting included."""
        overhead_s = self._stopwatch.overhead_s
        if (scheme, rows) in self._took_s:
            return overhead_s + self.typical_s(scheme, rows)
        few_s, most_s = (self.virtual_s[scheme, end] for end in _ENDS)
        share = (rows - FEW_ROWS) / (MANY_ROWS[0] - FEW_ROWS)
        more_s = _CAUTION * share * (most_s - few_s)
        if (scheme, FEW_ROWS) in self._took_s:
            took_s = self.typical_s(scheme, FEW_ROWS)
            return overhead_s + took_s + min(1.0, took_s / few_s) * more_s
        return overhead_s + _CAUTION * few_s + more_s


def layer_costs(stopwatch: Stopwatch, schemes: Sequence[Scheme], virtual: Virtual) -> LayerCosts:
    """Time layers while the budget lasts; all ranks call it together and find the same."""
    found = _Found(stopwatch, schemes, virtual)
    few = []
    for scheme in sorted(schemes, key=lambda scheme: found.virtual_s[scheme, FEW_ROWS]):
        if found.fits([scheme], FEW_ROWS):
            found.time([scheme], FEW_ROWS)
            few.append(scheme)
    many = found.largest(few)
    layers = [layer for layer in (many, (few, FEW_ROWS)) if layer[0]]
    while layers:
        layer = min(layers, key=lambda layer: found.rounds(layer[0][0], layer[1]))
        if found.rounds(layer[0][0], layer[1]) < _MOST_ROUNDS and found.fits(*layer):
            found.time(*layer)
        else:
            layers.remove(layer)
    rounds = min((found.rounds(scheme, FEW_ROWS) for scheme in few), default=0)
    return LayerCosts(
        lines=_lines(found, schemes, few, _scales(found, virtual, many)),
        doubt=_DOUBT / math.sqrt(max(1, rounds)),
        summary=_summary(found, schemes, few, many),
    )


def _scales(found: _Found, virtual: Virtual, many: _Layer) -> tuple[float, dict[Scheme, float]]:
    """Seconds per second of virtual time that more rows add: of all schemes, and of each timed."""
    schemes, rows = many
    if not schemes:
        return 1.0, {}
    took_s, virtual_s = {}, {}
    for scheme in schemes:
        took_s[scheme] = found.typical_s(scheme, rows) - found.typical_s(scheme, FEW_ROWS)
        virtual_s[scheme] = virtual(scheme, rows) - found.virtual_s[scheme, FEW_ROWS]
    of_all = sum(took_s.values()) / sum(virtual_s.values())
    shared = _SHARED_ROWS / rows
    own = {s: shared * of_all + (1 - shared) * took_s[s] / virtual_s[s] for s in schemes}
    return of_all, own


def _lines(
    found: _Found,
    schemes: Sequence[Scheme],
    few: Sequence[Scheme],
    scales: tuple[float, dict[Scheme, float]],
) -> tuple[tuple[str, float, float], ...]:
    of_all, own = scales
    lines = {}
    for scheme in few:
        scale = max(_LEAST_SCALE, own.get(scheme, of_all))
        few_s = found.virtual_s[scheme, FEW_ROWS]
        lines[scheme] = (found.typical_s(scheme, FEW_ROWS) - scale * few_s, scale)
    # Nothing speaks for or against a scheme that was not timed but its links.
    base_s, scale = (
        (statistics.mean(column) for column in zip(*lines.values(), strict=True))
        if lines
        else (0.0, 1.0)
    )
    return tuple((str(scheme), *lines.get(scheme, (base_s, scale))) for scheme in schemes)


def _summary(found: _Found, schemes: Sequence[Scheme], few: Sequence[Scheme], many: _Layer) -> str:
    if not few:
        return "links alone, layers would have taken too long"
    timed = [
        f"{', '.join(layer)} {found.rounds(layer[0], rows)} times with {rows} rows"
        for layer, rows in ((few, FEW_ROWS), many)
        if layer
    ]
    text = f"layers of {'; '.join(timed)}"
    missing = [scheme for scheme in schemes if scheme not in few]
    return text + (f"; none of {', '.join(missing)}, too slow" if missing else "")
