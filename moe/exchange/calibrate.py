"""Measures what messages and bytes cost between the ranks of a group: about a second, at start.

Collective. Each figure is a difference of two timings of the very calls that the exchanges make, so
it holds whatever the processor, the network and the number of ranks that share them add. Rank 0
works the costs out and gives them to all, so that all choose alike.

    delay     an exchange of empty messages along the rails is two delays and a few messages
    message   ... over all ranks it is many more messages
    bytes     ... with large messages it is many more bytes
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from cluster.dist.peer_group import PeerGroup
from cluster.dist.rank_topology import RankTopology
from moe.exchange.link_costs import LinkCosts
from moe.exchange.peers import Peers

_SMALL_BYTES = 8
_LARGE_BYTES = 128 * 1024
_ROW_BYTES = 4096
_NUM_ROWS = 512
_BUDGET_S = 0.15
"""For each of the timings; there are up to seven."""
_MAX_SAMPLES = 20
_ANSWER_BYTES = 512
_LEAST_S = 1e-7
# A two-sided message is the receiver's word and the data.
_WIRE_MESSAGES = 2


def calibrate(peers: Peers, topology: RankTopology) -> LinkCosts:
    """The costs, the same at every rank; all ranks call it together."""
    probe = _Probe(peers)
    alone_s = probe.time(lambda: _gather_rows())
    world_s = probe.exchange(peers.world, _SMALL_BYTES)
    found = {"row_bytes_per_s": 2 * _ROW_BYTES * _NUM_ROWS / alone_s}
    if topology.num_nodes == 1 or topology.has_two_levels:
        node_s = probe.exchange(peers.node, _SMALL_BYTES)
        node_large_s = probe.exchange(peers.node, _LARGE_BYTES)
        others = max(map(len, topology.nodes)) - 1
        spent_s = max(_LEAST_S, node_large_s - node_s)
        found["local_bytes_per_s"] = others * _LARGE_BYTES / spent_s
        found["local_message_s"] = node_s / (2 * _WIRE_MESSAGES * max(1, others))
        found["call_s"] = node_s / 4
        found["local_delay_s"] = node_s / 8
    if topology.num_nodes > 1:
        rail_s = probe.exchange(peers.rail, _SMALL_BYTES)
        rail_large_s = probe.exchange(peers.rail, _LARGE_BYTES)
        found |= _between_nodes(topology, world_s, rail_s, rail_large_s, found)
    return probe.agree(LinkCosts(**found))


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
    spent_s = max(_LEAST_S, rail_large_s - rail_s)
    fixed_s = rail_s - _WIRE_MESSAGES * rail_messages * per_message_s - found.get("call_s", 0.0)
    return {
        "node_message_s": per_message_s,
        "node_bytes_per_s": rail_messages * _LARGE_BYTES / spent_s,
        "node_delay_s": max(_LEAST_S, fixed_s / 2),
    }


class _Probe:
    def __init__(self, peers: Peers) -> None:
        self._world = peers.world

    def exchange(self, group: PeerGroup, num_bytes: int) -> float:
        """Seconds of an all-to-all that all groups of a kind make at once."""
        sent = torch.zeros(group.size * num_bytes, dtype=torch.uint8)
        received = torch.empty_like(sent)
        splits = [num_bytes] * group.size
        return self.time(
            lambda: group.all_to_all(received, sent, splits, splits).wait("calibration")
        )

    def time(self, action: Callable[[], None]) -> float:
        """The median over a few rounds of the slowest rank's time."""
        action()  # the first use of a connection is slower
        samples = [self._round(action)]
        num_more = min(_MAX_SAMPLES, int(_BUDGET_S / max(samples[0], 1e-4)))
        samples += [self._round(action) for _ in range(max(2, num_more))]
        return max(_LEAST_S, statistics.median(samples))

    def _round(self, action: Callable[[], None]) -> float:
        self._world.all_gather_bytes(b"ready", "calibration")
        begin_s = time.perf_counter()
        action()
        return max(
            float(json.loads(answer))
            for answer in self._everybody(json.dumps(time.perf_counter() - begin_s).encode())
        )

    def agree(self, costs: LinkCosts) -> LinkCosts:
        """Rank 0's."""
        return LinkCosts.from_bytes(self._everybody(costs.to_bytes())[0])

    def _everybody(self, own: bytes) -> list[bytes]:
        return self._world.all_gather_bytes(own.ljust(_ANSWER_BYTES), "calibration")


def _gather_rows() -> None:
    rows = torch.zeros((_NUM_ROWS, _ROW_BYTES), dtype=torch.uint8)
    rows.index_select(0, torch.arange(_NUM_ROWS))
