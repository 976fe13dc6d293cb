"""Keeps one connection to a replica up: greets, beats, listens for silence, comes back.

Knows when a connection stands and why it ended, not what is said on it. Silence counts as the end
too: a stopped leader keeps its socket open, but it cannot keep its one report per second.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.base.errors import PenstockError, UnavailableError
from replicas.leader.stream_codec import Beat, FromReplica, Hello, ToReplica
from router.hop_connection import HopConnection
from router.hop_settings import HopSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEvents:
    """Whom to tell; both are called on the loop."""

    on_message: Callable[[FromReplica], None]
    on_end: Callable[[PenstockError], None]
    """A connection, or the attempt at one, is over, and why."""


class HopLink:
    """The way to one replica; all methods belong to the loop's thread.

    Args:
        endpoint: host:port of the leader.
        hello: what each connection begins with.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        endpoint: str,
        hello: Hello,
        events: LinkEvents,
        settings: HopSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._hello = hello
        self._events = events
        self._settings = settings
        self._clock = clock
        self._connection: HopConnection | None = None
        self._last_heard_s = clock()
        self._runner: asyncio.Task[None] | None = None
        self.comes_back = True
        """Whether another connection follows one that ended."""

    @property
    def ended(self) -> bool:
        """Whether it is idle for good, if it does not come back."""
        return self._runner is None or self._runner.done()

    def start(self) -> None:
        """Begin connecting; returns at once."""
        self._runner = asyncio.create_task(self._run(), name=f"hop-link {self._endpoint}")

    def send(self, message: ToReplica) -> None:
        """Queue a message; without a connection it goes nowhere.

        Raises:
            InternalError: it is too long.
        """
        if self._connection is not None:
            self._connection.send(message)

    def end(self, error: PenstockError) -> None:
        """Give the present connection up, if there is one."""
        if self._connection is not None:
            self._connection.end(error)

    async def close(self) -> None:
        """End for good."""
        self.comes_back = False
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    async def _run(self) -> None:
        settings = self._settings
        backoff_s = settings.backoff_initial_s
        while self.comes_back:
            started_s = self._clock()
            self._events.on_end(await self._connect_once())
            if self._clock() - started_s > settings.backoff_max_s:
                backoff_s = settings.backoff_initial_s
            if self.comes_back:
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, settings.backoff_max_s)

    async def _connect_once(self) -> PenstockError:
        """Run one connection to its end; returns why it ended."""
        host, _, port = self._endpoint.rpartition(":")
        limit_s = self._settings.silence_timeout_s
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await loop.create_connection(
                    lambda: HopConnection(self._hear), host.strip("[]"), int(port)
                )
        except TimeoutError:
            return _silent(limit_s)
        except OSError as error:
            return UnavailableError(f"The replica cannot be reached ({error}).")
        self._connection = connection
        self._last_heard_s = self._clock()
        try:
            connection.send(self._hello)
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
            if self._clock() - self._last_heard_s > limit_s:
                return _silent(limit_s)
            connection.send(Beat())

    def _hear(self, message: FromReplica) -> None:
        self._last_heard_s = self._clock()
        self._events.on_message(message)


def _silent(limit_s: float) -> PenstockError:
    return UnavailableError(f"The replica was silent for {limit_s:g} s.")
