from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from loop_harness import Harness
from simulated_executor import SimulatedExecutor, expected, request

from cluster.base.errors import (
    CollectiveTimeoutError,
    PenstockError,
    UnavailableError,
    WorkerDiedError,
)
from replicas.api import FinishReason
from replicas.engine.engine_loop import EngineLoop
from replicas.engine.scheduler_output import SchedulerOutput


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.loop.stop()


def test_one_call_per_step_while_the_next_one_is_computed(harness: Harness) -> None:
    wanted = request("a", [1, 2, 3], max_tokens=4, ignore_eos=True)
    harness.loop.add_request(wanted)
    while harness.loop.run_once():
        pass
    # What step n said is told when step n + 1 is under way, the last one's when nothing is.
    assert [stats.step for _, stats in harness.calls] == [2, 3, 4, 4]
    tokens = [token for delta in harness.deltas for token in delta.token_ids]
    assert tokens == expected(wanted, 0, 128).token_ids
    assert harness.calls[-1][1].kv_blocks_free == 256
    assert harness.loop.times.num_steps == 4
    assert harness.loop.times.num_tokens == 3 + 3


def test_a_step_that_says_nothing_still_reports_its_load() -> None:
    harness = Harness(max_step_tokens=2)
    harness.loop.add_request(request("a", [1, 2, 3, 4], max_tokens=1))
    assert harness.loop.run_once()
    assert harness.calls == []
    assert harness.loop.run_once()
    assert harness.calls[0][0] == []
    assert harness.calls[0][1].num_running == 1


def test_abort_frees_blocks_before_the_next_step(harness: Harness) -> None:
    harness.loop.add_request(request("a", [1] * 9, max_tokens=50, n=2, ignore_eos=True))
    harness.loop.add_request(request("b", [2] * 9, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        harness.loop.run_once()
    harness.loop.abort("a", 1)
    harness.loop.abort("nobody")
    harness.loop.run_once()
    assert set(harness.last()) == {("a", 1)}
    assert harness.calls[-1][1].num_running == 2
    harness.loop.abort("a")
    harness.loop.abort("b")
    harness.loop.run_once()
    assert harness.calls[-1][1].kv_blocks_free == 256
    assert {d.finish_reason for d in harness.last().values()} == {FinishReason.ABORT}


def test_add_and_abort_in_one_batch_still_answers(harness: Harness) -> None:
    harness.loop.add_request(request("a", [1, 2]))
    harness.loop.abort("a")
    assert harness.loop.run_once()
    assert harness.last()["a", 0].finish_reason is FinishReason.ABORT
    assert harness.executor.history == []


def test_a_refused_request_is_answered_and_the_others_go_on() -> None:
    harness = Harness(max_context=16, max_waiting_requests=1)
    harness.loop.add_request(request("long", [1] * 99, n=2))
    harness.loop.add_request(request("good", [1, 2], max_tokens=1))
    harness.loop.add_request(request("extra", [1, 2], max_tokens=1))
    while harness.loop.run_once():
        pass
    assert harness.codes() == {"long": "context_too_long", "extra": "overloaded", "good": None}
    assert len(harness.last()) == 4
    assert harness.fatal == []


def test_a_failed_request_fails_alone(harness: Harness) -> None:
    for name in ("a", "b"):
        harness.loop.add_request(request(name, [1, 2], max_tokens=3, ignore_eos=True))
    harness.executor.errors["0"] = "NaN logits"
    while harness.loop.run_once():
        pass
    assert harness.codes() == {"a": "internal", "b": None}
    assert harness.fatal == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerDiedError("Rank 1 was killed."), "worker_died"),
        (CollectiveTimeoutError("No answer in 5 s."), "collective_timeout"),
        (ZeroDivisionError("oops"), "internal"),
    ],
)
def test_losing_the_executor_ends_everything_at_once(error: Exception, code: str) -> None:
    harness = Harness(max_running_requests=1)
    harness.loop.add_request(request("running", [1, 2], max_tokens=9, ignore_eos=True))
    harness.loop.add_request(request("waiting", [1, 2], n=2))
    harness.loop.run_once()
    harness.executor.fail_with = error
    harness.loop.add_request(request("new", [1, 2]))
    harness.loop.add_request(request("gone", [1, 2]))
    harness.loop.abort("gone")
    harness.on_deltas = lambda: harness.loop.abort("running")
    assert not harness.loop.run_once()
    assert harness.codes() == {"running": code, "waiting": code, "new": code, "gone": None}
    assert len(harness.last()) == 5
    assert [fatal.code for fatal in harness.fatal] == [code]
    assert harness.loop.health.fatal is harness.fatal[0]
    assert harness.calls[-1][1].kv_blocks_free == 256
    with pytest.raises(PenstockError) as refusal:
        harness.loop.add_request(request("after", [1]))
    assert refusal.value.code == code
    assert not harness.loop.run_once()
    assert harness.loop.stop()
    assert len(harness.fatal) == 1
    with pytest.raises(PenstockError) as refusal:
        harness.loop.add_request(request("after", [1]))
    assert refusal.value.code == code


