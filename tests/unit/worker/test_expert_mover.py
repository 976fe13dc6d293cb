"""A rank fetches announced experts beside its steps and switches between two of them."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from cluster.base.errors import InternalError
from cluster.dist.rank_topology import RankTopology
from moe.exchange.exchanges import Exchanges
from moe.exchange.wire import WireFormat
from moe.expert_table import ExpertTable, starting_tables
from moe.spread_experts import SpreadExperts
from replicas.engine.lockstep import ExpertOrders, Rebalance
from replicas.layers.weights import ResidentWeights
from replicas.worker.expert_mover import ExpertMover, expert_name
from tests.support.thread_peers import Hub, on_threads

TABLE = ExpertTable(layer=2, logical_by_rank=((1, 3), (0, 2)))


def mover(peers, rank, read) -> tuple[ExpertMover, SpreadExperts, ResidentWeights]:
    wire = WireFormat(dim=8, dtype=torch.float32, top_k=2)
    exchanges = Exchanges(peers, RankTopology.regular(1, 2), wire)
    experts = SpreadExperts(starting_tables([(2, 4)], 2), exchanges, rank)
    held = experts.held(2)
    weights = ResidentWeights({expert_name(2, e): {"w": torch.tensor(e)} for e in held})
    return ExpertMover(experts, weights, read), experts, weights


def wait_until(condition) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def on_both(body):
    return on_threads(Hub(RankTopology.regular(1, 2)), lambda rank, peers: body(rank, peers))


def test_weights_come_before_the_switch_and_go_with_it():
    def body(rank, peers):
        read = lambda layer, expert: {"w": torch.tensor(expert)}  # noqa: E731
        rank_mover, experts, weights = mover(peers, rank, read)
        rank_mover.obey(ExpertOrders(rebalance=Rebalance(version=1, tables=(TABLE,))))
        wait_until(lambda: rank_mover.prepared == 1)
        before = experts.held(2)
        rank_mover.obey(ExpertOrders(table=1))
        after = experts.held(2)
        found = [weights.acquire(expert_name(2, e))["w"].item() for e in after]
        gone = [e for e in before if e not in after]
        for expert in gone:
            with pytest.raises(KeyError):
                weights.acquire(expert_name(2, expert))
        return before, list(after), found

    (before, after, found), (_, other, _) = on_both(body)
    assert before == (0, 1)
    assert after == found == [1, 3]
    assert other == [0, 2]


def test_what_cannot_be_read_is_said_and_what_is_aborted_is_forgotten():
    def body(rank, peers):
        def read(layer, expert):
            raise OSError("the disk is gone")

        rank_mover, experts, _ = mover(peers, rank, read)
        rank_mover.obey(ExpertOrders(rebalance=Rebalance(version=1, tables=(TABLE,))))
        wait_until(lambda: rank_mover.failure != "")
        assert "the disk is gone" in rank_mover.failure
        rank_mover.obey(ExpertOrders(abort=True))
        assert rank_mover.failure == ""
        assert rank_mover.prepared == 0
        with pytest.raises(InternalError, match="not prepared"):
            rank_mover.obey(ExpertOrders(table=1))
        return experts.held(2)

    assert on_both(body) == [(0, 1), (2, 3)]


def test_what_was_read_for_an_older_placement_is_not_taken_for_a_newer_one():
    def body(rank, peers):
        older_may_end = threading.Event()
        num_reads = itertools.count()

        def read(layer, expert):
            if next(num_reads) == 0:
                older_may_end.wait(5)
            return {"w": torch.tensor(expert)}

        rank_mover, experts, _ = mover(peers, rank, read)
        before = set(threading.enumerate())
        rank_mover.obey(ExpertOrders(rebalance=Rebalance(version=1, tables=(TABLE,))))
        older = [t for t in threading.enumerate() if t not in before and t.name == "expert-mover"]
        rank_mover.obey(ExpertOrders(rebalance=Rebalance(version=2, tables=(TABLE,))))
        wait_until(lambda: rank_mover.prepared == 2)
        older_may_end.set()
        for thread in older:
            thread.join(5)
        assert rank_mover.prepared == 2
        with pytest.raises(InternalError, match="3 of the experts is used but not prepared"):
            rank_mover.obey(ExpertOrders(table=3))
        return experts.held(2)

    assert on_both(body) == [(0, 1), (2, 3)]
