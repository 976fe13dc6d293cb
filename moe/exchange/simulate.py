"""One layer's dispatch and combine in virtual time: how long each scheme takes on given links.

Pure and torch-free. Every rank has a clock, every node a way out and a way in that carry one
message after the other. A message of gloo is three on the wire: the receiver's word that it is
ready, the sender's, and the data. A collective costs two one-way delays, since its data waits for
the receiver's word; where the receive was posted before it costs one, and the word travels later.
A stream has no words.

    flat          counts, rows | answers            over all ranks
    hierarchical  rows, rows | answers, answers     over rails, in streams, then nodes
    preposted     rows, rows | answers, answers     the same, in slots posted before
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.dist.rank_topology import RankTopology
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme, Way

_COUNT_BYTES = 8.0
_HEADER_BYTES = 16.0
PACKET_BYTES = 65_000.0
"""What TCP hands to the card at once; a longer message is several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The rows of one layer, routed evenly.

    Args:
        rows: of each rank.
        top_k: experts a row visits.
        row_bytes, answer_bytes: of a row there and back.
        max_nodes: nodes a row may visit at most; 0: all.
    """

    rows: int
    top_k: int
    row_bytes: int
    answer_bytes: int
    max_nodes: int = 0

    def node_share(self, topology: RankTopology) -> float:
        """Chance that a row visits a given node."""
        num_nodes = topology.num_nodes
        if 0 < self.max_nodes < num_nodes:
            return (self.max_nodes / num_nodes) * _hit(self.max_nodes, self.top_k)
        return _hit(num_nodes, self.top_k)

    def rank_share(self, topology: RankTopology) -> float:
        """Chance that a row visits a given rank."""
        if 0 < self.max_nodes < topology.num_nodes:
            ranks = topology.num_ranks * self.max_nodes / topology.num_nodes
            return (self.max_nodes / topology.num_nodes) * _hit(ranks, self.top_k)
        return _hit(topology.num_ranks, self.top_k)


def _hit(places: float, tries: int) -> float:
    return 1.0 - (1.0 - 1.0 / places) ** tries


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Who sends to whom in one hop: (source, target, their nodes), in the order of sending."""

    there: tuple[tuple[int, int, int, int], ...]
    back: tuple[tuple[int, int, int, int], ...]
    """The same the other way round."""


@functools.lru_cache(maxsize=64)
def _pairs(way: Way, topology: RankTopology) -> _Pairs:
    listed = {Way.WORLD: _world, Way.NODE: _nodes, Way.RAIL: _rails}[way](topology)
    node = [topology.node_index(rank) for rank in range(topology.num_ranks)]
    there = tuple((a, b, node[a], node[b]) for a, b in listed)
    return _Pairs(there, tuple((b, a, m, n) for a, b, n, m in there))


class _Network:
    """Clocks of ranks, and when each way is free again."""

    def __init__(self, topology: RankTopology, costs: LinkCosts) -> None:
        self.topology = topology
        self.costs = costs
        self.now = [0.0] * topology.num_ranks
        self._out = [0.0] * topology.num_nodes
        self._in = [0.0] * topology.num_nodes
        self._local = [0.0] * topology.num_ranks

    def stream(self, pairs: _Pairs, num_bytes: float) -> None:
        """All send so many bytes and wait, and nobody says a word before or after."""
        self.now = [clock + self.costs.posted_call_s for clock in self.now]
        ready = [self.now[source] for source, *_ in pairs.there]
        self._end(pairs, self._carry(pairs.there, ready, num_bytes))

    def hop(self, pairs: _Pairs, num_bytes: float, *, asked_before: bool) -> None:
        """All send so many bytes and wait; without `asked_before` data waits for the receiver."""
        spent_s = self.costs.posted_call_s if asked_before else self.costs.call_s
        self.now = [clock + spent_s for clock in self.now]
        ready = [self.now[source] for source, *_ in pairs.there]
        if not asked_before:
            heard = self._carry(pairs.back, [self.now[target] for target, *_ in pairs.back], 0.0)
            self._carry(pairs.there, ready, 0.0)
            ready = list(map(max, ready, heard))
        else:
            # What the receivers announce now is for a later hop, but some of it is in the way: a
            # rank's words leave before the data of others of its node.
            self._carry(pairs.there, ready, 0.0)
            self._carry(pairs.back, [self.now[target] for target, *_ in pairs.back], 0.0)
        self._end(pairs, self._carry(pairs.there, ready, num_bytes))

    def _end(self, pairs: _Pairs, arrived: Sequence[float]) -> None:
        now = self.now
        for (_, target, _, _), when in zip(pairs.there, arrived, strict=True):
            now[target] = max(now[target], when)

    def work(self, num_bytes: float) -> None:
        """Every rank handles rows."""
        spent_s = num_bytes / self.costs.row_bytes_per_s
        self.now = [clock + spent_s for clock in self.now]

    def _carry(
        self,
        pairs: Sequence[tuple[int, int, int, int]],
        ready: Sequence[float],
        num_bytes: float,
    ) -> list[float]:
        """When messages of one size arrive, which queue in the order in which they are ready."""
        costs, local, ways_out, ways_in = self.costs, self._local, self._out, self._in
        local_s = costs.local_message_s + num_bytes / costs.local_bytes_per_s
        packets = max(1.0, math.ceil(num_bytes / PACKET_BYTES))
        node_s = packets * costs.node_message_s + num_bytes / costs.node_bytes_per_s
        arrived = [0.0] * len(pairs)
        far = []
        for index in sorted(range(len(pairs)), key=ready.__getitem__):
            source, _, source_node, target_node = pairs[index]
            ready_s = ready[index]
            if source_node == target_node:
                local[source] = done_s = max(ready_s, local[source]) + local_s
                arrived[index] = done_s + costs.local_delay_s
                continue
            ways_out[source_node] = done_s = max(ready_s, ways_out[source_node]) + node_s
            arrived[index] = done_s + costs.node_delay_s
            far.append(index)
        # It passes the way in as it comes; only several senders to one node queue there.
        for index in sorted(far, key=arrived.__getitem__):
            target_node = pairs[index][3]
            came_s = max(arrived[index], ways_in[target_node] + node_s)
            ways_in[target_node] = arrived[index] = came_s
        return arrived