@pytest.mark.parametrize("idle", [False, True])
def test_requests_go_on_with_other_workers(harness: Harness, idle: bool) -> None:
    wanted = request("a", [1, 2, 3], max_tokens=20, ignore_eos=True)
    harness.spare_executors = [SimulatedExecutor(harness.config)]
    if not idle:
        harness.loop.add_request(wanted)
        for _ in range(4):
            harness.loop.run_once()
        harness.executor.fail_with = WorkerDiedError("Rank 1 was killed.")
    else:
        harness.loop.lose_workers(WorkerDiedError("Rank 1 was killed."))
        assert harness.loop.run_once()
        harness.loop.add_request(wanted)
    while harness.loop.run_once():
        pass
    assert harness.fatal == []
    assert [str(loss.cause) for loss in harness.losses] == ["Rank 1 was killed."]
    tokens = [token for delta in harness.deltas for token in delta.token_ids]
    assert tokens == expected(wanted, 0, 128).token_ids
    # Another loss finds no others.
    harness.loop.add_request(request("b", [1, 2]))
    harness.executor.fail_with = CollectiveTimeoutError("No answer in 5 s.")
    while harness.loop.run_once():
        pass
    assert harness.codes()["b"] == "collective_timeout"
    assert [fatal.code for fatal in harness.fatal] == ["collective_timeout"]


def test_a_fault_of_the_engine_is_no_loss_of_workers(harness: Harness) -> None:
    harness.spare_executors = [SimulatedExecutor(harness.config)]
    harness.loop.add_request(request("a", [1, 2, 3], max_tokens=20))
    harness.executor.fail_with = ZeroDivisionError("oops")
    assert not harness.loop.run_once()
    assert harness.losses == []
    assert harness.codes() == {"a": "internal"}


def test_a_request_that_arrives_while_the_executor_dies_is_answered(harness: Harness) -> None:
    harness.executor.before_collect = lambda: harness.loop.add_request(request("late", [1], n=2))
    harness.executor.fail_with = WorkerDiedError("Rank 1 was killed.")
    harness.loop.add_request(request("a", [1]))
    harness.loop.run_once()
    assert set(harness.last()) == {("a", 0), ("late", 0), ("late", 1)}
    assert set(harness.codes().values()) == {"worker_died"}


def test_a_callback_that_raises_is_fatal_and_said_once(harness: Harness) -> None:
    def explode() -> None:
        if len(harness.calls) == 2:
            raise RuntimeError("callback")

    harness.on_deltas = explode
    harness.loop.add_request(request("a", [1, 2], max_tokens=9, ignore_eos=True))
    harness.loop.add_request(request("b", [1, 2], max_tokens=2, ignore_eos=True))
    for _ in range(2):
        harness.loop.run_once()
        assert not harness.fatal
    harness.loop.run_once()
    assert harness.codes() == {"a": "internal", "b": None}
    assert len(harness.fatal) == 1


