"""Rows, routes and placements for tests of exchanges, and experts simple enough to be an oracle.

Integer-valued data: every product and sum is a small whole number, so fp32 is exact whatever the
order, and equality to the bit means that no row was lost, doubled or swapped.
"""

from __future__ import annotations

import random

import torch

from cluster.dist.rank_topology import RankTopology
from moe.expert_slots import ExpertSlots
from moe.replica_choice import ReplicaChoice

DIM = 12
TOP_K = 4
NUM_EXPERTS = 16


def placement(kind: str, topology: RankTopology, seed: int = 0) -> ExpertSlots:
    """even; scattered: shuffled and unequal, ranks without any included; replicated: hot copies."""
    ranks = topology.num_ranks
    if kind == "even":
        return ExpertSlots.even(NUM_EXPERTS, ranks)
    chance = random.Random(seed)
    held: list[set[int]] = [set() for _ in range(ranks)]
    for expert in range(NUM_EXPERTS):
        held[chance.randrange(ranks)].add(expert)
    if kind == "replicated":
        for expert in range(0, NUM_EXPERTS, 2):
            for rank in chance.sample(range(ranks), min(ranks, 3)):
                held[rank].add(expert)
    return ExpertSlots(tuple(tuple(sorted(experts)) for experts in held))


def logical_routes(kind: str, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """int64 (T, K), distinct within a row: random, or skewed: all rows to the same experts."""
    if kind == "skewed":
        return torch.arange(TOP_K).expand(num_rows, TOP_K).clone()
    scores = torch.rand((num_rows, NUM_EXPERTS), generator=generator)
    return scores.topk(TOP_K, dim=1).indices


def rows_of_rank(
    rank: int, num_rows: int, routes: str, *, whole: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, logical experts, weights of one rank; the same every time."""
    generator = torch.Generator().manual_seed(1000 * rank + num_rows)
    logical = logical_routes(routes, num_rows, generator)
    if whole:
        hidden = torch.randint(-8, 9, (num_rows, DIM), generator=generator).to(dtype)
        weights = torch.randint(1, 5, (num_rows, TOP_K), generator=generator).float()
    else:
        hidden = torch.randn((num_rows, DIM), generator=generator).to(dtype)
        weights = torch.rand((num_rows, TOP_K), generator=generator)
    return hidden, logical, weights


def expert(slots: ExpertSlots, slot: int, hidden: torch.Tensor) -> torch.Tensor:
    """What the logical expert in a slot computes: a scaled, shifted reversal; whole for whole."""
    logical = slots.logical_slots[slot]
    return hidden.float().flip(1) * (1 + logical % 5) + logical


def physical(
    slots: ExpertSlots, topology: RankTopology, rank: int, logical: torch.Tensor
) -> torch.Tensor:
    return ReplicaChoice(slots, topology, rank).physical(logical)
