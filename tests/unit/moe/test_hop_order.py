"""Hops refuse what is of another trip or of another kind, and keep rows of odd widths apart."""

from __future__ import annotations

import pytest
import torch

from cluster.base.errors import InternalError
from cluster.dist.rank_topology import RankTopology
from moe.exchange.preposted import SlotHop
from moe.exchange.shared_hop import SharedHop
from moe.exchange.stream_hop import StreamHop
from moe.plan import RowPlan
from moe.row_moves import whole
from tests.support.thread_peers import Hub, on_threads

GRID = RankTopology.regular(2, 2)
WIDTH = 12
"""No multiple of the eight bytes that a row number takes."""
TO_BOTH = RowPlan.build(torch.tensor([[0, 1], [1, 1], [0, 1]]), 2)


def hop_of(kind, peers):
    if kind == "streams":
        return StreamHop(peers.rail, peers.streams, row_bytes=WIDTH)
    if kind == "memory":
        return SharedHop(peers.node, peers.shared, row_bytes=WIDTH)
    return SlotHop(peers.rail, row_bytes=WIDTH, slot_rows=2)


def rows_of(rank: int) -> torch.Tensor:
    return torch.arange(3 * WIDTH).add(100 * rank).to(torch.uint8).view(3, WIDTH)


@pytest.mark.parametrize("kind", ["streams", "memory", "slots"])
def test_a_message_of_another_trip_is_refused(kind):
    def body(rank, peers):
        hop = hop_of(kind, peers)
        if rank == 0:
            hop.num_trips = 5
        try:
            hop.open([rows_of(rank)], TO_BOTH, WIDTH).arrive("a test")
        except InternalError as error:
            return str(error)
        return ""

    errors = on_threads(Hub(GRID), body)
    other = 1 if kind == "memory" else 2
    assert "is at trip 1 and this rank at 6 (a test)" in errors[0]
    assert "is at trip 6 and this rank at 1 (a test)" in errors[other]
    assert errors[3 - other] == errors[3] == ""


def test_an_answer_where_rows_are_due_is_refused():
    def body(rank, peers):
        hop = hop_of("streams", peers)
        if rank == 0:
            peers.streams.send(1, (1, 0, 1), torch.empty(0, dtype=torch.uint8))
        trip = hop.open([rows_of(rank)], TO_BOTH, WIDTH)
        if rank != 2:
            return
        with pytest.raises(InternalError, match="of kind 1 in a test"):
            trip.arrive("a test")

    on_threads(Hub(GRID), body)


@pytest.mark.parametrize("kind", ["streams", "memory", "slots"])
def test_each_member_gets_its_rows_and_the_answers_to_its_own(kind):
    def body(rank, peers):
        hop = hop_of(kind, peers)
        for turn in range(3):  # boxes, slots and connections are used again
            trip = hop.open([rows_of(rank + turn)], TO_BOTH, WIDTH)
            arrived = whole(trip.arrive("a test"))
            sources = [rows_of(source + turn) for source in hop.group.ranks]
            mine = [0, 2] if hop.group.rank == 0 else [0, 1, 2]
            assert torch.equal(arrived, torch.cat([rows[mine] for rows in sources]))
            trip.room().copy_(255 - arrived)
            came = torch.cat(trip.give_back("a test"))
            assert torch.equal(came, 255 - rows_of(rank + turn)[[0, 2, 0, 1, 2]])

    on_threads(Hub(GRID), body)


def test_who_is_written_to_first_reads_that_first():
    def body(rank, peers):
        hop = hop_of("streams", peers)
        return hop.targets, hop.sources

    orders = on_threads(Hub(RankTopology.regular(5, 2)), body)[::2]
    for member, (targets, _) in enumerate(orders):
        assert [orders[target][1].index(member) for target in targets] == [0, 1, 2, 3]
