"""The expert cache: right units, held ones stay, the useful ones are read once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from offload.expert_cache import ExpertCache
from tests.support.fake_link import FakeLink

UNITS = [f"layer.0.expert.{i}" for i in range(16)]


def cache_of(num_slots: int) -> tuple[ExpertCache, FakeLink]:
    link = FakeLink(dict.fromkeys(UNITS, 100), bytes_per_s=100.0)
    return ExpertCache(UNITS, num_slots, link), link


@given(st.data())
def test_whatever_is_asked_for_is_there_and_stays_while_it_is_held(data) -> None:
    num_slots = data.draw(st.integers(1, 6))
    cache, link = cache_of(num_slots)
    held: list[str] = []
    for _ in range(data.draw(st.integers(0, 40))):
        if data.draw(st.booleans()):
            cache.announce(data.draw(st.lists(st.sampled_from(UNITS), unique=True, max_size=5)))
        if held and (len(held) == num_slots or data.draw(st.booleans())):
            cache.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        unit = data.draw(st.sampled_from(UNITS))
        cache.acquire(unit)
        assert link.log[-1][:2] == ("use", unit)
        held.append(unit)
        assert set(held) <= set(link.held.values())


def test_more_holders_than_slots_is_an_error() -> None:
    cache, _ = cache_of(2)
    cache.acquire(UNITS[0])
    cache.acquire(UNITS[1])
    with pytest.raises(InternalError, match="held at the same time"):
        cache.acquire(UNITS[2])
    with pytest.raises(InternalError, match="not held"):
        cache.release(UNITS[2])


def test_the_units_used_most_stay() -> None:
    cache, link = cache_of(6)
    chance = random.Random(0)
    weights = [2.0**-rank for rank in range(len(UNITS))]
    for _ in range(2000):
        unit = chance.choices(UNITS, weights)[0]
        cache.acquire(unit)
        cache.release(unit)
    assert cache.num_hits / (cache.num_hits + cache.num_misses) > 0.9
    assert set(UNITS[:3]) <= set(link.held.values())


def test_announced_units_are_read_side_by_side() -> None:
    cache, link = cache_of(4)
    cache.announce(UNITS[:3])
    assert [entry[0] for entry in link.log] == ["submit"] * 3
    for unit in UNITS[:3]:
        cache.acquire(unit)
        cache.release(unit)
    assert link.stats.num_reads == 3
    assert (cache.num_hits, cache.num_misses) == (0, 3)


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_a_skewed_step_reads_what_it_visits_and_little_else(tokens: int) -> None:
    """Four layers of 32 experts, two per token, slots for a third of them."""
    units = [f"layer.{layer}.expert.{i}" for layer in range(4) for i in range(32)]
    link = FakeLink(dict.fromkeys(units, 100), bytes_per_s=1e9)
    cache = ExpertCache(units, 40, link)
    chance = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(32)]
    needed = visits = 0
    for _ in range(300):
        for layer in range(4):
            chosen = {chance.choices(range(32), weights)[0] for _ in range(2 * tokens)}
            visited = [f"layer.{layer}.expert.{i}" for i in sorted(chosen)]
            visits += len(visited)
            needed += sum(unit not in link.held.values() for unit in visited)
            cache.announce(visited)
            for unit in visited:
                cache.acquire(unit)
                cache.release(unit)
    assert cache.num_hits + cache.num_misses == visits
    assert cache.num_misses == needed
    assert link.stats.num_bytes <= 1.15 * 100 * needed
    assert needed < 0.75 * visits


@pytest.mark.parametrize("ahead", [True, False])
def test_when_all_are_visited_they_stream_at_the_rate_of_the_link(ahead: bool) -> None:
    """As in a ring: reading goes on through the layers, and nothing is read for nothing."""
    units = [f"layer.{layer}.expert.{i}" for layer in range(4) for i in range(16)]
    link = FakeLink(dict.fromkeys(units, 100), bytes_per_s=1000.0)
    cache = ExpertCache(units, 12, link)
    for _ in range(6):
        started_s, before = link.clock.now_s, link.stats.num_bytes
        for layer in range(4):
            visited = [f"layer.{layer}.expert.{i}" for i in range(16)]
            if ahead:
                cache.announce(visited)
            for unit in visited:
                cache.acquire(unit)
                link.clock.now_s += 0.08
                cache.release(unit)
    seconds, read = link.clock.now_s - started_s, link.stats.num_bytes - before
    assert read <= 64 * 100
    roofline = max(read / 1000.0, 64 * 0.08)
    assert (seconds <= 1.05 * roofline) == ahead
