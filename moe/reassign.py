"""Where a layer's experts go when ranks are lost: the survivors keep theirs and take in the rest.

Pure and torch-free. An expert with a copy on a survivor needs nothing. Any other one is taken in by
the survivor that holds fewest, into room that was planned for it; where there is none left, a copy
of an expert that others hold too is given up. So it is possible exactly when the survivors' slots
are as many as the experts, and `spare_slots` says how many that takes on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe.expert_table import ExpertTable


def reassign(
    table: ExpertTable, survivors: Sequence[int], room: Sequence[int]
) -> ExpertTable | None:
    """The placement without the ranks that are lost.

    Args:
        table: the placement so far.
        survivors: ranks of `table` that stay, ascending; in the answer they are 0, 1, 2 ...
        room: most experts that each survivor may hold, parallel to `survivors`.

    Returns:
        None when the survivors have fewer slots than there are experts.
    """
    num_experts = table.slots.num_experts
    if sum(min(most, num_experts) for most in room) < num_experts:
        return None
    held = [set(table.logical_by_rank[rank]) for rank in survivors]
    copies = [sum(expert in experts for experts in held) for expert in range(num_experts)]
    for expert in range(num_experts):
        if not copies[expert]:
            _take_in(expert, held, copies, room)
    return ExpertTable(
        layer=table.layer, logical_by_rank=tuple(tuple(sorted(experts)) for experts in held)
    )


def spare_slots(table: ExpertTable, group_size: int, num_lost_groups: int) -> int:
    """Slots that each rank needs beside its own, so that any such groups may be lost.

    Args:
        table: the placement that a replica begins with.
        group_size: ranks of a tensor-parallel group; these stand together and are lost together.
        num_lost_groups: fewer than there are groups.
    """
    counts = table.slots.counts
    groups = sorted(
        sum(counts[first : first + group_size]) for first in range(0, len(counts), group_size)
    )
    least = groups[: len(groups) - num_lost_groups]
    missing = table.slots.num_experts - sum(least)
    return max(0, -(-missing // (len(least) * group_size)))


def _take_in(expert: int, held: list[set[int]], copies: list[int], room: Sequence[int]) -> None:
    """Put an expert that nobody holds somewhere; there are slots enough."""
    free = [rank for rank, experts in enumerate(held) if len(experts) < room[rank]]
    if not free:
        rank, given_up = _copy_to_give_up(held, copies)
        held[rank].remove(given_up)
        copies[given_up] -= 1
        free = [rank]
    rank = min(free, key=lambda rank: (len(held[rank]), rank))
    held[rank].add(expert)
    copies[expert] += 1


def _copy_to_give_up(held: Sequence[set[int]], copies: Sequence[int]) -> tuple[int, int]:
    """A rank and an expert of it that has most copies; of equals the first of the fullest rank."""
    candidates = (
        (-copies[expert], -len(experts), rank, expert)
        for rank, experts in enumerate(held)
        for expert in experts
        if copies[expert] > 1
    )
    _, _, rank, expert = min(candidates)
    return rank, expert
