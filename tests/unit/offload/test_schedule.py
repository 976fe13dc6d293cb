"""Schedules are safe for every ring, the checker catches what is not, and overlap is what theory
says, on a virtual clock."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload.ops import Op, OpKind
from offload.schedule import build_schedule
from offload.schedule_check import ScheduleError, check_schedule


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[str], int, int]:
    count = draw(st.integers(0, 23))
    num_slots = draw(st.integers(1, 7))
    return [f"u{i}" for i in range(count)], num_slots, draw(st.integers(1, num_slots))


@given(ring=rings(), data=st.data())
def test_every_ring_is_safe_and_every_pass_complete(ring, data) -> None:
    units, num_slots, depth = ring
    sizes = {unit: data.draw(st.integers(1, 64)) for unit in units}
    schedule = build_schedule(units, num_slots, depth)
    check_schedule(schedule, sizes, slot_bytes=64, budget_bytes=64 * num_slots)
    computed = [op.unit for op in schedule.cycle if op.kind is OpKind.COMPUTE]
    passes = len(computed) // max(1, len(units))
    assert computed == units * passes
    with pytest.raises(ScheduleError):
        check_schedule(schedule, sizes, slot_bytes=64, budget_bytes=64 * num_slots - 1)


@given(ring=rings(), data=st.data())
def test_what_is_held_beside_the_slots_counts(ring, data) -> None:
    units, num_slots, depth = ring
    sizes = {unit: data.draw(st.integers(1, 64)) for unit in units}
    held = {unit: data.draw(st.integers(0, size)) for unit, size in sizes.items()}
    schedule, room = build_schedule(units, num_slots, depth), 64 * num_slots + sum(held.values())
    check_schedule(schedule, sizes, slot_bytes=64, budget_bytes=room, held=held)
    for wrong, budget in (
        (held, room - 1),
        (held | {"other": 1}, room + 1),
        (held | {unit: size + 1 for unit, size in sizes.items()} | {"": 0}, 2**20),
    ):
        with pytest.raises(ScheduleError):
            check_schedule(schedule, sizes, slot_bytes=64, budget_bytes=budget, held=wrong)


@given(ring=rings(), data=st.data())
def test_a_damaged_schedule_is_refused(ring, data) -> None:
    units, num_slots, depth = ring
    assume(len(units) > num_slots)
    schedule = build_schedule(units, num_slots, depth)
    cycle = list(schedule.cycle)
    at = data.draw(st.integers(0, len(cycle) - 1))
    damage = data.draw(st.sampled_from(["drop", "swap", "slot", "unit"]))
    if damage == "drop":
        del cycle[at]
    elif damage == "swap":
        # Evicting one slot and loading another commute; everything else has an order.
        other = (at + 1) % len(cycle)
        assume(other and cycle[at].kind is OpKind.COMPUTE and cycle[other].slot == cycle[at].slot)
        cycle[at], cycle[other] = cycle[other], cycle[at]
    elif damage == "slot":
        assume(num_slots > 1)
        cycle[at] = dataclasses.replace(cycle[at], slot=(cycle[at].slot + 1) % num_slots)
    else:
        names = [unit for unit in units if unit != cycle[at].unit]
        cycle[at] = dataclasses.replace(cycle[at], unit=data.draw(st.sampled_from(names)))
    damaged = dataclasses.replace(schedule, cycle=tuple(cycle))
    with pytest.raises(ScheduleError):
        check_schedule(damaged, dict.fromkeys(units, 1), slot_bytes=1, budget_bytes=num_slots)


def test_units_larger_than_a_slot_are_refused() -> None:
    schedule = build_schedule(["a", "b", "c"], 2, 2)
    with pytest.raises(ScheduleError, match="do not fit"):
        check_schedule(schedule, {"a": 1, "b": 9, "c": 1}, slot_bytes=8, budget_bytes=16)


def test_what_cannot_be_a_ring() -> None:
    with pytest.raises(ValueError, match="depth"):
        build_schedule(["a"], 2, 3)
    with pytest.raises(ValueError, match="twice"):
        build_schedule(["a", "a"], 2, 1)


def test_units_that_all_have_slots_are_loaded_once() -> None:
    schedule = build_schedule(["a", "b"], 3, 2)
    assert {op.kind for op in schedule.cycle} == {OpKind.COMPUTE}
    assert schedule.prologue == (Op(OpKind.LOAD, "a", 0), Op(OpKind.LOAD, "b", 1))
