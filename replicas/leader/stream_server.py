"""The leader's side of the hop: one bidirectional stream per gateway over one engine.

Owns which gateway asked for which request. It never runs the engine: requests go in through
`EngineInbox` (thread-safe calls), deltas come out of the engine's thread through `publish`, which
hands a whole step to the asyncio loop with one `call_soon_threadsafe`. When a gateway is gone,
its requests are aborted. Apart from `publish` and `fail_all`, everything runs on the loop.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio

from cluster.base.errors import InternalError, PenstockError, UnavailableError
from replicas.api import FinishReason, GenerationDelta, GenerationRequest, ReplicaStats
from replicas.leader.gateway_link import GatewayLink
from replicas.leader.stream_codec import (
    MAX_HOP_MESSAGE_BYTES,
    error_to_proto,
    stats_to_proto,
    submit_from_proto,
)
from replicas.proto import replica_stream_pb2 as pb
from replicas.proto import replica_stream_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

LOAD_REPORT_PERIOD_S = 1.0


class EngineInbox(Protocol):
    """What the servicer needs of an engine loop; both calls are thread-safe and do not block."""

    def add_request(self, request: GenerationRequest) -> None:
        """Queue a request; a `PenstockError` refuses it."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop one choice or all; an unknown id is ignored."""
        ...


