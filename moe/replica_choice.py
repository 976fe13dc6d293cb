"""Which copy of a redundant expert a token visits: decided by its sender, without talking.

Without shares, copies on the sender's own node come first, because they cost no traffic between
nodes, and take turns. With shares each copy gets its part of the rows, a node serving itself as far
as the parts allow. The token's index and the sender's rank decide whose turn it is, so that load
spreads and a repeat gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.dist.rank_topology import RankTopology
from moe.expert_slots import ExpertSlots
from moe.load_split import source_shares

_TURNS = 128
"""Rows after which the copies of an expert with shares come round again."""
_GOLDEN = 0.6180339887498949


class ReplicaChoice:
    """From logical to physical experts, for the rows of one rank in one layer.

    Args:
        shares: as in `ExpertTable`.
    """

    def __init__(
        self,
        slots: ExpertSlots,
        topology: RankTopology,
        rank: int,
        shares: Sequence[Sequence[float]] = (),
    ) -> None:
        self._rank = rank
        turns = [
            _by_share(slots, topology, rank, expert, shares[expert])
            if shares
            else _nearest(slots, topology, rank, expert)
            for expert in range(slots.num_experts)
        ]
        self._num_turns_E = torch.tensor([len(found) for found in turns])
        most = max(len(found) for found in turns)
        # Filled up by repetition; the modulus never reaches the filling.
        self._turns_E = torch.tensor(
            [[found[index % len(found)] for index in range(most)] for found in turns]
        )
        self._single = most == 1

    def physical(self, logical_TK: torch.Tensor) -> torch.Tensor:
        """The slot each row visits for each of its experts: int64, (T, K)."""
        logical_TK = logical_TK.long()
        if self._single:
            return self._turns_E[:, 0][logical_TK]
        turn_T1 = torch.arange(logical_TK.shape[0]).unsqueeze(1) + self._rank
        return self._turns_E[logical_TK, turn_T1 % self._num_turns_E[logical_TK]]


def _nearest(slots: ExpertSlots, topology: RankTopology, rank: int, expert: int) -> list[int]:
    everywhere = slots.replicas(expert)
    own_node = set(topology.node_ranks(rank))
    near = [slot for slot in everywhere if slots.rank_of_slot[slot] in own_node]
    return near or list(everywhere)


def _by_share(
    slots: ExpertSlots,
    topology: RankTopology,
    rank: int,
    expert: int,
    shares: Sequence[float],
) -> list[int]:
    """The copies in turn, each as often as its share says and spread evenly over the turns."""
    copies = slots.replicas(expert)
    if len(copies) == 1:
        return list(copies)
    homes = [slots.rank_of_slot[slot] for slot in copies]
    nodes = topology.node_of_rank
    own = source_shares(homes, shares, nodes, nodes[rank])
    ends = torch.tensor(own, dtype=torch.float64).cumsum(0)
    points = (torch.arange(_TURNS, dtype=torch.float64) * _GOLDEN) % 1.0
    chosen = torch.searchsorted(ends, points, right=True).clamp(max=len(copies) - 1)
    return [copies[index] for index in chosen.tolist()]
