"""A bell that wakes one sleeping thread: `threading.Event` for a single waiter, in one lock.

An Event is a condition over a lock written in Python; the thread that rings it for a new request
and the one that wakes each paid tens of microseconds for that, with cold caches.
"""

from __future__ import annotations

import contextlib
import threading


class Doorbell:
    """Rung by any thread, answered by one; rings that nobody has heard yet count as one."""

    def __init__(self) -> None:
        self._silence = threading.Lock()
        """Held until it rings."""
        self._silence.acquire()

    def ring(self) -> None:
        """Wake the waiter, or let its next wait return at once."""
        with contextlib.suppress(RuntimeError):  # it has rung already
            self._silence.release()

    def wait(self) -> None:
        """Sleep until it rings; takes the ring."""
        self._silence.acquire()

    def clear(self) -> None:
        """Forget a ring; what is done after this call honours whatever it was for."""
        self._silence.acquire(blocking=False)
