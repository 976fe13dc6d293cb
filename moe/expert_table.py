"""Where the experts of one layer are and how their rows are split, as plain values that travel.

Torch-free: planner, leader and ranks build theirs with the same functions, so that nothing has to
be agreed before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.expert_slots import ExpertSlots
from moe.placement import LayerPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTable:
    """The placement of one layer."""

    layer: int
    """Index of the decoder layer."""
    logical_by_rank: tuple[tuple[int, ...], ...]
    """The logical experts of each rank, ascending."""
    shares: tuple[tuple[float, ...], ...] = ()
    """Per expert, parallel to its ranks in ascending order: the part of its rows that each copy
    takes. Empty: copies on a sender's own node take all of its rows, equally; else all do."""

    @property
    def slots(self) -> ExpertSlots:
        """The same as slots.

        Raises:
            ConfigError: an expert is nowhere, or twice on one rank.
        """
        return ExpertSlots(self.logical_by_rank)

    def placement(self) -> LayerPlacement:
        """The same by expert; equal shares where the table has none."""
        slots = self.slots
        homes = tuple(
            tuple(slots.rank_of_slot[slot] for slot in slots.replicas(expert))
            for expert in range(slots.num_experts)
        )
        shares = self.shares or tuple((1.0 / len(ranks),) * len(ranks) for ranks in homes)
        return LayerPlacement(homes=homes, shares=shares)

    @classmethod
    def of(cls, layer: int, placement: LayerPlacement, num_ranks: int) -> ExpertTable:
        """From a placement, shares included."""
        return cls(
            layer=layer,
            logical_by_rank=tuple(placement.experts_of(rank) for rank in range(num_ranks)),
            shares=placement.shares,
        )


def starting_tables(
    num_experts: Sequence[tuple[int, int]], num_ranks: int, num_redundant: int = 0
) -> tuple[ExpertTable, ...]:
    """What a replica begins with: consecutive experts as evenly as may be, and some copies.

    Each rank also holds the first `num_redundant` experts of the ranks half a group away, which are
    on another node if there are several; so with as many copies as experts per rank every expert is
    on two ranks.

    Args:
        num_experts: (decoder layer, its logical experts) of each mixture layer.
        num_redundant: copies per rank and layer; no more than there are experts elsewhere.
    """
    return tuple(
        ExpertTable(layer=layer, logical_by_rank=_starting_slots(count, num_ranks, num_redundant))
        for layer, count in num_experts
    )


def _starting_slots(
    num_experts: int, num_ranks: int, num_redundant: int
) -> tuple[tuple[int, ...], ...]:
    own = ExpertSlots.even(num_experts, num_ranks).logical_by_rank
    held = []
    for rank in range(num_ranks):
        away = [(rank + num_ranks // 2 + step) % num_ranks for step in range(num_ranks)]
        others = [expert for other in away if other != rank for expert in own[other]]
        held.append(tuple(sorted((*own[rank], *others[:num_redundant]))))
    return tuple(held)
