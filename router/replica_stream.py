"""The gateway's end of the hop: one multiplexed stream to one replica, for all requests.

Fans deltas out to the channels of their requests and keeps the newest load report. When the replica
is lost, the stream lets go of every request at once; whether one goes on elsewhere is not decided
here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from cluster.base.errors import PenstockError, UnavailableError, error_from_dict
from replicas.api import GenerationRequest, ReplicaStats
from replicas.leader.stream_codec import (
    HOP_VERSION,
    Cancel,
    Cancelled,
    CancelNamed,
    Delta,
    FromReplica,
    Goodbye,
    Hello,
    Submit,
    delta_from_wire,
)
from router.hop_link import HopLink, LinkEvents
from router.hop_settings import HopSettings
from router.loss import Loss
from router.open_questions import OpenQuestions
from router.request_channel import RequestChannel


class ReplicaStream:
    """One replica as this gateway reaches it; all methods belong to the loop's thread.

    Args:
        epoch: the leader's life that is meant.
        version: what the replica was built from, see `cluster.base.replica_version`.
        on_ready: called whenever requests can be submitted that could not before.
    """

    def __init__(
        self,
        endpoint: str,
        epoch: str,
        *,
        gateway_id: str,
        settings: HopSettings,
        version: str = "",
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.endpoint = endpoint
        self.epoch = epoch
        self.version = version
        self.stats = ReplicaStats()
        self.draining = False
        self.last_error = ""
        self._settings = settings
        self._on_ready = on_ready
        self._keys = itertools.count(1)
        self._channels: dict[int, RequestChannel] = {}
        self._unstarted: dict[int, int] = {}
        self._questions = OpenQuestions()
        self._connected = False
        self._failing = False
        self._retired = False
        hello = Hello(HOP_VERSION, gateway_id, epoch)
        events = LinkEvents(on_message=self._take, on_end=self._let_go)
        self._link = HopLink(endpoint, hello, events, settings)

    @property
    def ready(self) -> bool:
        """Whether a request can be submitted now."""
        return self._connected and not (self.draining or self._failing or self._retired)

    @property
    def connected(self) -> bool:
        """Whether the replica has accepted this stream and it still stands."""
        return self._connected

    @property
    def ended(self) -> bool:
        """Whether the stream is retired and idle: nothing will come of it any more."""
        return self._retired and self._link.ended

    @property
    def num_in_flight(self) -> int:
        """Requests of this gateway on this replica."""
        return len(self._channels)

    @property
    def unstarted_tokens(self) -> int:
        """Tokens submitted from here to be computed for requests that have shown no delta yet."""
        return sum(self._unstarted.values())

    def start(self) -> None:
        """Begin connecting; returns at once."""
        self._link.start()

    def retire(self) -> None:
        """The member is no longer listed: finish what runs, reconnect no more."""
        self._retired = True
        self._link.comes_back = False
        self._leave_if_done()

    def reinstate(self) -> bool:
        """The member is listed (again); False when this stream has already ended."""
        if self.ended:
            return False
        self._retired = False
        self._link.comes_back = True
        return True

    async def lose(self, error: PenstockError) -> None:
        """The replica is known to have failed: its requests lose it now, and the stream ends."""
        self._retired = True
        self._let_go(error)
        await self._link.close()

    async def close(self, error: PenstockError) -> None:
        """The gateway leaves: its requests end with `error`, wherever else they could go on."""
        self._retired = True
        for channel in self._channels.values():
            channel.carry(lambda index: None)
            channel.fail(error)
        self._let_go(error)
        await self._link.close()

    def submit(self, request: GenerationRequest, channel: RequestChannel) -> None:
        """Send a request, or what is left of one; its deltas arrive in the channel.

        Raises:
            UnavailableError: the stream is down, draining or retired.
            InternalError: the request is too long to be sent.
        """
        if not self.ready:
            raise UnavailableError("The replica is not reachable now.", "Retry.")
        key = next(self._keys)
        self._link.send(Submit(key, request))
        self._channels[key] = channel
        self._unstarted[key] = request.num_known_tokens
        channel.carry(lambda index: self._cancel(key, index))

    async def cancel_named(self, request_id: str) -> bool:
        """End a request that any gateway submitted there; whether the replica had it."""
        if not self._connected:
            return False
        return await self._questions.ask(
            lambda number: self._link.send(CancelNamed(number, request_id)),
            self._settings.answer_timeout_s,
        )

    def _cancel(self, key: int, index: int | None) -> None:
        if key not in self._channels:
            return
        self._link.send(Cancel(key, index))
        if index is None:
            self._forget(key)

    def _forget(self, key: int) -> None:
        self._channels.pop(key, None)
        self._unstarted.pop(key, None)
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._retired and not self._channels:
            self._link.end(UnavailableError("The replica is no longer part of the cluster."))

    def _take(self, message: FromReplica) -> None:
        if isinstance(message, Goodbye):
            self._link.end(error_from_dict(message.error))
            return
        if isinstance(message, Cancelled):
            self._questions.answer(message.question, message.found)
            return
        was_ready = self.ready
        self.stats, self.draining = message.load, message.draining
        self._connected = True
        for delta in message.deltas:
            self._dispatch(delta)
        if self.ready and not was_ready:
            self._on_ready()

    def _dispatch(self, message: Delta) -> None:
        key = message.stream_key
        channel = self._channels.get(key)
        if channel is None:
            return
        if message.whole is not None and message.whole.replica_lost:
            # Nothing more is sent there: it would only lose the request once more.
            self._failing = True
            self._forget(key)
            channel.lose(self._loss(error_from_dict(message.whole.error or {})))
            return
        self._unstarted.pop(key, None)
        channel.push(delta_from_wire(message, channel.request_id))
        if channel.finished:
            self._forget(key)

    def _let_go(self, error: PenstockError) -> None:
        """The connection is gone, and every request on it has lost its replica."""
        self.last_error = error.cause
        self._connected = self._failing = False
        self._questions.give_up()
        channels = list(self._channels.values())
        self._channels.clear()
        self._unstarted.clear()
        loss = self._loss(error)
        for channel in channels:
            channel.lose(loss)

    def _loss(self, error: PenstockError) -> Loss:
        return Loss.of(error, is_draining=self.draining)
