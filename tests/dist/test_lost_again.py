"""Losses on top of losses: while survivors gather, at once, one after another; ranks that wake up
again after they were replaced, replacements on other nodes, and the loss of the leader."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.dist.test_lockstep_ranks import MODEL, PROMPTS, LoopRun, greedy
from tests.support.expert_shuffler import Shuffler
from tests.support.lockstep_ranks import LockstepRanks, model_plan
from tests.support.surviving_ranks import SurvivingRanks

pytestmark = pytest.mark.dist

NUM_TOKENS = 120
NODES = ("a", "a", "b", "b")


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What one rank alone says to `PROMPTS`."""
    alone = LockstepRanks(model_plan(MODEL, dp=1, tp=1))
    try:
        requests = [greedy(f"u{n}", prompt, NUM_TOKENS) for n, prompt in enumerate(PROMPTS)]
        return [completion.token_ids for completion in alone.engine().generate(requests)]
    finally:
        alone.close()


@pytest.fixture
def ranks():
    """Four groups of one rank, any two of which may be lost."""
    plan = model_plan(
        MODEL,
        dp=4,
        tp=1,
        survives=True,
        lost_groups=2,
        exchange="hierarchical",
        num_redundant=1,
        max_moves=8,
    )
    group = SurvivingRanks(plan, NODES)
    yield group
    group.close()


def ask(run: LoopRun, series: str) -> None:
    for number, prompt in enumerate(PROMPTS):
        run.loop.add_request(greedy(f"{series}{number}", prompt, NUM_TOKENS))


def check(run: LoopRun, expected: list[list[int]], *series: str) -> None:
    """Drain; every request of these series got its tokens, and none an error."""
    run.drain()
    assert run.fatal == []
    assert run.causes == set()
    for name in series:
        assert [run.tokens[f"{name}{n}"] for n in range(len(PROMPTS))] == expected


def exits(process, within_s: float) -> bool:
    process.join(within_s)
    return not process.is_alive()


# The first member hosts the store that all others meet at.
@pytest.mark.parametrize(("second", "signum"), [(0, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_second_loss_while_survivors_gather_is_named_as_quickly(ranks, expected, second, signum):
    lost_s: list[float] = []

    def strike(number: int) -> None:
        if number == 1:
            ranks.signal(second, signum)
            lost_s.append(time.monotonic())

    ranks.on_gather = strike
    run = LoopRun(ranks, ranks.recover)
    ask(run, "r")
    run.wait_for_tokens("r4", 5)
    ranks.signal(3, signal.SIGKILL)
    check(run, expected, "r")
    (_, first), (noticed_s, again) = ranks.noticed
    assert "ank 3" in first.cause
    assert f"rank {second} of 4 (node {NODES[second]})" in again.cause
    assert noticed_s - lost_s[0] < 5.0
    assert ranks.num_gatherings == 2
    assert ranks.recovery_s[0] < 8.0
    assert ranks.roster.lost == tuple(sorted((second, 3)))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_two_ranks_lost_at_once_cost_one_gathering(ranks, expected, signum):
    run = LoopRun(ranks, ranks.recover)
    ask(run, "r")
    run.wait_for_tokens("r4", 5)
    lost_s = time.monotonic()
    ranks.signal(0, signum)
    ranks.signal(3, signum)
    run.wait_for_tokens("r4", len(run.tokens["r4"]) + 12)
    assert time.monotonic() - lost_s < 10.0
    check(run, expected, "r")
    assert ranks.roster.lost == (0, 3)
    assert ranks.num_gatherings == 1
    assert ranks.noticed[0][0] - lost_s < 5.0


def shuffle(ranks: SurvivingRanks, times: int) -> None:
    """Move experts about under load."""
    shuffler, until = Shuffler(ranks), ranks.balancer.version + times
    deadline_s = time.monotonic() + 30.0
    while ranks.balancer.version < until and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert shuffler.stop() >= until


def test_losses_in_sequence_and_a_replacement_on_another_node(ranks, expected):
    run = LoopRun(ranks, ranks.recover)
    ask(run, "r")
    shuffle(ranks, 2)
    moves = ranks.balancer.num_moves
    for victim in (3, 2):
        run.wait_for_tokens("r4", len(run.tokens.get("r4", ())) + 5)
        ranks.signal(victim, signal.SIGKILL)
        run.wait_for_tokens("r4", len(run.tokens["r4"]) + 10)
    assert ranks.roster.groups == (0, 1)
    # Counts and versions go on from those of the ranks before.
    version = ranks.balancer.version
    assert version >= 4
    assert ranks.balancer.num_moves >= moves > 0
    ranks.start_missing(("a", "a", "b", "a"))
    ask(run, "s")
    run.wait_for_tokens("s4", 2)
    run.loop.widen(ranks.take_in)
    run.wait_for_tokens("s4", 30)
    assert ranks.roster.now.members == (0, 1, 3, 2)
    assert ranks.roster.nodes_of(ranks.roster.now) == ("a", "a", "a", "b")
    shuffle(ranks, 2)
    assert ranks.balancer.version > version
    run.wait_for_tokens("s4", len(run.tokens["s4"]) + 2)
    ranks.signal(3, signal.SIGSTOP)
    check(run, expected, "r", "s")
    assert "rank 3 (node a)" in ranks.noticed[-1][1].cause.replace("Rank", "rank")


def test_a_stopped_rank_that_wakes_up_after_it_was_replaced_changes_nothing(ranks, expected):
    ranks.kills = False  # as where its node cannot be reached
    old = ranks.processes[2]
    run = LoopRun(ranks, ranks.recover)
    ask(run, "r")
    run.wait_for_tokens("r4", 5)
    ranks.signal(2, signal.SIGSTOP)
    run.wait_for_tokens("r4", len(run.tokens["r4"]) + 5)
    ranks.start_missing()
    ask(run, "s")
    run.loop.widen(ranks.take_in)
    run.wait_for_tokens("s4", 5)
    assert ranks.roster.lost == ()
    os.kill(old.pid, signal.SIGCONT)
    assert exits(old, 10.0)
    ask(run, "t")
    check(run, expected, "r", "s", "t")
    assert ranks.num_gatherings == 2


def test_all_ranks_end_with_their_leader(ranks):
    """In a step, halted, or on the way into a group that never comes about."""
    run = LoopRun(ranks)
    ask(run, "r")
    run.wait_for_tokens("r4", 5)
    begun_s = time.monotonic()
    ranks.link.close()
    assert all(exits(process, 5.0) for process in ranks.processes.values())
    assert time.monotonic() - begun_s < 5.0
