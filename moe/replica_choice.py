"""Which copy of a redundant expert a token visits: decided by its sender, without talking.

Copies on the sender's own node come first, because they cost no traffic between nodes; among
several the token's index and the sender's rank decide, so that load spreads and a repeat gives the
same.
"""

from __future__ import annotations

import torch

from cluster.dist.rank_topology import RankTopology
from moe.expert_slots import ExpertSlots


class ReplicaChoice:
    """From logical to physical experts, for the rows of one rank in one layer."""

    def __init__(self, slots: ExpertSlots, topology: RankTopology, rank: int) -> None:
        self._rank = rank
        own_node = set(topology.node_ranks(rank))
        candidates = []
        for expert in range(slots.num_experts):
            everywhere = slots.replicas(expert)
            near = tuple(slot for slot in everywhere if slots.rank_of_slot[slot] in own_node)
            candidates.append(near or everywhere)
        self._num_candidates_E = torch.tensor([len(found) for found in candidates])
        most = max(len(found) for found in candidates)
        # Filled up by repetition; the modulus never reaches the filling.
        self._candidates_E = torch.tensor(
            [[found[index % len(found)] for index in range(most)] for found in candidates]
        )
        self._single = most == 1

    def physical(self, logical_TK: torch.Tensor) -> torch.Tensor:
        """The slot each row visits for each of its experts: int64, (T, K)."""
        logical_TK = logical_TK.long()
        if self._single:
            return self._candidates_E[:, 0][logical_TK]
        turn_T1 = torch.arange(logical_TK.shape[0]).unsqueeze(1) + self._rank
        return self._candidates_E[logical_TK, turn_T1 % self._num_candidates_E[logical_TK]]