class ReplicaStreamServicer(pb_grpc.ReplicaServicer):
    """Serves `Replica.Stream` to any number of gateways; construct it inside the running loop."""

    def __init__(
        self, engine: EngineInbox, *, epoch: str, load_period_s: float = LOAD_REPORT_PERIOD_S
    ) -> None:
        self._engine = engine
        self._epoch = epoch
        self._load_period_s = load_period_s
        self._loop = asyncio.get_running_loop()
        self._links: dict[int, GatewayLink] = {}
        self._routes: dict[str, tuple[GatewayLink, int, set[int]]] = {}
        self._serials = itertools.count(1)
        self._stats = ReplicaStats()
        self._draining = False
        self._failure: PenstockError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_requests(self) -> int:
        """Requests submitted here whose choices have not all ended."""
        return len(self._routes)

    def publish(self, deltas: Sequence[GenerationDelta], stats: ReplicaStats) -> None:
        """Hand one step's results over; called from the engine's thread, never blocks.

        `deltas` is read later, on the loop: the caller must not change it afterwards.
        """
        self._loop.call_soon_threadsafe(self._deliver, deltas, stats)

    def fail_all(self, error: PenstockError) -> None:
        """End every stream with `error` and refuse new ones; callable from any thread."""
        self._loop.call_soon_threadsafe(self._fail_all, error)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; True when none is left."""
        self._draining = True
        self._report(self._links.values())
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def Stream(  # noqa: N802 (the proto's name)
        self, request_iterator: AsyncIterator[pb.ToReplica], context: Any
    ) -> AsyncIterator[pb.FromReplica]:
        """One gateway's stream, from its Hello to its end."""
        first = await anext(request_iterator, None)
        refusal = self._refusal(first)
        if first is None or refusal is not None:
            if refusal is not None:
                yield pb.FromReplica(goodbye=error_to_proto(refusal))
            return
        link = GatewayLink(first.hello.gateway_id, next(self._serials))
        self._links[link.serial] = link
        self._report([link])
        reader = asyncio.create_task(self._read(link, request_iterator))
        reader.add_done_callback(functools.partial(_reader_ended, link))
        try:
            while True:
                message = await link.next_message(self._load_period_s)
                if message is None:
                    self._report([link])
                    continue
                yield message
                if message.HasField("goodbye"):
                    return
        finally:
            reader.cancel()
            self._forget(link)

    def _refusal(self, first: pb.ToReplica | None) -> PenstockError | None:
        if first is None or first.WhichOneof("message") != "hello":
            return InternalError("A replica stream must start with Hello.")
        if first.hello.epoch != self._epoch:
            return UnavailableError(
                f"This replica is of epoch {self._epoch!r}, not {first.hello.epoch!r}."
            )
        return self._failure

    async def _read(self, link: GatewayLink, messages: AsyncIterator[pb.ToReplica]) -> None:
        async for message in messages:
            kind = message.WhichOneof("message")
            if kind == "submit":
                self._submit(link, message.submit)
            elif kind == "cancel":
                self._cancel(link, message.cancel)
            else:
                log.warning("gateway %s sent an unexpected %s", link.gateway_id, kind)

    def _submit(self, link: GatewayLink, message: pb.Submit) -> None:
        key = message.stream_key
        engine_id = link.engine_id(key, message.request_id)
        try:
            if self._draining:
                raise UnavailableError("The replica is draining.", "Retry on another replica.")
            request = submit_from_proto(message, engine_id)
            num_choices = 1 if request.pooling is not None else max(1, request.params.n)
            # Registered first: the engine's thread may answer before add_request returns.
            self._routes[engine_id] = (link, key, set(range(num_choices)))
            link.engine_ids[key] = engine_id
            self._idle.clear()
            self._engine.add_request(request)
        except Exception as error:
            self._end(engine_id, link, key)
            self._refuse(link, key, error)

    def _refuse(self, link: GatewayLink, key: int, error: Exception) -> None:
        if not isinstance(error, PenstockError):
            log.exception("engine refused a request of gateway %s", link.gateway_id)
            error = InternalError("The engine could not take the request.")
        delta = GenerationDelta(
            request_id="", finish_reason=FinishReason.ERROR, error=error.to_dict()
        )
        link.push(key, delta)
        self._report([link])

    def _cancel(self, link: GatewayLink, message: pb.Cancel) -> None:
        engine_id = link.engine_ids.get(message.stream_key)
        if engine_id is None:
            return
        if message.HasField("index"):
            open_choices = self._routes[engine_id][2]
            open_choices.discard(message.index)
            if open_choices:
                self._engine.abort(engine_id, message.index)
                return
        self._end(engine_id, link, message.stream_key)
        self._engine.abort(engine_id)

    def _deliver(self, deltas: Sequence[GenerationDelta], stats: ReplicaStats) -> None:
        self._stats = stats
        touched: dict[int, GatewayLink] = {}
        for delta in deltas:
            route = self._routes.get(delta.request_id)
            if route is None:
                continue
            link, key, open_choices = route
            if delta.index not in open_choices:
                continue
            link.push(key, delta)
            touched[link.serial] = link
            if delta.finish_reason is not None:
                open_choices.discard(delta.index)
                if not open_choices:
                    self._end(delta.request_id, link, key)
        self._report(touched.values())

    def _report(self, links: Iterable[GatewayLink]) -> None:
        load = stats_to_proto(self._stats, draining=self._draining)
        for link in links:
            link.report(load)

    def _end(self, engine_id: str, link: GatewayLink, key: int) -> None:
        self._routes.pop(engine_id, None)
        link.engine_ids.pop(key, None)
        if not self._routes:
            self._idle.set()

    def _forget(self, link: GatewayLink) -> None:
        """The gateway is gone: nobody will read its requests' answers."""
        self._links.pop(link.serial, None)
        for key, engine_id in list(link.engine_ids.items()):
            self._end(engine_id, link, key)
            self._engine.abort(engine_id)

    def _fail_all(self, error: PenstockError) -> None:
        self._failure = error
        goodbye = error_to_proto(error)
        for link in self._links.values():
            link.say_goodbye(goodbye)


def _reader_ended(link: GatewayLink, reader: asyncio.Task[None]) -> None:
    """The gateway sends no more: its stream ends (a cancelled reader is our own doing)."""
    if not reader.cancelled():
        if (error := reader.exception()) is not None:
            log.warning("stream of gateway %s broke: %s", link.gateway_id, error)
        link.say_goodbye(pb.Error())


def hop_server_options() -> list[tuple[str, int]]:
    """Channel options of the leader's server: explicit caps, keepalive that allows ours."""
    return [
        ("grpc.max_receive_message_length", MAX_HOP_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_HOP_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),
    ]


async def start_replica_server(
    servicer: ReplicaStreamServicer, host: str, port: int = 0
) -> tuple[grpc.aio.Server, int]:
    """Serve the hop on `host`; returns the running server and the port it got."""
    server = grpc.aio.server(options=hop_server_options())
    pb_grpc.add_ReplicaServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    return server, bound
