"""Sizes and durations for people; plain functions, for parts that know no pydantic too."""

from __future__ import annotations

import math

_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def size_text(num_bytes: float) -> str:
    """Bytes for people: the largest binary unit that leaves at least one, two digits at most."""
    for unit, size in _UNITS.items():
        if abs(num_bytes) >= size:
            return f"{_short(num_bytes / size)}{unit}"
    return f"{num_bytes:.0f}B"


def duration_text(seconds: float) -> str:
    """Seconds for people, in a form that `Duration` reads back."""
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    if seconds >= 3600 and math.isclose(seconds % 3600, 0):
        return f"{seconds / 3600:g}h"
    if seconds >= 60 and math.isclose(seconds % 60, 0):
        return f"{seconds / 60:g}m"
    return f"{seconds:g}s"


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
