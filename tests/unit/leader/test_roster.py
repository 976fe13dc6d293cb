"""Who may go on after a loss, with which experts, and what each of them is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.base.errors import UnavailableError
from moe.expert_table import ExpertTable, starting_tables
from replicas.leader.roster import Meeting, Roster
from replicas.worker import wire
from tests.support.lockstep_ranks import model_plan

TABLES = starting_tables([(0, 8), (2, 6)], 6)


def roster(lost_groups: int = 1, tables: tuple[ExpertTable, ...] = TABLES) -> Roster:
    plan = model_plan(Path("/m"), dp=3, tp=2, survives=True, lost_groups=lost_groups)
    return Roster(plan, ("a", "a", "a", "a", "b", "b"), tables)


def test_a_group_serves_whole_or_not_at_all():
    ranks = roster()
    muster = ranks.without({0, 1, 2, 4, 5}, TABLES)
    assert muster.members == (0, 1, 4, 5)
    assert [table.slots.num_experts for table in muster.tables] == [8, 6]
    assert [table.layer for table in muster.tables] == [0, 2]
    assert all(held <= 2 + 1 for held in muster.tables[0].slots.counts)
    ranks.adopt(muster)
    assert ranks.groups == (0, 2)
    assert ranks.lost == (2, 3)
    assert ranks.first_ranks(muster) == (0, 4)
    assert ranks.nodes_of(muster) == ("a", "a", "b", "b")


def test_more_losses_than_planned_are_refused_with_the_numbers_and_a_remedy():
    ranks = roster()
    ranks.adopt(ranks.without({0, 1, 4, 5}, TABLES))
    with pytest.raises(UnavailableError, match=r"Ranks \[4, 5\] are left with room for") as refused:
        ranks.without({4, 5}, ranks.now.tables)
    assert "moe.failover.lost_groups" in refused.value.remedy
    with pytest.raises(UnavailableError, match="No tensor-parallel group has all its ranks left"):
        ranks.without({0, 5}, ranks.now.tables)


def test_without_spare_room_copies_elsewhere_are_enough_or_not():
    with pytest.raises(UnavailableError, match="has 8"):
        roster(lost_groups=0).without({0, 1, 2, 3}, TABLES)
    copied = starting_tables([(0, 8), (2, 6)], 6, 2)
    muster = roster(0, copied).without({0, 1, 2, 3}, copied)
    assert muster.members == (0, 1, 2, 3)


def test_all_ranks_get_back_what_they_held_before_the_first_loss():
    ranks = roster(lost_groups=2)
    moved = tuple(
        ExpertTable(layer=table.layer, logical_by_rank=table.logical_by_rank[::-1])
        for table in TABLES
    )
    ranks.adopt(ranks.without({0, 1, 2, 3}, moved))
    ranks.adopt(ranks.without({2, 3}, ranks.now.tables))
    assert ranks.groups == (1,)
    assert ranks.whole().members == (0, 1, 2, 3, 4, 5)
    assert ranks.whole().tables == moved
    ranks.adopt(ranks.whole())
    assert ranks.lost == ()


def test_nobody_lost_is_the_same_ranks_again():
    ranks = roster()
    assert ranks.without(range(6), TABLES).members == (0, 1, 2, 3, 4, 5)


def test_every_member_is_told_the_same_but_for_its_own_group():
    ranks = roster()
    muster = ranks.without({0, 1, 4, 5}, TABLES)
    meeting = Meeting(epoch="e2", peers=("h", 1), tensor_groups={0: ("h", 2), 2: ("i", 3)})
    told = ranks.gatherings(muster, meeting, forgets_rows=True)
    assert list(told) == [0, 1, 4, 5]
    assert [(each.tensor_host, each.tensor_port) for each in told.values()] == [
        ("h", 2),
        ("h", 2),
        ("i", 3),
        ("i", 3),
    ]
    gathering = told[4]
    assert gathering.members == (0, 1, 4, 5)
    assert gathering.nodes == ("a", "a", "b", "b")
    assert wire.decode_gathering(wire.encode(gathering)) == gathering


def test_a_replacement_on_another_node_stands_with_the_ranks_there():
    whole = starting_tables([(0, 8)], 6, 1)
    shares = tuple(tuple(float(rank + 1) for rank in homes) for homes in whole[0].placement().homes)
    tables = (ExpertTable(layer=0, logical_by_rank=whole[0].logical_by_rank, shares=shares),)
    ranks = roster(tables=tables)
    ranks.adopt(ranks.without({0, 1, 4, 5}, tables))
    # The bundle of group 1 is now where group 2 is; ranks keep their experts and their shares.
    ranks.seat(("a", "a", "b", "b", "a", "a"))
    assert ranks.whole().members == (0, 1, 4, 5, 2, 3)
    assert ranks.nodes_of(ranks.whole()) == ("a", "a", "a", "a", "b", "b")
    (moved,) = ranks.whole().tables
    for member, rank in enumerate(ranks.whole().members):
        assert moved.logical_by_rank[member] == tables[0].logical_by_rank[rank]
    for homes, parts in zip(moved.placement().homes, moved.shares, strict=True):
        assert [ranks.whole().members[member] + 1.0 for member in homes] == list(parts)
    assert ranks.tables_by_rank() == tables
    ranks.adopt(ranks.whole())
    assert ranks.lost == ()
    assert ranks.without({0, 1, 2, 3}, ranks.whole().tables).members == (0, 1, 2, 3)
