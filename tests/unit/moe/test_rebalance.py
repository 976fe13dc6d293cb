"""Following a drifting load: never without a home, few moves, and flatter than standing still."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from moe.load_stats import LoadStats
from moe.node_packing import ExpertRanks
from moe.placement import LayerPlacement, place_layer
from moe.rebalance import Move, apply_move, follow

RANKS = ExpertRanks(slots=(5,) * 8, nodes=(0, 0, 0, 0, 1, 1, 1, 1))


def _loads(seed: int, zipf: float = 1.0) -> np.ndarray:
    load = 1.0 / np.arange(1, 33) ** zipf
    np.random.default_rng(seed).shuffle(load)
    return load


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 6))
def test_a_step_never_strands_an_expert_and_never_makes_it_worse(
    before: int, now: int, max_moves: int
) -> None:
    current = place_layer(_loads(before), RANKS)
    load = _loads(now)
    step = follow(load, current, RANKS, max_moves=max_moves)
    assert len(step.moves) <= max_moves
    assert step.after <= step.before + 1e-6
    homes = [list(ranks) for ranks in current.homes]
    for move in step.moves:
        assert move.target not in homes[move.expert]
        homes = apply_move(homes, move)
        assert all(homes)
        held = sum(move.target in ranks for ranks in homes)
        assert held <= RANKS.slots[move.target]
    assert tuple(tuple(sorted(ranks)) for ranks in homes) == step.placement.homes


def test_new_shares_come_first_and_move_nothing() -> None:
    homes = ((0, 1), (1,))
    current = LayerPlacement(homes=homes, shares=((0.5, 0.5), (1.0,)))
    ranks = ExpertRanks(slots=(1, 2), nodes=(0, 0))
    step = follow([30.0, 10.0], current, ranks, max_moves=4)
    assert step.moves == ()
    assert step.placement.homes == homes
    assert step.placement.shares[0] == pytest.approx((2 / 3, 1 / 3))
    assert (step.before, step.after) == pytest.approx((1.25, 1.0))


def test_a_hot_expert_is_copied_into_a_free_slot() -> None:
    current = LayerPlacement(homes=((0,), (1,)), shares=((1.0,), (1.0,)))
    ranks = ExpertRanks(slots=(2, 2), nodes=(0, 0))
    step = follow([90.0, 10.0], current, ranks, max_moves=1)
    assert step.moves == (Move(expert=0, target=1, gives_up=None),)
    assert step.after == pytest.approx(1.0)


def test_a_drifting_load_stays_level_with_few_moves() -> None:
    rng = np.random.default_rng(0)
    current_load = _loads(1)
    placement = frozen = place_layer(current_load, RANKS)
    online, once, moves = [], [], 0
    for window in range(5):
        target = 0.8 * current_load + 0.2 * _loads(int(rng.integers(1000)) + window)
        for part in range(1, 6):
            load = current_load + (target - current_load) * part / 5
            online.append(placement.imbalance(load, 8))
            once.append(frozen.imbalance(load, 8))
            step = follow(load, placement, RANKS, max_moves=1)
            placement, moves = step.placement, moves + len(step.moves)
        current_load = target
    assert np.mean(online) <= 1.10
    assert np.mean(online) < np.mean(once)
    assert moves <= 0.05 * sum(RANKS.slots) * 5


def test_old_rows_weigh_half_after_a_half_life() -> None:
    stats = LoadStats(2, 3, half_life_rows=6)
    first = np.array([[6.0, 0, 0], [0, 6, 0]])
    stats.add(first)
    stats.add(np.array([[0, 0, 6.0], [0, 0, 6]]))
    assert stats.load.tolist() == [[3, 0, 6], [0, 3, 6]]
    assert stats.total_rows == 24
    stats.load[0, 0] = 99
    assert stats.load[0, 0] == 3
    with pytest.raises(ConfigError, match="do not fit"):
        stats.add(np.zeros((3, 3)))
    with pytest.raises(ConfigError, match="do not fit"):
        stats.add(-first)
    with pytest.raises(ConfigError, match="No load"):
        LoadStats(0, 3, half_life_rows=1)


def test_a_gain_that_is_not_worth_the_journey_moves_nothing() -> None:
    ranks = ExpertRanks(slots=(3, 3), nodes=(0, 1))
    current = place_layer([1.0] * 4, ExpertRanks(slots=(2, 2), nodes=(0, 1)))
    load = [3.0, 1.0, 1.0, 1.0]
    worth = follow(load, current, ranks, max_moves=1, min_gain=0.01)
    assert len(worth.moves) == 1
    gain = follow(load, current, ranks, max_moves=0).after - worth.after
    assert follow(load, current, ranks, max_moves=1, min_gain=gain + 0.01).moves == ()
