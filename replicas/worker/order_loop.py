"""What a rank does as its leader says: steps, and between two groups halting and gathering.

An exception inside a step is this rank's end: the leader hears the root cause over the link. But
for the loss of a peer, where ranks survive it: then the rank halts and waits for the leader to
gather those that are left. The loop reads the link all the time but during a step, so a rank that
gathers can be told at once that somebody else was lost meanwhile.
"""

from __future__ import annotations

import logging
import time

from cluster.base.errors import (
    CollectiveTimeoutError,
    InternalError,
    PenstockError,
    UnavailableError,
    WorkerDiedError,
)
from replicas.worker import wire
from replicas.worker.frames import PLAN, FrameKind, Payload
from replicas.worker.gathering import Gathered
from replicas.worker.gathering_attempt import GatheringAttempt
from replicas.worker.lockstep_rank import LockstepRank
from replicas.worker.plan import WorkerPlan
from replicas.worker.tensor_rank import TensorParallelRank
from replicas.worker.worker_link import WorkerLink

log = logging.getLogger(__name__)

# Longer than a leader takes to gather the ranks that are left, or to give the replica up.
_HALTED_TIMEOUT_S = 300.0
# How late an answer may be, or a plan be taken up, while the device has work.
_DEVICE_POLL_S = 50e-6


class OrderLoop:
    """One rank under the orders of its leader.

    Args:
        plan: the rank's.
        rank: what runs its steps.
        link: to the leader.
    """

    def __init__(
        self, plan: WorkerPlan, rank: TensorParallelRank | LockstepRank, link: WorkerLink
    ) -> None:
        self._number = plan.rank
        self._survives = plan.experts is not None and plan.experts.survives
        self._rank = rank
        # A rank whose device computes beside the host; the ranks of others end a step in one go.
        self._ahead = rank if isinstance(rank, TensorParallelRank) and rank.runs_ahead else None
        self._link = link
        # Between two groups: what the leader planned for the one that ended is not run.
        self._halted = plan.experts is not None and plan.experts.joins_later
        self._patience_s = None if self._halted else _HALTED_TIMEOUT_S
        self._attempt: GatheringAttempt | None = None
        self._failure: Exception | None = None

    def run(self) -> None:
        """Obey in order of arrival until the leader stops or goes.

        Raises:
            PenstockError: a step failed and this rank cannot go on; the leader has been told.
        """
        try:
            while (order := self._next_order()) is not None:
                self._obey(*order)
            if self._failure is not None:
                raise self._failure
        except Exception as error:
            fault = _as_fault(error)
            log.exception("rank %d failed", self._number)
            self._link.send_fault(fault.to_dict())
            raise fault from error
        finally:
            self._link.close()

    def _next_order(self) -> tuple[FrameKind, Payload] | None:
        if self._ahead is not None:
            self._answer_until_ordered(self._ahead)
        if not self._halted:
            return self._link.receive_order(None)
        while True:
            try:
                return self._link.receive_order(self._patience_s if self._halted else None)
            except TimeoutError:
                if self._halted:  # it may have joined a group while it listened
                    raise UnavailableError(
                        f"The leader made no new group within {_HALTED_TIMEOUT_S:.0f} s."
                    ) from None

    def _answer_until_ordered(self, rank: TensorParallelRank) -> None:
        """The device and the leader cannot be waited for together: each is asked in turn."""
        while rank.num_in_flight and not self._link.has_order():
            if rank.answer_is_ready:
                self._answer(rank)
            else:
                time.sleep(_DEVICE_POLL_S)

    def _obey(self, kind: FrameKind, payload: Payload) -> None:
        if kind is PLAN and not self._halted:
            self._step(payload)
            return
        if self._ahead is not None:
            self._answer(self._ahead)
        if kind is FrameKind.HALT:
            self._halt()
            self._link.send_halted()
        elif kind is FrameKind.GATHER:
            self._gather(payload)

    def _step(self, payload: Payload) -> None:
        try:
            if self._ahead is None:
                self._execute(payload)
            else:
                self._launch(self._ahead, payload)
        except (WorkerDiedError, CollectiveTimeoutError) as error:
            if not self._survives:
                raise
            log.warning("rank %d waits for a new group: %s", self._number, error)
            self._halt()
            self._link.send_fault(error.to_dict())

    def _execute(self, payload: Payload) -> None:
        """A whole step. Few calls: between two steps whatever Python does costs the ranks time, and
        a call of a function about a microsecond, because a step's weights have swept the caches."""
        rank, link = self._rank, self._link
        answer = rank.execute(payload, link.send_nearly_done, link.waited_s)
        if answer is not None:
            link.send_result(answer)
        if rank.settles:
            rank.settle()

    def _launch(self, rank: TensorParallelRank, payload: Payload) -> None:
        """A step on top of the one in flight, where the rank's device allows it."""
        rank.begin(payload, self._link.send_nearly_done, self._link.waited_s)
        self._answer(rank, all_but=1 if rank.may_run_ahead else 0)

    def _answer(self, rank: TensorParallelRank, *, all_but: int = 0) -> None:
        """Answer steps in flight, oldest first, until so many are left."""
        while rank.num_in_flight > all_but:
            answer = rank.answer()
            if answer is not None:
                self._link.send_result(answer)
        if not rank.num_in_flight:
            rank.settle()

    def _halt(self) -> None:
        """Leave all groups: peers that wait for this rank hear of it by that."""
        self._halted = True
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.call_off()
            self._halted = True  # the attempt may just have ended well
        if isinstance(self._rank, LockstepRank):
            self._rank.leave()

    def _gather(self, payload: Payload) -> None:
        if not isinstance(self._rank, LockstepRank):
            raise InternalError("Only ranks of an expert-parallel replica gather anew.")
        self._halt()
        self._attempt = GatheringAttempt(
            self._rank, wire.decode_gathering(payload), self._gathered, self._not_gathered
        )

    def _gathered(self, gathered: Gathered) -> None:
        """In the attempt's thread: the leader sends no plan before it has this answer."""
        self._halted, self._patience_s = False, _HALTED_TIMEOUT_S
        self._link.send_gathered(gathered)

    def _not_gathered(self, error: Exception) -> None:
        """In the attempt's thread."""
        self._link.send_fault(_as_fault(error).to_dict())
        if not isinstance(error, (WorkerDiedError, CollectiveTimeoutError)):
            self._failure = error
            self._link.close()  # ends the loop's wait for an order


def _as_fault(error: Exception) -> PenstockError:
    """The error to report for whatever ended a step."""
    if isinstance(error, PenstockError):
        return error
    return InternalError(f"{type(error).__name__}: {error}")
