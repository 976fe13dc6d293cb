"""Ranks on nodes: order, rails, forwarders, also where nodes are unequal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from cluster.dist.rank_topology import RankTopology, order_by_node

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def of_sizes(sizes: list[int]) -> RankTopology:
    return RankTopology(tuple(f"n{i}" for i, size in enumerate(sizes) for _ in range(size)))


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_members_are_ordered_by_node(nodes):
    order = order_by_node(nodes)
    assert sorted(order) == list(range(len(nodes)))
    topology = RankTopology(tuple(nodes[i] for i in order))
    assert topology.num_nodes == len(set(nodes))
    for ranks in topology.nodes:
        assert [order[r] for r in ranks] == sorted(order[r] for r in ranks)


@given(SIZES)
def test_rails_and_forwarders(sizes):
    topology = of_sizes(sizes)
    assert topology.num_rails == min(sizes)
    assert topology.has_two_levels == (len(sizes) > 1 and min(sizes) > 1)
    for rank in range(topology.num_ranks):
        rail = topology.rail_ranks(rank)
        assert rank in rail
        assert all(topology.rail_ranks(other) == rail for other in rail)
        assert topology.node_ranks(rank)[topology.local_rank(rank)] == rank
        for node in range(topology.num_nodes):
            forwarder = topology.forwarder(rank, node)
            assert forwarder in rail
            assert topology.node_index(forwarder) == node
        assert topology.forwarder(rank, topology.node_index(rank)) == rank


def test_names():
    topology = RankTopology.regular(2, 2)
    assert topology.describe(3) == "rank 3 (node node1)"
    assert topology.nodes == ((0, 1), (2, 3))


@pytest.mark.parametrize("bad", [(), ("a", "b", "a")])
def test_disorder_is_refused(bad):
    with pytest.raises(ConfigError):
        RankTopology(bad)
