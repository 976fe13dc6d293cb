"""Experts of lost ranks: nothing is left out, nobody holds more than was planned."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from moe.expert_table import ExpertTable, starting_tables
from moe.reassign import reassign, spare_slots

SHAPES = st.tuples(
    st.integers(2, 5),  # groups
    st.integers(1, 3),  # ranks of each
    st.integers(0, 30),  # experts beyond one per rank
    st.integers(0, 6),  # copies on each rank
)


def begun(num_experts: int, num_ranks: int, num_redundant: int) -> ExpertTable:
    (table,) = starting_tables([(3, num_experts)], num_ranks, num_redundant)
    return table


@given(shape=SHAPES, data=st.data())
def test_planned_spare_slots_hold_every_expert_whichever_groups_are_lost(shape, data):
    dp, tp, more, redundant = shape
    table = begun(dp * tp + more, dp * tp, redundant)
    num_lost = data.draw(st.integers(1, dp - 1))
    lost = data.draw(st.sets(st.integers(0, dp - 1), min_size=num_lost, max_size=num_lost))
    spare = spare_slots(table, tp, num_lost)
    survivors = [rank for rank in range(dp * tp) if rank // tp not in lost]
    room = [len(table.logical_by_rank[rank]) + spare for rank in survivors]
    after = reassign(table, survivors, room)
    assert after is not None
    assert after.layer == table.layer
    assert after.slots.num_experts == table.slots.num_experts
    assert after.slots.num_ranks == len(survivors)
    assert all(held <= most for held, most in zip(after.slots.counts, room, strict=True))
    assert after == reassign(table, survivors, room)


@given(shape=SHAPES, data=st.data())
def test_it_is_refused_exactly_when_slots_are_too_few(shape, data):
    dp, tp, more, redundant = shape
    table = begun(dp * tp + more, dp * tp, redundant)
    survivors = sorted(
        data.draw(st.sets(st.integers(0, dp * tp - 1), min_size=1, max_size=dp * tp))
    )
    room = [
        data.draw(st.integers(len(table.logical_by_rank[rank]), table.slots.num_experts))
        for rank in survivors
    ]
    after = reassign(table, survivors, room)
    assert (after is None) == (sum(room) < table.slots.num_experts)


@given(shape=SHAPES, data=st.data())
def test_survivors_keep_what_they_hold_while_there_is_room(shape, data):
    dp, tp, more, redundant = shape
    table = begun(dp * tp + more, dp * tp, redundant)
    survivors = sorted(
        data.draw(st.sets(st.integers(0, dp * tp - 1), min_size=1, max_size=dp * tp))
    )
    after = reassign(table, survivors, [table.slots.num_experts] * len(survivors))
    assert after is not None
    for rank, held in zip(survivors, after.logical_by_rank, strict=True):
        assert set(table.logical_by_rank[rank]) <= set(held)


@given(shape=SHAPES)
def test_no_spare_slot_fewer_would_do(shape):
    dp, tp, more, redundant = shape
    table = begun(dp * tp + more, dp * tp, redundant)
    spare = spare_slots(table, tp, 1)
    assume(spare > 0)
    heaviest = max(range(dp), key=lambda group: sum(table.slots.counts[group * tp :][:tp]))
    survivors = [rank for rank in range(dp * tp) if rank // tp != heaviest]
    room = [len(table.logical_by_rank[rank]) + spare - 1 for rank in survivors]
    assert reassign(table, survivors, room) is None


def test_with_copies_of_everything_elsewhere_nothing_moves():
    table = begun(8, 4, 2)
    after = reassign(table, [0, 1, 3], [4, 4, 4])
    assert spare_slots(table, 1, 1) == 0
    assert after is not None
    assert after.logical_by_rank == tuple(table.logical_by_rank[rank] for rank in (0, 1, 3))


def test_without_room_a_copy_that_others_hold_makes_way():
    table = ExpertTable(layer=0, logical_by_rank=((0, 1), (1, 2), (3,)))
    after = reassign(table, [0, 1], [2, 2])
    assert after is not None
    assert after.slots.num_experts == 4
    assert after.slots.counts == (2, 2)
