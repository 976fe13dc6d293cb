"""What a routing policy sees: the request in numbers and the replicas as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestInfo:
    """A request as far as routing cares."""

    prompt_token_ids: Sequence[int]
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One ready replica: its newest report plus what this gateway sent since."""

    replica_id: str
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    num_in_flight: int = 0
    """Requests of this gateway there."""
    unstarted_tokens: int = 0
    """Prompt tokens of those that have shown nothing yet; the report may not hold them."""

    @property
    def num_requests(self) -> int:
        """Requests on the replica; never less than what this gateway knows of."""
        return max(self.num_running + self.num_waiting, self.num_in_flight)

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens still to compute; never less than what this gateway knows of."""
        return max(self.num_waiting_tokens, self.unstarted_tokens)


class Policy(Protocol):
    """Chooses a replica. Deterministic: equal calls in equal order choose equally."""

    def choose(self, request: RequestInfo, snapshot: Sequence[ReplicaView]) -> str:
        """The `replica_id` to send the request to; `snapshot` is not empty."""
        ...

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and with it whatever it had cached."""
        ...
