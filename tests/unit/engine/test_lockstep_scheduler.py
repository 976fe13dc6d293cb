"""Several groups in lock-step: every stream is what it is alone, and nobody is left behind.

The same random workloads as for one scheduler, over one simulated KV store per group.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from engine_settings import engine_settings
from hypothesis import given
from hypothesis import strategies as st
from loop_harness import Harness
from scheduler_runs import MAX_STEPS, Run, random_limits, work_through
from simulated_executor import EOS, SimulatedExecutor, config, expected, request

from cluster.base.errors import (
    ConfigError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    WorkerDiedError,
)
from replicas.api import GenerationDelta, ReplicaStats
from replicas.engine.engine_loop import EngineLoop
from replicas.engine.group_choice import TOKENS_PER_REQUEST, GroupView, choose_group
from replicas.engine.lockstep import LockstepOutput, LockstepPlan
from replicas.engine.lockstep_scheduler import LockstepScheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.engine.step_runner import StepRunner
from replicas.engine.sync_engine import SyncEngine


class LockstepExecutor:
    """One simulated worker per group; all of them see every step."""

    def __init__(self, limits: SchedulerConfig, num_groups: int) -> None:
        self.limits = limits
        self.groups = [SimulatedExecutor(limits) for _ in range(num_groups)]
        self.submitted: list[LockstepPlan] = []
        self.plans: list[LockstepPlan] = []
        self.fail_with: Exception | None = None

    @property
    def errors(self) -> dict[str, str]:
        return {key: error for group in self.groups for key, error in group.errors.items()}

    def submit(self, plan: LockstepPlan) -> None:
        assert plan.step == len(self.submitted) + 1
        assert {each.step for each in plan.plans} == {plan.step}
        assert plan.num_tokens > 0
        self.submitted.append(plan)
        self.plans.append(plan)
        for index, group in enumerate(self.groups):
            rank_step = plan.for_group(index)
            assert rank_step.plan.num_tokens == plan.header.num_tokens[index]
            if plan.header.is_idle(index):
                assert rank_step.plan == SchedulerOutput(step=plan.step)
            else:
                group.submit(rank_step.plan)

    def poll(self, timeout_s: float) -> bool:
        return True

    def collect(self, timeout_s: float) -> LockstepOutput:
        if self.fail_with is not None:
            raise self.fail_with
        plan = self.plans.pop(0)
        return LockstepOutput(
            outputs=tuple(
                StepOutput(step=plan.step)
                if plan.header.is_idle(index)
                else self.groups[index].collect(timeout_s)
                for index in plan.groups
            )
        )

    def lose(self, losing: set[int], num_executed: dict[int, int]) -> None:
        """Groups end in the middle of steps; the others forget their rows and keep their blocks.

        Args:
            num_executed: steps in flight that a group still executes, although nobody hears of it.
        """
        for index, group in enumerate(self.groups):
            if index in losing:
                self.groups[index] = SimulatedExecutor(self.limits)
                self.groups[index].submitted = group.submitted
                continue
            for _ in range(min(num_executed.get(index, 0), len(group.plans))):
                group.collect(0.0)
            group.rows.clear()
            group.plans.clear()
        self.plans.clear()

    def close(self) -> None:
        pass


def scheme_of(num_tokens: int) -> tuple[str, str]:
    return ("preposted", "small") if num_tokens <= 4 else ("flat", "large")


class LockstepRun(Run):
    """Up to `depth` steps in flight, everything checked after each."""

    def __init__(self, limits: SchedulerConfig, num_groups: int, seed: int, depth: int) -> None:
        self.limits = limits
        self.scheduler = LockstepScheduler(
            limits, num_groups, choose_scheme=scheme_of, eos_token_ids=EOS
        )
        self.executor = LockstepExecutor(limits, num_groups)
        self.engine = SyncEngine(self.scheduler, self.executor)
        self.runner = StepRunner(self.scheduler, self.executor, step_timeout_s=1.0)
        self.requests, self.completions = {}, {}
        self.rng, self.depth = random.Random(seed), depth

    @property
    def is_busy(self) -> bool:
        return self.engine.has_unfinished or self.runner.num_in_flight > 0

    def step(self) -> None:
        self.take(self.advance())
        self.scheduler.check_invariants()

    def advance(self) -> list[GenerationDelta]:
        num_in_flight = self.runner.num_in_flight
        if not num_in_flight:
            assert self.runner.submit() == self.engine.has_unfinished
            return []
        if num_in_flight < self.depth and self.rng.random() < 0.8 and self.runner.submit():
            return []
        return self.runner.collect()


class ShrinkingRun(LockstepRun):
    """Now and then groups are lost with steps in flight; later others take their places."""

    def __init__(self, limits: SchedulerConfig, num_groups: int, seed: int, depth: int) -> None:
        super().__init__(limits, num_groups, seed, depth)
        self.serving = list(range(num_groups))
        self.scheduler = LockstepScheduler(
            limits,
            num_groups,
            choose_scheme=scheme_of,
            eos_token_ids=EOS,
            serving=lambda: self.serving,
        )
        self.engine = SyncEngine(self.scheduler, self.executor)
        self.runner = StepRunner(self.scheduler, self.executor, step_timeout_s=1.0)
        self.num_losses = self.num_handed_over = self.num_joined = 0

    def advance(self) -> list[GenerationDelta]:
        num_groups = len(self.scheduler.groups)
        if self.num_losses < 6 and self.rng.random() < 0.1:
            self.lose()
        elif (
            not self.runner.num_in_flight
            and len(self.serving) < num_groups
            and self.rng.random() < 0.3
        ):
            self.serving = list(range(num_groups))
            self.num_joined += 1
        return super().advance()

    def lose(self) -> None:
        losing = set(self.rng.sample(self.serving, self.rng.randrange(len(self.serving))))
        executed = {index: self.rng.randrange(3) for index in self.serving}
        self.num_losses += 1
        self.num_handed_over += sum(self.scheduler.groups[i].num_unfinished for i in losing)
        self.serving = [index for index in self.serving if index not in losing]
        self.executor.lose(losing, executed)
        self.runner.restart(self.executor, keeps_cache=True)
        self.scheduler.check_invariants()


def random_lockstep_run(
    seed: int, *, speculates: bool = False, kind: type[LockstepRun] = LockstepRun
) -> LockstepRun:
    rng = random.Random(seed)
    limits = random_limits(rng, speculates=speculates)
    run = kind(limits, rng.choice((1, 2, 3, 4)), seed, rng.choice((1, 2, 2)))
    if kind is LockstepRun and rng.random() < 0.2:
        key, step = rng.randrange(8), rng.randrange(1, 12)
        for group in run.executor.groups:
            group.errors_from[key] = step
    work_through(run, rng, max_requests=12, copies=speculates)
    return run


@engine_settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_any_interleaving_over_groups_gives_the_streams_of_one_at_a_time(seed: int) -> None:
    random_lockstep_run(seed)


@engine_settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_drafts_of_one_group_change_no_stream_of_any(seed: int) -> None:
    random_lockstep_run(seed, speculates=True)


@engine_settings(max_examples=150)
@given(st.integers(0, 2**32), st.booleans())
def test_groups_that_come_and_go_change_no_stream(seed: int, speculates: bool) -> None:
    random_lockstep_run(seed, speculates=speculates, kind=ShrinkingRun)


def test_many_random_runs_hand_requests_over_and_keep_caches() -> None:
    seen: Counter[str] = Counter()
    for seed in range(150):
        run = random_lockstep_run(seed, kind=ShrinkingRun)
        assert isinstance(run, ShrinkingRun)
        seen["losses"] += run.num_losses
        seen["handed over"] += run.num_handed_over
        seen["joined"] += run.num_joined
    assert min(seen.values()) > 40, seen


def test_survivors_compute_no_full_block_again() -> None:
    run = ShrinkingRun(config(block_size=4, num_blocks=64, max_context=60), 2, seed=0, depth=1)
    run.num_losses = 99  # none at random
    run.add(request("stays", list(range(30)), max_tokens=9, ignore_eos=True))
    run.add(request("moves", list(range(9, 39)), max_tokens=9, ignore_eos=True))
    for _ in range(8):
        run.step()
    run.serving = [0]
    run.executor.lose({1}, {})
    run.runner.restart(run.executor, keeps_cache=True)
    before = len(run.executor.submitted)
    run.finish()
    assert groups_of(run) == []
    plan = run.executor.submitted[before].plans[0]
    computed = dict(zip(plan.keys, plan.num_computed_tokens, strict=True))
    assert computed == {0: 32, 1: 0}


def test_many_random_runs_meet_idle_groups_preemption_discards_and_failures() -> None:
    seen: Counter[str] = Counter()
    for seed in range(300):
        run = random_lockstep_run(seed)
        headers = [plan.header for plan in run.executor.submitted]
        seen["idle"] += sum(0 in header.num_tokens for header in headers)
        seen["together"] += sum(sum(map(bool, h.num_tokens)) > 1 for h in headers)
        seen["preemptions"] += run.engine.stats.num_preemptions
        seen["discarded"] += run.scheduler.num_discarded_tokens
        seen["hits"] += run.engine.stats.prefix_hit_tokens
        seen["failed"] += len(run.executor.errors)
        for header in headers:
            assert header.scheme == scheme_of(max(header.num_tokens))[0]
    assert min(seen.values()) > 30, seen


def lockstep(num_groups: int = 2, **limits: int | bool) -> LockstepRun:
    return LockstepRun(config(**limits), num_groups, seed=0, depth=1)


def groups_of(run: LockstepRun) -> list[int]:
    """The group of each live request, in order of arrival."""
    return [
        index
        for name in run.requests
        for index, group in enumerate(run.scheduler.groups)
        if group.knows(name)
    ]


def test_equal_requests_spread_over_the_groups() -> None:
    run = lockstep(4)
    for number in range(8):
        run.add(request(f"r{number}", [number, 1, 2], max_tokens=4))
    assert groups_of(run) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert run.engine.stats.num_waiting == 8
    assert run.engine.stats.kv_blocks_total == 4 * 256
    run.finish()


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    run = lockstep(3)
    prompts = [[group * 9 + i % 5 for i in range(40)] for group in range(3)]
    for number, prompt in enumerate(prompts):
        run.add(request(f"r{number}", prompt, max_tokens=2, ignore_eos=True))
    run.finish()
    for number in (2, 1, 2, 0):
        name = f"again{len(run.requests)}"
        run.add(request(name, [*prompts[number], 3], max_tokens=1, ignore_eos=True))
        assert groups_of(run) == [number]
        run.finish()
        assert run.completions[name, 0].num_cached_tokens == 40


def view(cached: int = 0, **stats: int) -> GroupView:
    return GroupView(
        stats=ReplicaStats(**{"kv_blocks_free": 100, **stats}), num_cached_tokens=cached
    )


def test_affinity_yields_to_load_and_to_missing_blocks() -> None:
    assert choose_group(200, 16, [view(), view(160, num_running=0)]) == 1
    # A running request more is worth as much as the tokens saved.
    assert choose_group(400, 16, [view(), view(TOKENS_PER_REQUEST + 1, num_running=1)]) == 1
    assert choose_group(400, 16, [view(), view(TOKENS_PER_REQUEST - 1, num_running=1)]) == 0
    assert choose_group(64, 16, [view(kv_blocks_free=3), view()]) == 1
    assert choose_group(64, 16, [view(num_waiting_tokens=1), view()]) == 1


def test_an_id_may_live_once_in_the_whole_replica_and_the_queue_is_shared() -> None:
    run = lockstep(2, max_waiting_requests=3)
    run.add(request("a", [1, 2, 3]))
    with pytest.raises(InvalidRequestError, match="running already"):
        run.engine.add(request("a", [4, 5]))
    run.add(request("b", [1, 2, 3]))
    run.add(request("c", [1, 2, 3]))
    with pytest.raises(OverloadedError, match="3 requests are waiting; the limit is 3"):
        run.engine.add(request("d", [1, 2, 3]))
    run.abort("b", None)
    run.add(request("d", [1, 2, 3]))
    run.finish()


def test_nothing_is_planned_when_no_group_has_work() -> None:
    run = lockstep(3)
    assert run.scheduler.schedule() is None
    run.add(request("a", [1, 2], max_tokens=1))
    run.finish()
    assert run.scheduler.schedule() is None
    assert [plan.header.num_tokens for plan in run.executor.submitted] == [(2, 0, 0)]


def test_an_answer_to_another_step_is_a_fault() -> None:
    run = lockstep(2)
    run.add(request("a", [1, 2], max_tokens=1))
    plan = run.scheduler.schedule()
    assert plan is not None
    answered = StepOutput(step=1)
    with pytest.raises(InternalError, match="Group 1 answered step 2 instead of 1"):
        run.scheduler.update_from_output(
            plan, LockstepOutput(outputs=(answered, StepOutput(step=2)))
        )
    with pytest.raises(ConfigError, match="0 data-parallel groups"):
        LockstepScheduler(run.limits, 0, choose_scheme=scheme_of)


class LockstepHarness(Harness):
    """The engine loop over two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = LockstepScheduler(self.config, 2, choose_scheme=scheme_of, eos_token_ids=EOS)
        self.ranks = LockstepExecutor(self.config, 2)
        self.loop = EngineLoop(
            self.groups,
            self.ranks,
            on_deltas=self._hear,
            on_fatal=self.fatal.append,
            step_timeout_s=5.0,
            clock=lambda: self.now,
        )


