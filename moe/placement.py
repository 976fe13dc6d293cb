"""Which rank holds which expert, and what part of an expert's rows each copy takes. Pure.

Input is a load (rows per expert of one layer), the slots of every rank and its node, and
optionally which experts tokens tend to visit together. Output is a `LayerPlacement`. Three things
set it apart from EPLB (DeepSeek), whose greedy steps it starts from:

- copies take *shares*, not equal parts: how a hot expert's rows are split over its copies is solved
  exactly (`split_load`), so few copies give a flat load, and a drifting load is first met by new
  shares, which move no weights;
- experts that are visited together stay on one node, and only copies leave it, so that a token
  still reaches few nodes (one row per token and node is what crosses the network);
- ranks may have unequal slots; nothing has to divide anything.

Results of a model do not depend on the placement: every copy computes the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.base.errors import ConfigError
from moe.load_split import split_load
from moe.node_packing import ExpertRanks, Loads, NodePacking
from moe.placement_polish import polish


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlacement:
    """Copies of each logical expert of one layer."""

    homes: tuple[tuple[int, ...], ...]
    """Per expert: the ranks that hold it, ascending, each once."""
    shares: tuple[tuple[float, ...], ...]
    """Parallel to `homes`: the part of the expert's rows that each copy takes; sums to 1."""

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Experts on one rank, ascending."""
        return tuple(expert for expert, homes in enumerate(self.homes) if rank in homes)

    def rank_loads(self, load_E: Sequence[float] | Loads, num_ranks: int) -> Loads:
        """Rows that each rank computes under a load."""
        loads: Loads = np.zeros(num_ranks)
        for load, homes, shares in zip(load_E, self.homes, self.shares, strict=True):
            for rank, share in zip(homes, shares, strict=True):
                loads[rank] += load * share
        return loads

    def imbalance(self, load_E: Sequence[float] | Loads, num_ranks: int) -> float:
        """Load of the busiest rank over the mean; 1.0 is perfect, also when nobody has work."""
        loads = self.rank_loads(load_E, num_ranks)
        return float(loads.max() / loads.mean()) if loads.any() else 1.0


def place_layer(
    load_E: Sequence[float] | Loads,
    ranks: ExpertRanks,
    *,
    clusters: Sequence[Sequence[int]] = (),
) -> LayerPlacement:
    """A placement from nothing.

    Args:
        load_E: rows per expert; only ratios matter.
        ranks: where experts may live; slots beyond one per expert are filled with copies.
        clusters: experts that should share a node, e.g. the groups of group-limited routing
            or `co_activated`; those in none stand alone.

    Raises:
        ConfigError: fewer slots than experts.
    """
    load = np.asarray(load_E, dtype=np.float64)
    if sum(ranks.slots) < len(load):
        raise ConfigError(
            f"{len(load)} experts do not fit into {sum(ranks.slots)} slots.",
            "Use more ranks, or leave more slots on each.",
        )
    # A load of zero says nothing about the next window: spread such experts evenly, not blindly.
    load = load + max(float(load.sum()), 1.0) * 1e-9
    copies = _copies(load, ranks)
    packing = NodePacking(load / copies, ranks)
    packing.add_first_copies(_complete(clusters, len(load)))
    packing.add_other_copies(copies)
    homes = packing.onto_ranks()
    homes = polish(load, homes, ranks.nodes)
    return with_shares(load, homes, ranks.num_ranks)


def with_shares(
    load_E: Sequence[float] | Loads, homes: Sequence[Sequence[int]], num_ranks: int
) -> LayerPlacement:
    """The given homes with the shares that make the busiest rank least busy."""
    ordered = tuple(tuple(sorted(set(ranks))) for ranks in homes)
    return LayerPlacement(homes=ordered, shares=split_load(load_E, ordered, num_ranks))


def even_placement(num_experts: int, ranks: ExpertRanks) -> LayerPlacement:
    """Contiguous experts in rank order, as many per rank as its share of the slots; no copies.

    What a group starts with, before any load is known.

    Raises:
        ConfigError: fewer slots than experts.
    """
    total = sum(ranks.slots)
    if total < num_experts:
        raise ConfigError(f"{num_experts} experts do not fit into {total} slots.")
    ends = np.cumsum(ranks.slots) * num_experts // total
    homes = [(int(np.searchsorted(ends, expert, side="right")),) for expert in range(num_experts)]
    return LayerPlacement(homes=tuple(homes), shares=((1.0,),) * num_experts)


def _copies(load: Loads, ranks: ExpertRanks) -> npt.NDArray[np.int64]:
    """How many copies of each expert: the next one always to the largest load per copy."""
    most = sum(slots > 0 for slots in ranks.slots)
    copies = np.ones(len(load), dtype=np.int64)
    heap = [(-value, expert) for expert, value in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(sum(ranks.slots) - len(load)):
        while heap and copies[heap[0][1]] >= most:
            heapq.heappop(heap)
        if not heap:
            break
        _, expert = heap[0]
        copies[expert] += 1
        heapq.heapreplace(heap, (-load[expert] / copies[expert], expert))
    return copies


def _complete(clusters: Sequence[Sequence[int]], num_experts: int) -> list[tuple[int, ...]]:
    """The clusters, and one of its own for each expert that is in none."""
    named = {expert for cluster in clusters for expert in cluster}
    alone = [(expert,) for expert in range(num_experts) if expert not in named]
    return [tuple(cluster) for cluster in clusters if cluster] + alone
