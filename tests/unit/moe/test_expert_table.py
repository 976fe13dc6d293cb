"""Tables of experts say the same as slots and placements, and what a replica begins with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.expert_slots import ExpertSlots
from moe.expert_table import ExpertTable, starting_tables
from moe.node_packing import ExpertRanks
from moe.placement import place_layer
from moe.row_counter import RowCounter


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 50))
def test_a_replica_begins_with_every_expert_and_the_copies_asked_for(num_experts, ranks, copies):
    (table,) = starting_tables([(3, num_experts)], ranks, copies)
    even = ExpertSlots.even(num_experts, ranks)
    assert table.slots.num_experts == num_experts
    for own, held in zip(even.logical_by_rank, table.logical_by_rank, strict=True):
        assert set(own) <= set(held)
        assert list(held) == sorted(set(held))
        assert len(held) == min(len(own) + copies, num_experts)


def test_as_many_copies_as_experts_per_rank_put_every_expert_on_two_nodes():
    (table,) = starting_tables([(0, 8)], 4, 2)
    for expert in range(8):
        homes = [rank for rank, held in enumerate(table.logical_by_rank) if expert in held]
        assert [rank // 2 for rank in homes] == [0, 1]


@given(st.lists(st.floats(0, 100), min_size=4, max_size=12), st.integers(0, 6))
def test_a_placement_survives_the_way_through_a_table(load, spare):
    slots = -(-(len(load) + spare) // 3)
    placement = place_layer(load, ExpertRanks(slots=(slots,) * 3, nodes=(0, 0, 1)))
    table = ExpertTable.of(5, placement, 3)
    assert table.placement() == placement


def test_rows_are_counted_by_layer_and_logical_expert():
    counter = RowCounter({4: 3, 1: 2})
    counter.add(4, torch.tensor([[0, 2], [2, 1]]))
    counter.add(4, torch.empty((0, 2), dtype=torch.int64))
    counter.add(1, torch.tensor([[1]]))
    assert counter.layers == (1, 4)
    assert counter.rows == [[0, 1], [1, 1, 2]]
    with pytest.raises(RuntimeError):
        counter.add(1, torch.tensor([[2]]))
