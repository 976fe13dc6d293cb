"""Where the experts of one layer are: the slots of every rank and the logical expert in each.

A physical expert is a slot. Slots are numbered through the ranks: first those of rank 0, then those
of rank 1, so a slot's number says its rank. A logical expert may sit in several slots (redundant
experts); every logical expert sits in at least one. Ranks need not have equally many slots.
Torch-free: placement, planner and exchange read it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from cluster.base.errors import ConfigError


@dataclass(frozen=True)
class ExpertSlots:
    """A layer's placement.

    Args:
        logical_by_rank: the logical expert in each slot of each rank.

    Raises:
        ConfigError: an expert is nowhere, or twice on one rank.
    """

    logical_by_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        present = sorted(set(self.logical_slots))
        if present != list(range(len(present))):
            raise ConfigError(f"Experts {present} leave gaps: every expert needs a slot.")
        for rank, experts in enumerate(self.logical_by_rank):
            if len(set(experts)) != len(experts):
                raise ConfigError(f"Rank {rank} holds an expert twice: {experts}.")

    @classmethod
    def even(cls, num_experts: int, num_ranks: int) -> ExpertSlots:
        """Consecutive experts, each in one slot; the first ranks hold one more if need be."""
        bounds = [
            rank * (num_experts // num_ranks) + min(rank, num_experts % num_ranks)
            for rank in range(num_ranks + 1)
        ]
        return cls(tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds)))

    @cached_property
    def logical_slots(self) -> tuple[int, ...]:
        """The logical expert in each slot, over all ranks."""
        return tuple(itertools.chain.from_iterable(self.logical_by_rank))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Slots of each rank."""
        return tuple(len(experts) for experts in self.logical_by_rank)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Number of each rank's first slot."""
        return tuple(itertools.accumulate(self.counts, initial=0))[:-1]

    @cached_property
    def rank_of_slot(self) -> tuple[int, ...]:
        """The rank of each slot."""
        return tuple(rank for rank, count in enumerate(self.counts) for _ in range(count))

    @property
    def num_ranks(self) -> int:
        """Ranks, those without a slot included."""
        return len(self.logical_by_rank)

    @property
    def num_slots(self) -> int:
        """Slots of all ranks."""
        return len(self.logical_slots)

    @cached_property
    def num_experts(self) -> int:
        """Logical experts."""
        return len(set(self.logical_slots))

    def replicas(self, expert: int) -> tuple[int, ...]:
        """The slots that hold a logical expert, ascending."""
        return self._replicas[expert]

    @cached_property
    def _replicas(self) -> tuple[tuple[int, ...], ...]:
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.logical_slots):
            slots[expert].append(slot)
        return tuple(tuple(found) for found in slots)
