"""Experts that move between real ranks, under load, never change a token."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import asdict

import pytest

from moe.expert_table import ExpertTable
from moe.placement import ExpertRanks, place_layer
from tests.dist.test_lockstep_ranks import MODEL, PROMPTS, LoopRun, greedy, oracle
from tests.support.lockstep_ranks import LockstepRanks, model_plan

pytestmark = pytest.mark.dist
__all__ = ["oracle"]

LAYOUTS = {
    "two groups of two on two nodes": (2, 2, "hierarchical", ("a", "a", "b", "b")),
    "three groups with posted receives": (3, 1, "preposted", ()),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request):
    dp, tp, exchange, nodes = LAYOUTS[request.param]
    plan = model_plan(MODEL, dp=dp, tp=tp, exchange=exchange, num_redundant=2, max_moves=8)
    group = LockstepRanks(plan, nodes)
    yield group
    group.close()


class Shuffler:
    """Asks the ranks and forces another random placement of all layers, again and again."""

    def __init__(self, ranks: LockstepRanks) -> None:
        self._ranks = ranks
        self._rng = random.Random(1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> int:
        """The number of placements that were used."""
        self._over.set()
        self._thread.join()
        return self._ranks.balancer.version

    def _run(self) -> None:
        balancer = self._ranks.balancer
        while not self._over.wait(0.02):
            balancer.hear([asdict(state) for state in self._ranks.expert_states()])
            if balancer.is_resting:
                balancer.force([self._shuffled(table) for table in balancer.tables.values()])

    def _shuffled(self, table: ExpertTable) -> ExpertTable:
        slots = tuple(len(held) for held in table.logical_by_rank)
        load = [self._rng.random() ** 4 for _ in range(table.slots.num_experts)]
        placement = place_layer(load, ExpertRanks(slots=slots, nodes=(0,) * len(slots)))
        return ExpertTable.of(table.layer, placement, len(slots))


def test_forced_rebalances_under_load_change_no_token(ranks, oracle):
    run, rng, shuffler = LoopRun(ranks), random.Random(4), Shuffler(ranks)
    try:
        for number in range(40):
            index = rng.randrange(len(PROMPTS))
            run.loop.add_request(greedy(f"{number} {index}", PROMPTS[index]))
            time.sleep(rng.choice((0.0, 0.05, 0.1)))
        run.drain()
    finally:
        used = shuffler.stop()
    assert run.fatal == []
    assert used >= 3
    for name, tokens in run.tokens.items():
        assert tokens == oracle[int(name.split()[1])]
