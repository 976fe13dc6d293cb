"""Which gateway wants the answers of which request. Not thread-safe: its owner holds a lock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replicas.api import GenerationDelta, GenerationRequest

if TYPE_CHECKING:
    from replicas.leader.gateway_link import GatewayLink


@dataclass(slots=True)
class Route:
    """One request's way back."""

    link: GatewayLink
    key: int
    """What the gateway calls the request."""
    request_id: str
    """What its client calls it."""
    open_choices: set[int]
    has_spoken: bool = False
    """Whether anything of it has been sent back."""


class RequestRoutes:
    """Running requests by the id the engine knows them by."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._ids: dict[GatewayLink, dict[int, str]] = {}

    def __len__(self) -> int:
        return len(self._routes)

    def add(self, link: GatewayLink, key: int, request: GenerationRequest) -> str:
        """A request begins; the id that the engine is to know it by."""
        engine_id = link.engine_id(key, request.request_id)
        choices = {choice.index for choice in request.choices}
        self._routes[engine_id] = Route(link, key, request.request_id, choices)
        self._ids.setdefault(link, {})[key] = engine_id
        return engine_id

    def named(self, request_id: str) -> list[str]:
        """Engine ids of the running requests whose clients call them so; looks at all."""
        return [
            engine_id for engine_id, route in self._routes.items() if route.request_id == request_id
        ]

    def take(self, delta: GenerationDelta) -> Route | None:
        """Where a delta goes; None if nobody wants it. The last one of a request ends it."""
        route = self._routes.get(delta.request_id)
        if route is None or delta.index not in route.open_choices:
            return None
        if delta.finish_reason is not None:
            route.open_choices.discard(delta.index)
            if not route.open_choices:
                self.end(delta.request_id)
        return route

    def cancel(self, link: GatewayLink, key: int, index: int | None) -> tuple[str, int | None]:
        """A gateway wants one choice (or all) no longer.

        Returns:
            What to abort: engine id ("" when there is nothing) and choice, None for all.
        """
        engine_id = self._ids.get(link, {}).get(key, "")
        if not engine_id:
            return "", None
        if index is not None:
            open_choices = self._routes[engine_id].open_choices
            open_choices.discard(index)
            if open_choices:
                return engine_id, index
        self.end(engine_id)
        return engine_id, None

    def end(self, engine_id: str) -> None:
        """A request is over; an unknown id is ignored."""
        route = self._routes.pop(engine_id, None)
        if route is not None:
            self._ids[route.link].pop(route.key, None)

    def forget(self, link: GatewayLink) -> Iterable[str]:
        """A gateway is gone; the engine ids of what it left running."""
        engine_ids = list(self._ids.pop(link, {}).values())
        for engine_id in engine_ids:
            del self._routes[engine_id]
        return engine_ids