def simulate(
    scheme: Scheme, topology: RankTopology, traffic: Traffic, costs: LinkCosts, slot_rows: int
) -> float:
    """Seconds from the first rank's dispatch to the last rank's combine; experts take no time."""
    network = _Network(topology, costs)
    two_levels = topology.has_two_levels
    preposted = scheme is Scheme.PREPOSTED
    streamed = scheme is Scheme.HIERARCHICAL and two_levels
    if scheme is Scheme.FLAT or not two_levels:
        share = traffic.rank_share(topology)
        legs = [(Way.WORLD, traffic.rows * share, topology.num_ranks)]
    else:
        outer = traffic.rows * traffic.node_share(topology)
        inner = topology.num_nodes * traffic.rows * traffic.rank_share(topology)
        legs = [
            (Way.RAIL, outer, topology.num_nodes),
            (Way.NODE, inner, max(map(len, topology.nodes))),
        ]
    for way, rows, num_targets in legs:
        network.work(num_targets * rows * traffic.row_bytes)
        pairs = _pairs(way, topology)
        if streamed:
            network.stream(pairs, _HEADER_BYTES + rows * traffic.row_bytes)
        else:
            _there(network, pairs, rows, traffic, slot_rows if preposted else None)
    for way, rows, num_targets in reversed(legs):
        pairs, num_bytes = _pairs(way, topology), rows * traffic.answer_bytes
        if streamed:
            network.stream(pairs, num_bytes)
        else:
            network.hop(pairs, num_bytes, asked_before=preposted)
        network.work(num_targets * rows * traffic.answer_bytes)
    return max(network.now)


def exchange_s(way: Way, topology: RankTopology, costs: LinkCosts, num_bytes: float) -> float:
    """Seconds of one collective of all groups of a kind; for fitting costs to a measured one."""
    network = _Network(topology, costs)
    network.hop(_pairs(way, topology), num_bytes, asked_before=False)
    return max(network.now)


def _there(
    network: _Network,
    pairs: _Pairs,
    rows: float,
    traffic: Traffic,
    slot_rows: int | None,
) -> None:
    if slot_rows is None:
        network.hop(pairs, _COUNT_BYTES, asked_before=False)
        network.hop(pairs, rows * traffic.row_bytes, asked_before=False)
        return
    first = _HEADER_BYTES + min(rows, slot_rows) * traffic.row_bytes
    network.hop(pairs, first, asked_before=True)
    if rows > slot_rows:
        network.hop(pairs, (rows - slot_rows) * traffic.row_bytes, asked_before=False)


# Everybody begins with the next rank, so that no way in is everybody's first.
def _world(topology: RankTopology) -> Iterator[tuple[int, int]]:
    size = topology.num_ranks
    return ((a, (a + step) % size) for step in range(1, size) for a in range(size))


def _rails(topology: RankTopology) -> Iterator[tuple[int, int]]:
    num_nodes = topology.num_nodes
    for step in range(1, num_nodes):
        for rank in range(topology.num_ranks):
            node = (topology.node_index(rank) + step) % num_nodes
            yield rank, topology.forwarder(rank, node)


def _nodes(topology: RankTopology) -> Iterator[tuple[int, int]]:
    return ((a, b) for ranks in topology.nodes for a in ranks for b in ranks if a != b)
