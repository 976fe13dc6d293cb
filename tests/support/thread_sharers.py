"""Ranks that share slots, as threads of one process: notes are queues, memory is memory."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.dist.peer_group import Note

PATIENCE_S = 20.0


class ThreadSharers:
    """One member; `members` makes all of them."""

    def __init__(self, rank: int, count: int, notes: dict[tuple[int, int], queue.Queue[Note]]):
        self.rank = rank
        self.names = tuple(f"rank {other} (node here)" for other in range(count))
        self._notes = notes

    def tell(self, note: Note) -> None:
        for other in range(len(self.names)):
            if other != self.rank:
                self._notes[self.rank, other].put(note)

    def hear(self, peer: int, what: str) -> Note:
        return self._notes[peer, self.rank].get(timeout=PATIENCE_S)


def members(count: int) -> list[ThreadSharers]:
    pairs = itertools.permutations(range(count), 2)
    notes: dict[tuple[int, int], queue.Queue[Note]] = {pair: queue.Queue() for pair in pairs}
    return [ThreadSharers(rank, count, notes) for rank in range(count)]


def on_threads(count: int, body: Callable[[int], Any]) -> list[Any]:
    """What `body(rank)` returned or raised, in rank order."""
    with ThreadPoolExecutor(max_workers=count) as pool:
        futures = [pool.submit(body, rank) for rank in range(count)]
        return [future.exception() or future.result() for future in futures]
