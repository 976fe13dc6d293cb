"""Experts that move between real ranks, under load, never change a token."""

from __future__ import annotations

import random
import time

import pytest

from tests.dist.test_lockstep_ranks import MODEL, PROMPTS, LoopRun, greedy, oracle
from tests.support.expert_shuffler import Shuffler
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
