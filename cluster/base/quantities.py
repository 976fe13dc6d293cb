"""Rules for amounts: numbers, memory sizes (to bytes) and durations (to seconds).

Strict: `true`, `"2"`, NaN and infinity are not numbers, a size may be plain bytes, a duration
needs its unit. `amount_text` is the way back, for people.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.base.amount_text import duration_text, size_text
from cluster.base.problems import shown
from cluster.base.rules import Rule

AUTO = "auto"

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]{1,3})")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([a-z]{1,2})")


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number in a closed range."""

    low: int
    high: int
    auto: bool = False

    @property
    def allowed(self) -> str:
        """The range."""
        return _or_auto(f"a whole number from {self.low} to {self.high}", self.auto)

    def parse(self, value: object) -> int | str:
        """The number, or "auto"."""
        if self.auto and value == AUTO:
            return AUTO
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(value, _not_a_number(value, "a whole number"))
        if not self.low <= value <= self.high:
            raise self.refuse(value, f"{shown(value)} is out of range")
        return value


@dataclass(frozen=True)
class Real(Rule):
    """A finite number in a closed range."""

    low: float
    high: float
    auto: bool = False

    @property
    def allowed(self) -> str:
        """The range."""
        return _or_auto(f"a number from {self.low:g} to {self.high:g}", self.auto)

    def parse(self, value: object) -> float | str:
        """The number, or "auto"."""
        if self.auto and value == AUTO:
            return AUTO
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(value, _not_a_number(value, "a number"))
        if not self.low <= value <= self.high:
            raise self.refuse(value, f"{shown(value)} is out of range")
        return float(value)


@dataclass(frozen=True)
class Size(Rule):
    """An amount of memory; becomes bytes."""

    low: int
    high: int
    auto: bool = False

    @property
    def allowed(self) -> str:
        """The range and the units."""
        span = f"a size from {size_text(self.low)} to {size_text(self.high)}"
        return _or_auto(f"{span}, in bytes or with a unit such as KiB, MiB, GB", self.auto)

    def parse(self, value: object) -> int | str:
        """Bytes, or "auto"."""
        if self.auto and value == AUTO:
            return AUTO
        num_bytes = self._bytes(value)
        if not self.low <= num_bytes <= self.high:
            raise self.refuse(value, f"{shown(value)} is out of range")
        return num_bytes

    def _bytes(self, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, str):
            raise self.refuse(value, f"{shown(value)} is not a size")
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise self.refuse(value, f"{shown(value)} is not a size")
        unit = {name.lower(): scale for name, scale in _UNITS.items()}.get(match.group(2).lower())
        if unit is None:
            units = ", ".join(_UNITS)
            raise self.refuse(value, f"{shown(value)} has an unknown unit (known: {units})")
        return round(float(match.group(1)) * unit)


@dataclass(frozen=True)
class Duration(Rule):
    """A length of time; becomes seconds."""

    low_s: float
    high_s: float

    @property
    def allowed(self) -> str:
        """The range and the units."""
        span = f"{duration_text(self.low_s)} to {duration_text(self.high_s)}"
        return f"a duration from {span}, with a unit of ms, s, m or h"

    def parse(self, value: object) -> float:
        """Seconds."""
        match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None or match.group(2) not in _SECONDS:
            why = f"{shown(value)} is not a duration"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                why = f"{shown(value)} lacks a unit"
            raise self.refuse(value, why)
        seconds = float(match.group(1)) * _SECONDS[match.group(2)]
        if not self.low_s <= seconds <= self.high_s:
            raise self.refuse(value, f"{shown(value)} is out of range")
        return seconds


def _or_auto(text: str, auto: bool) -> str:
    return f"{text}, or auto" if auto else text


def _not_a_number(value: object, what: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9][0-9_.]*", value):
        return f"{shown(value)} is text, not {what} (no quotes, no underscores)"
    return f"{shown(value)} is not {what}"
