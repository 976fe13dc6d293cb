"""Ranks that share slots: their schedule is safe at any pace, and N links are N times as fast."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from offload.gather_check import check_gathering
from offload.layout import PAGE_BYTES
from offload.lockstep_ring import LockstepRing
from offload.ops import OpKind, Schedule
from offload.pieces import Piece, piece_bytes
from offload.ring import Ring
from offload.schedule import build_schedule
from offload.schedule_check import ScheduleError, check_schedule
from tests.support.fake_link import FakeLink, VirtualClock

MIB = 2**20


@given(pages=st.integers(1, 1000), count=st.integers(1, 17))
def test_pieces_are_whole_pages_that_cover_a_record_once(pages: int, count: int) -> None:
    size = pages * PAGE_BYTES
    spans = [Piece(index, count).span(size) for index in range(count)]
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert all(start % PAGE_BYTES == 0 for start, _ in spans)
    largest = max(stop - start for start, stop in spans)
    assert largest == piece_bytes(size, count) == math.ceil(pages / count) * PAGE_BYTES


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_slots = draw(st.integers(1, 5))
    units = [f"u{i}" for i in range(draw(st.integers(1, 12)))]
    return build_schedule(units, num_slots, draw(st.integers(1, num_slots)), gathers=True)


@given(schedule=schedules(), num_ranks=st.integers(1, 5), data=st.data())
def test_ranks_at_any_pace_keep_out_of_each_others_way(schedule, num_ranks, data) -> None:
    sizes = dict.fromkeys(schedule.units, 1)
    check_schedule(schedule, sizes, slot_bytes=1, budget_bytes=schedule.num_slots)
    check_gathering(
        schedule, num_ranks, cycles=2, choose=lambda able: data.draw(st.sampled_from(able))
    )


@given(schedule=schedules(), data=st.data())
def test_what_is_not_gathered_or_given_back_is_found(schedule, data) -> None:
    assume(len(schedule.units) > schedule.num_slots)
    kind = data.draw(st.sampled_from([OpKind.GATHER, OpKind.EVICT]))
    places = [at for at, op in enumerate(schedule.cycle) if op.kind is kind]
    at = data.draw(st.sampled_from(places))
    damaged = dataclasses.replace(schedule, cycle=schedule.cycle[:at] + schedule.cycle[at + 1 :])
    sizes = dict.fromkeys(schedule.units, 1)
    with pytest.raises(ScheduleError):
        check_schedule(damaged, sizes, slot_bytes=1, budget_bytes=schedule.num_slots)


def test_ranks_that_do_not_wait_are_caught() -> None:
    """Without a gather the faster rank computes with what the slower one has not loaded."""
    schedule = build_schedule(["a", "b", "c"], 2, 2, gathers=True)
    hasty = dataclasses.replace(
        schedule, cycle=tuple(op for op in schedule.cycle if op.kind is not OpKind.GATHER)
    )
    with pytest.raises(ScheduleError, match="every rank"):
        check_gathering(hasty, 2, cycles=2, choose=min)


def test_only_ranks_that_share_gather() -> None:
    schedule = build_schedule(["a", "b", "c"], 2, 2, gathers=True)
    alone = dataclasses.replace(schedule, gathers=False)
    with pytest.raises(ScheduleError, match="nobody's piece"):
        check_schedule(alone, dict.fromkeys("abc", 1), slot_bytes=1, budget_bytes=2)


class FakeGatheringLink(FakeLink):
    """One rank's pieces over a link of its own; who drives the ranks brings their clocks together.

    Asserts that nothing is used before it was gathered.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gathered: set[int] = set()

    def submit(self, unit: str, slot: int) -> None:
        super().submit(unit, slot)
        self.gathered.discard(slot)

    def gather(self, unit: str, slot: int) -> None:
        super().wait(unit, slot)
        self.gathered.add(slot)

    def wait(self, unit: str, slot: int) -> None:
        assert self.held.get(slot) == unit
        assert slot in self.gathered


def ranks_of(
    sizes: Mapping[str, int], count: int, num_slots: int = 4, depth: int = 3
) -> list[tuple[LockstepRing, FakeGatheringLink]]:
    schedule = build_schedule(list(sizes), num_slots, depth, gathers=True)
    ranks = []
    for _ in range(count):
        pieces = {unit: piece_bytes(size, count) for unit, size in sizes.items()}
        link = FakeGatheringLink(pieces, bytes_per_s=1000 * MIB, clock=VirtualClock())
        ranks.append((LockstepRing(schedule, link), link))
    return ranks


@pytest.mark.parametrize("compute_share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_n_links_bring_a_layer_n_times_as_fast(count: int, compute_share: float) -> None:
    """As long as transfers decide; a layer is computed when the last piece is there."""
    sizes = {f"layer.{index}": 200 * MIB for index in range(20)}
    compute_s = compute_share * 0.2 / count
    link = FakeLink(sizes, bytes_per_s=1000 * MIB)
    ring = Ring(build_schedule(list(sizes), 4, 3), link)
    for unit in [*sizes] * 3:
        ring.acquire(unit)
        link.clock.now_s += compute_s
        ring.release(unit)
    ranks = ranks_of(sizes, count)
    for _ in range(3):
        for unit in sizes:
            for shared, _link in ranks:
                shared.acquire(unit)
            together_s = max(own.clock.now_s for _, own in ranks)
            for shared, own in ranks:
                own.clock.now_s = together_s + compute_s
                shared.release(unit)
        for shared, _link in ranks:
            shared.end_pass()
    assert link.clock.now_s / ranks[0][1].clock.now_s >= 0.95 * count
    read = {own.stats.num_bytes for _, own in ranks}
    assert read == {ranks[0][1].stats.num_reads * piece_bytes(200 * MIB, count)}


UNITS = ("embed", "layer.0", "layer.1", "layer.2", "norm", "head")


@given(data=st.data())
def test_whatever_a_step_leaves_out_every_rank_carries_out_the_same_list(data) -> None:
    num_slots = data.draw(st.integers(1, 7))
    depth = data.draw(st.integers(1, num_slots))
    ranks = ranks_of(dict.fromkeys(UNITS, MIB), 2, num_slots, depth)
    for _ in range(4):
        for ring, _link in ranks:
            for unit in UNITS:
                if data.draw(st.booleans()):
                    for _ in range(data.draw(st.integers(1, 2))):
                        assert ring.acquire(unit)
                        ring.release(unit)
            ring.end_pass()
        # The last ones to be submitted wait for their turn in the next pass, at both alike.
        logs = [[entry for entry in link.log if entry[0] == "submit"] for _, link in ranks]
        assert logs[0] == logs[1]


def test_a_step_does_not_go_backwards() -> None:
    ((ring, _),) = ranks_of(dict.fromkeys(UNITS, MIB), 1)
    ring.acquire("layer.1")
    with pytest.raises(InternalError, match="not released"):
        ring.acquire("layer.2")
    with pytest.raises(InternalError, match="not held"):
        ring.release("layer.2")
    ring.release("layer.1")
    with pytest.raises(InternalError, match="after what follows"):
        ring.acquire("layer.0")
