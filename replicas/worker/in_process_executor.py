"""The executor of a single rank in the caller's own process: tests, benchmarks, offline use.

The step runs inside `collect`, on the caller's thread, so its timeout cannot be kept; everything
else is as `replicas.engine.executor.Executor` says.
"""

from __future__ import annotations

from collections import deque

from cluster.base.errors import InternalError, WorkerDiedError
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.worker.model_runner import ModelRunner


class InProcessExecutor:
    """Implements `Executor` over one `ModelRunner`."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._submitted: deque[SchedulerOutput] = deque()
        self._closed = False

    def submit(self, plan: SchedulerOutput) -> None:
        """Queue a step.

        Raises:
            WorkerDiedError: the executor is closed.
        """
        if self._closed:
            raise WorkerDiedError("The executor is closed.")
        self._submitted.append(plan)

    def poll(self, timeout_s: float) -> bool:
        """Whether a step was submitted: it runs when it is collected, so waiting gains nothing.

        Raises:
            WorkerDiedError: the executor is closed.
        """
        if self._closed:
            raise WorkerDiedError("The executor is closed.")
        return bool(self._submitted)

    def collect(self, timeout_s: float) -> StepOutput:
        """Run the oldest queued step; `timeout_s` is not kept.

        Raises:
            WorkerDiedError: the executor is closed.
            InternalError: nothing was submitted.
        """
        if self._closed:
            raise WorkerDiedError("The executor is closed.")
        if not self._submitted:
            raise InternalError("There is no submitted step to collect.")
        return self._runner.execute(self._submitted.popleft())

    def close(self) -> None:
        """Drop what was not run; safe to call twice."""
        self._closed = True
        self._submitted.clear()
