"""The seam between the engine loop and whatever runs the model.

`submit` and `collect` are apart so that a loop may keep two steps in flight; results come back in
the order of submission. An executor never touches scheduler state.
"""

from __future__ import annotations

from typing import Protocol

from replicas.engine.scheduler_output import SchedulerOutput, StepOutput


class Executor(Protocol):
    """Runs steps on one rank or many."""

    def submit(self, plan: SchedulerOutput) -> None:
        """Start a step on every rank; does not wait.

        Raises:
            WorkerDiedError: a rank is gone.
        """
        ...

    def collect(self, timeout_s: float) -> StepOutput:
        """Wait for the oldest submitted step.

        Raises:
            WorkerDiedError: a rank is gone.
            CollectiveTimeoutError: no answer within `timeout_s` seconds.
        """
        ...

    def close(self) -> None:
        """Let the ranks go; safe to call twice."""
        ...
