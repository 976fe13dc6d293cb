"""Whatever is batched, chunked, shared, preempted or aborted: each stream is what it is alone.

Random workloads against answers computed from the tokens alone; the executor raises on any
block-table mistake. All of it with one step at a time, and with steps planned on top of others.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engine_settings import engine_settings
from hypothesis import given
from hypothesis import strategies as st
from scheduler_runs import (
    MAX_STEPS,
    PipelinedRun,
    RestartedRun,
    Run,
    random_run,
)
from simulated_executor import config, request

from cluster.base.errors import ContextTooLongError
from replicas.api import FinishReason
from replicas.engine.scheduler_config import SchedulerConfig


@engine_settings(max_examples=80)
@given(st.integers(0, 2**32))
def test_any_interleaving_gives_the_streams_of_one_at_a_time(seed: int) -> None:
    random_run(seed)


@engine_settings(max_examples=120)
@given(st.integers(0, 2**32), st.sampled_from((2, 2, 2, 3)))
def test_steps_in_flight_change_no_stream(seed: int, depth: int) -> None:
    random_run(seed, depth)


def test_many_random_runs_in_flight_meet_every_mechanism() -> None:
    preempted_unknown = discarded = on_top = errors = preemptions = copies = hits = 0
    for seed in range(700):
        run = random_run(seed, depth=2)
        assert isinstance(run, PipelinedRun)
        preempted_unknown += run.num_preempted_unknown
        discarded += run.scheduler.num_discarded_tokens
        on_top += run.num_on_top
        preemptions += run.engine.stats.num_preemptions
        copies += run.executor.num_copies
        hits += run.engine.stats.prefix_hit_tokens
        reasons = [completion.finish_reason for completion in run.completions.values()]
        errors += reasons.count(FinishReason.ERROR)
    assert preempted_unknown > 30
    assert discarded > 200
    assert on_top > 5000
    assert errors > 30
    assert preemptions > 80
    assert copies > 100
    assert hits > 500


@engine_settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from((2, 3)), st.booleans())
def test_other_workers_change_no_stream(seed: int, depth: int, speculates: bool) -> None:
    random_run(seed, depth, speculates=speculates, kind=RestartedRun)


def test_many_random_runs_replace_their_workers() -> None:
    runs = [random_run(seed, 2, kind=RestartedRun) for seed in range(100)]
    assert sum(run.num_restarts for run in runs if isinstance(run, RestartedRun)) > 100


@engine_settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from((1, 2, 2, 3)))
def test_drafts_change_no_stream(seed: int, depth: int) -> None:
    random_run(seed, depth, speculates=True)


def test_many_random_runs_with_drafts_meet_every_mechanism() -> None:
    drafted = accepted = preemptions = on_top = copies = errors = 0
    for seed in range(500):
        run = random_run(seed, depth=2, speculates=True)
        assert isinstance(run, PipelinedRun)
        drafted += run.engine.stats.draft_tokens
        accepted += run.engine.stats.accepted_draft_tokens
        preemptions += run.engine.stats.num_preemptions
        copies += run.executor.num_copies
        on_top += run.num_on_top
        reasons = [completion.finish_reason for completion in run.completions.values()]
        errors += reasons.count(FinishReason.ERROR)
    assert accepted > 300
    assert drafted - accepted > 300
    assert preemptions > 80
    assert copies > 200
    assert on_top > 5000
    assert errors > 30


def test_many_random_runs_meet_every_mechanism() -> None:
    preemptions = hits = copies = replaced = 0
    for seed in range(500):
        run = random_run(seed)
        preemptions += run.engine.stats.num_preemptions
        hits += run.engine.stats.prefix_hit_tokens
        copies += run.executor.num_copies
        replaced += run.executor.num_replaced
    assert preemptions > 80
    assert hits > 500
    assert copies > 100
    assert replaced > 20


PROMPTS = [[(i * k) % 13 for i in range(20 + k)] for k in range(1, 6)]


def streams(limits: SchedulerConfig, **params: object) -> tuple[Run, list[list[int]]]:
    run = Run(limits)
    for number, prompt in enumerate(PROMPTS):
        run.add(request(f"r{number}", prompt, max_tokens=12, ignore_eos=True, **params))
    run.finish()
    return run, [completion.token_ids for completion in run.completions.values()]


def test_chunked_prefill_equals_whole_prefill() -> None:
    _, whole = streams(config(max_step_tokens=128))
    run, chunked = streams(config(max_step_tokens=5))
    assert chunked == whole
    assert max(plan.num_tokens for plan in run.executor.history) == 5


def test_preempted_equals_straight() -> None:
    _, straight = streams(config())
    run, preempted = streams(config(num_blocks=16))
    assert preempted == straight
    assert run.engine.stats.num_preemptions > 0
    assert run.engine.stats.prefix_query_tokens == sum(len(prompt) for prompt in PROMPTS)


def test_prefix_hit_equals_miss() -> None:
    run = Run(config())
    first = request("a", PROMPTS[0], max_tokens=12, ignore_eos=True)
    run.add(first)
    run.finish()
    run.add(request("b", PROMPTS[0], max_tokens=12, ignore_eos=True))
    run.finish()
    assert run.completions["b", 0].token_ids == run.completions["a", 0].token_ids
    assert run.completions["a", 0].num_cached_tokens == 0
    assert run.completions["b", 0].num_cached_tokens == 20
    assert run.engine.stats.prefix_hit_tokens == 20
    assert run.engine.stats.prefix_query_tokens == 2 * len(PROMPTS[0])
    run.add(request("c", PROMPTS[0], max_tokens=2, ignore_eos=True, n=3))
    run.finish()
    assert [run.completions["c", index].num_cached_tokens for index in range(3)] == [20] * 3


@pytest.mark.parametrize("num_prompt", [1, 2, 5, 8, 9])
def test_forked_choices_equal_separate_requests(num_prompt: int) -> None:
    prompt = list(range(num_prompt))
    run = Run(config(prefix_caching=False))
    run.add(request("a", prompt, n=4, max_tokens=10, prompt_logprobs=0, logprobs=0))
    run.finish()
    computed = sum(plan.num_tokens for plan in run.executor.history)
    num_outputs = sum(len(c.token_ids) - 1 for c in run.completions.values())
    # The prompt once, its last token again for three forks, and every output but the last.
    assert computed == num_prompt + 3 + num_outputs


@pytest.mark.parametrize("doom", [0, 1, 3, 6])
@pytest.mark.parametrize("index", [0, 1, None])
def test_aborting_one_choice_leaves_the_others_alone(doom: int, index: int | None) -> None:
    run = Run(config(max_step_tokens=4))
    run.add(request("a", list(range(11)), n=3, max_tokens=9, prompt_logprobs=0))
    for _ in range(doom):
        run.step()
    run.abort("a", index)
    run.finish()
    aborted = [c.index for c in run.completions.values() if c.finish_reason is FinishReason.ABORT]
    assert aborted == ([0, 1, 2] if index is None else [index])


def test_a_failed_parent_leaves_the_prompt_to_its_heirs() -> None:
    run = Run(config(max_step_tokens=4))
    run.add(request("a", list(range(11)), n=3, max_tokens=4))
    run.executor.errors["0"] = "NaN logits"
    for _ in range(MAX_STEPS):
        run.step()
        if not run.engine.has_unfinished:
            break
    failed = run.completions["a", 0]
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error is not None
    assert failed.error["code"] == "internal"
    assert failed.error["cause"] == "NaN logits"
    for index in (1, 2):
        run.check(run.requests["a"], index, run.completions["a", index])


def test_forks_give_their_blocks_back_when_others_need_them() -> None:
    run = Run(config(num_blocks=6, max_running_requests=1))
    run.add(request("a", list(range(10)), n=3, max_tokens=12, ignore_eos=True))
    run.finish()
    assert run.engine.stats.num_preemptions == 0


def test_waiting_forks_make_room_for_a_more_important_request() -> None:
    run = Run(config(num_blocks=6, max_running_requests=1))
    run.add(request("a", list(range(10)), n=3, max_tokens=1))
    run.step()
    assert run.engine.stats.num_waiting_tokens == 2
    assert run.engine.stats.kv_blocks_free == 3
    run.add(request("urgent", list(range(20, 40)), priority=-1, max_tokens=3, ignore_eos=True))
    run.step()
    assert run.completions["urgent", 0].token_ids != []
    # Both forks gave their blocks back and will compute the prompt themselves.
    assert run.engine.stats.num_waiting_tokens == 10 + 10
    run.finish()


def test_a_request_that_fills_the_pool_to_the_last_slot_runs() -> None:
    limits = config(num_blocks=5, max_context=64)
    run = Run(limits)
    run.add(request("a", list(range(8)), n=2, max_tokens=13, ignore_eos=True))
    run.add(request("b", list(range(8)), n=2, max_tokens=13, ignore_eos=True))
    run.finish()
    with pytest.raises(ContextTooLongError, match="memory for 21 tokens; the replica has 20"):
        run.add(request("c", list(range(8)), max_tokens=14))


@pytest.mark.parametrize("make", [lambda n: config(max_step_tokens=n), lambda n: config()])
def test_prompt_only_requests_say_their_scores_once(
    make: Callable[[int], SchedulerConfig],
) -> None:
    run = Run(make(3))
    run.add(request("a", list(range(10)), max_tokens=0, prompt_logprobs=2, n=2))
    run.finish()
    for completion in run.completions.values():
        assert len(completion.prompt_logprobs) == 10
        assert completion.prompt_logprobs[0] is None
        assert completion.finish_reason is FinishReason.LENGTH


def test_streams_that_end_by_length_cost_no_token_in_flight() -> None:
    run = PipelinedRun(config(max_context=32), random.Random(0), depth=2)
    for number, prompt in enumerate(PROMPTS):
        run.add(request(f"r{number}", prompt, max_tokens=4 + 3 * number, ignore_eos=True))
    run.finish()
    assert run.num_on_top > 5
    assert run.scheduler.num_discarded_tokens == 0
