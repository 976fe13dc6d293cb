"""Guessed experts: good guesses hide reads, bad ones end, and bytes stay near what was needed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.expert_cache import ExpertCache
from offload.expert_forecast import LOOK_EVERY, MAX_CREDIT, WASTE_SHARE, ExpertForecast
from tests.support.fake_link import FakeLink

LAYERS, EXPERTS, TOP_K = 4, 32, 4
Guess = Callable[[random.Random, list[int]], list[int]]


def right(chance: random.Random, truth: list[int]) -> list[int]:
    return truth


def three_of_four(chance: random.Random, truth: list[int]) -> list[int]:
    return [*truth[1:], chance.randrange(EXPERTS)]


def wrong(chance: random.Random, truth: list[int]) -> list[int]:
    return chance.sample([index for index in range(EXPERTS) if index not in truth], TOP_K)


def run(guess: Guess | None, *, passes: int = 300, slots: int = 40) -> tuple[ExpertCache, FakeLink]:
    """Passes that choose experts evenly; a guess comes while the layer before it computes."""
    units = [f"layer.{layer}.expert.{i}" for layer in range(LAYERS) for i in range(EXPERTS)]
    link = FakeLink(dict.fromkeys(units, 100), bytes_per_s=1000.0)
    cache = ExpertCache(units, slots, link)
    chance, doubt = random.Random(3), random.Random(4)
    plans = [[chance.sample(range(EXPERTS), TOP_K) for _ in range(LAYERS)] for _ in range(passes)]
    for plan in plans:
        for layer, chosen in enumerate(plan):
            cache.announce([f"layer.{layer}.expert.{i}" for i in sorted(chosen)])
            after = layer + 1
            if guess is not None and after < LAYERS and cache.wants_guess(f"layer.{after}"):
                cache.foresee([f"layer.{after}.expert.{i}" for i in guess(doubt, plan[after])])
            for i in sorted(chosen):
                cache.acquire(f"layer.{layer}.expert.{i}")
                link.clock.now_s += 0.05
                cache.release(f"layer.{layer}.expert.{i}")
            link.clock.now_s += 0.2  # the next layer's attention
    return cache, link


def test_right_guesses_use_the_time_between_layers_and_read_nothing_more() -> None:
    _, without = run(None)
    cache, link = run(right)
    assert cache.num_early_useful > 200
    assert cache.num_early_wasted == 0
    assert link.stats.num_bytes <= 1.05 * without.stats.num_bytes
    assert link.clock.now_s < 0.85 * without.clock.now_s


@pytest.mark.parametrize("guess", [right, three_of_four, wrong])
def test_whatever_the_guesses_bytes_stay_near_what_was_needed(guess: Guess) -> None:
    _, without = run(None)
    cache, link = run(guess)
    needed = 100 * cache.num_misses
    unsettled = link.stats.num_bytes - needed - 100 * cache.num_early_wasted
    assert 0 <= unsettled <= 100 * MAX_CREDIT
    assert link.stats.num_bytes <= 1.15 * needed
    assert link.stats.num_bytes <= 1.15 * without.stats.num_bytes
    assert link.clock.now_s <= 1.02 * without.clock.now_s


def test_a_layer_that_cannot_be_guessed_is_looked_at_now_and_then() -> None:
    cache, link = run(wrong)
    assert cache.num_early_useful + cache.num_early_wasted == 0
    assert link.stats.num_bytes == 100 * cache.num_misses
    forecast = ExpertForecast()
    forecast.judge("layer.1", [f"u{i}" for i in range(20)], [])
    wanted = [forecast.wants("layer.1") for _ in range(4 * LOOK_EVERY)]
    assert sum(wanted) == 4
    assert forecast.wants("layer.2")


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), max_size=200), st.randoms())
def test_useless_reads_are_a_share_of_the_needed_ones(steps, chance) -> None:
    """However often reads are asked for, and whichever of them turn out useful."""
    forecast = ExpertForecast()
    forecast.judge("layer.1", [f"u{i}" for i in range(50)], {f"u{i}" for i in range(50)})
    needed = useless = 0
    for misses, luck in steps:
        for _ in range(misses):
            forecast.missed()
            needed += 1
        while forecast.may_read("layer.1"):
            forecast.read_early()
            if chance.random() < luck:
                forecast.missed()
                forecast.used()
                needed += 1
                if chance.random() < 0.2:
                    break
            else:
                forecast.wasted()
                useless += 1
    assert useless == forecast.num_wasted <= WASTE_SHARE * needed + 1e-6


def test_a_long_good_time_is_no_licence() -> None:
    forecast = ExpertForecast()
    forecast.judge("layer.1", [f"u{i}" for i in range(50)], {f"u{i}" for i in range(50)})
    for _ in range(10_000):
        forecast.missed()
    reads = 0
    while forecast.may_read("layer.1"):
        forecast.read_early()
        reads += 1
    assert reads == MAX_CREDIT


@given(st.data())
def test_units_are_right_and_held_ones_stay_under_any_guess(data) -> None:
    units = [f"layer.{layer}.expert.{i}" for layer in range(3) for i in range(6)]
    link = FakeLink(dict.fromkeys(units, 100), bytes_per_s=100.0)
    cache = ExpertCache(units, data.draw(st.integers(2, 9)), link)
    some = st.lists(st.sampled_from(range(6)), unique=True, max_size=6)
    for _ in range(data.draw(st.integers(1, 12))):
        for layer in range(3):
            chosen = sorted(data.draw(some))
            cache.announce([f"layer.{layer}.expert.{i}" for i in chosen])
            after = f"layer.{(layer + 1) % 3}"
            if cache.wants_guess(after):
                cache.foresee([f"{after}.expert.{i}" for i in data.draw(some)])
            for i in chosen:
                unit = f"layer.{layer}.expert.{i}"
                cache.acquire(unit)
                assert link.log[-1][:2] == ("use", unit)
                assert unit in link.held.values()
                cache.release(unit)
