"""How long whole layers take beside virtual time: each scheme, with few rows and with many.

The simulator knows of messages, bytes and calls. What processors do besides, which ranks may share,
it does not: how often ranks are woken, how long they queue for a core, which costs of messages are
paid side by side. So a layer's time is a line over its virtual time, through what layers took:

    few rows     mostly calls, wake-ups and messages; says where the line begins
    many rows    bytes and work on rows, and the more the better: says how steep it is

What fits into the budget is timed: few rows first, then as many as there is time for, twice if
possible since the first use is slower, then both again.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe.exchange.calibrate import Stopwatch
from moe.exchange.schemes import Scheme

FEW_ROWS = 4
MANY_ROWS = (192, 128, 96, 64, 48, 32, 24, 16)
_ENDS = (FEW_ROWS, MANY_ROWS[0])
_MOST_ROUNDS = 5
_ENOUGH_ROWS = 64
_WARM_UP_SHARE = 0.3
"""Of what is left: a layer of each scheme may take that much and not count."""
_LEAST_SCALE = 0.1
_CAUTION = 1.2
"""A layer that nobody has timed may take so much longer than it should."""

Virtual = Callable[[Scheme, int], float]
"""Virtual time of a layer: scheme, rows of a rank."""


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What the layers cost, and what was timed for it."""

    lines: tuple[tuple[str, float, float], ...]
    """See `LinkCosts.layers`."""
    summary: str


class _Found:
    """The layers timed so far.

    Virtual time is worked out before and after the timings, never between them: ranks that share
    cores would begin at different times.
    """

    def __init__(self, stopwatch: Stopwatch, schemes: Sequence[Scheme], virtual: Virtual) -> None:
        self._stopwatch = stopwatch
        self.virtual = functools.cache(virtual)
        self._took_s: dict[tuple[Scheme, int], list[float]] = {}
        self._ends = {scheme: [self.virtual(scheme, n) for n in _ENDS] for scheme in schemes}
        stopwatch.agree([0.0])

    def time(self, schemes: Sequence[Scheme], rows: int) -> None:
        for scheme in schemes:
            self._took_s.setdefault((scheme, rows), []).append(self._stopwatch.layer(scheme, rows))

    def typical_s(self, scheme: Scheme, rows: int) -> float:
        """Of the timings of a layer; the first use of its buffers and windows is slower."""
        first_s, *later_s = self._took_s[scheme, rows]
        return statistics.median(later_s or [first_s])

    def rounds(self, scheme: Scheme, rows: int) -> int:
        """How often a layer was timed."""
        return len(self._took_s.get((scheme, rows), ()))

    def largest(self, schemes: Sequence[Scheme]) -> int:
        """As many rows as can be timed twice, or once where that would be few; 0: none."""
        twice = [
            rows for rows in MANY_ROWS if rows >= _ENOUGH_ROWS and self.fits(schemes, rows, rows)
        ]
        once = [rows for rows in MANY_ROWS if self.fits(schemes, rows)]
        return (*twice, *once, 0)[0]

    def needed_s(self, schemes: Sequence[Scheme], *sizes: int) -> float:
        """What one more timing of each takes."""
        return sum(self._expected_s(scheme, rows) for scheme in schemes for rows in sizes)

    def fits(self, schemes: Sequence[Scheme], *sizes: int) -> bool:
        return self.needed_s(schemes, *sizes) <= self._stopwatch.left_s

    def _expected_s(self, scheme: Scheme, rows: int) -> float:
        """Of one more timing, ranks meeting and resting included."""
        overhead_s = self._stopwatch.overhead_s
        if (scheme, rows) in self._took_s:
            return overhead_s + self.typical_s(scheme, rows)
        few_s, most_s = self._ends[scheme]
        share = (rows - FEW_ROWS) / (MANY_ROWS[0] - FEW_ROWS)
        more_s = share * (most_s - few_s)
        if (scheme, FEW_ROWS) in self._took_s:
            took_s = self.typical_s(scheme, FEW_ROWS)
            return overhead_s + took_s + min(1.0, took_s / few_s) * more_s
        return overhead_s + _CAUTION * (few_s + more_s)


def layer_costs(stopwatch: Stopwatch, schemes: Sequence[Scheme], virtual: Virtual) -> LayerCosts:
    """Time layers while the budget lasts; all ranks call it together and find the same."""
    found = _Found(stopwatch, schemes, virtual)
    if found.needed_s(schemes, FEW_ROWS) <= _WARM_UP_SHARE * stopwatch.left_s:
        for scheme in schemes:
            stopwatch.layer(scheme, FEW_ROWS)  # the first use is slower, and is not counted
    few = []
    for scheme in sorted(schemes, key=lambda scheme: found.virtual(scheme, FEW_ROWS)):
        if found.fits([scheme], FEW_ROWS):
            found.time([scheme], FEW_ROWS)
            few.append(scheme)
    many = found.largest(few) if few else 0
    sizes = [rows for rows in (many, FEW_ROWS) if few and rows]
    while sizes:
        rows = min(sizes, key=lambda rows: found.rounds(few[0], rows))
        if found.rounds(few[0], rows) < _MOST_ROUNDS and found.fits(few, rows):
            found.time(few, rows)
        else:
            sizes.remove(rows)
    return LayerCosts(_lines(found, schemes, few, many), _summary(found, schemes, few, many))


def _lines(
    found: _Found, schemes: Sequence[Scheme], few: Sequence[Scheme], many: int
) -> tuple[tuple[str, float, float], ...]:
    lines = {}
    for scheme in few:
        few_s, scale = found.virtual(scheme, FEW_ROWS), 1.0
        took_s = found.typical_s(scheme, FEW_ROWS)
        if many:
            more_s = found.virtual(scheme, many) - few_s
            scale = max(_LEAST_SCALE, (found.typical_s(scheme, many) - took_s) / more_s)
        lines[scheme] = (took_s - scale * few_s, scale)
    # Nothing speaks for or against a scheme that was not timed but its links.
    base_s, scale = (
        (statistics.mean(column) for column in zip(*lines.values(), strict=True))
        if lines
        else (0.0, 1.0)
    )
    return tuple((str(scheme), *lines.get(scheme, (base_s, scale))) for scheme in schemes)


def _summary(found: _Found, schemes: Sequence[Scheme], few: Sequence[Scheme], many: int) -> str:
    if not few:
        return "links alone, layers would have taken too long"
    sizes = [
        f"{found.rounds(few[0], rows)} times with {rows} rows" for rows in (FEW_ROWS, many) if rows
    ]
    text = f"layers of {', '.join(few)} {', '.join(sizes)}"
    missing = [scheme for scheme in schemes if scheme not in few]
    return text + (f"; none of {', '.join(missing)}, too slow" if missing else "")
