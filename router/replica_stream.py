"""The gateway's end of the hop: one multiplexed gRPC stream to one replica, for all requests.

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
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from cluster.base.errors import InternalError, PenstockError, UnavailableError
from replicas.api import GenerationRequest, ReplicaStats
from replicas.leader.stream_codec import (
    MAX_HOP_MESSAGE_BYTES,
    delta_from_proto,
    error_from_proto,
    stats_from_proto,
    submit_to_proto,
)
from replicas.proto import replica_stream_pb2 as pb
from replicas.proto import replica_stream_pb2_grpc as pb_grpc
from router.request_channel import RequestChannel

if TYPE_CHECKING:
    HopCall = grpc.aio.StreamStreamCall[pb.ToReplica, pb.FromReplica]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopSettings:
    """Timing and bounds of a hop."""

    stream_buffer_events: int = 1024
    """Unread deltas after which a slow client's request is ended."""
    silence_timeout_s: float = 10.0
    """No message for this long (a report is due every second) means the replica hangs."""
    backoff_initial_s: float = 0.05
    backoff_max_s: float = 2.0


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
        self._outbox: list[pb.ToReplica] = []
        self._outbox_wake = asyncio.Event()
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
        self._outbox_wake.set()

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
        self._send(pb.ToReplica(submit=submit_to_proto(key, request)))
        return channel

    def _cancel(self, key: int, index: int | None) -> None:
        if key not in self._channels:
            return
        message = pb.ToReplica(cancel=pb.Cancel(stream_key=key, index=index))
        if index is None:
            self._forget(key)
        self._send(message)

    def _forget(self, key: int) -> None:
        self._channels.pop(key, None)
        self._unstarted.pop(key, None)
        if self._retired and not self._channels:
            self._outbox_wake.set()

    def _send(self, message: pb.ToReplica) -> None:
        self._outbox.append(message)
        self._outbox_wake.set()

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
        async with grpc.aio.insecure_channel(self.endpoint, options=_channel_options()) as channel:
            stub = pb_grpc.ReplicaStub(channel)
            call = stub.Stream()
            hello = pb.Hello(gateway_id=self._gateway_id, epoch=self.epoch)
            self._outbox = [pb.ToReplica(hello=hello)]
            self._last_heard = self._clock()
            writer = asyncio.create_task(self._write(call))
            try:
                return await self._read(call)
            except grpc.aio.AioRpcError as error:
                return UnavailableError(f"The replica's stream was lost ({error.code().name}).")
            except asyncio.CancelledError:
                # Either this task is being closed, or our writer cancelled the call.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                (reason,) = await asyncio.gather(writer, return_exceptions=True)
                if isinstance(reason, PenstockError):
                    return reason
                log.error("stream of replica %s failed", self.endpoint, exc_info=reason)
                return InternalError("The replica's stream could not be written.")
            except Exception:
                log.exception("stream of replica %s failed", self.endpoint)
                return InternalError("The replica's stream could not be read.")
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: HopCall) -> PenstockError:
        """Send what is queued; ends, cancelling the call, on silence or retirement."""
        limit_s = self._settings.silence_timeout_s
        error: PenstockError = UnavailableError("The replica is no longer part of the cluster.")
        try:
            while not (self._retired and not self._channels):
                if self._clock() - self._last_heard > limit_s:
                    raise TimeoutError
                await self._wait_for_outbox(limit_s / 4)
                batch, self._outbox = self._outbox, []
                for message in batch:
                    # A stopped replica reads nothing: a write can wait as long as a read.
                    async with asyncio.timeout(limit_s):
                        await call.write(message)
        except TimeoutError:
            error = UnavailableError(f"The replica was silent for {limit_s:g} s.")
        finally:
            # Whatever stopped the writer: without one the stream is no use to its reader.
            call.cancel()
        return error

    async def _wait_for_outbox(self, at_most_s: float) -> None:
        if self._outbox:
            return
        self._outbox_wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._outbox_wake.wait()

    async def _read(self, call: HopCall) -> PenstockError:
        async for message in call:
            self._last_heard = self._clock()
            if message.HasField("load"):
                self.stats = stats_from_proto(message.load)
                self.draining = message.load.draining
                self._connected = True
            for delta in message.deltas:
                self._dispatch(delta)
            if message.HasField("goodbye") and message.goodbye.code:
                return error_from_proto(message.goodbye)
        return UnavailableError("The replica ended its stream.")

    def _dispatch(self, message: pb.Delta) -> None:
        key = message.stream_key
        channel = self._channels.get(key)
        if channel is None:
            return
        self._unstarted.pop(key, None)
        channel.push(delta_from_proto(message, channel.request_id))
        if channel.finished:
            self._forget(key)

    def _lose(self, error: PenstockError) -> None:
        """The connection is gone: end every request that was on it."""
        self._connected = False
        channels = list(self._channels.values())
        self._channels.clear()
        self._unstarted.clear()
        self._outbox.clear()
        for channel in channels:
            channel.fail(error, tell_replica=False)


def _channel_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_HOP_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_HOP_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A connection of its own: no shared backoff with an earlier try to the same address.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]
