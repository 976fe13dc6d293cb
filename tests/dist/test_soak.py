"""Random arrivals at ranks that idle in between, experts moving all the while: nothing hangs.

pytest tests/dist/test_soak.py --soak-s 600 -o timeout=900
"""

from __future__ import annotations

import random
import time

import pytest

from replicas.api import FinishReason
from tests.dist.test_lockstep_ranks import MODEL, PROMPTS, LoopRun, greedy, oracle
from tests.support.expert_shuffler import Shuffler
from tests.support.lockstep_ranks import LockstepRanks, model_plan

pytestmark = pytest.mark.dist
__all__ = ["oracle"]

NUM_RANKS = 4
# A replica refuses requests beyond 256 that wait.
MOST_WAITING = 128


@pytest.fixture
def ranks():
    plan = model_plan(MODEL, dp=NUM_RANKS, tp=1, exchange="preposted", num_redundant=2, max_moves=8)
    group = LockstepRanks(plan, ("a", "a", "b", "b"))
    yield group
    group.close()


def test_arrivals_at_random_for_a_while(ranks, oracle, pytestconfig):
    soak_s, rng = pytestconfig.getoption("soak_s"), random.Random(6)
    run, shuffler = LoopRun(ranks), Shuffler(ranks)
    end_s, number = time.monotonic() + soak_s, 0
    try:
        while time.monotonic() < end_s:
            # Bursts and gaps: mostly some groups idle, now and then all of them.
            for _ in range(rng.choice((1, 1, 1, 2, 9))):
                index = rng.randrange(len(PROMPTS))
                run.loop.add_request(greedy(f"{number} {index}", PROMPTS[index]))
                if rng.random() < 0.1:
                    run.loop.abort(f"{number} {index}")
                number += 1
            time.sleep(min(rng.expovariate(4.0), 2.0))
            while run.loop.health.num_unfinished > MOST_WAITING:
                time.sleep(0.1)  # a busy machine is slower than the arrivals
            assert run.loop.health.fatal is None
        run.drain()
    finally:
        placements = shuffler.stop()
    assert run.fatal == []
    assert run.causes == set()
    assert len(run.ends) == number
    for name, reason in run.ends.items():
        said, answer = run.tokens.get(name, []), oracle[int(name.split()[1])]
        assert said == answer[: len(said)]
        assert reason is FinishReason.ABORT or said == answer
    assert placements >= soak_s / 10
    begun_s, before = time.monotonic(), [ranks.cpu_s(rank) for rank in range(NUM_RANKS)]
    time.sleep(2.0)
    elapsed_s = time.monotonic() - begun_s
    assert all((ranks.cpu_s(r) - cpu_s) / elapsed_s < 0.05 for r, cpu_s in enumerate(before))
