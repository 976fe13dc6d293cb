"""Sends an engine request to the replica that the policy chooses, and again when that is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cluster.base.errors import UnavailableError
from cluster.base.front_plan import LimitsPlan
from replicas.api import GenerationRequest
from router.directory import ReplicaDirectory
from router.policies.snapshot import Policy, ReplicaView, RequestInfo
from router.replica_stream import ReplicaStream
from router.request_channel import RequestChannel
from router.resume import Move, Resumer, Trip


class Dispatcher:
    """Policy over directory.

    Args:
        on_move: told of every request that lost its replica, and what became of it.
    """

    def __init__(
        self,
        directory: ReplicaDirectory,
        policy: Policy,
        limits: LimitsPlan,
        on_move: Callable[[Move], None] = lambda move: None,
    ) -> None:
        self._directory = directory
        self._policy = policy
        self._limits = limits
        self._resumer = Resumer(self._find, directory.changed, limits, on_move)

    @property
    def num_resumed(self) -> int:
        """Times that a request went on with another replica."""
        return self._resumer.num_resumed

    def set_limits(self, limits: LimitsPlan) -> None:
        """Follow other limits from now on; requests that run keep their buffers."""
        self._limits = limits
        self._resumer.set_limits(limits)

    def views(self, model: str) -> list[ReplicaView]:
        """The replicas of `model` that can take a request now."""
        return [view for view, _ in self._directory.snapshot(model).values()]

    def submit(self, model: str, request: GenerationRequest) -> RequestChannel:
        """Submit to a ready replica of `model`.

        Raises:
            UnavailableError: no replica of it can take a request now.
        """
        stream = self._find(model, request)
        if stream is None:
            raise UnavailableError(
                f"No replica of {model!r} can take requests now.", "Retry in a few seconds."
            )
        trip = Trip(model=model, version=stream.version)
        channel = RequestChannel(
            request,
            limit=self._limits.stream_buffer_events,
            on_loss=partial(self._resumer.lose, trip),
        )
        stream.submit(request, channel)
        return channel

    def _find(
        self, model: str, request: GenerationRequest, version: str | None = None
    ) -> ReplicaStream | None:
        """The replica that takes a request, of those that are of that version if one is given."""
        candidates = {
            name: (view, stream)
            for name, (view, stream) in self._directory.snapshot(model).items()
            if version in (None, stream.version)
        }
        if not candidates:
            return None
        info = RequestInfo(
            prompt_token_ids=request.prompt_token_ids,
            cache_salt=request.cache_salt,
        )
        chosen = self._policy.choose(info, [view for view, _ in candidates.values()])
        return candidates[chosen][1]