def test_the_loop_plans_lock_steps_on_top_of_each_other() -> None:
    harness = LockstepHarness()
    harness.ranks.poll = lambda timeout_s: False
    wanted = [request(f"r{i}", [i, 2, 3], max_tokens=4 + 3 * i, ignore_eos=True) for i in range(3)]
    for new in wanted:
        harness.loop.add_request(new)
    while harness.loop.run_once():
        harness.groups.check_invariants()
    for new in wanted:
        said = [t for d in harness.deltas if d.request_id == new.request_id for t in d.token_ids]
        assert said == expected(new, 0, 128).token_ids
    # The longest request decides the number of steps; the other group idles at the end.
    assert [plan.header.num_tokens for plan in harness.ranks.submitted][-3:] == [(1, 0)] * 3
    assert len(harness.ranks.submitted) == 10
    assert len(harness.ranks.submitted) < MAX_STEPS


def test_a_lost_rank_ends_the_requests_of_every_group() -> None:
    harness = LockstepHarness()
    for number in range(4):
        harness.loop.add_request(request(f"r{number}", [1, 2], max_tokens=9, ignore_eos=True))
    harness.loop.run_once()
    harness.ranks.fail_with = WorkerDiedError("Rank 3 was killed.")
    assert not harness.loop.run_once()
    assert set(harness.codes().values()) == {"worker_died"}
    assert len(harness.last()) == 4
    assert harness.groups.num_unfinished == 0
