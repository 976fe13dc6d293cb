"""Who runs first, who gives way, who is refused, and when a choice ends."""

from __future__ import annotations

import pytest
from simulated_executor import EOS, SimulatedExecutor, config, request

from cluster.base.errors import (
    ConfigError,
    ContextTooLongError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
)
from replicas.api import FinishReason, GenerationDelta, Pooling, TokenLogprob
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_output import RequestResult, SchedulerOutput, StepOutput
from replicas.engine.sync_engine import SyncEngine


def answer(plan: SchedulerOutput, token_id: int, **fields: object) -> StepOutput:
    """Every request that samples gets `token_id`."""
    results = tuple(
        RequestResult(key=key, token_ids=(token_id,), **fields)
        for key, samples in zip(plan.keys, plan.samples, strict=True)
        if samples
    )
    return StepOutput(step=plan.step, results=results)


def play(scheduler: Scheduler, *token_ids: int) -> list[GenerationDelta]:
    """One step per token id."""
    deltas = []
    for token_id in token_ids:
        plan = scheduler.schedule()
        assert plan is not None
        deltas += scheduler.update_from_output(plan, answer(plan, token_id))
    return deltas


def finish_order(engine: SyncEngine) -> list[str]:
    return [delta.request_id for delta in engine.run() if delta.finish_reason]


def make_engine(**limits: int) -> SyncEngine:
    scheduler = Scheduler(config(**limits), EOS)
    return SyncEngine(scheduler, SimulatedExecutor(scheduler.config))


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = Scheduler(config())
    assert scheduler.schedule() is None
    scheduler.add(request("a", [1], max_tokens=1))
    assert len(play(scheduler, 5)) == 1
    assert scheduler.schedule() is None
    assert scheduler.num_unfinished == 0


def test_plans_carry_diffs_only() -> None:
    scheduler = Scheduler(config(block_size=2), EOS)
    scheduler.add(request("a", [1, 2, 3], max_tokens=3, ignore_eos=True))
    first = scheduler.schedule()
    assert first is not None
    (new,) = first.new_requests
    assert (new.token_ids, new.num_prompt_tokens, new.eos_token_ids) == ((1, 2, 3), 3, ())
    assert first.new_block_ids == ((0, 1),)
    assert first.samples == (True,)
    scheduler.update_from_output(first, answer(first, 11))
    second = scheduler.schedule()
    assert second is not None
    assert second.new_requests == ()
    assert second.new_block_ids == ((),)
    assert second.num_computed_tokens == (3,)
    scheduler.update_from_output(second, answer(second, 12))
    third = scheduler.schedule()
    assert third is not None
    assert third.new_block_ids == ((2,),)
    scheduler.update_from_output(third, answer(third, 13))
    scheduler.add(request("b", [1], max_tokens=1))
    fourth = scheduler.schedule()
    assert fourth is not None
    assert fourth.finished_keys == (0,)
    assert fourth.new_requests[0].eos_token_ids == EOS


def test_priority_then_arrival_decides_who_is_let_in() -> None:
    engine = make_engine(max_running_requests=1)
    for name, priority in (("late", 5), ("a", 0), ("b", 0), ("urgent", -1)):
        engine.add(request(name, [1, 2], priority=priority, max_tokens=2, ignore_eos=True))
    assert finish_order(engine) == ["urgent", "a", "b", "late"]


def test_the_least_important_request_gives_way() -> None:
    scheduler = Scheduler(config(num_blocks=8, max_context=32), EOS)
    engine = SyncEngine(scheduler, SimulatedExecutor(scheduler.config))
    for name, priority in (("low", 1), ("first", 0), ("second", 0)):
        engine.add(request(name, [1] * 4, priority=priority, max_tokens=12, ignore_eos=True))
    assert finish_order(engine) == ["first", "second", "low"]
    assert engine.stats.num_preemptions >= 1


