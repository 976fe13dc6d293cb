"""Timing and bounds of the stream between a gateway and a replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HopSettings:
    """As a gateway keeps them."""

    silence_timeout_s: float = 10.0
    """No message for this long (a report is due every second) means the replica hangs."""
    beat_period_s: float = 2.0
    """How often a gateway tells that it lives; a leader waits 15 s for that."""
    backoff_initial_s: float = 0.05
    backoff_max_s: float = 2.0
    answer_timeout_s: float = 1.0
    """How long a replica may take to answer a question; it needs a turn of its loop."""
