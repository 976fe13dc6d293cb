"""Properties of dispatch plans: permutation, inverse, counts; slots, replicas and pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from cluster.dist.rank_topology import RankTopology
from moe.expert_slots import ExpertSlots
from moe.plan import NOWHERE, Pairs, RowPlan
from moe.replica_choice import ReplicaChoice


@st.composite
def destinations(draw):
    """(T, K) destinations, some nowhere, over any number of places and any skew."""
    places = draw(st.integers(1, 9))
    num_rows = draw(st.integers(0, 40))
    top_k = draw(st.integers(1, 5))
    pool = draw(st.sampled_from([range(-1, places), [places - 1], [NOWHERE], range(1)]))
    cell = st.sampled_from(list(pool))
    rows = draw(
        st.lists(
            st.lists(cell, min_size=top_k, max_size=top_k), min_size=num_rows, max_size=num_rows
        )
    )
    return torch.tensor(rows, dtype=torch.int64).view(num_rows, top_k), places


@given(destinations())
def test_a_plan_holds_each_row_once_per_place_and_its_inverse_finds_it(case):
    destination_TK, places = case
    plan = RowPlan.build(destination_TK, places)
    wanted = {(d, t) for t, row in enumerate(destination_TK.tolist()) for d in row if d >= 0}
    place_R = [d for d, count in enumerate(plan.counts) for _ in range(count)]
    got = list(zip(place_R, plan.row_R.tolist(), strict=True))
    assert got == sorted(wanted)
    assert plan.num_copies == sum(plan.counts) == len(wanted)
    inverse_TW = plan.inverse()
    assert (inverse_TW >= 0).sum() == len(wanted)
    for position, (place, row) in enumerate(got):
        assert inverse_TW[row, place] == position


@given(destinations())
def test_what_was_gathered_is_summed_back_to_the_row_it_came_from(case):
    destination_TK, places = case
    plan = RowPlan.build(destination_TK, places)
    rows = torch.arange(destination_TK.shape[0], dtype=torch.float32)[:, None] + 1
    copies = torch.tensor([len(set(r) - {NOWHERE}) for r in destination_TK.tolist()]).view(-1, 1)
    summed = torch.zeros_like(rows).index_add_(0, plan.row_R, plan.gather(rows))
    assert torch.equal(summed, rows * copies)


@given(destinations(), st.integers(0, 3), st.integers(0, 6))
def test_pairs_are_sorted_and_complete(case, first, num_local):
    expert_AK, _ = case
    weight_AK = torch.arange(expert_AK.numel(), dtype=torch.float32).view(expert_AK.shape)
    pairs = Pairs.build(expert_AK - first, weight_AK, num_local)
    wanted = sorted(
        (slot - first, row, float(weight_AK[row, k]))
        for row, chosen in enumerate(expert_AK.tolist())
        for k, slot in enumerate(chosen)
        if first <= slot < first + num_local
    )
    offsets = pairs.offsets_L1.tolist()
    assert len(offsets) == num_local + 1
    assert offsets[0] == 0
    assert offsets[-1] == pairs.row_M.numel()
    local_M = [e for e in range(num_local) for _ in range(offsets[e + 1] - offsets[e])]
    got = list(zip(local_M, pairs.row_M.tolist(), pairs.weight_M.tolist(), strict=True))
    assert got == wanted


@given(st.integers(1, 40), st.integers(1, 9))
def test_even_slots_cover_all_experts_in_order(num_experts, num_ranks):
    slots = ExpertSlots.even(num_experts, num_ranks)
    assert slots.logical_slots == tuple(range(num_experts))
    assert max(slots.counts) - min(slots.counts) <= 1
    for slot, rank in enumerate(slots.rank_of_slot):
        assert slots.firsts[rank] <= slot < slots.firsts[rank] + slots.counts[rank]
        assert slots.replicas(slot) == (slot,)


@pytest.mark.parametrize("bad", [((0, 2),), ((0, 0),), ((1,), (2,))])
def test_impossible_slots_are_refused(bad):
    with pytest.raises(ConfigError):
        ExpertSlots(bad)


def test_a_copy_on_the_own_node_comes_first_and_load_spreads_over_several():
    topology = RankTopology(("a", "a", "b", "b"))
    slots = ExpertSlots(((0, 1), (1,), (0, 2), (0,)))
    logical = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 2]])
    at_0 = ReplicaChoice(slots, topology, 0).physical(logical)
    # 0 is near once and 1 twice (turn: token + rank); 2 is only far away
    assert at_0.tolist() == [[0, 1], [0, 4], [0, 1], [2, 4]]
    at_3 = ReplicaChoice(slots, topology, 3).physical(logical)
    assert at_3.tolist() == [[5, 2], [3, 4], [5, 2], [1, 4]]


@given(st.lists(st.sets(st.integers(0, 7)), min_size=2, max_size=6), st.integers(0, 20))
def test_the_chosen_slot_always_holds_the_expert(extra, num_rows):
    held = [
        sorted(set(experts) | ({0, 1, 2, 3, 4, 5, 6, 7} if rank == 1 else set()))
        for rank, experts in enumerate(extra)
    ]
    slots = ExpertSlots(tuple(tuple(experts) for experts in held))
    topology = RankTopology(tuple("ab"[rank % len(held) >= 1] for rank in range(len(held))))
    logical = torch.randint(0, 8, (num_rows, 3))
    for rank in range(len(held)):
        chosen = ReplicaChoice(slots, topology, rank).physical(logical)
        assert torch.equal(torch.tensor(slots.logical_slots)[chosen], logical)
