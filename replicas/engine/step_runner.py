"""One step from schedule to deltas, over any executor: the only place that orders the calls.

Shared by the engine loop and the synchronous engine. Errors pass through: whoever drives it knows
what they mean for the requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from replicas.api import GenerationDelta
from replicas.engine.executor import Executor
from replicas.engine.scheduler import Scheduler
from replicas.engine.step_ledger import StepLedger

Clock = Callable[[], float]


class StepRunner:
    """Drives a scheduler and an executor.

    Args:
        step_timeout_s: longest wait for the answer to a step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        step_timeout_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self.ledger = StepLedger()

    def step(self, meanwhile: Callable[[], None] | None = None) -> list[GenerationDelta] | None:
        """Run one step and return what it says; None when no request is left.

        Args:
            meanwhile: called once the workers are busy with the step; whatever it does costs
                no time as long as it is shorter than the step.

        Raises:
            WorkerDiedError: a rank is gone.
            CollectiveTimeoutError: a rank gave no answer in time.
            InternalError: scheduler and workers disagree.
        """
        clock = self._clock
        started_s = clock()
        plan = self._scheduler.schedule()
        if plan is None:
            return None
        scheduled_s = clock()
        self._executor.submit(plan)
        if meanwhile is not None:
            meanwhile()
        output = self._executor.collect(self._step_timeout_s)
        executed_s = clock()
        deltas = self._scheduler.update_from_output(plan, output)
        self.ledger.add(
            num_tokens=plan.num_tokens,
            schedule_s=scheduled_s - started_s,
            execute_s=executed_s - scheduled_s,
            update_s=clock() - executed_s,
        )
        return deltas
