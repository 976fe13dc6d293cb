"""What ranks of a probe agree on, over which messages, and who of them computes."""

from __future__ import annotations

import pytest
import torch

from cluster.base.errors import InternalError
from cluster.dist.rank_topology import RankTopology
from moe.exchange.exchanges import Exchanges
from moe.exchange.preposted import SlotHop
from moe.exchange.probe import Probe, Probed, slots_of
from moe.exchange.probe_meeting import Meeting
from moe.exchange.wire import WireFormat
from moe.row_sums import TorchRowSums
from tests.support.thread_peers import STREAM_HEADER_BYTES, Hub, on_threads

WIRE = WireFormat(dim=8, dtype=torch.float32, top_k=2)


@pytest.mark.parametrize("nodes", ["a", "aa", "ab", "aabb", "aab", "aaabbb"])
def test_all_ranks_hold_the_largest_of_each_number(nodes):
    topology = RankTopology(tuple(nodes))

    def meet(rank, peers):
        meeting = Meeting(peers)
        rounds = [meeting.largest([rank, -rank, step]) for step in range(3)]
        return rounds, meeting.took_s > 0, meeting.ended_s > meeting.took_s

    expected = [[topology.num_ranks - 1, 0, step] for step in range(3)]
    assert on_threads(Hub(topology), meet) == [(expected, True, True)] * topology.num_ranks


def test_a_node_agrees_without_the_others():
    topology = RankTopology(tuple("aaabb"))
    hub = Hub(topology)
    agreed = on_threads(hub, lambda rank, peers: Meeting(peers).largest_of_node([rank]))
    assert agreed == [[2], [2], [2], [4], [4]]
    assert hub.node_bytes == 0


def test_along_the_rails_one_message_a_pair_is_enough():
    hub = Hub(RankTopology(tuple("aabb")))
    on_threads(hub, lambda rank, peers: Meeting(peers).largest([rank, 1.0]))
    # Two rails, both ways: nobody is asked first.
    assert hub.node_messages == 4
    assert hub.node_bytes == 4 * (STREAM_HEADER_BYTES + 16)


def test_a_message_of_a_layer_is_not_taken_for_a_number():
    def meet(rank, peers):
        if rank < 2:
            peers.streams.send(1, (0, 1, 1), torch.zeros(8, dtype=torch.uint8))
            return
        with pytest.raises(InternalError, match="kind 0"):
            Meeting(peers).largest([1.0])

    # One rank a node has no streams, so the nodes have two; they meet within the node first.
    on_threads(Hub(RankTopology(tuple("aabb"))), meet)


@pytest.mark.parametrize("nodes", ["aa", "aabb", "aab"])
def test_one_rank_of_a_node_computes_for_its_neighbours(nodes):
    topology = RankTopology(tuple(nodes))

    def work(rank, peers):
        exchanges = Exchanges(peers, topology, WIRE)
        slots = slots_of(topology, WIRE)
        probed = Probed(
            peers=peers,
            inside=SlotHop(peers.node, row_bytes=WIRE.row_bytes, slot_rows=4),
            exchange=exchanges.for_layer(0, slots),
            use=exchanges.use,
            sums=TorchRowSums(),
            format=WIRE,
        )
        asked = []

        def compute():
            asked.append(rank)
            return [0.5, 3.0]

        found = Probe(probed, slots.num_slots, 1.0).worked_out(compute, 2)
        return found, len(asked)

    answers = on_threads(Hub(topology), work)
    assert [found for found, _ in answers] == [[0.5, 3.0]] * topology.num_ranks
    assert sum(asked for _, asked in answers) == topology.num_nodes
