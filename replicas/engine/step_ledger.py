"""Where the engine's wall time goes, summed over steps: what a benchmark and a status page read.

Constant memory; the loop thread writes, any thread may read a snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replicas.engine.weight_traffic import WeightTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Totals since the engine started.

    Seconds are wall time of the loop thread and do not overlap: while a step executes, planning the
    next one counts as that one's `schedule_s`. The workers' own time is told by them; what is
    missing in `worker_s` to the sum of the others, they had nothing to do.
    """

    num_steps: int = 0
    num_tokens: int = 0
    """Query tokens computed."""
    schedule_s: float = 0.0
    execute_s: float = 0.0
    """From the submission, or the result of the step ahead, to the result."""
    update_s: float = 0.0
    worker_s: float = 0.0
    max_execute_s: float = 0.0
    traffic: WeightTraffic = field(default_factory=WeightTraffic)
    """Of the output rank."""


class StepLedger:
    """Adds up steps."""

    def __init__(self) -> None:
        self._times = StepTimes()

    @property
    def times(self) -> StepTimes:
        """Totals so far."""
        return self._times

    def add(
        self,
        *,
        num_tokens: int,
        schedule_s: float,
        execute_s: float,
        update_s: float,
        worker_s: float,
        traffic: WeightTraffic | None = None,
    ) -> None:
        """Count one finished step."""
        old = self._times
        # One assignment of a frozen value, so that a reader never sees half a step.
        self._times = StepTimes(
            num_steps=old.num_steps + 1,
            num_tokens=old.num_tokens + num_tokens,
            schedule_s=old.schedule_s + schedule_s,
            execute_s=old.execute_s + execute_s,
            update_s=old.update_s + update_s,
            worker_s=old.worker_s + worker_s,
            max_execute_s=max(old.max_execute_s, execute_s),
            traffic=traffic or old.traffic,
        )
