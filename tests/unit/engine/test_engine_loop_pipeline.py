"""The loop with a step planned on top of the one in flight: streams, commands, ends, accounts."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
from loop_harness import Harness
from simulated_executor import COPYING, expected, request

from cluster.base.errors import WorkerDiedError
from replicas.api import FinishReason
from replicas.engine.speculation import SpeculationConfig


def pipelined(**limits: Any) -> Harness:
    """No answer is there early, so each step is planned on top of the one before."""
    harness = Harness(**limits)
    harness.executor.is_ready = lambda: False
    return harness


def tokens_of(harness: Harness, request_id: str) -> list[int]:
    return [
        token
        for delta in harness.deltas
        if delta.request_id == request_id
        for token in delta.token_ids
    ]


def run_to_the_end(harness: Harness) -> None:
    while harness.loop.run_once():
        harness.scheduler.check_invariants()


def test_the_workers_always_have_the_next_plan() -> None:
    harness = pipelined()
    wanted = [
        request("a", [1, 2, 3], max_tokens=6, ignore_eos=True),
        request("b", list(range(9)), max_tokens=4, ignore_eos=True, n=2),
    ]
    for new in wanted:
        harness.loop.add_request(new)
    depths: list[int] = []
    harness.executor.before_collect = lambda: depths.append(len(harness.executor.plans))
    run_to_the_end(harness)
    assert depths == [2] * (len(depths) - 1) + [1]
    assert tokens_of(harness, "a") == expected(wanted[0], 0, 128).token_ids
    assert harness.scheduler.num_discarded_tokens == 0
    assert harness.calls[-1][1].kv_blocks_free == 256
    # One call per step, told while the next one is computed.
    assert len(harness.calls) == len(depths)
    assert harness.loop.times.num_steps == len(depths)


@pytest.mark.parametrize(("step_s", "depth"), [(0.0, 2), (1.0, 1)], ids=["due", "not due"])
def test_tokens_are_told_before_the_next_plan_unless_it_is_due(step_s: float, depth: int) -> None:
    harness = pipelined()
    collect = harness.executor.collect
    harness.executor.collect = lambda timeout_s: replace(  # type: ignore[method-assign]
        collect(timeout_s), duration_s=step_s
    )
    harness.loop.add_request(request("a", [1, 2, 3], max_tokens=6, ignore_eos=True))
    depths: list[int] = []
    harness.on_deltas = lambda: depths.append(len(harness.executor.plans))
    run_to_the_end(harness)
    # The first decode is of a size that nothing is known of; the end leaves nothing to plan.
    assert depths[2:4] == [depth] * 2


def test_a_step_that_answers_early_is_taken_in_before_the_next_plan() -> None:
    harness = Harness()
    harness.loop.add_request(request("a", [1, 2, 3], max_tokens=4, ignore_eos=True))
    depths: list[int] = []
    harness.executor.before_collect = lambda: depths.append(len(harness.executor.plans))
    run_to_the_end(harness)
    assert depths == [1] * 4


def test_the_token_after_a_stop_is_discarded_and_nobody_hears_of_it() -> None:
    harness = pipelined()
    long = request("a", [1, 2, 3], max_tokens=60, ignore_eos=True)
    stream = expected(long, 0, 128).token_ids
    wanted = request("b", [1, 2, 3], max_tokens=60, ignore_eos=True, stop_token_ids=(stream[4],))
    harness.loop.add_request(wanted)
    run_to_the_end(harness)
    answer = expected(wanted, 0, 128)
    assert tokens_of(harness, "b") == answer.token_ids
    assert harness.last()["b", 0].stop_token_id == answer.stop_token_id
    assert harness.scheduler.num_discarded_tokens == 1
    assert len(harness.executor.history) == len(answer.token_ids) + 1
    assert harness.calls[-1][1].kv_blocks_free == 256


def test_commands_that_arrive_during_a_step_count_for_the_very_next_plan() -> None:
    harness = pipelined()
    for name in ("a", "b"):
        harness.loop.add_request(request(name, [1, 2, 3], max_tokens=50, ignore_eos=True))

    def while_the_step_runs() -> bool:
        if len(harness.executor.submitted) == 3:
            harness.loop.abort("a")
            harness.loop.add_request(request("c", [7, 7], max_tokens=2, ignore_eos=True))
        return False

    harness.executor.is_ready = while_the_step_runs
    for _ in range(3):
        harness.loop.run_once()
    plan = harness.executor.submitted[3]
    assert plan.step == 4
    assert (plan.keys, plan.finished_keys) == ((1, 2), (0,))
    assert harness.scheduler.num_discarded_tokens == 1
    run_to_the_end(harness)
    assert {name: d.finish_reason for (name, _), d in harness.last().items()} == {
        "a": FinishReason.ABORT,
        "b": FinishReason.LENGTH,
        "c": FinishReason.LENGTH,
    }


def test_a_failed_request_fails_once_and_its_step_in_flight_is_dropped() -> None:
    harness = pipelined()
    good = request("good", [1, 2], max_tokens=6, ignore_eos=True)
    harness.loop.add_request(request("bad", [1, 2], max_tokens=6, ignore_eos=True))
    harness.loop.add_request(good)
    harness.executor.errors_from[0] = 3
    run_to_the_end(harness)
    assert harness.codes() == {"bad": "internal", "good": None}
    assert len(tokens_of(harness, "bad")) == 2
    assert tokens_of(harness, "good") == expected(good, 0, 128).token_ids
    assert harness.fatal == []


def test_losing_the_executor_with_two_steps_in_flight_answers_everybody() -> None:
    harness = pipelined(max_running_requests=1)
    harness.loop.add_request(request("running", [1, 2], max_tokens=9, ignore_eos=True))
    harness.loop.add_request(request("waiting", [1, 2], n=2))
    harness.loop.run_once()
    harness.executor.fail_with = WorkerDiedError("Rank 1 was killed.")
    assert not harness.loop.run_once()
    assert len(harness.executor.plans) == 2
    assert harness.codes() == {"running": "worker_died", "waiting": "worker_died"}
    assert len(harness.last()) == 3
    assert [fatal.code for fatal in harness.fatal] == ["worker_died"]
    assert harness.loop.stop()
    harness.scheduler.check_invariants()


def test_stop_leaves_no_step_in_the_executor() -> None:
    harness = pipelined()
    harness.loop.add_request(request("a", [1, 2], max_tokens=90, ignore_eos=True))
    for _ in range(3):
        harness.loop.run_once()
    assert len(harness.executor.plans) == 1
    assert harness.loop.stop()
    assert not harness.executor.plans
    assert harness.codes() == {"a": "unavailable"}
    # The answer that was still out is told too.
    assert len(tokens_of(harness, "a")) == 4
    assert harness.fatal == []


def test_an_executor_that_dies_while_the_loop_stops_is_still_fatal() -> None:
    harness = pipelined()
    harness.loop.add_request(request("a", [1, 2], max_tokens=90, ignore_eos=True))
    harness.loop.run_once()
    harness.executor.fail_with = WorkerDiedError("Rank 0 was killed.")
    assert harness.loop.stop()
    assert harness.codes() == {"a": "worker_died"}
    assert [fatal.code for fatal in harness.fatal] == ["worker_died"]


def test_a_drain_ends_after_the_last_step_in_flight() -> None:
    harness = pipelined()
    # Stops by a token, so that a step is in flight for nobody.
    stop = expected(request("a", [1, 2, 3], ignore_eos=True), 0, 128).token_ids[2]
    harness.loop.add_request(request("a", [1, 2, 3], ignore_eos=True, stop_token_ids=(stop,)))
    harness.loop.drain()
    harness.loop.start()
    assert harness.loop.wait_drained(10.0)
    assert not harness.executor.plans
    assert harness.codes() == {"a": None}
    assert harness.loop.stop()


def test_health_and_times_follow_the_step_that_executes() -> None:
    harness = pipelined()
    harness.loop.add_request(request("a", [1, 2], max_tokens=3, ignore_eos=True))

    def wait() -> bool:
        harness.now += 2.0
        return False

    def compute() -> None:
        harness.now += 1.0

    harness.executor.is_ready, harness.executor.before_collect = wait, compute
    started = []
    while harness.loop.run_once():
        started.append((harness.loop.health.step_started_s, harness.loop.health.last_step_end_s))
    # A step starts when the one ahead of it ends.
    assert started[:3] == [(103.0, 103.0), (106.0, 106.0), (None, 109.0)]
    assert harness.loop.times.execute_s == 9.0
    assert harness.loop.times.max_execute_s == 3.0


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_add_and_abort_and_every_choice_ends_once(seed: int) -> None:
    harness = Harness(num_blocks=24, max_context=32, max_waiting_requests=1000)
    rng = random.Random(seed)
    harness.executor.is_ready = lambda: rng.random() < 0.3
    harness.loop.start()

    def client(number: int) -> None:
        for count in range(12):
            name = f"c{number}-{count}"
            harness.loop.add_request(request(name, [number, count, 1], n=2, max_tokens=4))
            if count % 3 == 0:
                harness.loop.abort(name, count % 2)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    harness.loop.drain()
    assert harness.loop.wait_drained(20.0)
    assert len(harness.last()) == 4 * 12 * 2
    assert harness.fatal == []
    assert harness.calls[-1][1].kv_blocks_free == 24
    assert harness.loop.stop()
    harness.scheduler.check_invariants()


SPECULATION = SpeculationConfig(num_tokens=5, min_ngram=1, max_ngram=3)


def test_only_a_promising_guess_holds_the_next_plan_back() -> None:
    """One request copies and one does not: while the first has a guess, plans wait for answers."""
    harness = pipelined(speculation=SPECULATION)
    copies = request("copies", [1, 2, 3], max_tokens=40, ignore_eos=True, seed=COPYING)
    other = request("other", [1, 2, 3], max_tokens=40, ignore_eos=True, seed=1)
    for new in (copies, other):
        harness.loop.add_request(new)
    depths: list[int] = []
    harness.executor.before_collect = lambda: depths.append(len(harness.executor.plans))
    run_to_the_end(harness)
    for new in (copies, other):
        assert tokens_of(harness, new.request_id) == expected(new, 0, 128).token_ids
    stats = harness.calls[-1][1]
    assert stats.accepted_draft_tokens > 10
    assert stats.kv_blocks_free == 256
    # Steps with a draft in them stand alone, and others are planned ahead.
    drafted = [bool(plan.draft_token_ids) for plan in harness.executor.history]
    assert all(depth == 1 for depth, drafts in zip(depths, drafted, strict=True) if drafts)
    assert depths.count(2) > 5
    assert sum(drafted) > 5


def test_an_abort_with_a_draft_in_flight_frees_everything() -> None:
    harness = pipelined(speculation=SPECULATION)
    copies = request("a", [1, 2, 3], max_tokens=60, ignore_eos=True, seed=COPYING)
    harness.loop.add_request(copies)
    aborted = []

    def while_the_step_runs() -> bool:
        if harness.executor.plans[-1].draft_token_ids and not aborted:
            aborted.append(harness.executor.plans[-1].draft_token_ids)
            harness.loop.abort("a")
        return False

    harness.executor.is_ready = while_the_step_runs
    run_to_the_end(harness)
    assert aborted
    assert harness.last()["a", 0].finish_reason is FinishReason.ABORT
    heard = tokens_of(harness, "a")
    assert heard == expected(copies, 0, 128).token_ids[: len(heard)]
    assert harness.calls[-1][1].kv_blocks_free == 256
