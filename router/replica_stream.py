"""The gateway's end of the hop: one multiplexed stream to one replica, for all requests.

Keeps the stream up while its member is listed (backoff between attempts), fans deltas out to the
channels of their requests and keeps the newest load report. When the stream is lost, every request
on it ends with a coded error at once; nothing is retried here. Silence counts as loss too: a
stopped leader keeps its socket open, but it cannot keep its one report per second.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable

from cluster.base.errors import PenstockError, UnavailableError, error_from_dict
from replicas.api import GenerationRequest, ReplicaStats
from replicas.leader.stream_codec import (
    HOP_VERSION,
    Beat,
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
from router.hop_connection import HopConnection
from router.hop_settings import HopSettings
from router.open_questions import OpenQuestions
from router.request_channel import RequestChannel

log = logging.getLogger(__name__)


class ReplicaStream:
    """One replica as this gateway reaches it; all methods belong to the loop's thread."""

    def __init__(
        self,
        endpoint: str,
        epoch: str,
        *,
        gateway_id: str,
        settings: HopSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self.epoch = epoch
        self.stats = ReplicaStats()
        self.draining = False
        self.last_error = ""
        self._gateway_id = gateway_id
        self._settings = settings
        self._clock = clock
        self._keys = itertools.count(1)
        self._channels: dict[int, RequestChannel] = {}
        self._unstarted: dict[int, int] = {}
        self._questions = OpenQuestions()
        self._connection: HopConnection | None = None
        self._connected = False
        self._last_heard = clock()
        self._retired = False
        self._runner: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a request can be submitted now."""
        return self._connected and not self.draining and not self._retired

    @property
    def connected(self) -> bool:
        """Whether the replica has accepted this stream and it still stands."""
        return self._connected

    @property
    def ended(self) -> bool:
        """Whether the stream is retired and idle: nothing will come of it any more."""
        return self._retired and (self._runner is None or self._runner.done())

    @property
    def num_in_flight(self) -> int:
        """Requests of this gateway on this replica."""
        return len(self._channels)

    @property
    def unstarted_tokens(self) -> int:
        """Prompt tokens submitted from here whose request has shown no delta yet."""
        return sum(self._unstarted.values())

    def start(self) -> None:
        """Begin connecting; returns at once."""
        self._runner = asyncio.create_task(self._run(), name=f"replica-stream {self.endpoint}")

    def retire(self) -> None:
        """The member is no longer listed: finish what runs, reconnect no more."""
        self._retired = True
        self._leave_if_done()

    def reinstate(self) -> bool:
        """The member is listed (again); False when this stream has already ended."""
        if self.ended:
            return False
        self._retired = False
        return True

    async def close(self, error: PenstockError) -> None:
        """End the stream now; its requests end with `error`."""
        self._retired = True
        self._lose(error)
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    def submit(self, request: GenerationRequest) -> RequestChannel:
        """Send a request; its deltas arrive in the channel.

        Raises:
            UnavailableError: the stream is down, draining or retired.
            InternalError: the request is too long to be sent.
        """
        if not self.ready:
            raise UnavailableError("The replica is not reachable now.", "Retry.")
        key = next(self._keys)
        channel = RequestChannel(
            request.request_id,
            num_choices=1 if request.pooling is not None else request.params.n,
            limit=self._settings.stream_buffer_events,
            cancel=lambda index: self._cancel(key, index),
        )
        self._channels[key] = channel
        self._unstarted[key] = len(request.prompt_token_ids)
        try:
            self._send(Submit(key, request))
        except PenstockError:
            self._forget(key)
            raise
        return channel

    async def cancel_named(self, request_id: str) -> bool:
        """End a request that any gateway submitted there; whether the replica had it."""
        if not self._connected:
            return False
        return await self._questions.ask(
            lambda number: self._send(CancelNamed(number, request_id)),
            self._settings.answer_timeout_s,
        )

    def _cancel(self, key: int, index: int | None) -> None:
        if key not in self._channels:
            return
        self._send(Cancel(key, index))
        if index is None:
            self._forget(key)

    def _forget(self, key: int) -> None:
        self._channels.pop(key, None)
        self._unstarted.pop(key, None)
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._retired and not self._channels and self._connection is not None:
            self._connection.end(UnavailableError("The replica is no longer part of the cluster."))

    def _send(self, message: Submit | Cancel | CancelNamed) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def _run(self) -> None:
        backoff_s = self._settings.backoff_initial_s
        while not self._retired:
            started = self._clock()
            error = await self._connect_once()
            self._lose(error)
            self.last_error = error.cause
            if self._clock() - started > self._settings.backoff_max_s:
                backoff_s = self._settings.backoff_initial_s
            if not self._retired:
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, self._settings.backoff_max_s)

    async def _connect_once(self) -> PenstockError:
        """Run one connection to its end; returns why it ended."""
        host, _, port = self.endpoint.rpartition(":")
        limit_s = self._settings.silence_timeout_s
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await loop.create_connection(
                    lambda: HopConnection(self._take), host.strip("[]"), int(port)
                )
        except TimeoutError:
            return _silent(limit_s)
        except OSError as error:
            return UnavailableError(f"The replica cannot be reached ({error}).")
        self._connection = connection
        self._last_heard = self._clock()
        try:
            connection.send(Hello(HOP_VERSION, self._gateway_id, self.epoch))
            return await self._keep_up(connection)
        finally:
            self._connection = None
            connection.end(UnavailableError("The gateway has left."))

    async def _keep_up(self, connection: HopConnection) -> PenstockError:
        """Beat, and listen for silence, until the connection ends; returns why it did."""
        limit_s = self._settings.silence_timeout_s
        pause_s = min(self._settings.beat_period_s, limit_s / 4)
        while True:
            done, _ = await asyncio.wait((connection.ended,), timeout=pause_s)
            if done:
                return connection.ended.result()
            if self._clock() - self._last_heard > limit_s:
                return _silent(limit_s)
            connection.send(Beat())

    def _take(self, message: FromReplica) -> None:
        self._last_heard = self._clock()
        if isinstance(message, Goodbye):
            if self._connection is not None:
                self._connection.end(error_from_dict(message.error))
            return
        if isinstance(message, Cancelled):
            self._questions.answer(message.question, message.found)
            return
        self.stats, self.draining = message.load, message.draining
        self._connected = True
        for delta in message.deltas:
            self._dispatch(delta)

    def _dispatch(self, message: Delta) -> None:
        key = message.stream_key
        channel = self._channels.get(key)
        if channel is None:
            return
        self._unstarted.pop(key, None)
        channel.push(delta_from_wire(message, channel.request_id))
        if channel.finished:
            self._forget(key)

    def _lose(self, error: PenstockError) -> None:
        """The connection is gone: end every request that was on it."""
        self._connected = False
        self._questions.give_up()
        channels = list(self._channels.values())
        self._channels.clear()
        self._unstarted.clear()
        for channel in channels:
            channel.fail(error, tell_replica=False)


def _silent(limit_s: float) -> PenstockError:
    return UnavailableError(f"The replica was silent for {limit_s:g} s.")
