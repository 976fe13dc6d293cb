"""The executor of a real replica: steps go over the link to one worker process per rank.

A rank reads its next plan when it is done with the last one. So a plan may only be sent on top of a
step in flight when the socket surely takes all of it: otherwise the leader would wait in the middle
of a plan for a rank that waits in the middle of a long answer. Longer plans stay here until the
answer is in.
"""

from __future__ import annotations

from collections import deque

from cluster.base.errors import InternalError
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.worker import wire
from replicas.worker.leader_link import LeaderLink

SEND_TIMEOUT_S = 10.0
# Well below the smallest default buffers, 64 KiB for a TCP receiver that does not read.
MAX_BUFFERED_BYTES = 32 * 1024


class LinkExecutor:
    """Implements `replicas.engine.executor.Executor` over a `LeaderLink`."""

    def __init__(self, link: LeaderLink) -> None:
        self._link = link
        self._in_flight: deque[int] = deque()
        self._unsent: deque[bytes] = deque()
        self._closed = False

    def submit(self, plan: SchedulerOutput) -> None:
        """Send the plan to every rank; see `Executor.submit` for errors."""
        payload = wire.encode(plan)
        is_first = not self._in_flight
        is_second = len(self._in_flight) == 1 and len(payload) <= MAX_BUFFERED_BYTES
        self._in_flight.append(plan.step)
        if is_first or is_second:
            self._link.send_plan(payload, SEND_TIMEOUT_S)
        else:
            self._unsent.append(payload)

    def poll(self, timeout_s: float) -> bool:
        """Whether rank 0 answers, or a rank ends, within `timeout_s`; `collect` tells which."""
        return self._link.wait_readable(timeout_s)

    def collect(self, timeout_s: float) -> StepOutput:
        """Wait for rank 0's answer to the oldest plan; see `Executor.collect` for errors."""
        if len(self._in_flight) > 1 and not self._unsent:
            self._link.nap()  # the ranks have their next step
        payload = self._link.receive_result(timeout_s)
        expected = self._in_flight.popleft()
        if self._unsent:
            # The ranks stand idle: decoding can wait.
            self._link.send_plan(self._unsent.popleft(), SEND_TIMEOUT_S)
        output = wire.decode_result(payload)
        if output.step != expected:
            raise InternalError(f"Rank 0 answered step {output.step} instead of {expected}.")
        return output

    def close(self) -> None:
        """Ask the ranks to leave; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._link.stop()
