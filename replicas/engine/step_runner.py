"""Steps from schedule to deltas, over any executor: the only place that orders the calls.

Shared by the synchronous engine, which runs one step at a time, and the engine loop, which plans
the next one while the workers are busy. Errors pass through: whoever drives it knows what they
mean for the requests. After one, steps may be in flight that nobody will answer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from replicas.api import GenerationDelta
from replicas.engine.executor import StepExecutor
from replicas.engine.step_forecast import StepForecast
from replicas.engine.step_ledger import StepLedger
from replicas.engine.step_source import OutputT, PlanT, StepSource

Clock = Callable[[], float]


@dataclass(slots=True, kw_only=True)
class _Flight(Generic[PlanT]):
    """A submitted step."""

    plan: PlanT
    schedule_s: float
    started_s: float
    """When the workers could begin: submission, or the answer to the step ahead of it."""
    is_ahead: bool
    """Whether it was planned while another one was in flight."""
    overlapped_s: float = 0.0
    """Time of the loop that went into other steps meanwhile: their answers, the next plan."""


class StepRunner(Generic[PlanT, OutputT]):
    """Drives a scheduler (or several, as one `StepSource`) and an executor of its plans.

    Args:
        step_timeout_s: longest time from the start of a step to its answer.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: StepSource[PlanT, OutputT],
        executor: StepExecutor[PlanT, OutputT],
        *,
        step_timeout_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._flights: deque[_Flight[PlanT]] = deque()
        self._forecast = StepForecast()
        self._woke_s: float | None = None
        self.ledger = StepLedger()

    @property
    def num_in_flight(self) -> int:
        """Steps submitted and not collected."""
        return len(self._flights)

    @property
    def oldest_started_s(self) -> float | None:
        """Start of the step that the workers execute; None when they have nothing to do."""
        return self._flights[0].started_s if self._flights else None

    @property
    def plan_is_due(self) -> bool:
        """Whether it is time to plan on top of the step in flight, without any wait."""
        return self._clock() >= self._plan_at_s

    @property
    def _plan_at_s(self) -> float:
        flight = self._flights[0]
        return flight.started_s + self._forecast.plan_after_s(flight.plan)

    def step(self) -> list[GenerationDelta] | None:
        """Run one step and return what it says; None when no request is left.

        Raises:
            PenstockError: see `submit` and `collect`.
        """
        return self.collect() if self.submit() else None

    def restart(self, executor: StepExecutor[PlanT, OutputT], *, keeps_cache: bool = False) -> None:
        """Go on with other workers, or those that are left; steps in flight are forgotten.

        Args:
            keeps_cache: see `RequestBook.restart`.
        """
        self._flights.clear()
        self.use(executor)
        self._scheduler.restart(keeps_cache=keeps_cache)

    def use(self, executor: StepExecutor[PlanT, OutputT]) -> None:
        """Go on with another executor; no step is in flight."""
        self._executor = executor
        self._woke_s = None

    def submit(self) -> bool:
        """Plan the next step and hand it to the workers; False when there is nothing to plan.

        Raises:
            WorkerDiedError: a rank is gone.
            InternalError: the scheduler is at a loss.
        """
        started_s = self._clock()
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        scheduled_s = self._clock()
        schedule_s = scheduled_s - started_s
        if self._flights:
            self._flights[0].overlapped_s += schedule_s
        self._executor.submit(plan)
        flight = _Flight(
            plan=plan,
            schedule_s=schedule_s,
            started_s=scheduled_s,
            is_ahead=bool(self._flights),
        )
        self._flights.append(flight)
        if self._woke_s is not None:
            self._forecast.add_planning(self._clock() - self._woke_s)
            self._woke_s = None
        return True

    def wait_nearly_done(self) -> bool:
        """Wait until it is time to plan on top of the step in flight, or its answer is there.

        It is time when the forecast says so, or the workers do.

        Returns:
            Whether the answer is there.

        Raises:
            WorkerDiedError: a rank is gone.
        """
        is_ready = self._executor.poll(max(0.0, self._plan_at_s - self._clock()))
        self._woke_s = None if is_ready else self._clock()
        return is_ready

    def collect(self) -> list[GenerationDelta]:
        """Wait for the oldest step in flight and return what it says.

        Raises:
            WorkerDiedError: a rank is gone.
            CollectiveTimeoutError: a rank gave no answer in time.
            InternalError: scheduler and workers disagree.
        """
        self._woke_s = None
        flight = self._flights[0]
        if len(self._flights) > 1:
            # The ranks have what comes next: whoever looks for the answer too early takes time from
            # the threads that bring the last one to its client.
            rest_s = flight.started_s + self._forecast.ends_after_s(flight.plan) - self._clock()
            if rest_s > 0.0:
                self._executor.poll(rest_s)
        elapsed_s = self._clock() - flight.started_s
        output = self._executor.collect(max(0.0, self._step_timeout_s - elapsed_s))
        executed_s = self._clock()
        self._flights.popleft()
        if self._flights:
            self._flights[0].started_s = executed_s
        self._forecast.add_step(flight.plan, output.duration_s, output.sign_s)
        if flight.is_ahead:
            self._forecast.add_idle(output.idle_s, output.duration_s)
        deltas = self._scheduler.update_from_output(flight.plan, output)
        update_s = self._clock() - executed_s
        if self._flights:
            self._flights[0].overlapped_s += update_s
        self.ledger.add(
            num_tokens=flight.plan.num_tokens,
            schedule_s=flight.schedule_s,
            execute_s=executed_s - flight.started_s - flight.overlapped_s,
            update_s=update_s,
            worker_s=output.duration_s,
            traffic=output.traffic,
        )
        return deltas
