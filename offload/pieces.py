"""A record cut over the ranks of a node, each of which reads its piece and sees all. Pure.

Pieces are whole pages, so that each can be read past the page cache into its place in a slot. They
stand in the order of the ranks; of a record with fewer pages than ranks the last ones get nothing.

    image      | rank 0: 3 pages | rank 1: 3 pages | rank 2: 2 pages |
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.layout import aligned


@dataclass(frozen=True, slots=True)
class Piece:
    """Which piece is a rank's."""

    index: int
    count: int

    def span(self, num_bytes: int) -> tuple[int, int]:
        """Where the piece of an image of `num_bytes` (whole pages) begins and ends."""
        each = piece_bytes(num_bytes, self.count)
        start = min(self.index * each, num_bytes)
        return start, min(start + each, num_bytes)


def piece_bytes(num_bytes: int, count: int) -> int:
    """Bytes of the largest piece of so many, in whole pages."""
    return aligned(-(-num_bytes // count))
