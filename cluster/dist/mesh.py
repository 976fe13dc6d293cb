"""Named axes over ranks: who shares a tensor-parallel, expert-parallel or data-parallel group.

Pure arithmetic. Ranks are row-major: the last axis varies fastest, so the most talkative axis goes
last and its ranks are neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A grid of ranks.

    Args:
        axes: (name, size) from the slowest to the fastest varying, e.g. `(("dp", 2), ("tp", 4))`.

    Raises:
        ConfigError: no axis, a repeated name, or a size below one.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if not names or len(set(names)) != len(names) or any(size < 1 for _, size in self.axes):
            raise ConfigError(
                f"{self.axes} is not a mesh.", "Give each axis once, with a size of at least 1."
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole mesh."""
        return math.prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        """Ranks along one axis; an axis the mesh does not have counts as size 1."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """This rank's index on every axis, in axis order."""
        self._check(rank)
        found: dict[str, int] = {}
        rest = rank
        for name, size in reversed(self.axes):
            rest, found[name] = divmod(rest, size)
        return {name: found[name] for name, _ in self.axes}

    def rank_at(self, coordinates: dict[str, int]) -> int:
        """Inverse of `coordinates`; a missing axis counts as index 0."""
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinates.get(name, 0)
        self._check(rank)
        return rank

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that differ from `rank` on `axis` alone, itself included, in axis order."""
        here = self.coordinates(rank)
        if axis not in here:
            return (rank,)
        return tuple(self.rank_at(here | {axis: index}) for index in range(self.size(axis)))

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"Rank {rank} is not in a mesh of {self.num_ranks} ranks.")
