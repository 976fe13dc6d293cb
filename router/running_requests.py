"""The requests this gateway has admitted and not yet ended: their places, deadlines and channels.

A request ends exactly once, by `RunningRequest.end`, whatever the reason; that gives back its
reservation and stops whatever a replica still does for it. The deadline is a timer of the loop, so
it holds even when nobody reads the request's stream.
"""

from __future__ import annotations

import asyncio

from cluster.base.errors import DeadlineExceededError, InvalidRequestError
from router.admission import Admission, Reservation
from router.request_channel import RequestChannel


class RunningRequests:
    """Admitted requests by public id."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._by_id: dict[str, RunningRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def admit(self, request_id: str, estimated_tokens: int, timeout_s: float) -> RunningRequest:
        """Reserve a place and start the deadline (0.0: none).

        Raises:
            InvalidRequestError: a running request has that id.
            OverloadedError: the gateway is full.
        """
        if request_id in self._by_id:
            raise InvalidRequestError(
                f"A request with the id {request_id!r} is running.",
                "Choose another id or leave it empty.",
                param="request_id",
            )
        reservation = self._admission.reserve(estimated_tokens)
        running = RunningRequest(self, request_id, reservation, timeout_s)
        self._by_id[request_id] = running
        return running

    def abort(self, request_id: str) -> bool:
        """Abort a running request; False when there is none of that id."""
        running = self._by_id.get(request_id)
        if running is None:
            return False
        running.abort()
        return True

    def forget(self, running: RunningRequest) -> None:
        """Drop an ended request."""
        self._by_id.pop(running.request_id, None)


class RunningRequest:
    """One admitted request."""

    def __init__(
        self,
        owner: RunningRequests,
        request_id: str,
        reservation: Reservation,
        timeout_s: float,
    ) -> None:
        self.request_id = request_id
        self._owner = owner
        self._reservation = reservation
        self._timeout_s = timeout_s
        self._channels: list[RequestChannel] = []
        self._aborted = False
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s > 0:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    def attach(self, channel: RequestChannel) -> None:
        """Put a submitted request of a replica under this one's deadline, abort and end."""
        self._channels.append(channel)
        if self._aborted:
            channel.abort()
        elif self._expired:
            channel.fail(self._deadline_error())

    def set_waiting_tokens(self, count: int) -> None:
        """See `Reservation.set_waiting_tokens`."""
        self._reservation.set_waiting_tokens(count)

    def abort(self) -> None:
        """End every choice with finish reason ABORT."""
        self._aborted = True
        for channel in self._channels:
            channel.abort()

    def end(self) -> None:
        """Stop what still runs and give the place back; harmless when already done."""
        if self._timer is not None:
            self._timer.cancel()
        for channel in self._channels:
            channel.close()
        self._reservation.release()
        self._owner.forget(self)

    def _expire(self) -> None:
        self._expired = True
        for channel in self._channels:
            channel.fail(self._deadline_error())

    def _deadline_error(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"The request did not finish within its {self._timeout_s:g} s.",
            "Ask for fewer tokens or allow more time.",
            param="timeout_s",
        )
