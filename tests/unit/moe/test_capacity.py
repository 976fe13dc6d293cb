"""Capacity drops the least weighty pairs, counts them, and otherwise changes nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from cluster.dist.rank_topology import RankTopology
from moe.exchange.capacity import CapacityExchange, keep_within
from moe.exchange.exchanges import Exchanges
from moe.exchange.reference import partial_sums, reference_sums
from moe.exchange.wire import WireFormat
from moe.plan import NOWHERE
from tests.support.routed_rows import DIM, TOP_K, expert, placement, rows_of_rank
from tests.support.thread_peers import Hub, on_threads


@given(st.integers(0, 30), st.integers(0, 6), st.integers(0, 1000))
def test_no_expert_keeps_more_than_its_capacity_and_the_heaviest_stay(num_rows, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand((num_rows, 5), generator=generator).topk(3).indices
    weights = torch.rand((num_rows, 3), generator=generator)
    kept = keep_within(chosen, weights, capacity)
    assert torch.equal(kept[kept != NOWHERE], chosen[kept != NOWHERE])
    for slot in range(5):
        wanted = weights[chosen == slot]
        stayed = weights[kept == slot]
        assert stayed.numel() == min(capacity, wanted.numel())
        assert torch.equal(stayed.sort().values, wanted.sort().values[len(wanted) - len(stayed) :])


def test_what_remains_is_exact_and_the_rest_is_counted():
    topology = RankTopology.regular(2, 2)
    slots = placement("even", topology)
    wire = WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K)
    inputs = [rows_of_rank(rank, 12, "skewed", whole=True) for rank in range(4)]
    kept = [(h, keep_within(e, w, 6), w) for h, e, w in inputs]

    def body(rank, peers):
        inner = Exchanges(peers, topology, wire).for_layer(0, slots)
        exchange = CapacityExchange(inner, 2.0, slots.num_slots)
        arrivals = exchange.dispatch(*inputs[rank]).wait()
        partial = partial_sums(arrivals, slots.firsts[rank], functools.partial(expert, slots))
        return exchange.combine(partial, arrivals), exchange.num_dropped

    for (sums, dropped), expected in zip(
        on_threads(Hub(topology), body),
        reference_sums(kept, functools.partial(expert, slots)),
        strict=True,
    ):
        assert torch.equal(sums, expected)
        assert dropped == 4 * 6


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ConfigError):
        CapacityExchange(None, 0.0, 4)


def test_a_single_row_is_never_beyond_a_capacity():
    class Inner:
        name = "inner"

        def dispatch(self, hidden_TD, expert_TK, weight_TK):
            return expert_TK

    exchange = CapacityExchange(Inner(), 1.0, num_experts=64)
    chosen = torch.tensor([[3, 40]])
    assert torch.equal(exchange.dispatch(torch.zeros((1, 4)), chosen, torch.ones((1, 2))), chosen)
    assert exchange.num_dropped == 0
