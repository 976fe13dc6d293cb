"""A mixture with many experts whose favourites drift: bytes read against bytes needed, for long."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from offload.expert_cache import ExpertCache
from tests.support.fake_link import FakeLink

LAYERS, EXPERTS, TOP_K = 4, 64, 4
SLOTS = LAYERS * EXPERTS * 3 // 10
EXPERT_BYTES = 100
STEPS, DRIFT_EVERY = 1200, 25


@dataclass
class Routing:
    """Zipf over a layer's experts; every few steps some change their rank."""

    exponent: float
    seed: int = 0
    favour: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.guessing = random.Random(self.seed + 1)
        self.weights = [(rank + 1) ** -self.exponent for rank in range(EXPERTS)]
        for _ in range(LAYERS):
            order = list(range(EXPERTS))
            self.chance.shuffle(order)
            self.favour.append(order)

    def drift(self) -> None:
        """The favourite of each layer falls to a place anywhere, and two others change theirs."""
        for order in self.favour:
            order.insert(self.chance.randrange(EXPERTS), order.pop(0))
            one, other = self.chance.sample(range(EXPERTS), 2)
            order[one], order[other] = order[other], order[one]

    def visited(self, layer: int, tokens: int) -> list[int]:
        """Experts that `tokens` tokens visit, each `TOP_K` different ones."""
        chosen: dict[int, None] = {}
        for _ in range(tokens):
            own: dict[int, None] = {}
            while len(own) < TOP_K:
                own[self.favour[layer][self.chance.choices(range(EXPERTS), self.weights)[0]]] = None
            chosen |= own
        return sorted(chosen)

    def guess(self, truth: list[int], right: float) -> list[int]:
        """The same, each expert right with that chance."""
        return list(
            dict.fromkeys(
                expert if self.guessing.random() < right else self.guessing.randrange(EXPERTS)
                for expert in truth
            )
        )


def names(layer: int, experts: list[int]) -> list[str]:
    return [f"layer.{layer}.expert.{expert}" for expert in experts]


def run(tokens: int, exponent: float, right: float | None) -> tuple[ExpertCache, FakeLink]:
    """Many steps; `right`: how good guesses at the next layer are, None: there are none."""
    units = [unit for layer in range(LAYERS) for unit in names(layer, list(range(EXPERTS)))]
    link = FakeLink(dict.fromkeys(units, EXPERT_BYTES), bytes_per_s=1e6)
    cache, routing = ExpertCache(units, SLOTS, link), Routing(exponent)
    for step in range(STEPS):
        if step % DRIFT_EVERY == 0:
            routing.drift()
        plan = [routing.visited(layer, tokens) for layer in range(LAYERS)]
        for layer, experts in enumerate(plan):
            visited = names(layer, experts)
            order = cache.announce(visited)
            following = (layer + 1) % LAYERS
            if right is not None and following and cache.wants_guess(f"layer.{following}"):
                cache.foresee(names(following, routing.guess(plan[following], right)))
            for index in order:
                cache.acquire(visited[index])
                link.clock.now_s += 2e-5
                cache.release(visited[index])
    return cache, link


@pytest.mark.parametrize("right", [0.95, 0.8, 0.3])
@pytest.mark.parametrize(("tokens", "exponent"), [(1, 1.2), (4, 1.2), (1, 2.0)])
def test_bytes_stay_near_what_was_needed_however_good_guesses_are(
    tokens: int, exponent: float, right: float
) -> None:
    plain_cache, plain = run(tokens, exponent, None)
    assert plain.stats.num_bytes == EXPERT_BYTES * plain_cache.num_misses
    cache, link = run(tokens, exponent, right)
    assert link.stats.num_bytes <= 1.15 * EXPERT_BYTES * cache.num_misses
    # Early reads evict hardly anything that would have been found.
    assert link.stats.num_bytes <= 1.15 * plain.stats.num_bytes
    early = cache.num_early_useful + cache.num_early_wasted
    if right < 0.5:
        assert early == 0
    if right > 0.9:
        assert 0 < cache.num_early_wasted < 0.3 * early


def test_a_third_of_the_slots_finds_most_of_a_skewed_routing() -> None:
    cache, _ = run(1, 2.0, None)
    assert cache.num_hits >= 0.8 * (cache.num_hits + cache.num_misses)
