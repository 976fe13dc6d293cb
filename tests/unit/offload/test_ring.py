"""The ring hands out the right unit whatever the order, and overlaps as the theory says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import InternalError, WeightStreamError
from offload.ring import Ring
from offload.schedule import build_schedule
from tests.support.fake_link import FakeLink

MIB = 2**20


def ring_of(count: int, num_slots: int, depth: int, link: FakeLink | None = None):
    units = [f"u{i}" for i in range(count)]
    link = link or FakeLink(dict.fromkeys(units, MIB), bytes_per_s=MIB)
    return units, Ring(build_schedule(units, num_slots, depth), link), link


def seconds_per_pass(count: int, depth: int, compute_s: float, passes: int = 6) -> float:
    """Steady state: the first pass fills the ring."""
    units, ring, link = ring_of(count, depth, depth)
    started_s = 0.0
    for number in range(passes):
        if number == 1:
            started_s = link.clock.now_s
        for unit in units:
            ring.acquire(unit)
            link.clock.now_s += compute_s
            ring.release(unit)
    return (link.clock.now_s - started_s) / (passes - 1)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_one_is_serial_and_more_reaches_the_roofline(ratio: float, depth: int) -> None:
    count = 11
    expected = count * (1 + ratio if depth == 1 else max(1.0, ratio))
    assert seconds_per_pass(count, depth, ratio) == pytest.approx(expected, rel=1e-9)


@given(st.data())
def test_any_order_of_units_gets_what_it_asks_for(data) -> None:
    count = data.draw(st.integers(1, 9))
    num_slots = data.draw(st.integers(1, 5))
    units, ring, link = ring_of(count, num_slots, data.draw(st.integers(1, num_slots)))
    for unit in data.draw(st.lists(st.sampled_from(units), max_size=40)):
        ring.acquire(unit)
        # The link itself asserts that no slot is overwritten and that the slot holds the unit.
        assert link.log[-1][:2] == ("use", unit)
        assert len(link.held) <= num_slots
        ring.release(unit)


def test_a_regular_pass_never_jumps_and_reads_every_unit_once() -> None:
    units, ring, link = ring_of(7, 3, 3)
    for _ in range(10):
        for unit in units:
            ring.acquire(unit)
            ring.release(unit)
    assert ring.num_jumps == 0
    assert link.stats.num_reads == 70 + 3
    assert [entry[1] for entry in link.log if entry[0] == "submit"] == (units * 11)[:73]


def test_leaving_out_the_last_unit_costs_its_own_read_only() -> None:
    units, ring, link = ring_of(8, 3, 3)
    for unit in units[:-1] + units[:-1]:
        ring.acquire(unit)
        ring.release(unit)
    # 7 + 7 used, 2 ahead, and one read for nothing at each end of a pass.
    assert link.stats.num_reads == 14 + 2 + 2
    assert ring.num_jumps == 1


def test_two_units_at_a_time_are_refused() -> None:
    _, ring, _ = ring_of(5, 3, 3)
    ring.acquire("u0")
    with pytest.raises(InternalError, match="u0 is not released"):
        ring.acquire("u1")
    with pytest.raises(InternalError, match="not held"):
        ring.release("u1")


def test_a_unit_that_failed_is_read_again_when_asked_again() -> None:
    class Failing(FakeLink):
        fail = True

        def wait(self, unit: str, slot: int) -> None:
            if self.fail:
                del self.held[slot]
                raise WeightStreamError("The disk is gone.")
            super().wait(unit, slot)

    units = [f"u{i}" for i in range(5)]
    link = Failing(dict.fromkeys(units, 1), bytes_per_s=1.0)
    ring = Ring(build_schedule(units, 3, 3), link)
    with pytest.raises(WeightStreamError):
        ring.acquire("u0")
    link.fail = False
    for unit in units:
        ring.acquire(unit)
        ring.release(unit)
