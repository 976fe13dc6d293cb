"""What other threads ask of an engine loop: requests to add and to end, until it takes no more.

Any thread appends; the loop alone takes out, in order of arrival. Once the inbox refuses, what
was accepted before still counts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.base.errors import PenstockError, error_from_dict
from replicas.api import GenerationRequest


@dataclass(frozen=True, slots=True)
class Add:
    """A request, and when it came."""

    request: GenerationRequest
    arrival_s: float


@dataclass(frozen=True, slots=True)
class Abort:
    """One choice is to end, or all of a request."""

    request_id: str
    index: int | None


class Inbox:
    """Commands for one loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._commands: deque[Add | Abort] = deque()
        self._gate = threading.Lock()
        self._refusal: PenstockError | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._commands)

    @property
    def refusal(self) -> PenstockError | None:
        """Why nothing more is accepted; None while it is."""
        return self._refusal

    def add(self, request: GenerationRequest) -> None:
        """Append a request.

        Raises:
            PenstockError: what `refuse` or `close` was told.
        """
        with self._gate:
            if self._refusal is not None:
                # A fresh copy: raising one object from many threads would chain tracebacks.
                raise error_from_dict(self._refusal.to_dict())
            self._commands.append(Add(request, self._clock()))

    def abort(self, request_id: str, index: int | None) -> None:
        """Append an abort; always accepted."""
        self._commands.append(Abort(request_id, index))

    def refuse(self, error: PenstockError) -> None:
        """Accept no more requests; what has closed the inbox stays the better answer."""
        with self._gate:
            if not self._closed:
                self._refusal = error

    def close(self, error: PenstockError) -> None:
        """Accept no more requests, for this reason and no later one."""
        with self._gate:
            self._refusal, self._closed = error, True

    def take(self) -> Iterator[Add | Abort]:
        """What is there now; what comes in meanwhile waits for the next call."""
        for _ in range(len(self._commands)):
            yield self._commands.popleft()
