"""The executor of an expert-parallel replica: every rank gets its part of each lock-step.

All ranks of a data-parallel group get the same plan; the first of them answers for the group, in
every step, idle or not. As in `link_executor.py`, a step is sent on top of one in flight only when
every socket surely takes it whole.
"""

from __future__ import annotations

import time
from collections import deque

from cluster.base.errors import CollectiveTimeoutError, InternalError
from replicas.engine.lockstep import LockstepOutput, LockstepPlan
from replicas.engine.scheduler_output import StepOutput
from replicas.worker import wire
from replicas.worker.leader_link import LeaderLink
from replicas.worker.link_executor import MAX_BUFFERED_BYTES, SEND_TIMEOUT_S


class LockstepExecutor:
    """Implements `StepExecutor[LockstepPlan, LockstepOutput]` over a `LeaderLink`.

    Args:
        link: to all ranks there are, numbered group by group; whole groups may be missing.
        tp_size: ranks of each group.
    """

    def __init__(self, link: LeaderLink, *, tp_size: int) -> None:
        self._link = link
        self._tp_size = tp_size
        self._answers: dict[int, deque[StepOutput]] = {
            rank // tp_size: deque() for rank in link.ranks
        }
        self._in_flight: deque[int] = deque()
        self._unsent: deque[list[bytes]] = deque()
        self._closed = False

    def submit(self, plan: LockstepPlan) -> None:
        """Send every rank its part; see `StepExecutor.submit` for errors."""
        by_group = [wire.encode(plan.for_group(group)) for group in self._answers]
        payloads = [payload for payload in by_group for _ in range(self._tp_size)]
        is_first = not self._in_flight
        fits = max(len(payload) for payload in by_group) <= MAX_BUFFERED_BYTES
        is_second = len(self._in_flight) == 1 and fits
        self._in_flight.append(plan.step)
        if is_first or is_second:
            self._link.send_plans(payloads, SEND_TIMEOUT_S)
        else:
            self._unsent.append(payloads)

    def poll(self, timeout_s: float) -> bool:
        """Whether all groups have answered within `timeout_s`; raises what a rank reports."""
        deadline_s = time.monotonic() + timeout_s
        while not all(self._answers.values()):
            if not self._link.wait_readable(max(0.0, deadline_s - time.monotonic())):
                return False
            self._take_answer(deadline_s)
        return True

    def collect(self, timeout_s: float) -> LockstepOutput:
        """Wait for all groups' answers to the oldest plan; see `StepExecutor.collect`."""
        deadline_s = time.monotonic() + timeout_s
        if len(self._in_flight) > 1 and not self._unsent:
            self._link.nap()  # the ranks have their next step
        while not all(self._answers.values()):
            self._take_answer(deadline_s)
        expected = self._in_flight.popleft()
        if self._unsent:
            self._link.send_plans(self._unsent.popleft(), SEND_TIMEOUT_S)
        outputs = tuple(answers.popleft() for answers in self._answers.values())
        for group, output in zip(self._answers, outputs, strict=True):
            if output.step != expected:
                raise InternalError(
                    f"Group {group} answered step {output.step} instead of {expected}."
                )
        return LockstepOutput(outputs=outputs)

    def close(self) -> None:
        """Ask the ranks to leave; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._link.stop()

    def _take_answer(self, deadline_s: float) -> None:
        try:
            rank, payload = self._link.receive_from_any(max(0.0, deadline_s - time.monotonic()))
        except CollectiveTimeoutError as error:
            late = [group for group, answers in self._answers.items() if not answers]
            raise CollectiveTimeoutError(
                f"{error.cause} Data-parallel groups without an answer: {late}.", error.remedy
            ) from None
        group, tp_rank = divmod(rank, self._tp_size)
        if tp_rank != 0:
            raise InternalError(f"Rank {rank} answered; the first rank of group {group} should.")
        self._answers[group].append(wire.decode_result(payload))
