"""Real ranks that go on without those that are lost: same tokens, same processes, nothing lost."""

from __future__ import annotations

import signal
import time

import pytest

from tests.dist.test_lockstep_ranks import MODEL, PROMPTS, LoopRun, greedy, oracle, sampled
from tests.support.lockstep_ranks import model_plan
from tests.support.surviving_ranks import SurvivingRanks

pytestmark = pytest.mark.dist
__all__ = ["oracle"]

NUM_TOKENS = 120
LAYOUTS = {
    "copies of every expert": {"dp": 2, "tp": 1, "num_redundant": 4, "nodes": ("a", "b")},
    "spare room, two nodes of two": {
        "dp": 2,
        "tp": 2,
        "lost_groups": 1,
        "exchange": "hierarchical",
        "nodes": ("a", "a", "b", "b"),
    },
    "posted receives": {
        "dp": 3,
        "tp": 1,
        "lost_groups": 1,
        "exchange": "preposted",
        "nodes": ("a", "b", "c"),
    },
}


def start(name: str) -> SurvivingRanks:
    layout = dict(LAYOUTS[name])
    nodes = layout.pop("nodes")
    return SurvivingRanks(model_plan(MODEL, survives=True, **layout), nodes)


def mixed(name: str, prompt: list[int], number: int):
    """Greedy and seeded requests in turn."""
    return greedy(name, prompt, NUM_TOKENS) if number % 2 else sampled(name, prompt)


@pytest.mark.parametrize(
    ("name", "signum"),
    [
        ("copies of every expert", signal.SIGKILL),
        ("spare room, two nodes of two", signal.SIGSTOP),
        ("posted receives", signal.SIGKILL),
    ],
)
def test_survivors_go_on_with_the_same_tokens_and_take_the_lost_rank_in_again(name, signum):
    ranks = start(name)
    victim = len(ranks.processes) - 1
    try:
        undisturbed = ranks.engine().generate(
            [mixed(f"u{n}", prompt, n) for n, prompt in enumerate(PROMPTS)]
        )
        expected = [completion.token_ids for completion in undisturbed]
        pids = {rank: process.pid for rank, process in ranks.processes.items()}
        run = LoopRun(ranks, ranks.recover)
        for number, prompt in enumerate(PROMPTS):
            run.loop.add_request(mixed(f"r{number}", prompt, number))
        run.wait_for_tokens("r4", 10)
        ranks.signal(victim, signum)
        lost_s = time.monotonic()
        run.wait_for_tokens("r4", len(run.tokens["r4"]) + 12)  # of steps after the loss
        # A stopped rank is given 3.4 s to speak; the rest is far less on an idle machine.
        assert time.monotonic() - lost_s < (12.0 if signum == signal.SIGSTOP else 6.0)
        assert len(ranks.recovery_s) == 1
        assert all(
            process.is_alive() and process.pid == pids[rank]
            for rank, process in ranks.processes.items()
            if rank in ranks.roster.now.members
        )
        ranks.start_missing()
        for number, prompt in enumerate(PROMPTS):
            run.loop.add_request(mixed(f"s{number}", prompt, number))
        run.wait_for_tokens("s4", 2)
        run.loop.widen(ranks.take_in)
        run.wait_for_tokens("s4", 60)
        assert ranks.roster.lost == ()
        run.loop.add_request(mixed("late", PROMPTS[1], 1))
        run.drain()
    finally:
        ranks.close()
    assert run.fatal == []
    assert run.causes == set()
    assert [run.tokens[f"r{n}"] for n in range(len(PROMPTS))] == expected
    assert [run.tokens[f"s{n}"] for n in range(len(PROMPTS))] == expected
    assert run.tokens["late"] == expected[1]
