"""Copies of an expert take the part of the rows that the table says, the sender's node first."""

from __future__ import annotations

import pytest
import torch

from cluster.dist.rank_topology import RankTopology
from moe.expert_slots import ExpertSlots
from moe.load_split import source_shares
from moe.replica_choice import ReplicaChoice

# Expert 0 in three places, expert 1 in two, 2 and 3 in one.
SLOTS = ExpertSlots(((0, 2), (0, 1), (1, 3), (0,)))
TOPOLOGY = RankTopology.regular(2, 2)
NUM_ROWS = 1280


def visits(choice: ReplicaChoice, expert: int) -> list[float]:
    """The part of a rank's rows for an expert that goes to each of its copies."""
    slots = choice.physical(torch.full((NUM_ROWS, 1), expert)).flatten()
    return [(slots == slot).float().mean().item() for slot in SLOTS.replicas(expert)]


@pytest.mark.parametrize("rank", range(4))
def test_shares_are_kept_over_the_ranks_and_rows_of_a_node_stay_there(rank: int):
    shares = ((0.5, 0.2, 0.3), (0.9, 0.1), (1.0,), (1.0,))
    choice = ReplicaChoice(SLOTS, TOPOLOGY, rank, shares)
    node_of_rank = TOPOLOGY.node_of_rank
    for expert in range(4):
        homes = [SLOTS.rank_of_slot[slot] for slot in SLOTS.replicas(expert)]
        wanted = source_shares(homes, shares[expert], node_of_rank, node_of_rank[rank])
        assert visits(choice, expert) == pytest.approx(wanted, abs=0.02)


def test_all_ranks_together_keep_the_shares():
    shares = ((0.5, 0.2, 0.3), (0.9, 0.1), (1.0,), (1.0,))
    choices = [ReplicaChoice(SLOTS, TOPOLOGY, rank, shares) for rank in range(4)]
    for expert in range(4):
        mean = torch.tensor([visits(choice, expert) for choice in choices]).mean(dim=0)
        assert mean.tolist() == pytest.approx(shares[expert], abs=0.02)


@pytest.mark.parametrize("rank", range(4))
def test_without_shares_only_copies_far_away_are_left_out(rank: int):
    choice = ReplicaChoice(SLOTS, TOPOLOGY, rank)
    own_node = TOPOLOGY.node_ranks(rank)
    for expert in range(4):
        homes = [SLOTS.rank_of_slot[slot] for slot in SLOTS.replicas(expert)]
        near = [home in own_node for home in homes]
        expected = [(n / sum(near) if any(near) else 1 / len(homes)) for n in near]
        assert visits(choice, expert) == pytest.approx(expected, abs=0.01)


def test_ranks_of_a_node_begin_with_different_copies():
    firsts = [ReplicaChoice(SLOTS, TOPOLOGY, rank).physical(torch.tensor([[0]])) for rank in (0, 1)]
    assert {SLOTS.rank_of_slot[int(first)] for first in firsts} == {0, 1}
