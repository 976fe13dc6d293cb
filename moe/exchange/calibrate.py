"""Measures what messages and bytes cost between the ranks of a group: about a second, at start.

Collective. Each figure is a difference of two timings of the very calls that the exchanges make, so
it holds whatever the processor, the network and the number of ranks that share them add. Rank 0
works the costs out and gives them to all, so that all choose alike.

    delay     an exchange of empty messages along the rails is two delays and a few messages
    message   ... over all ranks it is many more messages
    bytes     ... with large messages it is many more bytes
    own       whole layers of every scheme, with few rows and with more, take longer than virtual
              time says: cores that ranks share, and work on rows (probe_layers.py)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cluster.dist.peer_group import PeerGroup
from cluster.dist.rank_topology import RankTopology
from moe.exchange.link_costs import LinkCosts
from moe.exchange.peers import Peers
from moe.exchange.preposted import SlotHop
from moe.exchange.shared_hop import SharedHop
from moe.exchange.simulate import rail_exchange
from moe.plan import RowPlan
from moe.row_sums import RowSums

_SMALL_BYTES = 8
_LARGE_BYTES = 128 * 1024
_DIM = 1024
_NUM_ROWS = 128
_BUDGET_S = 0.08
"""For each of the timings; there are up to seven."""
_MAX_IN_A_ROW = 20
_ANSWER_BYTES = 1024
_LEAST_S = 1e-7
# The receiver's word, the sender's, and the data.
_WIRE_MESSAGES = 3


def calibrate(
    peers: Peers, topology: RankTopology, slots: Sequence[SlotHop | SharedHop], sums: RowSums
) -> LinkCosts:
    """The costs, the same at every rank; all ranks call it together.

    Args:
        peers: the rank's groups.
        topology: of all ranks.
        slots: the hops of `preposted`, outermost first.
        sums: what packs and adds partial sums.
    """
    probe = Probe(peers)
    found: dict[str, Any] = {"row_bytes_per_s": _RowWork.num_bytes / probe.time(_RowWork(sums).run)}
    world_s = probe.exchange(peers.world, _SMALL_BYTES)
    if topology.num_nodes == 1 or topology.has_two_levels:
        found |= _inside_nodes(topology, probe, peers, slots[-1])
    if topology.num_nodes > 1:
        rail_s = probe.exchange(peers.rail, _SMALL_BYTES)
        rail_large_s = probe.exchange(peers.rail, _LARGE_BYTES)
        found |= _between_nodes(topology, world_s, rail_s, rail_large_s, found)
    return probe.agree(LinkCosts(**found))


def _inside_nodes(
    topology: RankTopology, probe: Probe, peers: Peers, slots: SlotHop | SharedHop
) -> dict[str, float]:
    """Calls, messages and bytes where nothing is far away."""
    small_s = probe.exchange(peers.node, _SMALL_BYTES)
    large_s = probe.exchange(peers.node, _LARGE_BYTES)
    others = max(map(len, topology.nodes)) - 1
    # What a call costs and what its messages cost cannot be told apart here; half is each.
    message_s = small_s / (2 * _WIRE_MESSAGES * max(1, others))
    empty = torch.empty((0, slots.row_bytes), dtype=torch.uint8)
    nobody = RowPlan.build(torch.empty((0, 1), dtype=torch.int64), slots.group.size)

    def trip() -> None:
        there = slots.open(empty, nobody, slots.row_bytes)
        there.arrive("calibration")
        there.room()
        there.give_back("calibration")

    # Answers to nothing are not sent, so this is one hop.
    posted_s = probe.time(trip) - _WIRE_MESSAGES * others * message_s
    return {
        "local_bytes_per_s": others * _LARGE_BYTES / max(_LEAST_S, large_s - small_s),
        "local_message_s": message_s,
        "call_s": small_s / 2,
        "posted_call_s": max(small_s / 4, posted_s),
    }


def _between_nodes(
    topology: RankTopology,
    world_s: float,
    rail_s: float,
    rail_large_s: float,
    found: dict[str, float],
) -> dict[str, float]:
    """Message, rate and delay, from three timings."""
    largest = max(map(len, topology.nodes))
    rail_messages = largest * (topology.num_nodes - 1)
    world_messages = largest * (topology.num_ranks - largest)
    more = world_messages - rail_messages
    per_message_s = max(0.0, world_s - rail_s) / (_WIRE_MESSAGES * more) if more else 0.0
    known = LinkCosts(node_message_s=per_message_s, call_s=found.get("call_s", 0.0))

    # Handshakes, queues and delays overlap; virtual time knows how, so it is fitted, not solved.
    def with_delay(delay_s: float) -> float:
        return rail_exchange(topology, replace(known, node_delay_s=delay_s), _SMALL_BYTES)

    delay_s = _fit(with_delay, rail_s, rail_s)
    known = replace(known, node_delay_s=delay_s)

    def with_byte(byte_s: float) -> float:
        costs = replace(known, node_bytes_per_s=1 / max(byte_s, 1e-15))
        return rail_exchange(topology, costs, _LARGE_BYTES)

    byte_s = _fit(with_byte, rail_large_s, rail_large_s / _LARGE_BYTES)
    return {
        "node_message_s": per_message_s,
        "node_bytes_per_s": 1 / max(byte_s, 1e-15),
        "node_delay_s": max(_LEAST_S, delay_s),
    }


def _fit(predicted: Callable[[float], float], measured: float, most: float) -> float:
    """The cost between 0 and `most` at which a rising prediction meets a measurement."""
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) < measured else (low, middle)
    return (low + high) / 2


class Probe:
    """Times what all ranks do at once.

    Args:
        peers: the rank's groups.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def exchange(self, group: PeerGroup, num_bytes: int) -> float:
        """Seconds of an all-to-all that all groups of a kind make at once."""
        sent = torch.ones(group.size * num_bytes, dtype=torch.uint8)
        received = torch.empty_like(sent)
        splits = [num_bytes] * group.size
        return self.time(
            lambda: group.all_to_all(received, sent, splits, splits).wait("calibration")
        )

    def time(self, action: Callable[[], None]) -> float:
        """Seconds of one of several in a row, at the slowest rank."""
        action()  # the first use of a connection is slower
        once_s = self._row_of(1, action)
        return self._row_of(max(2, min(_MAX_IN_A_ROW, int(_BUDGET_S / once_s))), action)

    def _row_of(self, times: int, action: Callable[[], None]) -> float:
        action()  # ranks leave the line above at different times: this one takes that up
        begin_s = time.perf_counter()
        for _ in range(times):
            action()
        (longest_s,) = self.slowest([(time.perf_counter() - begin_s) / times])
        return longest_s

    def slowest(self, own_s: Sequence[float]) -> list[float]:
        """The longest of all ranks' times, each, at all of them.

        Within the node and then along the rail, which has a rank of every node: on a network that
        is slow to answer this is two delays, where a ring over all ranks takes many.
        """
        longest = torch.tensor(own_s, dtype=torch.float64)
        for group in (self._peers.node, self._peers.rail):
            if group.size == 1:
                continue
            sent = longest.repeat(group.size).view(torch.uint8)
            received = torch.empty_like(sent)
            splits = [longest.nbytes] * group.size
            group.all_to_all(received, sent, splits, splits).wait("calibration")
            longest = received.view(torch.float64).view(group.size, -1).amax(dim=0)
        return longest.clamp(min=_LEAST_S).tolist()

    def agree(self, costs: LinkCosts) -> LinkCosts:
        """Rank 0's."""
        own = costs.to_bytes().ljust(_ANSWER_BYTES)
        return LinkCosts.from_bytes(self._peers.world.all_gather_bytes(own, "calibration")[0])


class _RowWork:
    """What a hop does to rows there and back: gather, put together, add up."""

    num_copies = 2 * _NUM_ROWS
    num_bytes = 2 * num_copies * 4 * _DIM

    def __init__(self, sums: RowSums) -> None:
        self._sums = sums
        self._partial = torch.ones((self.num_copies, _DIM), dtype=torch.float64)
        self._rows = torch.ones((_NUM_ROWS, _DIM))
        self._plan = RowPlan.build(torch.arange(2).expand(_NUM_ROWS, 2), 2)

    def run(self) -> None:
        """Once there and back."""
        self._plan.gather(self._rows)
        packed = torch.empty((self.num_copies, 1 + _DIM), dtype=torch.int32)
        self._sums.pack(self._partial, packed)
        self._sums.total([packed], self._plan.row_R, torch.empty_like(self._rows))
