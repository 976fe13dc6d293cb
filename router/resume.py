"""Has requests go on with another replica when theirs is lost; the client sees a pause, no more.

What is left of a request is submitted to a replica built like the lost one: prompt, every parameter
with the seed that the gateway drew, and the tokens so far. Since a random number is a function of
seed and position, it gives the tokens that an undisturbed run gives. Everything that belongs to the
client (text, stop strings, deadline, place in the gateway) stays where it is and does not notice.

A request that loses replica after replica may be what ends them, so it is moved a bounded number of
times. Without a replica to go to it waits a bounded time, and ends with what its replica died of.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.base.errors import PenstockError, error_from_dict
from cluster.base.front_plan import LimitsPlan
from replicas.api import GenerationRequest
from router.loss import Loss, LossReason
from router.replica_stream import ReplicaStream
from router.request_channel import RequestChannel

log = logging.getLogger(__name__)


class Outcome(enum.StrEnum):
    """What became of a request that lost its replica."""

    RESUMED = "resumed"
    LIMIT = "limit"
    """It had lost too many replicas."""
    NO_REPLICA = "no_replica"
    """No other replica could take it in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One loss and its outcome."""

    model: str
    reason: LossReason
    outcome: Outcome
    num_replayed_tokens: int = 0
    """Prompt and output tokens that are computed again."""


@dataclass(slots=True, kw_only=True)
class Trip:
    """A request's way over replicas."""

    model: str
    version: str
    """Of the replica that it began on; tokens of another one could differ."""
    num_losses: int = 0
    """Replicas that were lost with it; one that was taken away is not the request's doing."""


_REMEDIES = {
    Outcome.LIMIT: "Send it again once; if that ends replicas too, the request is the cause.",
    Outcome.NO_REPLICA: "Retry in a few seconds; a second replica of the model would take over.",
}


class FindReplica(Protocol):
    """Chooses where a request goes."""

    def __call__(
        self, model: str, request: GenerationRequest, version: str | None = None
    ) -> ReplicaStream | None:
        """A replica of that model and version that can take the request now."""
        ...


class Resumer:
    """Moves requests; everything runs on one loop.

    Args:
        find: chooses the next replica.
        changed: returns when a replica may have become ready that was not.
        on_move: told of every loss once its outcome is known.
    """

    def __init__(
        self,
        find: FindReplica,
        changed: Callable[[], Awaitable[None]],
        limits: LimitsPlan,
        on_move: Callable[[Move], None],
    ) -> None:
        self._find = find
        self._changed = changed
        self._on_move = on_move
        self._waiting: set[asyncio.Task[None]] = set()
        self.num_resumed = 0
        self.set_limits(limits)

    def set_limits(self, limits: LimitsPlan) -> None:
        """Follow other limits from the next loss on."""
        self._max_resumes = limits.max_resumes
        self._wait_s = limits.resume_wait_s

    def lose(self, trip: Trip, channel: RequestChannel, loss: Loss) -> None:
        """A request has lost its replica: have it go on with another one, or end."""
        trip.num_losses += loss.reason is not LossReason.DRAINED
        if not self._max_resumes:
            self._end(trip, channel, loss, Outcome.LIMIT)
        elif trip.num_losses > self._max_resumes:
            why = (
                f"The request has lost {trip.num_losses} replicas and is not moved again "
                "(gateway.limits.max_resumes)."
            )
            self._end(trip, channel, loss, Outcome.LIMIT, why)
        elif not self._go_on(trip, channel, loss):
            self._wait(trip, channel, loss)

    def _go_on(self, trip: Trip, channel: RequestChannel, loss: Loss) -> bool:
        """Submit what is left of a request; False when no replica can take it now."""
        rest = channel.rest
        stream = self._find(trip.model, rest, trip.version)
        if stream is None:
            return False
        try:
            stream.submit(rest, channel)
        except PenstockError as error:
            channel.fail(error)
            return True
        self.num_resumed += 1
        log.warning(
            "request %s lost its replica (%s: %s) and goes on at %s behind %d tokens",
            channel.request_id,
            loss.reason,
            loss.error.cause,
            stream.endpoint,
            channel.log.num_tokens,
        )
        self._on_move(
            Move(
                model=trip.model,
                reason=loss.reason,
                outcome=Outcome.RESUMED,
                num_replayed_tokens=rest.num_known_tokens,
            )
        )
        return True

    def _wait(self, trip: Trip, channel: RequestChannel, loss: Loss) -> None:
        """Have the request go on as soon as a replica can take it, or end in time."""
        waiting = asyncio.create_task(self._go_on_in_time(trip, channel, loss))
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)

        def stop(index: int | None) -> None:
            if index is None:
                waiting.cancel()

        channel.carry(stop)

    async def _go_on_in_time(self, trip: Trip, channel: RequestChannel, loss: Loss) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                # Asked again first: one may have become ready before this task began to listen.
                while not self._go_on(trip, channel, loss):
                    await self._changed()
        except TimeoutError:
            why = f"No other replica could take the request within {self._wait_s:g} s."
            self._end(trip, channel, loss, Outcome.NO_REPLICA, why)

    def _end(
        self, trip: Trip, channel: RequestChannel, loss: Loss, outcome: Outcome, why: str = ""
    ) -> None:
        """End the request with what its replica was lost by, and why it does not go on."""
        num_tokens = channel.log.num_tokens
        told = f"{num_tokens} output tokens were delivered." if num_tokens else ""
        fields = loss.error.to_dict()
        fields["cause"] = " ".join(part for part in (loss.error.cause, why, told) if part)
        if why:
            fields["remedy"] = _REMEDIES[outcome]
        log.warning("request %s ends: %s", channel.request_id, fields["cause"])
        self._on_move(Move(model=trip.model, reason=loss.reason, outcome=outcome))
        channel.fail(error_from_dict(fields))
