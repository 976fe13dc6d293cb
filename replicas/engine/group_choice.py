"""Which data-parallel group of a replica takes a request: prefix affinity, bounded by load.

A pure function. All groups wait for the busiest one in every step, so the costs are weighed in the
unit that makes a step long, query tokens: what is left to compute of the prompt, what waits
before it, and what runs already. A group that would have to preempt pays for the missing blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replicas.api import ReplicaStats

TOKENS_PER_REQUEST = 256
"""Prompt tokens that cost about as much as one more running request; as in the gateways' policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """One group as a new request finds it."""

    stats: ReplicaStats
    num_cached_tokens: int
    """Of the request's prompt."""


def choose_group(num_known_tokens: int, block_size: int, groups: Sequence[GroupView]) -> int:
    """Index of the group where the request costs least; the first of equals."""
    costs = [_cost(num_known_tokens, block_size, group) for group in groups]
    return costs.index(min(costs))


def _cost(num_known_tokens: int, block_size: int, group: GroupView) -> int:
    stats = group.stats
    num_new_tokens = num_known_tokens - group.num_cached_tokens
    num_missing_blocks = max(0, -(-num_new_tokens // block_size) - stats.kv_blocks_free)
    return (
        num_new_tokens
        + stats.num_waiting_tokens
        + TOKENS_PER_REQUEST * (stats.num_running + stats.num_waiting)
        + block_size * num_missing_blocks
    )
