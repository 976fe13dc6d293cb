"""The leader's side of the hop: one connection per gateway over one engine.

Owns which gateway asked for which request. It never runs the engine: requests go in through
`EngineInbox` (thread-safe calls), deltas come out of the engine's thread through `publish`, which
writes a whole step to the gateways' sockets from that thread. What gateways say is read on the
asyncio loop. When a gateway is gone, its requests are aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import socket
import threading
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Protocol

from cluster.base.errors import InternalError, PenstockError, UnavailableError
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats
from replicas.engine.output_processor import error_delta
from replicas.leader.departure import Departure
from replicas.leader.gateway_ear import GatewayEar
from replicas.leader.gateway_link import GatewayLink
from replicas.leader.request_routes import RequestRoutes
from replicas.leader.stream_codec import (
    HOP_VERSION,
    Cancel,
    Cancelled,
    CancelNamed,
    Delta,
    Hello,
    Submit,
    ToReplica,
    delta_to_wire,
)

log = logging.getLogger(__name__)

LOAD_REPORT_PERIOD_S = 1.0
GATEWAY_SILENCE_S = 15.0
"""A gateway owes a beat every two seconds; without a word for so long it counts as gone."""

_HELLO_TIMEOUT_S = 5.0
_LAST_WORD_S = 1.0


class EngineInbox(Protocol):
    """What the server needs of an engine loop; both calls are thread-safe and do not block."""

    def add_request(self, request: GenerationRequest) -> None:
        """Queue a request; a `PenstockError` refuses it."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop one choice or all; an unknown id is ignored."""
        ...


