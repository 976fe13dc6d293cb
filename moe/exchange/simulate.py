"""One layer's dispatch and combine in virtual time: how long each scheme takes on given links.

Pure and torch-free. Every rank has a clock, every node a way out and a way in that carry one
message after the other. A message of gloo is three on the wire: the receiver's word that it is
ready, the sender's, and the data. A collective costs two one-way delays, since its data waits for
the receiver's word; where the receive was posted before it costs one, and the word travels later.

    flat          counts, rows | answers                        over all ranks
    hierarchical  counts, rows, counts, rows | answers, answers over rails, then nodes
    preposted     rows, rows | answers, answers                 the same, without words or counts
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.dist.rank_topology import RankTopology
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme

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
class _Message:
    source: int
    target: int
    num_bytes: float


class _Network:
    """Clocks of ranks, and when each way is free again."""

    def __init__(self, topology: RankTopology, costs: LinkCosts) -> None:
        self.topology = topology
        self.costs = costs
        self.now = [0.0] * topology.num_ranks
        self._out = [0.0] * topology.num_nodes
        self._in = [0.0] * topology.num_nodes
        self._local = [0.0] * topology.num_ranks

    def hop(self, messages: Sequence[_Message], *, asked_before: bool) -> None:
        """Everybody sends and waits; without `asked_before` data waits for its receiver's word."""
        spent_s = self.costs.posted_call_s if asked_before else self.costs.call_s
        self.now = [clock + spent_s for clock in self.now]
        from_receivers = [_Message(m.target, m.source, 0.0) for m in messages]
        from_senders = [_Message(m.source, m.target, 0.0) for m in messages]
        ready = self._ready(messages)
        if not asked_before:
            heard = self._carry(from_receivers, self._ready(from_receivers))
            self._carry(from_senders, self._ready(from_senders))
            ready = [max(pair) for pair in zip(ready, heard, strict=True)]
        else:
            self._carry(from_senders, ready)
        arrived = self._carry(messages, ready)
        if asked_before:
            self._carry(from_receivers, self._ready(from_receivers))
        for message, when in zip(messages, arrived, strict=True):
            self.now[message.target] = max(self.now[message.target], when)

    def _ready(self, messages: Sequence[_Message]) -> list[float]:
        return [self.now[message.source] for message in messages]

    def work(self, num_bytes: float) -> None:
        """Every rank handles rows."""
        spent_s = num_bytes / self.costs.row_bytes_per_s
        self.now = [clock + spent_s for clock in self.now]

    def _carry(self, messages: Sequence[_Message], ready: Sequence[float]) -> list[float]:
        arrived = [0.0] * len(messages)
        for index in sorted(range(len(messages)), key=ready.__getitem__):
            arrived[index] = self._one(messages[index], ready[index])
        return arrived

    def _one(self, message: _Message, ready_s: float) -> float:
        costs = self.costs
        source = self.topology.node_index(message.source)
        target = self.topology.node_index(message.target)
        if source == target:
            busy_s = costs.local_message_s + message.num_bytes / costs.local_bytes_per_s
            done_s = max(ready_s, self._local[message.source]) + busy_s
            self._local[message.source] = done_s
            return done_s + costs.local_delay_s
        packets = max(1.0, math.ceil(message.num_bytes / PACKET_BYTES))
        busy_s = packets * costs.node_message_s + message.num_bytes / costs.node_bytes_per_s
        done_s = max(ready_s, self._out[source]) + busy_s
        self._out[source] = done_s
        # It passes the way in as it comes; only several senders to one node queue there.
        came_s = max(done_s + costs.node_delay_s, self._in[target] + busy_s)
        self._in[target] = came_s
        return came_s


def simulate(
    scheme: Scheme, topology: RankTopology, traffic: Traffic, costs: LinkCosts, slot_rows: int
) -> float:
    """Seconds from the first rank's dispatch to the last rank's combine; experts take no time."""
    network = _Network(topology, costs)
    two_levels = topology.has_two_levels
    preposted = scheme is Scheme.PREPOSTED
    if scheme is Scheme.FLAT or not two_levels:
        share = traffic.rank_share(topology)
        legs = [(list(_world(topology)), traffic.rows * share, topology.num_ranks)]
    else:
        outer = traffic.rows * traffic.node_share(topology)
        inner = topology.num_nodes * traffic.rows * traffic.rank_share(topology)
        legs = [
            (list(_rails(topology)), outer, topology.num_nodes),
            (list(_nodes(topology)), inner, max(map(len, topology.nodes))),
        ]
    for pairs, rows, num_targets in legs:
        network.work(num_targets * rows * traffic.row_bytes)
        _there(network, pairs, rows, traffic, slot_rows if preposted else None)
    for pairs, rows, num_targets in reversed(legs):
        answers = [_Message(a, b, rows * traffic.answer_bytes) for a, b in pairs]
        network.hop(answers, asked_before=preposted)
        network.work(num_targets * rows * traffic.answer_bytes)
    return max(network.now)


def rail_exchange(topology: RankTopology, costs: LinkCosts, num_bytes: float) -> float:
    """Seconds of one collective along all rails; for fitting costs to a measured one."""
    network = _Network(topology, costs)
    messages = [_Message(a, b, num_bytes) for a, b in _rails(topology)]
    network.hop(messages, asked_before=False)
    return max(network.now)


def _there(
    network: _Network,
    pairs: Sequence[tuple[int, int]],
    rows: float,
    traffic: Traffic,
    slot_rows: int | None,
) -> None:
    if slot_rows is None:
        network.hop([_Message(a, b, _COUNT_BYTES) for a, b in pairs], asked_before=False)
        network.hop(
            [_Message(a, b, rows * traffic.row_bytes) for a, b in pairs], asked_before=False
        )
        return
    first = _HEADER_BYTES + min(rows, slot_rows) * traffic.row_bytes
    network.hop([_Message(a, b, first) for a, b in pairs], asked_before=True)
    if rows > slot_rows:
        rest = (rows - slot_rows) * traffic.row_bytes
        network.hop([_Message(a, b, rest) for a, b in pairs], asked_before=False)


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
