"""The executor of a real replica: steps go over the link to one worker process per rank."""

from __future__ import annotations

from collections import deque

from cluster.base.errors import InternalError
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.worker import wire
from replicas.worker.leader_link import LeaderLink

_SEND_TIMEOUT_S = 10.0


class LinkExecutor:
    """Implements `replicas.engine.executor.Executor` over a `LeaderLink`."""

    def __init__(self, link: LeaderLink) -> None:
        self._link = link
        self._in_flight: deque[int] = deque()
        self._closed = False

    def submit(self, plan: SchedulerOutput) -> None:
        """Send the plan to every rank; see `Executor.submit` for errors."""
        self._link.send_plan(wire.encode(plan), _SEND_TIMEOUT_S)
        self._in_flight.append(plan.step)

    def collect(self, timeout_s: float) -> StepOutput:
        """Wait for rank 0's answer to the oldest plan; see `Executor.collect` for errors."""
        output = wire.decode_result(self._link.receive_result(timeout_s))
        expected = self._in_flight.popleft()
        if output.step != expected:
            raise InternalError(f"Rank 0 answered step {output.step} instead of {expected}.")
        return output

    def close(self) -> None:
        """Ask the ranks to leave; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._link.stop()
