"""Sends an engine request to the replica that the policy chooses."""

from __future__ import annotations

from cluster.base.errors import UnavailableError
from replicas.api import GenerationRequest
from router.directory import ReplicaDirectory
from router.policies.snapshot import Policy, ReplicaView, RequestInfo
from router.request_channel import RequestChannel


class Dispatcher:
    """Policy over directory."""

    def __init__(self, directory: ReplicaDirectory, policy: Policy) -> None:
        self._directory = directory
        self._policy = policy

    def views(self, model: str) -> list[ReplicaView]:
        """The replicas of `model` that can take a request now."""
        return [view for view, _ in self._directory.snapshot(model).values()]

    def submit(self, model: str, request: GenerationRequest) -> RequestChannel:
        """Submit to a ready replica of `model`.

        Raises:
            UnavailableError: no replica of it can take a request now.
        """
        candidates = self._directory.snapshot(model)
        if not candidates:
            raise UnavailableError(
                f"No replica of {model!r} can take requests now.", "Retry in a few seconds."
            )
        info = RequestInfo(
            prompt_token_ids=request.prompt_token_ids,
            cache_salt=request.cache_salt,
        )
        chosen = self._policy.choose(info, [view for view, _ in candidates.values()])
        return candidates[chosen][1].submit(request)
