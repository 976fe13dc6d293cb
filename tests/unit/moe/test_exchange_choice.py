"""Virtual time against closed forms, the choice it leads to, and costs that all ranks share."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.choose import choose, schemes_of
from moe.exchange.exchanges import Exchanges
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme
from moe.exchange.simulate import Traffic, simulate
from moe.exchange.wire import WireFormat
from tests.support.thread_peers import Hub, on_threads

GRID = RankTopology.regular(4, 4)
WIRE = WireFormat(dim=1024, dtype=torch.float32, top_k=8)


def traffic(rows: int, max_nodes: int = 0) -> Traffic:
    return Traffic(rows=rows, top_k=8, row_bytes=4160, answer_bytes=4096, max_nodes=max_nodes)


@pytest.mark.parametrize(("scheme", "delays"), [("flat", 6), ("hierarchical", 2), ("preposted", 2)])
def test_delays_alone(scheme, delays):
    costs = LinkCosts(node_delay_s=0.02)
    took = simulate(Scheme(scheme), GRID, traffic(8), costs, 64)
    assert took == pytest.approx(delays * 0.02)


def test_messages_alone():
    costs = LinkCosts(node_message_s=0.001)
    flat = simulate(Scheme.FLAT, GRID, traffic(8), costs, 64)
    two_hops = simulate(Scheme.HIERARCHICAL, GRID, traffic(8), costs, 64)
    slots = simulate(Scheme.PREPOSTED, GRID, traffic(8), costs, 64)
    # A node sends 48 messages a hop straight, three times and each of them three on the wire; along
    # the rails it sends 12 there and 12 back.
    assert flat == pytest.approx(3 * 3 * 0.048, rel=0.08)
    assert two_hops == pytest.approx(2 * 0.012, rel=0.15)
    # Three on the wire again: what a receiver announces for later leaves ahead of the last data.
    assert slots == pytest.approx(2 * 3 * 0.012, rel=0.08)


def test_bytes_alone():
    costs = LinkCosts(node_bytes_per_s=1e6)
    rows = 64
    for scheme, share, crossings in (
        (Scheme.FLAT, 1 - (15 / 16) ** 8, 48),
        (Scheme.HIERARCHICAL, 1 - (3 / 4) ** 8, 12),
    ):
        sent = crossings * rows * share * (4160 + 4096)
        assert simulate(scheme, GRID, traffic(rows), costs, 64) == pytest.approx(
            sent / 1e6, rel=0.08
        )


def test_limited_routing_saves_bytes_between_nodes():
    costs = LinkCosts(node_bytes_per_s=1e6)
    free = simulate(Scheme.HIERARCHICAL, GRID, traffic(64), costs, 64)
    limited = simulate(Scheme.HIERARCHICAL, GRID, traffic(64, max_nodes=2), costs, 64)
    assert limited == pytest.approx(free / 1.8, rel=0.1)


def test_slots_that_are_too_small_cost_a_second_round():
    costs = LinkCosts(node_delay_s=0.02)
    assert simulate(Scheme.PREPOSTED, GRID, traffic(100), costs, 64) == pytest.approx(4 * 0.02)


@pytest.mark.parametrize("shape", list(itertools.product((1, 2, 4), (1, 2, 4)))[1:])
@pytest.mark.parametrize("rows", [0, 1, 64, 1024])
def test_the_choice_is_as_fast_as_any_and_says_why(shape, rows):
    topology = RankTopology.regular(*shape)
    costs = LinkCosts(
        node_delay_s=1e-4,
        node_message_s=15e-6,
        node_bytes_per_s=1e9,
        local_delay_s=2e-5,
        local_message_s=2e-5,
        local_bytes_per_s=2e9,
        call_s=1e-4,
    )
    choice = choose(rows, topology, costs, WIRE)
    assert choice.expected_s[choice.scheme] <= 1.1 * min(choice.expected_s.values())
    assert str(choice.scheme) in choice.reason
    assert f"{rows} rows" in choice.reason
    assert (Scheme.HIERARCHICAL in choice.expected_s) == topology.has_two_levels
    assert choice == choose(rows, topology, costs, WIRE)


@pytest.mark.parametrize(
    ("flat", "two_hops", "slots", "doubt", "chosen"),
    [
        (1.0, 1.05, 1.09, 0.1, "hierarchical"),  # the same: least bytes, then least messages
        (1.0, 1.2, 1.09, 0.1, "preposted"),
        (1.0, 1.2, 1.2, 0.1, "flat"),
        (1.2, 1.2, 1.0, 0.1, "preposted"),
        (1.0, 1.19, 1.09, 0.2, "hierarchical"),
        (1.0, 1.05, 1.09, 0.01, "flat"),
    ],
)
def test_of_schemes_that_cannot_be_told_apart_the_lightest_is_taken(
    flat, two_hops, slots, doubt, chosen
):
    names = ("flat", "hierarchical", "preposted")
    layers = tuple(
        (name, base, 0.0) for name, base in zip(names, (flat, two_hops, slots), strict=True)
    )
    assert choose(10, GRID, LinkCosts(layers=layers, doubt=doubt), WIRE).scheme == chosen


def test_where_each_scheme_wins():
    # Where nothing between nodes costs anything, a second hop is only one more hop.
    near = LinkCosts(node_delay_s=1e-6, call_s=1e-3, posted_call_s=1e-3)
    assert choose(1024, GRID, near, WIRE).scheme is Scheme.FLAT
    far = LinkCosts(node_delay_s=0.02, node_message_s=0.001)
    assert choose(8, GRID, far, WIRE).scheme is Scheme.HIERARCHICAL
    one_a_node = RankTopology.regular(4, 1)
    assert choose(8, one_a_node, far, WIRE).scheme is Scheme.PREPOSTED
    thin = LinkCosts(node_bytes_per_s=60e6, node_delay_s=0.002)
    assert choose(1024, GRID, thin, WIRE).scheme is not Scheme.FLAT


@pytest.mark.parametrize("nodes", ["aa", "ab", "aabb", "aab"])
def test_all_ranks_are_given_the_same_costs(nodes):
    topology = RankTopology(tuple(nodes))
    costs = on_threads(
        Hub(topology), lambda rank, peers: Exchanges(peers, topology, WIRE).calibrate()
    )
    assert len(set(costs)) == 1
    assert LinkCosts.from_bytes(costs[0].to_bytes()) == costs[0]
    assert costs[0].row_bytes_per_s > 0
    assert (costs[0].node_delay_s > 0) == (topology.num_nodes > 1)
    assert [name for name, _, _ in costs[0].layers] == [str(s) for s in schemes_of(topology)]
    for scheme in schemes_of(topology):
        few, more = (choose(rows, topology, costs[0], WIRE).expected_s[scheme] for rows in (4, 48))
        assert 0 <= few < 1
        assert 0 <= more < 1


def test_what_layers_took_in_the_probe_counts():
    costs = LinkCosts(node_delay_s=1e-3)
    fast = choose(10, GRID, costs, WIRE)
    slowed = replace(costs, layers=((str(fast.scheme), 0.5, 3.0), ("nobody", 9.0, 9.0)))
    other = choose(10, GRID, slowed, WIRE)
    assert other.scheme is not fast.scheme
    virtual_s = fast.expected_s[fast.scheme]
    assert other.expected_s[fast.scheme] == pytest.approx(0.5 + 3 * virtual_s)


def test_a_line_is_not_followed_to_where_links_need_longer():
    costs = LinkCosts(node_delay_s=1e-3, layers=(("flat", -5.0, 2.0),))
    choice = choose(10, GRID, costs, WIRE)
    virtual_s = choose(10, GRID, LinkCosts(node_delay_s=1e-3), WIRE).expected_s[Scheme.FLAT]
    assert choice.expected_s[Scheme.FLAT] == pytest.approx(virtual_s / 2)
