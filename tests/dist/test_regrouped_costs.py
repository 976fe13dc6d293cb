"""Costs of links when real ranks gather anew: kept where they still hold, else measured by all."""

from __future__ import annotations

import signal
from itertools import pairwise

import pytest

from moe.exchange.link_costs import LinkCosts
from tests.dist.test_lockstep_ranks import MODEL, PROMPTS, LoopRun, greedy
from tests.support.lockstep_ranks import model_plan
from tests.support.surviving_ranks import SurvivingRanks

pytestmark = pytest.mark.dist


@pytest.fixture
def ranks():
    plan = model_plan(MODEL, dp=3, tp=1, exchange="auto", lost_groups=1, survives=True)
    ranks = SurvivingRanks(plan, ("a", "a", "b"))
    yield ranks
    ranks.close()


def lose_one_and_take_it_in(ranks: SurvivingRanks, nodes: tuple[str, ...]) -> list[LinkCosts]:
    """What ranks hold at first, without the last one, and with it; all must hold the same."""
    held = [{bytes(facts["costs"]) for facts in ranks.facts()}]
    run = LoopRun(ranks, ranks.recover)
    run.loop.add_request(greedy("r", PROMPTS[0], 400))
    run.wait_for_tokens("r", 4)
    ranks.signal(2, signal.SIGKILL)
    run.wait_for_tokens("r", len(run.tokens["r"]) + 8)
    assert sorted(ranks.gathered) == [0, 1]
    held.append({bytes(answer.costs) for answer in ranks.gathered.values()})
    ranks.start_missing(nodes)
    run.loop.widen(ranks.take_in)
    run.wait_for_tokens("r", len(run.tokens["r"]) + 8)
    assert sorted(ranks.gathered) == [0, 1, 2]
    held.append({bytes(answer.costs) for answer in ranks.gathered.values()})
    assert run.fatal == []
    assert len({tuple(answer.schemes) for answer in ranks.gathered.values()}) == 1
    assert [len(costs) for costs in held] == [1, 1, 1]
    return [LinkCosts.from_bytes(next(iter(costs))) for costs in held]


def test_costs_are_kept_by_survivors_and_by_the_rank_that_comes_back(ranks):
    costs = lose_one_and_take_it_in(ranks, ("a", "a", "b"))
    assert costs[0].node_delay_s > 0
    assert all(before == after for before, after in pairwise(costs))
    assert [decision.probes for decision in ranks.decisions] == [False, False]
    assert {d.reason for d in ranks.decisions} == {
        "no node has more ranks than when they were measured"
    }


def test_costs_are_measured_anew_when_a_rank_comes_back_elsewhere(ranks):
    first, kept, anew = lose_one_and_take_it_in(ranks, ("a", "a", "c"))
    assert kept == first
    assert anew != kept, "two measurements agree to the last digit"
    assert anew.node_delay_s > 0
    assert [decision.probes for decision in ranks.decisions] == [False, True]
    assert ranks.decisions[1].reason == "more ranks are on c than when they were measured"
