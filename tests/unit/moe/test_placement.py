"""Placement: valid for any load and any ranks, flat where copies allow it, kind to the network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from moe.load_split import source_shares, split_load
from moe.node_packing import ExpertRanks
from moe.placement import LayerPlacement, even_placement, place_layer
from moe.placement_polish import polish


@st.composite
def _problems(draw: st.DrawFn) -> tuple[list[float], ExpertRanks, list[list[int]]]:
    num_experts = draw(st.integers(1, 24))
    num_ranks = draw(st.integers(1, 9))
    nodes = sorted(draw(st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks)))
    slots = draw(st.lists(st.integers(0, 6), min_size=num_ranks, max_size=num_ranks))
    missing = num_experts - sum(slots)
    if missing > 0:
        slots[draw(st.integers(0, num_ranks - 1))] += missing
    load = draw(st.lists(st.floats(0, 1e6), min_size=num_experts, max_size=num_experts))
    size = draw(st.integers(1, 6))
    clusters = [
        list(range(start, min(start + size, num_experts))) for start in range(0, num_experts, size)
    ]
    ranks = ExpertRanks(slots=tuple(slots), nodes=tuple(nodes))
    return load, ranks, draw(st.sampled_from([clusters, []]))


def _check(placement: LayerPlacement, num_experts: int, ranks: ExpertRanks) -> None:
    assert len(placement.homes) == len(placement.shares) == num_experts
    held = [0] * ranks.num_ranks
    for homes, shares in zip(placement.homes, placement.shares, strict=True):
        assert homes
        assert list(homes) == sorted(set(homes))
        assert len(shares) == len(homes)
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(1)
        for rank in homes:
            held[rank] += 1
    assert all(count <= slots for count, slots in zip(held, ranks.slots, strict=True))


@settings(max_examples=150)
@given(_problems())
def test_any_load_on_any_ranks_gives_every_expert_a_home(
    problem: tuple[list[float], ExpertRanks, list[list[int]]],
) -> None:
    load, ranks, clusters = problem
    placement = place_layer(load, ranks, clusters=clusters)
    _check(placement, len(load), ranks)
    assert placement == place_layer(load, ranks, clusters=clusters)
    _check(even_placement(len(load), ranks), len(load), ranks)


@pytest.mark.parametrize("zipf", [0.6, 1.0])
@pytest.mark.parametrize(("experts", "num_ranks", "spare"), [(64, 16, 16), (256, 32, 32)])
def test_a_skewed_load_is_levelled_to_half_a_percent(
    zipf: float, experts: int, num_ranks: int, spare: int
) -> None:
    rng = np.random.default_rng(experts)
    slots = (experts + spare) // num_ranks
    ranks = ExpertRanks(
        slots=(slots,) * num_ranks, nodes=tuple(rank * 4 // num_ranks for rank in range(num_ranks))
    )
    groups = np.arange(experts).reshape(8, -1).tolist()
    for _ in range(3):
        load = 1.0 / np.arange(1, experts + 1) ** zipf
        rng.shuffle(load)
        placement = place_layer(load, ranks, clusters=groups)
        assert placement.imbalance(load, num_ranks) <= 1.005


def test_clusters_stay_on_one_node_where_they_fit() -> None:
    ranks = ExpertRanks(slots=(4, 4, 4, 4), nodes=(0, 0, 1, 1))
    clusters = [[0, 5, 10, 15], [1, 2, 3, 4], [6, 7, 8, 9], [11, 12, 13, 14]]
    placement = place_layer([1.0] * 16, ranks, clusters=clusters)
    for cluster in clusters:
        assert (
            len({ranks.nodes[rank] for expert in cluster for rank in placement.homes[expert]}) == 1
        )


def test_too_few_slots_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="9 experts do not fit into 8 slots"):
        place_layer([1.0] * 9, ExpertRanks(slots=(4, 4), nodes=(0, 1)))
    with pytest.raises(ConfigError, match="do not describe"):
        ExpertRanks(slots=(4, 4), nodes=(0,))


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e4), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_no_other_split_has_a_lower_peak(experts: list[tuple[float, list[int]]]) -> None:
    load = [rows for rows, _ in experts]
    homes = [sorted(ranks) for _, ranks in experts]
    shares = split_load(load, homes, 6)
    filled = np.zeros(6)
    for rows, ranks, split in zip(load, homes, shares, strict=True):
        filled[ranks] += rows * np.asarray(split)
    # Optimality (Hall): every set of ranks must take at least the rows that can go nowhere else.
    floor = max(
        sum(rows for rows, ranks in zip(load, homes, strict=True) if set(ranks) <= subset)
        / len(subset)
        for subset in _subsets(6)
    )
    assert filled.max() <= floor * 1.001 + 1e-6
    assert filled.sum() == pytest.approx(sum(load))


def _subsets(size: int) -> list[set[int]]:
    return [{rank for rank in range(size) if mask >> rank & 1} for mask in range(1, 2**size)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_serving_the_own_node_first_keeps_the_totals(weights: list[int], num_nodes: int) -> None:
    nodes = [rank % num_nodes for rank in range(8)]
    homes = list(range(len(weights)))
    shares = [weight / sum(weights) for weight in weights]
    by_node = [source_shares(homes, shares, nodes, node) for node in range(num_nodes)]
    assert np.mean(by_node, axis=0) == pytest.approx(shares)
    for node, taken in enumerate(by_node):
        assert sum(taken) == pytest.approx(1)
        here = sum(share for rank, share in zip(homes, shares, strict=True) if nodes[rank] == node)
        mine = sum(share for rank, share in zip(homes, taken, strict=True) if nodes[rank] == node)
        assert mine == pytest.approx(min(1.0, here * num_nodes))


def test_every_node_keeps_a_slot_for_copies_of_what_is_hot_elsewhere() -> None:
    # Whole on the second node the cluster would leave no slot there for a copy of expert 0.
    ranks = ExpertRanks(slots=(4, 4), nodes=(0, 1))
    placement = place_layer([100, 1, 1, 1, 1, 1], ranks, clusters=[(1, 2, 3, 4)])
    assert placement.homes[0] == (0, 1)


def test_of_two_exchanges_the_one_that_stays_inside_a_node_is_made() -> None:
    load = np.array([4, 4, 2, 2, 2, 2, 2, 2, 2, 4, 4], dtype=np.float64)
    homes = [[0], [0], [0], [1], [1], [1], [2], [2], [2], [3], [3]]
    nodes = (0, 0, 1, 1)
    after = polish(load, homes, nodes)
    assert after != homes
    assert [nodes[home] for (home,) in after] == [nodes[home] for (home,) in homes]
