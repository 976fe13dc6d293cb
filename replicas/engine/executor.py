"""The seam between the engine loop and whatever runs the model.

`submit` and `collect` are apart so that a loop may keep two steps in flight: ranks execute plans in
the order of submission and results come back in that order. An executor never touches scheduler
state. One scheduler's plan is a `SchedulerOutput` (`Executor`); a replica of several data-parallel
groups has a `LockstepPlan`, one for all of them.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from replicas.engine.scheduler_output import SchedulerOutput, StepOutput

PlanT_contra = TypeVar("PlanT_contra", contravariant=True)
OutputT_co = TypeVar("OutputT_co", covariant=True)


class StepExecutor(Protocol[PlanT_contra, OutputT_co]):
    """Runs steps on one rank or many."""

    def submit(self, plan: PlanT_contra) -> None:
        """Start a step on every rank, after those submitted before; does not wait for them.

        Raises:
            WorkerDiedError: a rank is gone.
        """
        ...

    def poll(self, timeout_s: float) -> bool:
        """Wait until `collect` would not have to; False when that takes longer than `timeout_s`.

        Returns False early when the workers have said that the step is nearly done, see
        `StepOutput.sign_s`. Lateness is no error. The loss of a rank may be raised here, or counts
        as ready and is raised by `collect`.

        Raises:
            WorkerDiedError: a rank is gone.
        """
        ...

    def collect(self, timeout_s: float) -> OutputT_co:
        """Wait for the oldest submitted step.

        Raises:
            WorkerDiedError: a rank is gone.
            CollectiveTimeoutError: no answer within `timeout_s` seconds.
        """
        ...

    def close(self) -> None:
        """Let the ranks go; safe to call twice."""
        ...


class Executor(StepExecutor[SchedulerOutput, StepOutput], Protocol):
    """Runs the steps of one scheduler."""
