"""What a rank that streams its weights has moved since it started; totals, told with every step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTraffic:
    """Totals of one rank."""

    read_bytes: int = 0
    """Of weight units, from disk or host memory."""
    wait_s: float = 0.0
    """What the computation lost while it waited for them."""
    expert_hits: int = 0
    """Visits of streamed experts that found them in a slot."""
    expert_misses: int = 0
    """Visits that took a read, early or not."""
    early_useful: int = 0
    """Experts that were read because the gate of their layer was guessed, and used."""
    early_wasted: int = 0
    """The same, and evicted unused."""


def traffic_of(weights: object) -> WeightTraffic | None:
    """What a provider has moved, which its `traffic` says; None for one whose weights stay."""
    # Asked with every step: an `isinstance` of a protocol takes as long as a dozen other calls.
    traffic: WeightTraffic | None = getattr(weights, "traffic", None)
    return traffic
