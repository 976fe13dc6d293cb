"""Copies of experts onto nodes and their ranks, greedily: what `placement.py` begins with. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.base.errors import ConfigError

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


class NodePacking:
    """Copies onto nodes, first copies by cluster, the others to level them; then onto their ranks.

    Args:
        per_copy: rows that each copy of an expert would take.
        ranks: with slots for all experts.
    """

    def __init__(self, per_copy: Loads, ranks: ExpertRanks) -> None:
        self._per_copy = per_copy
        self._ranks = ranks
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
        self._node_of: dict[int, int] = {}
        self._extras: dict[int, list[int]] = {}

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
                taken = [self._node_of[expert], *self._extras.get(expert, [])]
                usable = [
                    node
                    for node in self._nodes
                    if self._room[node] and taken.count(node) < self._width[node]
                ]
                if not usable:
                    break
                node = self._emptiest(usable)
                self._extras.setdefault(expert, []).append(node)
                self._fill(expert, node)

    def onto_ranks(self) -> list[list[int]]:
        """The ranks of each expert: heaviest copy first, to the emptiest rank of its node."""
        ranks = self._ranks
        homes: list[list[int]] = [[] for _ in self._node_of]
        free = list(ranks.slots)
        filled = [0.0] * ranks.num_ranks
        placed = list(self._node_of.items())
        placed += [(expert, node) for expert, nodes in self._extras.items() for node in nodes]
        # First copies are placed before others of equal weight: they must find a slot.
        order = sorted(
            range(len(placed)), key=lambda index: (-self._per_copy[placed[index][0]], index)
        )
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
            filled[rank] += self._per_copy[expert]
            free[rank] -= 1
        return homes

    def _put_first(self, experts: Sequence[int], node: int) -> None:
        for expert in experts:
            self._node_of[expert] = node
            self._fill(expert, node)

    def _fill(self, expert: int, node: int) -> None:
        self._filled[node] += float(self._per_copy[expert]) / self._width[node]
        self._room[node] -= 1

    def _emptiest(self, nodes: Sequence[int]) -> int:
        return min(nodes, key=lambda node: (self._filled[node], node))

    def _weight(self, experts: Sequence[int]) -> float:
        return float(self._per_copy[list(experts)].sum())
