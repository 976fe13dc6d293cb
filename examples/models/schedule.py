"""When a run ends and how its learning rate moves: warm up, hold, decay.

A run is bounded either by steps or by wall time. Under a wall-time budget the decay's start is
fixed when the hold phase has used its share, from the pace measured so far; from then on the step
count is settled and recorded, and a rerun bounded by these steps sees the same rates. Holding the
rate needs no total in advance, which is why this is not a cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate by step; `total_steps` is None while the end is still open."""

    peak: float
    warmup_steps: int
    decay_steps: int = 0
    total_steps: int | None = None

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        if self.total_steps is None or not self.decay_steps:
            return self.peak * warm
        decayed = (step - (self.total_steps - self.decay_steps)) / self.decay_steps
        return self.peak * min(warm, 1.0 - math.sqrt(min(1.0, max(0.0, decayed))))

    def is_over(self, step: int) -> bool:
        """Whether `step` lies past the end."""
        return self.total_steps is not None and step >= self.total_steps

    def settled(self, step: int, elapsed_s: float, budget_s: float, decay_share: float) -> Schedule:
        """This schedule, its end fixed at the measured pace once the hold phase has had its time.

        Args:
            step: steps done.
            elapsed_s: seconds spent on them.
            budget_s: seconds that the whole run may take.
            decay_share: the part of the budget that belongs to the decay.
        """
        if self.total_steps is not None or not step or elapsed_s < (1 - decay_share) * budget_s:
            return self
        left = max(1, round((budget_s - elapsed_s) * step / elapsed_s))
        return replace(self, decay_steps=left, total_steps=step + left)
