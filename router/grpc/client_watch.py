"""Whether a client is there: it greets in time, and answers when it has been silent for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from router.grpc.peer_conduct import ConnectionLimits


class ClientWatch:
    """The clocks of one connection, on its loop."""

    def __init__(
        self, limits: ConnectionLimits, ping: Callable[[], None], give_up: Callable[[str], None]
    ) -> None:
        """`give_up` is told why, once, and has to end the connection."""
        self.heard_s = time.monotonic()
        """When the client last sent something, by `time.monotonic`."""
        self._limits = limits
        self._ping = ping
        self._give_up = give_up
        self._has_greeted = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The connection is made: wait for HTTP/2's preface."""
        self._wait(self._limits.handshake_timeout_s, self._miss_greeting)

    def note_heard(self) -> None:
        """Bytes came."""
        self.heard_s = time.monotonic()

    def note_greeting(self) -> None:
        """The preface and settings of the client are there."""
        if not self._has_greeted:
            self._has_greeted = True
            self.stop()
            self._wait(self._limits.keepalive_s, self._ask_if_there)

    def stop(self) -> None:
        """No clock runs any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _miss_greeting(self) -> None:
        # Bytes that trickle in are no greeting: they would hold a place for ever.
        self._give_up(f"no HTTP/2 preface within {self._limits.handshake_timeout_s:.0f} s")

    def _ask_if_there(self) -> None:
        """Ping a silent client; one that stays silent is gone."""
        limits, silent_s = self._limits, time.monotonic() - self.heard_s
        pause_s = limits.keepalive_s - silent_s
        if silent_s >= limits.keepalive_s + limits.keepalive_timeout_s:
            self._give_up(f"nothing came for {silent_s:.0f} s")
            return
        if silent_s >= limits.keepalive_s:
            self._ping()
            pause_s = limits.keepalive_s + limits.keepalive_timeout_s - silent_s
        self._wait(max(0.01, pause_s), self._ask_if_there)
