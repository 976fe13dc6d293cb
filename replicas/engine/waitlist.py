"""Who waits, for what, and in which order.

Three kinds of waiting: ready choices, in order of importance; among them those that share the
blocks of a computed prompt already, and can be made to give them back; and forks, which cannot be
scheduled before another choice of their request has computed the prompt. Never touches blocks.
"""

from __future__ import annotations

from collections import OrderedDict

from replicas.engine.request import EngineRequest
from replicas.engine.request_queue import RequestQueue


class Waitlist:
    """Waiting choices of one scheduler."""

    def __init__(self) -> None:
        self._ready = RequestQueue()
        self._sharing = RequestQueue()
        self._forks: dict[int, list[EngineRequest]] = {}
        self._fork_parent: dict[int, int] = {}
        self._weights: dict[int, int] = {}
        self._unstarted: OrderedDict[int, float] = OrderedDict()
        self.num_tokens = 0
        """Tokens the waiting choices have to compute before they can say something."""

    def __len__(self) -> int:
        return len(self._ready) + len(self._fork_parent)

    @property
    def first(self) -> EngineRequest | None:
        """The most important ready choice."""
        return self._ready[0] if self._ready else None

    @property
    def oldest_arrival_s(self) -> float | None:
        """Arrival of the choice that has waited longest for its first step."""
        return next(iter(self._unstarted.values()), None)

    def add(self, request: EngineRequest, *, shares_blocks: bool = False) -> None:
        """A choice becomes ready: new, preempted, or just forked."""
        self._ready.add(request)
        if shares_blocks:
            self._sharing.add(request)
        self._weigh(request, request.num_uncomputed_tokens)
        if request.num_cached_tokens is None:
            self._unstarted.setdefault(request.key, request.arrival_s)

    def add_family(self, family: list[EngineRequest]) -> None:
        """A choice becomes ready, with those that wait for it to compute their prompt."""
        self.add(family[0])
        self.add_forks(family[0], family[1:])

    def add_forks(self, parent: EngineRequest, forks: list[EngineRequest]) -> None:
        """Choices that wait for `parent` to compute the prompt they have in common."""
        if not forks:
            return
        self._forks[parent.key] = forks
        for fork in forks:
            self._fork_parent[fork.key] = parent.key
            self._weigh(fork, 1)
            self._unstarted.setdefault(fork.key, fork.arrival_s)

    def has_forks(self, parent: EngineRequest) -> bool:
        """Whether choices wait for this one's prompt."""
        return parent.key in self._forks

    def take_forks(self, parent: EngineRequest) -> list[EngineRequest]:
        """Remove and return the choices that wait for this one's prompt."""
        forks = self._forks.pop(parent.key, [])
        for fork in forks:
            del self._fork_parent[fork.key]
            self._drop_weight(fork)
        return forks

    def take_all(self) -> list[list[EngineRequest]]:
        """Remove and return all choices, each ready one with those that wait for its prompt."""
        families = []
        for request in list(self._ready):
            families.append([request, *self.take_forks(request)])
            for choice in families[-1][1:]:
                self._unstarted.pop(choice.key, None)
            self.remove(request)
        return families

    def remove(self, request: EngineRequest) -> None:
        """Take a choice out, whatever it waits for.

        Raises:
            KeyError: it does not wait.
        """
        parent_key = self._fork_parent.pop(request.key, None)
        if parent_key is None:
            self._ready.remove(request)
            if request in self._sharing:
                self._sharing.remove(request)
        else:
            siblings = self._forks[parent_key]
            siblings.remove(request)
            if not siblings:
                del self._forks[parent_key]
        self._drop_weight(request)
        self._unstarted.pop(request.key, None)

    def take_sharer(self) -> EngineRequest | None:
        """The least important ready choice that shares blocks; from now on it counts as without.

        The caller releases its blocks and calls `reweigh`.
        """
        if not self._sharing:
            return None
        request = self._sharing[-1]
        self._sharing.remove(request)
        return request

    def reweigh(self, request: EngineRequest) -> None:
        """The tokens a waiting choice has to compute have changed."""
        self._drop_weight(request)
        self._weigh(request, request.num_uncomputed_tokens)

    def _weigh(self, request: EngineRequest, num_tokens: int) -> None:
        self._weights[request.key] = num_tokens
        self.num_tokens += num_tokens

    def _drop_weight(self, request: EngineRequest) -> None:
        self.num_tokens -= self._weights.pop(request.key)