def test_the_oldest_request_is_never_held_up_by_newcomers() -> None:
    engine = make_engine(num_blocks=6, max_context=24, max_step_tokens=4, max_running_requests=3)
    engine.add(request("old", [1] * 9, max_tokens=15, ignore_eos=True))
    finished, num_steps = [], 0
    while "old" not in finished:
        engine.add(request(f"new{num_steps}", [2, 3, num_steps % 7], max_tokens=3))
        finished += [delta.request_id for delta in engine.step() if delta.finish_reason]
        num_steps += 1
    # Three chunks of the prompt, then a token a step (the last chunk gives the first).
    assert num_steps <= 4 + 14
    assert len(list(engine.run())) > 0
    assert not engine.has_unfinished


def test_a_long_prompt_leaves_running_requests_a_token_each() -> None:
    scheduler = Scheduler(config(max_step_tokens=8), EOS)
    for name in ("a", "b"):
        scheduler.add(request(name, [1], priority=1, max_tokens=20))
    play(scheduler, 1)
    scheduler.add(request("long", [2] * 50, max_tokens=1))
    play(scheduler, 1, 1)
    plan = scheduler.schedule()
    assert plan is not None
    # "long" is more important and goes first, yet takes what the others leave.
    assert plan.num_scheduled_tokens == (6, 1, 1)


def test_a_budget_smaller_than_the_batch_serves_the_most_important_first() -> None:
    engine = make_engine(max_step_tokens=2)
    for number in range(5):
        engine.add(request(f"r{number}", [number], max_tokens=3, ignore_eos=True))
    assert finish_order(engine) == [f"r{number}" for number in range(5)]


def test_an_admission_leaves_a_block_for_each_running_request() -> None:
    scheduler = Scheduler(config(num_blocks=4, max_context=16), EOS)
    scheduler.add(request("a", [1] * 8, max_tokens=4))
    scheduler.add(request("b", [2] * 8, max_tokens=4))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.keys == (0,)


def test_a_prompt_is_let_in_only_when_all_of_it_fits() -> None:
    scheduler = Scheduler(config(num_blocks=6, max_context=24, max_step_tokens=8))
    scheduler.add(request("a", [1] * 7, max_tokens=9))
    play(scheduler, 1)
    scheduler.add(request("b", [2] * 13, max_tokens=4))
    plan = scheduler.schedule()
    assert plan is not None
    # A first chunk of 7 tokens would fit into the 4 free blocks; 4 blocks and one spare do not.
    assert plan.keys == (0,)


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_token_id"),
    [
        ({"max_tokens": 3}, (1, 1, 1), FinishReason.LENGTH, None),
        ({"max_tokens": 9}, (1, 7), FinishReason.STOP, 7),
        ({"max_tokens": 2}, (1, 7), FinishReason.STOP, 7),
        ({"max_tokens": 3, "ignore_eos": True}, (1, 7, 7), FinishReason.LENGTH, None),
        ({"max_tokens": 9, "stop_token_ids": (4,)}, (1, 4), FinishReason.STOP, 4),
        (
            {"max_tokens": 9, "stop_token_ids": (7,), "ignore_eos": True},
            (7,),
            FinishReason.STOP,
            7,
        ),
        ({"max_tokens": 9, "min_tokens": 2}, (7, 7, 7), FinishReason.STOP, 7),
        ({"max_tokens": 2, "min_tokens": 2}, (7, 7), FinishReason.LENGTH, None),
        ({"max_tokens": 99}, (1, 2, 3, 4), FinishReason.LENGTH, None),
    ],
)
def test_endings(
    params: dict[str, object],
    tokens: tuple[int, ...],
    reason: FinishReason,
    stop_token_id: int | None,
) -> None:
    scheduler = Scheduler(config(max_context=7), EOS)
    scheduler.add(request("a", [1, 2, 3], **params))
    *_, last = deltas = play(scheduler, *tokens)
    assert [token for delta in deltas for token in delta.token_ids] == list(tokens)
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    assert (last.finish_reason, last.stop_token_id) == (reason, stop_token_id)
    assert scheduler.num_unfinished == 0


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (request("a", []), InvalidRequestError, "no tokens"),
        (request("a", [1], n=0), InvalidRequestError, "n is 0"),
        (request("a", [1], n=2, pooling=Pooling.LAST), InvalidRequestError, "embedding"),
        (request("a", [1] * 16), ContextTooLongError, "16 tokens; with a context of 16 .* 15"),
        (request("a", [1] * 17, max_tokens=0), ContextTooLongError, "at most 16"),
        (request("a", [1] * 17, pooling=Pooling.LAST), ContextTooLongError, "at most 16"),
        (request("a", [1] * 9, max_tokens=6), ContextTooLongError, "14 tokens.*12 .3 blocks of 4"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    bad: object, error: type[Exception], match: str
) -> None:
    scheduler = Scheduler(config(max_context=16, num_blocks=3))
    with pytest.raises(error, match=match):
        scheduler.add(bad)
    assert scheduler.num_unfinished == 0
    scheduler.add(request("a", [1] * 9, max_tokens=4))


