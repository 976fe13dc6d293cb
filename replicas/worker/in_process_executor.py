"""The executor of a single rank in the caller's own process: tests, benchmarks, offline use.

A step is launched by `submit` where the runner runs ahead, else it runs inside `collect`; on the
caller's thread, so that a timeout cannot be kept. Everything else is as
`replicas.engine.executor.Executor` says.
"""

from __future__ import annotations

from collections import deque

from cluster.base.errors import InternalError, WorkerDiedError
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.worker.model_runner import ModelRunner
from replicas.worker.pending_step import LaunchedStep


class InProcessExecutor:
    """Implements `Executor` over one `ModelRunner`."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._submitted: deque[SchedulerOutput | LaunchedStep] = deque()
        self._closed = False

    def submit(self, plan: SchedulerOutput) -> None:
        """Queue a step, or launch it.

        Raises:
            WorkerDiedError: the executor is closed.
            PenstockError: see `ModelRunner.launch`.
        """
        if self._closed:
            raise WorkerDiedError("The executor is closed.")
        self._submitted.append(self._runner.launch(plan) if self._runner.runs_ahead else plan)

    def poll(self, timeout_s: float) -> bool:
        """Whether a step was submitted: `collect` is where it is waited for.

        Raises:
            WorkerDiedError: the executor is closed.
        """
        if self._closed:
            raise WorkerDiedError("The executor is closed.")
        return bool(self._submitted)

    def collect(self, timeout_s: float) -> StepOutput:
        """See the oldest step to its end; `timeout_s` is not kept.

        Raises:
            WorkerDiedError: the executor is closed.
            InternalError: nothing was submitted.
        """
        if self._closed:
            raise WorkerDiedError("The executor is closed.")
        if not self._submitted:
            raise InternalError("There is no submitted step to collect.")
        step = self._submitted.popleft()
        if isinstance(step, LaunchedStep):
            return self._runner.finish(step)
        return self._runner.execute(step)

    def close(self) -> None:
        """Drop what was not run; safe to call twice."""
        self._closed = True
        self._submitted.clear()