class ReplicaStreamServer:
    """Serves the replica stream to any number of gateways; made and started on the loop."""

    def __init__(
        self, engine: EngineInbox, *, epoch: str, load_period_s: float = LOAD_REPORT_PERIOD_S
    ) -> None:
        self._engine = engine
        self._epoch = epoch
        self._load_period_s = load_period_s
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Guards what follows; nothing is sent and the engine is not called while it is held."""
        self._links: dict[int, GatewayLink] = {}
        self._routes = RequestRoutes()
        self._stats = ReplicaStats()
        self._departure = Departure(lambda: not self._routes)
        self._failure: PenstockError | None = None
        self._serials = itertools.count(1)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_requests(self) -> int:
        """Requests submitted here whose choices have not all ended."""
        return len(self._routes)

    async def start(self, host: str, port: int = 0) -> int:
        """Listen on `host`; the port it got.

        Raises:
            OSError: the address cannot be bound.
        """
        infos = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = infos[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=128)
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))
        self._spawn(self._report_now_and_then())
        bound: int = self._listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def publish(self, deltas: Sequence[GenerationDelta], stats: ReplicaStats) -> None:
        """Send one step's results; called from the engine's thread, never blocks.

        First words go ahead of what streams that run already have to say: a gateway passes on what
        comes first, and that is what a client waits for.
        """
        touched: dict[GatewayLink, list[Delta]] = {}
        with self._lock:
            self._stats, draining = stats, self._departure.is_announced
            routed = [(route, delta) for delta in deltas if (route := self._routes.take(delta))]
            if not all(route.has_spoken for route, _ in routed):
                routed.sort(key=lambda routed: routed[0].has_spoken)
            for route, delta in routed:
                route.has_spoken = True
                touched.setdefault(route.link, []).append(delta_to_wire(route.key, delta))
            self._note_idle()
        for link, messages in touched.items():
            link.send(messages, stats, draining=draining)

    def fail_all(self, error: PenstockError) -> None:
        """End every stream with `error` and refuse new ones; callable from any thread."""
        with self._lock:
            self._failure = error
            links = list(self._links.values())
        for link in links:
            link.say_goodbye(error)

    async def drain(self, timeout_s: float) -> bool:
        """Tell gateways to send nothing more, finish what there is; True when nothing is left."""
        self._departure.is_announced = True
        self._report()
        return await self._departure.wait(timeout_s)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError:
                log.exception("a gateway could not be let in")
                await asyncio.sleep(self._load_period_s)
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        """One gateway's connection, from its hello to its end."""
        link = GatewayLink(sock, next(self._serials))
        ear = GatewayEar(sock, partial(self._obey, link))
        listening = asyncio.create_task(self._listen(link, ear))
        over = asyncio.create_task(link.wait_over())
        try:
            await asyncio.wait((listening, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._forget(link)
            ear.close()
            link.end()
            for task in (listening, over):
                task.cancel()
            await asyncio.gather(listening, over, return_exceptions=True)
            sock.close()

    async def _listen(self, link: GatewayLink, ear: GatewayEar) -> None:
        """Wait until a gateway goes; what it does wrong ends its stream with the reason."""

        def patience_s() -> float:
            return GATEWAY_SILENCE_S if link.serial in self._links else _HELLO_TIMEOUT_S

        try:
            await ear.wait_end(patience_s)
        except TimeoutError:
            log.warning("gateway %s was silent for %g s", link.gateway_id, patience_s())
        except OSError as error:
            log.warning("the stream of gateway %s broke: %s", link.gateway_id, error)
        except PenstockError as error:
            log.warning("gateway %s is sent away: %s", link.gateway_id, error)
            link.say_goodbye(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD_S):
                    await link.wait_over()

    def _obey(self, link: GatewayLink, message: ToReplica) -> None:
        """Do what a message says.

        Raises:
            PenstockError: the gateway cannot be served.
        """
        if isinstance(message, Hello):
            self._greet(link, message)
        elif link.serial not in self._links:
            raise InternalError("A replica stream must start with a hello.")
        elif isinstance(message, Submit):
            self._submit(link, message)
        elif isinstance(message, Cancel):
            self._cancel(link, message)
        elif isinstance(message, CancelNamed):
            self._cancel_named(link, message)

    def _greet(self, link: GatewayLink, hello: Hello) -> None:
        if hello.version != HOP_VERSION:
            raise UnavailableError(
                f"This replica speaks version {HOP_VERSION} of the replica stream, "
                f"the gateway version {hello.version}.",
                "Let all nodes run one version of Penstock.",
            )
        if hello.epoch != self._epoch:
            raise UnavailableError(
                f"This replica is of epoch {self._epoch!r}, not {hello.epoch!r}."
            )
        link.gateway_id = hello.gateway_id
        with self._lock:
            failure = self._failure
            self._links[link.serial] = link
        if failure is not None:
            raise failure
        self._report(link)

    def _submit(self, link: GatewayLink, message: Submit) -> None:
        key, request = message.stream_key, message.request
        engine_id = ""
        try:
            with self._lock:
                if self._departure.is_closed:
                    raise UnavailableError("The replica is leaving.", "Retry on another replica.")
                # Registered first: the engine's thread may answer before add_request returns.
                engine_id = self._routes.add(link, key, request)
            self._engine.add_request(dataclasses.replace(request, request_id=engine_id))
        except Exception as error:
            with self._lock:
                self._routes.end(engine_id)
                self._note_idle()
            self._refuse(link, message, error)

    def _refuse(self, link: GatewayLink, message: Submit, error: Exception) -> None:
        """Say no: a coded error stands for a replica that takes nothing more, others can."""
        key, takes_nothing = message.stream_key, isinstance(error, PenstockError)
        if not isinstance(error, PenstockError):
            log.exception("engine refused a request of gateway %s", link.gateway_id)
            error = InternalError("The engine could not take the request.")
        index = message.request.choices[0].index
        delta = error_delta("", index, error, replica_lost=takes_nothing)
        link.send([delta_to_wire(key, delta)], self._stats, draining=self._departure.is_announced)

    def _cancel(self, link: GatewayLink, message: Cancel) -> None:
        with self._lock:
            engine_id, index = self._routes.cancel(link, message.stream_key, message.index)
            self._note_idle()
        if engine_id:
            self._engine.abort(engine_id, index)

    def _cancel_named(self, link: GatewayLink, message: CancelNamed) -> None:
        """Abort a request of any gateway; its own is told by the deltas that this brings about."""
        with self._lock:
            engine_ids = self._routes.named(message.request_id)
        for engine_id in engine_ids:
            self._engine.abort(engine_id)
        link.answer(Cancelled(message.question, found=bool(engine_ids)))

    def _forget(self, link: GatewayLink) -> None:
        """The gateway is gone: nobody will read its requests' answers."""
        with self._lock:
            self._links.pop(link.serial, None)
            engine_ids = self._routes.forget(link)
            self._note_idle()
        for engine_id in engine_ids:
            self._engine.abort(engine_id)

    async def _report_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._load_period_s)
            self._report()

    def _report(self, only: GatewayLink | None = None) -> None:
        with self._lock:
            links = list(self._links.values()) if only is None else [only]
            stats, draining = self._stats, self._departure.is_announced
        for link in links:
            link.send((), stats, draining=draining)

    def _note_idle(self) -> None:
        """Tell `drain` when nothing is left; the caller holds the lock."""
        if not self._routes:
            self._departure.note_idle()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
