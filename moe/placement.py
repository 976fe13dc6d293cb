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
from moe.placement_polish import polish

Loads = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRanks:
    """The ranks of a group as homes of experts.

    Raises:
        ConfigError: the two columns differ in length, or a rank has a negative number of slots.
    """

    slots: tuple[int, ...]
    """Experts that each rank can hold, in one layer."""
    nodes: tuple[int, ...]
    """Node of each rank."""

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.nodes) or min(self.slots, default=0) < 0:
            raise ConfigError(f"Slots {self.slots} do not describe ranks on nodes {self.nodes}.")

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return len(self.slots)


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
    packing = _NodePacking(load / copies, ranks)
    packing.add_first_copies(_complete(clusters, len(load)))
    packing.add_other_copies(copies)
    homes = _onto_ranks(load / copies, packing.node_of, packing.extras, ranks)
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


class _NodePacking:
    """Copies onto nodes: first copies by cluster, then the others to level the nodes.

    Args:
        per_copy: rows that each copy of an expert would take.
    """

    def __init__(self, per_copy: Loads, ranks: ExpertRanks) -> None:
        self._per_copy = per_copy
        self._nodes = sorted(set(ranks.nodes))
        self._width = {node: ranks.nodes.count(node) for node in self._nodes}
        self._room = dict.fromkeys(self._nodes, 0)
        for slots, node in zip(ranks.slots, ranks.nodes, strict=True):
            self._room[node] += slots
        total = sum(ranks.slots)
        spare = total - len(per_copy)
        # Slots kept for copies: every node gets its part, so that each can take in hot experts.
        self._kept = {node: spare * room // total for node, room in self._room.items()}
        self._filled = dict.fromkeys(self._nodes, 0.0)
        self.node_of: dict[int, int] = {}
        self.extras: dict[int, list[int]] = {}

    def add_first_copies(self, clusters: Sequence[tuple[int, ...]]) -> None:
        """Heaviest cluster first, whole where a node has room, else expert by expert."""
        for cluster in sorted(clusters, key=lambda some: (-self._weight(some), some)):
            fitting = [n for n in self._nodes if self._room[n] - self._kept[n] >= len(cluster)]
            if fitting:
                self._put_first(cluster, self._emptiest(fitting))
                continue
            for expert in sorted(cluster, key=lambda one: (-self._per_copy[one], one)):
                open_nodes = [n for n in self._nodes if self._room[n] > self._kept[n]]
                open_nodes = open_nodes or [n for n in self._nodes if self._room[n]]
                self._put_first((expert,), self._emptiest(open_nodes))

    def add_other_copies(self, copies: npt.NDArray[np.int64]) -> None:
        """Hottest first, each to the emptiest node that has a rank without this expert."""
        for expert in sorted(range(len(copies)), key=lambda one: (-self._per_copy[one], one)):
            for _ in range(int(copies[expert]) - 1):
                taken = [self.node_of[expert], *self.extras.get(expert, [])]
                usable = [
                    node
                    for node in self._nodes
                    if self._room[node] and taken.count(node) < self._width[node]
                ]
                if not usable:
                    break
                node = self._emptiest(usable)
                self.extras.setdefault(expert, []).append(node)
                self._fill(expert, node)

    def _put_first(self, experts: Sequence[int], node: int) -> None:
        for expert in experts:
            self.node_of[expert] = node
            self._fill(expert, node)

    def _fill(self, expert: int, node: int) -> None:
        self._filled[node] += float(self._per_copy[expert]) / self._width[node]
        self._room[node] -= 1

    def _emptiest(self, nodes: Sequence[int]) -> int:
        return min(nodes, key=lambda node: (self._filled[node], node))

    def _weight(self, experts: Sequence[int]) -> float:
        return float(self._per_copy[list(experts)].sum())


def _onto_ranks(
    per_copy: Loads,
    node_of: dict[int, int],
    extras: dict[int, list[int]],
    ranks: ExpertRanks,
) -> list[list[int]]:
    """Within each node: heaviest copy first, to the emptiest rank that has a slot for it."""
    homes: list[list[int]] = [[] for _ in node_of]
    free = list(ranks.slots)
    filled = [0.0] * ranks.num_ranks
    placed = list(node_of.items())
    placed += [(expert, node) for expert, nodes in extras.items() for node in nodes]
    # First copies are placed before others of equal weight: they must find a slot.
    order = sorted(range(len(placed)), key=lambda index: (-per_copy[placed[index][0]], index))
    for index in order:
        expert, node = placed[index]
        open_ranks = [
            rank
            for rank in range(ranks.num_ranks)
            if ranks.nodes[rank] == node and free[rank] and rank not in homes[expert]
        ]
        if not open_ranks:
            continue
        rank = min(open_ranks, key=lambda rank: (filled[rank], rank))
        homes[expert].append(rank)
        filled[rank] += per_copy[expert]
        free[rank] -= 1
    return homes
