"""Sends a request to the replica with the least work, counted in steps the request would wait.

A pure function of its arguments; ties go to the first of the snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.policies.snapshot import ReplicaView, RequestInfo

TOKENS_PER_REQUEST = 256
"""Prompt tokens that cost about as much as one more running request."""


def load_of(replica: ReplicaView) -> float:
    """Work on a replica, in running requests.

    A replica whose KV cache is nearly full will preempt: each request weighs up to twice.
    """
    used = 0.0
    if replica.kv_blocks_total > 0:
        used = 1.0 - replica.kv_blocks_free / replica.kv_blocks_total
    pressure = 1.0 + max(0.0, used - 0.9) / 0.1
    return pressure * replica.num_requests + replica.backlog_tokens / TOKENS_PER_REQUEST


class LeastLoad:
    """Routes by load alone."""

    def choose(self, request: RequestInfo, snapshot: Sequence[ReplicaView]) -> str:
        """The least loaded replica's id."""
        return min(snapshot, key=load_of).replica_id

    def forget(self, replica_id: str) -> None:
        """Nothing is remembered."""
