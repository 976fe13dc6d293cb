"""Peer groups whose ranks are threads of one process: every exchange at every shape, in seconds.

Messages are queues. A receive is filled when it is waited for, tags keep their own order, and a
shorter message fills the beginning of a receive. A message that never comes is an error after
`PATIENCE_S`, so a wrong order of calls fails instead of hanging.
"""

from __future__ import annotations

import itertools
import queue
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from cluster.dist.peer_group import Note
from cluster.dist.rank_topology import RankTopology

PATIENCE_S = 20.0
_NUM_TAGS = 6
_GATHER_TAG = 5
STREAM_HEADER_BYTES = 32


class Hub:
    """All queues of one group of threads; counts what crosses between nodes.

    `shared`: the ranks of a node can read each other's memory.
    """

    def __init__(self, topology: RankTopology, *, shared: bool = True) -> None:
        self.topology = topology
        self.shared = shared
        pairs = list(itertools.product(range(topology.num_ranks), repeat=2))
        self.notes: dict[tuple[int, int], queue.Queue[Any]] = {p: queue.Queue() for p in pairs}
        self.streams: dict[tuple[int, int], queue.Queue[Any]] = {p: queue.Queue() for p in pairs}
        self._queues: dict[Any, queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
        for kind in ("world", "node", "rail"):
            for source in range(topology.num_ranks):
                for target in range(topology.num_ranks):
                    for tag in range(_NUM_TAGS):
                        self._queues[kind, source, target, tag] = queue.Queue()
        self.node_bytes = 0
        self.node_messages = 0
        self.num_by_tag: Counter[int] = Counter()

    def put(self, kind: str, source: int, target: int, tag: int, data: torch.Tensor) -> None:
        if data.numel():
            self.count(source, target, data.numel())
        self.num_by_tag[tag] += 1
        self._queues[kind, source, target, tag].put(data.clone())

    def count(self, source: int, target: int, num_bytes: int) -> None:
        if self.topology.node_index(source) != self.topology.node_index(target):
            self.node_bytes += num_bytes
            self.node_messages += 1

    def get(self, kind: str, source: int, target: int, tag: int) -> torch.Tensor:
        return self._queues[kind, source, target, tag].get(timeout=PATIENCE_S)


@dataclass
class Later:
    action: Callable[[], None]

    def wait(self, what: str) -> None:
        self.action()


class ThreadGroup:
    def __init__(self, hub: Hub, kind: str, rank: int, ranks: tuple[int, ...]) -> None:
        self.hub, self.kind, self.ranks = hub, kind, ranks
        self.own = rank
        self.rank = ranks.index(rank)
        self.size = len(ranks)

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_splits: Sequence[int],
        sent_splits: Sequence[int],
    ) -> Later:
        assert received.numel() == sum(received_splits)
        assert sent.numel() == sum(sent_splits)
        for other, piece in zip(self.ranks, sent.split(list(sent_splits)), strict=True):
            self.hub.put(self.kind, self.own, other, 0, piece)
        places = received.split(list(received_splits))

        def fill() -> None:
            for other, place in zip(self.ranks, places, strict=True):
                place.copy_(self.hub.get(self.kind, other, self.own, 0))

        return Later(fill)

    def send(self, data: torch.Tensor, peer: int, tag: int) -> Later:
        assert tag
        assert data.numel()
        self.hub.put(self.kind, self.own, self.ranks[peer], tag, data)
        return Later(lambda: None)

    def receive(self, into: torch.Tensor, peer: int, tag: int) -> Later:
        def fill() -> None:
            data = self.hub.get(self.kind, self.ranks[peer], self.own, tag)
            into[: data.numel()].copy_(data)

        return Later(fill)

    def all_gather_bytes(self, own: bytes, what: str) -> list[bytes]:
        data = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        for other in self.ranks:
            self.hub.put(self.kind, self.own, other, _GATHER_TAG, data)
        pieces = [self.hub.get(self.kind, o, self.own, _GATHER_TAG) for o in self.ranks]
        return [piece.numpy().tobytes() for piece in pieces]


class ThreadBoxes:
    """Memory of the ranks of a node, which threads share anyway."""

    def __init__(self, hub: Hub, rank: int, ranks: tuple[int, ...]) -> None:
        self._hub, self._own, self._ranks = hub, rank, ranks
        self.rank, self.size = ranks.index(rank), len(ranks)
        self._boxes: dict[int, torch.Tensor] = {}

    def box(self, index: int, num_bytes: int) -> torch.Tensor:
        if index not in self._boxes or self._boxes[index].numel() < num_bytes:
            with torch.inference_mode(False):  # idle ranks write outside of it
                self._boxes[index] = torch.empty(num_bytes, dtype=torch.uint8)
        self._boxes[index].fill_(0xA5)  # whoever still reads it shall see that
        return self._boxes[index][:num_bytes]

    def tell(self, peer: int, index: int, note: Note) -> None:
        self._hub.notes[self._own, self._ranks[peer]].put((self._boxes[index], note))

    def hear(self, peer: int, what: str) -> tuple[torch.Tensor, Note]:
        return self._hub.notes[self._ranks[peer], self._own].get(timeout=PATIENCE_S)


class ThreadStreams:
    """Connections along a rail; what is sent is left where it lies until it is received."""

    def __init__(self, hub: Hub, rank: int, ranks: tuple[int, ...]) -> None:
        self._hub, self._own, self._ranks = hub, rank, ranks
        self.rank, self.size = ranks.index(rank), len(ranks)

    def send(self, peer: int, note: Note, data: torch.Tensor) -> None:
        self._hub.count(self._own, self._ranks[peer], data.numel() + STREAM_HEADER_BYTES)
        self._hub.streams[self._own, self._ranks[peer]].put((note, data))

    def receive(self, peer: int, place: Callable[[Note], torch.Tensor], what: str) -> None:
        streams = self._hub.streams[self._ranks[peer], self._own]
        note, data = streams.get(timeout=PATIENCE_S)
        into = place(note)
        assert into.shape == data.shape
        into.copy_(data)


class ThreadPeers:
    """What `ExpertPeers` is, for one thread."""

    def __init__(self, hub: Hub, rank: int) -> None:
        topology = hub.topology
        self.world = ThreadGroup(hub, "world", rank, tuple(range(topology.num_ranks)))
        self.node = ThreadGroup(hub, "node", rank, topology.node_ranks(rank))
        self.rail = ThreadGroup(hub, "rail", rank, topology.rail_ranks(rank))
        has_rails = topology.has_two_levels
        self.streams = ThreadStreams(hub, rank, topology.rail_ranks(rank)) if has_rails else None
        mates = topology.node_ranks(rank)
        has_memory = hub.shared and len(mates) > 1
        self.shared = ThreadBoxes(hub, rank, mates) if has_memory else None


def on_threads(hub: Hub, body: Callable[[int, ThreadPeers], Any]) -> list[Any]:
    """Run `body(rank, peers)` on a thread per rank; what each returned, in rank order."""
    ranks = range(hub.topology.num_ranks)
    with ThreadPoolExecutor(max_workers=len(ranks)) as pool:
        return [f.result() for f in [pool.submit(body, r, ThreadPeers(hub, r)) for r in ranks]]