def test_an_id_in_use_is_refused_until_its_last_choice_ended() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", [1], n=2))
    with pytest.raises(InvalidRequestError, match="running already"):
        scheduler.add(request("a", [1]))
    scheduler.abort("a", 0)
    with pytest.raises(InvalidRequestError):
        scheduler.add(request("a", [1]))
    scheduler.abort("a")
    scheduler.add(request("a", [1]))


def test_too_many_waiting_requests_are_refused() -> None:
    scheduler = Scheduler(config(max_waiting_requests=2, max_running_requests=1))
    for name in ("a", "b"):
        scheduler.add(request(name, [1]))
    with pytest.raises(OverloadedError, match="2 requests are waiting; the limit is 2"):
        scheduler.add(request("c", [1]))
    play(scheduler, 1)
    scheduler.add(request("c", [1]))


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens is 0"):
        config(max_step_tokens=0)


def test_one_request_fails_alone() -> None:
    scheduler = Scheduler(config(), EOS)
    for name in ("a", "b", "c", "d"):
        scheduler.add(request(name, [1, 2], max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    broken: object = ("not a number",)
    results = (
        RequestResult(key=0, token_ids=(3,)),
        RequestResult(key=1, error="NaN logits"),
        RequestResult(key=3, token_ids=broken, prompt_logprobs=5),  # type: ignore[arg-type]
    )
    deltas = scheduler.update_from_output(plan, StepOutput(step=plan.step, results=results))
    failed = {d.request_id: d.error for d in deltas if d.finish_reason is FinishReason.ERROR}
    assert set(failed) == {"b", "c"}
    assert failed["b"] == InternalError("NaN logits").to_dict()
    assert failed["c"] is not None
    assert "no token" in str(failed["c"]["cause"])
    scheduler.check_invariants()


def test_an_unexpected_exception_over_one_result_fails_that_request_only() -> None:
    scheduler = Scheduler(config(), EOS)
    scheduler.add(request("bad", [1, 2, 3], max_tokens=2, prompt_logprobs=0))
    scheduler.add(request("good", [1, 2, 3], max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    results = (
        RequestResult(key=0, token_ids=(3,), prompt_logprobs=5),  # type: ignore[arg-type]
        RequestResult(key=1, token_ids=(3,)),
    )
    deltas = scheduler.update_from_output(plan, StepOutput(step=plan.step, results=results))
    assert [d.finish_reason for d in deltas] == [FinishReason.ERROR, None]
    assert deltas[0].error is not None
    assert deltas[0].error["cause"] == "The engine met an unexpected TypeError."


def test_missing_scores_fail_the_request_instead_of_shifting_them() -> None:
    scheduler = Scheduler(config(), EOS)
    scheduler.add(request("a", [1, 2, 3], max_tokens=2, prompt_logprobs=0))
    plan = scheduler.schedule()
    assert plan is not None
    one = (TokenLogprob(token_id=2, logprob=-1.0, rank=1),)
    (delta,) = scheduler.update_from_output(plan, answer(plan, 4, prompt_logprobs=one))
    assert delta.error is not None
    assert "3 prompt tokens, but 2 were scored" in str(delta.error["cause"])


def test_the_answer_to_another_step_is_an_error() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", [1]))
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(InternalError, match="Step 1 was answered with step 2"):
        scheduler.update_from_output(plan, StepOutput(step=2))


def test_a_result_of_an_aborted_request_is_dropped_and_its_row_freed() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", [1, 2]))
    scheduler.add(request("b", [1, 2]))
    plan = scheduler.schedule()
    assert plan is not None
    (last,) = scheduler.abort("a")
    assert last.finish_reason is FinishReason.ABORT
    assert [d.request_id for d in scheduler.update_from_output(plan, answer(plan, 3))] == ["b"]
    after = scheduler.schedule()
    assert after is not None
    assert after.finished_keys == (0,)
    assert scheduler.abort("a") == []
    assert scheduler.abort("b", 5) == []


def test_a_request_aborted_before_its_first_step_never_reaches_the_workers() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", [1, 2], n=3))
    scheduler.add(request("b", [1, 2]))
    assert len(scheduler.abort("a")) == 3
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.keys, plan.finished_keys) == ((3,), ())


def test_stats_count_what_waits_and_what_was_made() -> None:
    scheduler = Scheduler(config(max_running_requests=1))
    scheduler.add(request("a", [1, 2], max_tokens=3), arrival_s=1.0)
    scheduler.add(request("b", [1, 2, 3], n=2, max_tokens=3), arrival_s=2.0)
    assert scheduler.oldest_waiting_arrival_s == 1.0
    before = scheduler.stats()
    assert (before.num_waiting, before.num_waiting_tokens) == (3, 2 + 3 + 1)
    play(scheduler, 1, 1)
    after = scheduler.stats()
    assert scheduler.oldest_waiting_arrival_s == 2.0
    assert (after.num_running, after.num_waiting, after.num_waiting_tokens) == (1, 2, 4)
    assert (after.step, after.generated_tokens) == (2, 2)
    assert (after.kv_blocks_total, after.kv_blocks_free) == (256, 255)
    assert (after.prefix_query_tokens, after.prefix_hit_tokens) == (2, 0)


def test_fail_all_ends_everything_with_the_cause() -> None:
    scheduler = Scheduler(config(max_running_requests=1))
    scheduler.add(request("a", [1, 2], max_tokens=3))
    scheduler.add(request("b", [1, 2], n=2))
    play(scheduler, 1)
    deltas = scheduler.fail_all(InternalError("boom"))
    assert [(d.request_id, d.index) for d in deltas] == [("a", 0), ("b", 0), ("b", 1)]
    assert all(d.error is not None and d.error["cause"] == "boom" for d in deltas)
    scheduler.check_invariants()
    assert scheduler.num_unfinished == 0


def test_a_plan_on_top_of_a_step_counts_on_its_tokens() -> None:
    scheduler = Scheduler(config(block_size=2), EOS)
    scheduler.add(request("a", [1, 2, 3], max_tokens=3, ignore_eos=True))
    plans = [scheduler.schedule() for _ in range(3)]
    assert all(plan is not None and plan.samples == (True,) for plan in plans)
    assert [plan.num_computed_tokens for plan in plans if plan] == [(0,), (3,), (4,)]
    assert [plan.num_scheduled_tokens for plan in plans if plan] == [(3,), (1,), (1,)]
    # Three tokens will be out then: nothing is left to plan, and nothing is wrong.
    assert scheduler.schedule() is None
    deltas = []
    for token_id, plan in zip((11, 12, 13), plans, strict=True):
        assert plan is not None
        scheduler.check_invariants()
        deltas += scheduler.update_from_output(plan, answer(plan, token_id))
    assert [delta.token_ids for delta in deltas] == [(11,), (12,), (13,)]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert scheduler.num_discarded_tokens == 0


def test_a_stop_discards_what_was_planned_on_top_of_it() -> None:
    scheduler = Scheduler(config(), EOS)
    scheduler.add(request("a", [1, 2, 3], max_tokens=9))
    scheduler.add(request("b", [1, 2, 3], max_tokens=9, ignore_eos=True))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    ended = scheduler.update_from_output(first, answer(first, 7))
    assert [delta.finish_reason for delta in ended] == [FinishReason.STOP, None]
    third = scheduler.schedule()
    assert third is not None
    assert (third.keys, third.finished_keys) == ((1,), (0,))
    late = scheduler.update_from_output(second, answer(second, 5))
    assert [delta.request_id for delta in late] == ["b"]
    assert scheduler.num_discarded_tokens == 1
    scheduler.check_invariants()


def test_answers_have_to_come_in_the_order_of_the_plans() -> None:
    scheduler = Scheduler(config(), EOS)
    scheduler.add(request("a", [1, 2, 3], max_tokens=9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(InternalError, match="Step 2 is not the oldest one in flight"):
        scheduler.update_from_output(second, answer(second, 5))


def test_a_preempted_request_comes_back_when_its_token_is_known_and_carries_it() -> None:
    scheduler = Scheduler(config(num_blocks=5, max_context=16, prefix_caching=False))
    for name in ("a", "b"):
        scheduler.add(request(name, [1] * 7, max_tokens=9, ignore_eos=True))
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.keys, second.keys, third.keys) == ((0, 1), (0, 1), (0,))
    assert third.finished_keys == (1,)
    scheduler.check_invariants()
    scheduler.abort("a")
    # There is room now, but two tokens of b are still being sampled.
    assert scheduler.schedule() is None
    scheduler.update_from_output(first, answer(first, 21))
    assert scheduler.schedule() is None
    scheduler.update_from_output(second, answer(second, 22))
    back = scheduler.schedule()
    assert back is not None
    assert [new.token_ids for new in back.new_requests] == [(1,) * 7 + (21, 22)]
    assert (back.keys, back.num_computed_tokens, back.num_scheduled_tokens) == ((1,), (0,), (9,))
    scheduler.check_invariants()


def test_a_request_that_ends_in_flight_gives_its_blocks_before_another_is_preempted() -> None:
    scheduler = Scheduler(config(num_blocks=6, max_context=16, prefix_caching=False))
    scheduler.add(request("a", [1] * 7, max_tokens=5))
    scheduler.add(request("ends", [2] * 4, max_tokens=2))
    scheduler.add(request("b", [3] * 3, max_tokens=5))
    plans = [scheduler.schedule() for _ in range(3)]
    # The third step needs a block for `a`, the last one, and one for `b`.
    assert [plan.keys for plan in plans if plan] == [(0, 1, 2), (0, 1, 2), (0, 2)]
    assert plans[2] is not None
    assert plans[2].finished_keys == (1,)
    assert scheduler.stats().num_preemptions == 0
    deltas = []
    for plan in plans:
        assert plan is not None
        deltas += scheduler.update_from_output(plan, answer(plan, 9))
        scheduler.check_invariants()
    ended = {d.request_id: d.finish_reason for d in deltas if d.finish_reason}
    assert ended == {"ends": FinishReason.LENGTH}


def test_a_place_that_becomes_free_in_flight_is_taken_at_once() -> None:
    scheduler = Scheduler(config(max_running_requests=1))
    scheduler.add(request("a", [1], max_tokens=1))
    scheduler.add(request("b", [2], max_tokens=1))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert (first.keys, second.keys) == ((0,), (1,))
    scheduler.check_invariants()