def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    harness = Harness(max_running_requests=1)
    for name in ("a", "b"):
        harness.loop.add_request(request(name, [1, 2], max_tokens=3, ignore_eos=True))
    harness.loop.drain()
    with pytest.raises(UnavailableError, match="draining"):
        harness.loop.add_request(request("c", [1]))
    assert not harness.loop.wait_drained(0.0)
    harness.loop.start()
    assert harness.loop.wait_drained(10.0)
    assert harness.codes() == {"a": None, "b": None}
    assert {d.finish_reason for d in harness.last().values()} == {FinishReason.LENGTH}
    assert harness.loop.stop()


def test_an_idle_drain_is_over_at_once(harness: Harness) -> None:
    harness.loop.start()
    harness.loop.drain()
    assert harness.loop.wait_drained(10.0)


def test_stop_ends_requests_with_an_error_and_the_thread() -> None:
    harness = Harness(max_context=8000, num_blocks=2000)
    stepped = threading.Event()
    harness.on_deltas = stepped.set
    harness.loop.start()
    harness.loop.add_request(request("a", [1, 2], max_tokens=7000, ignore_eos=True))
    assert stepped.wait(10.0)
    assert harness.loop.stop()
    assert harness.codes() == {"a": "unavailable"}
    assert harness.fatal == []
    with pytest.raises(UnavailableError, match="shutting down"):
        harness.loop.add_request(request("b", [1]))


def test_stop_without_a_thread_answers_too(harness: Harness) -> None:
    harness.loop.add_request(request("a", [1, 2]))
    assert harness.loop.stop()
    assert harness.codes() == {"a": "unavailable"}


def test_the_idle_loop_sleeps_and_wakes_on_a_command(harness: Harness) -> None:
    harness.loop.start()
    harness.loop.abort("nobody")
    time.sleep(0.05)
    before_s = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before_s < 0.1
    harness.loop.add_request(request("a", [1, 2], max_tokens=1))
    harness.wait_for(lambda: len(harness.calls) == 1)
    assert set(harness.last()) == {("a", 0)}


def test_health_tells_a_stuck_step_from_an_idle_loop() -> None:
    seen: list[tuple[float | None, int]] = []

    class Watching(SimulatedExecutor):
        def submit(self, plan: SchedulerOutput) -> None:
            seen.append((harness.loop.health.step_started_s, harness.loop.health.num_unfinished))
            harness.now += 2.0
            super().submit(plan)

    harness = Harness(max_running_requests=1)
    harness.executor = Watching(harness.config)
    harness.loop = EngineLoop(
        harness.scheduler,
        harness.executor,
        on_deltas=harness._hear,
        on_fatal=harness.fatal.append,
        step_timeout_s=5.0,
        clock=lambda: harness.now,
    )
    assert harness.loop.health.last_step_end_s is None
    for name in ("a", "b"):
        harness.loop.add_request(request(name, [1, 2], max_tokens=1))
    harness.loop.run_once()
    assert seen == [(100.0, 2)]
    health = harness.loop.health
    assert health.step_started_s is None
    assert health.last_step_end_s == 102.0
    assert health.oldest_waiting_since_s == 100.0
    while harness.loop.run_once():
        pass
    assert harness.loop.health.oldest_waiting_since_s is None
    assert harness.loop.health.last_step_end_s == 104.0
    assert harness.loop.times.execute_s == 4.0


def test_many_threads_add_and_abort_and_every_choice_ends_once() -> None:
    harness = Harness(num_blocks=24, max_context=32, max_waiting_requests=1000)
    harness.loop.start()

    def client(number: int) -> None:
        for count in range(15):
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
    assert len(harness.last()) == 4 * 15 * 2
    assert harness.fatal == []
    assert harness.calls[-1][1].kv_blocks_free == 24
    assert harness.loop.stop()
