"""A queue of requests in order of importance: (priority, arrival).

Insert, remove and look-up of either end cost a binary search and a short memory move; a heap would
not let an abort take a request out of the middle.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from replicas.engine.request import EngineRequest

_ORDER = attrgetter("order")


class RequestQueue:
    """Requests sorted by `EngineRequest.order`, most important first."""

    def __init__(self) -> None:
        self._requests: list[EngineRequest] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[EngineRequest]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> EngineRequest:
        return self._requests[index]

    def __contains__(self, request: EngineRequest) -> bool:
        index = bisect_left(self._requests, request.order, key=_ORDER)
        return index < len(self._requests) and self._requests[index] is request

    def add(self, request: EngineRequest) -> None:
        """Insert in order."""
        insort(self._requests, request, key=_ORDER)

    def remove(self, request: EngineRequest) -> None:
        """Take a request out.

        Raises:
            KeyError: it is not in the queue.
        """
        index = bisect_left(self._requests, request.order, key=_ORDER)
        if index == len(self._requests) or self._requests[index] is not request:
            raise KeyError(request.key)
        del self._requests[index]
