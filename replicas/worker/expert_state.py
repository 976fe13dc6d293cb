"""What a rank of an expert-parallel replica tells of its experts, when its leader asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """Totals since the rank began; crosses Ray as plain values."""

    layers: Sequence[int] = ()
    """Mixture layers, by the decoder layer's index."""
    rows: Sequence[Sequence[int]] = ()
    """Parallel to `layers`: this rank's own rows to each logical expert."""
    num_dropped: int = 0
    """Pairs of row and expert left out for want of capacity."""
    announced: int = 0
    """Version of the placement that this rank was last told to prepare."""
    prepared: int = 0
    """The newest version that it is ready for, or uses."""
    move_failure: str = ""
    """Why it cannot prepare what was announced."""
