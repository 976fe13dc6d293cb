"""How a replica takes its leave of the gateways: announced first, closed when nothing is left.

A gateway may have sent a request before it hears that the replica drains. Such a request is served
like the others: turning it away would end a request that nobody wanted to end. So the announcement
stands for a moment before an idle replica may go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

SETTLE_S = 1.0
"""Longer than any gateway takes to hear an announcement and to send what it had decided before."""


class Departure:
    """The state of one leave-taking; made on the loop.

    Args:
        is_idle: whether no request is left; read on the loop.
    """

    def __init__(self, is_idle: Callable[[], bool], settle_s: float = SETTLE_S) -> None:
        self._is_idle = is_idle
        self._settle_s = settle_s
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self.is_announced = False
        """Gateways are told to send nothing more."""
        self.is_closed = False
        """What still comes is refused."""

    def note_idle(self) -> None:
        """The last request has ended; from any thread."""
        if self.is_announced:
            self._loop.call_soon_threadsafe(self._idle.set)

    async def wait(self, timeout_s: float) -> bool:
        """Wait, after the announcement, until nothing is left; whether that came in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self._settle_s)
                while not self._is_idle():
                    self._idle.clear()
                    if not self._is_idle():
                        await self._idle.wait()
        self.is_closed = True
        return self._is_idle()
