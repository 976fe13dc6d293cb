"""Real expert-parallel ranks in lock-step: tokens, idle groups, and ranks that die or stop."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from cluster.base.errors import PenstockError
from replicas.api import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from replicas.engine.engine_loop import Recovery
from tests.support.lockstep_ranks import LockstepRanks, model_plan
from tests.support.loop_run import (
    LoopRun,
    check_alone_and_together,
    check_random_arrivals,
    greedy,
    said_by_transformers,
)

pytestmark = pytest.mark.dist

MODEL = Path(__file__).parents[2] / "examples" / "models" / "demo-moe"
PROMPTS = [[5 + i, 6, 7] * (1 + 6 * i) for i in range(5)]
NUM_TOKENS = 12
LAYOUTS = {
    "two groups": (2, 1, "flat", ()),
    "one group of two": (1, 2, "flat", ()),
    "two groups of two on two nodes": (2, 2, "hierarchical", ("a", "a", "b", "b")),
    "four groups with posted receives": (4, 1, "preposted", ()),
    "an expert per rank": (4, 2, "flat", ()),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request):
    dp, tp, exchange, nodes = LAYOUTS[request.param]
    group = LockstepRanks(model_plan(MODEL, dp=dp, tp=tp, exchange=exchange), nodes)
    yield group
    group.close()


@pytest.fixture(scope="module")
def two_groups():
    group = LockstepRanks(model_plan(MODEL, dp=2, tp=1), ("a", "b"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def oracle() -> list[list[int]]:
    """What transformers says to `PROMPTS`."""
    return said_by_transformers(MODEL, PROMPTS, NUM_TOKENS)


def test_tokens_are_those_of_transformers_alone_and_together(ranks, oracle):
    check_alone_and_together(ranks, PROMPTS, oracle)


def test_every_routed_row_is_counted_once(ranks):
    before = ranks.expert_states()
    engine = ranks.engine()
    engine.generate([greedy(f"counted{n}", p, 5) for n, p in enumerate(PROMPTS)])
    after = ranks.expert_states()
    layers = range(len(after[0].layers))
    rows = [
        sum(sum(now.rows[i]) - sum(then.rows[i]) for then, now in zip(before, after, strict=True))
        for i in layers
    ]
    # The last token of an answer is not computed with, and prefixes may be cached by now.
    num_tokens = sum(len(prompt) + 4 for prompt in PROMPTS)
    top_k = json.loads((MODEL / "config.json").read_text())["num_experts_per_tok"]
    assert len(set(rows)) == 1
    assert 4 * len(PROMPTS) * top_k < rows[0] <= num_tokens * top_k
    assert sum(state.num_dropped for state in after) == 0


def test_in_bfloat16_other_requests_change_no_token():
    ranks = LockstepRanks(
        model_plan(MODEL, dp=2, tp=2, exchange="hierarchical", dtype="bfloat16"),
        ("a", "a", "b", "b"),
    )
    try:
        engine = ranks.engine()
        alone = [
            engine.generate([greedy(f"alone{n}", prompt)])[0].token_ids
            for n, prompt in enumerate(PROMPTS)
        ]
        together = engine.generate([greedy(f"all{n}", p) for n, p in enumerate(PROMPTS)])
        assert [completion.token_ids for completion in together] == alone
    finally:
        ranks.close()


def test_capacity_drops_and_counts_what_is_beyond_it():
    ranks = LockstepRanks(model_plan(MODEL, dp=2, tp=1, capacity_factor=0.5))
    try:
        (answer,) = ranks.engine().generate([greedy("r", PROMPTS[4])])
        assert len(answer.token_ids) == NUM_TOKENS
        assert sum(state.num_dropped for state in ranks.expert_states()) > 0
    finally:
        ranks.close()


def test_random_arrivals_with_idle_groups_neither_hang_nor_change_a_token(ranks, oracle):
    check_random_arrivals(ranks, PROMPTS, oracle, 24)


def test_idle_ranks_sleep(ranks):
    time.sleep(0.5)
    begun_s = time.monotonic()
    before = [ranks.cpu_s(rank) for rank in range(ranks.plan.num_ranks)]
    time.sleep(2.0)
    elapsed_s = time.monotonic() - begun_s
    for rank, cpu_s in enumerate(before):
        assert (ranks.cpu_s(rank) - cpu_s) / elapsed_s < 0.05


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2)])
def test_a_lost_rank_is_named_with_node_and_operation_in_every_answer(dp, tp, signum):
    ranks = LockstepRanks(model_plan(MODEL, dp=dp, tp=tp), ("a", "b") if tp == 1 else ("b", "b"))
    try:
        run = LoopRun(ranks)
        for number in range(4):
            run.loop.add_request(greedy(f"r{number}", PROMPTS[number], 400))
        run.wait_for_tokens("r3", 3)
        ranks.signal(1, signum)
        lost_s = time.monotonic()
        assert run.loop.wait_drained(10.0)
        assert time.monotonic() - lost_s < 5.0
    finally:
        ranks.close()
    assert [error.code for error in run.fatal] == ["worker_died"]
    assert set(run.ends.values()) == {FinishReason.ERROR}
    assert len(run.ends) == 4
    (cause,) = run.causes
    assert "ank 1" in cause
    assert "node b" in cause
    assert "layer" in cause or "tensor-parallel" in cause


def test_requests_go_on_with_other_ranks_and_get_the_same_tokens():
    first = LockstepRanks(model_plan(MODEL, dp=2, tp=1), ("a", "b"))
    others: list[LockstepRanks] = []

    def recover(error: PenstockError):
        first.close()
        others.append(LockstepRanks(model_plan(MODEL, dp=2, tp=1), ("a", "b")))
        return Recovery(executor=others[0].executor)

    try:
        undisturbed = first.engine().generate(
            [sampled(f"u{n}", prompt) for n, prompt in enumerate(PROMPTS)]
        )
        run = LoopRun(first, recover)
        for number, prompt in enumerate(PROMPTS):
            run.loop.add_request(sampled(f"r{number}", prompt))
        run.wait_for_tokens("r4", 20)
        first.signal(1, signal.SIGKILL)
        run.loop.drain()
        assert run.loop.wait_drained(60.0)
        assert run.loop.stop()
    finally:
        for ranks in (first, *others):
            ranks.close()
    assert len(others) == 1
    assert run.fatal == []
    assert [run.tokens[f"r{n}"] for n in range(len(PROMPTS))] == [
        completion.token_ids for completion in undisturbed
    ]


def sampled(name: str, prompt: list[int]) -> GenerationRequest:
    params = SamplingParams(temperature=0.9, seed=7, max_tokens=120, ignore_eos=True)
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(prompt), params=params)
