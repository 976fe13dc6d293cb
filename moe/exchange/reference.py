"""What every exchange must deliver, computed in one process over the inputs of all ranks.

The oracle of the tests: no plan, no hop, a loop over rows and experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from moe.exact_sums import heaviest, settle
from moe.exchange.base import Arrivals
from moe.expert_slots import ExpertSlots
from moe.plan import NOWHERE

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""hidden (T, D), physical experts (T, K), gate weights (T, K) of one rank."""

Expert = Callable[[int, torch.Tensor], torch.Tensor]
"""From a physical expert and rows to fp32 rows."""


def reference_sums(inputs: Sequence[Routed], expert: Expert) -> list[torch.Tensor]:
    """What `combine` must return at each rank: fp32 (T, D)."""
    answers = []
    for hidden_TD, expert_TK, weight_TK in inputs:
        summed = torch.zeros(hidden_TD.shape, dtype=torch.float64)
        for row, chosen in enumerate(expert_TK.tolist()):
            for slot in sorted(set(chosen) - {NOWHERE}):
                at = chosen.index(slot)
                product = weight_TK[row, at] * expert(slot, hidden_TD[row : row + 1])
                most = heaviest(weight_TK[row : row + 1])
                summed[row] += settle(product, weight_TK[row, at : at + 1], most)[0]
        answers.append(summed.float())
    return answers


def partial_sums(arrivals: Arrivals, first_slot: int, expert: Expert) -> torch.Tensor:
    """What a mixture block does with the rows that arrived, the slow and plain way: fp64 (A, D)."""
    partial_AD = torch.zeros(arrivals.hidden_AD.shape, dtype=torch.float64)
    heaviest_A = heaviest(arrivals.weight_AK)
    pairs = arrivals.pairs()
    offsets = pairs.offsets_L1.tolist()
    for local, (begin, end) in enumerate(itertools.pairwise(offsets)):
        rows = pairs.row_M[begin:end]
        if rows.numel():
            weight_M = pairs.weight_M[begin:end]
            product = weight_M[:, None] * expert(first_slot + local, arrivals.hidden_AD[rows])
            partial_AD[rows] += settle(product, weight_M, heaviest_A[rows])
    return partial_AD


def reference_pairs(
    inputs: Sequence[Routed], slots: ExpertSlots, rank: int
) -> set[tuple[int, ...]]:
    """Which (source rank, row, local expert) a rank must be given."""
    first, count = slots.firsts[rank], slots.counts[rank]
    return {
        (source, row, slot - first)
        for source, (_, expert_TK, _) in enumerate(inputs)
        for row, chosen in enumerate(expert_TK.tolist())
        for slot in chosen
        if first <= slot < first + count
    }
