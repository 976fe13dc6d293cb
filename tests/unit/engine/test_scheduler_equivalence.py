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
from simulated_executor import COPYING, EOS, SimulatedExecutor, config, expected, request

from cluster.base.errors import ContextTooLongError
from replicas.api import FinishReason, GenerationDelta, GenerationRequest, Pooling
from replicas.engine.request import RequestStatus
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.step_runner import StepRunner
from replicas.engine.sync_engine import Completion, SyncEngine

MAX_STEPS = 3000


class Run:
    """One engine with everything it said, checked after every step."""

    def __init__(self, limits: SchedulerConfig) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits, EOS)
        self.executor = SimulatedExecutor(limits)
        self.engine = SyncEngine(self.scheduler, self.executor)
        self.requests: dict[str, GenerationRequest] = {}
        self.completions: dict[tuple[str, int], Completion] = {}

    def add(self, new: GenerationRequest) -> None:
        self.engine.add(new)
        self.requests[new.request_id] = new
        for index in range(new.params.n):
            self.completions[new.request_id, index] = Completion(
                request_id=new.request_id, index=index
            )

    def abort(self, request_id: str, index: int | None) -> None:
        self.take(self.engine.abort(request_id, index))
        self.scheduler.check_invariants()

    def step(self) -> None:
        num_preemptions = self.engine.stats.num_preemptions
        self.take(self.advance())
        self.scheduler.check_invariants()
        if self.engine.stats.num_preemptions > num_preemptions and self.executor.submitted:
            assert self.executor.submitted[-1].new_requests == ()

    def advance(self) -> list[GenerationDelta]:
        return self.engine.step()

    @property
    def is_busy(self) -> bool:
        return self.engine.has_unfinished

    def take(self, deltas: list[GenerationDelta]) -> None:
        for delta in deltas:
            completion = self.completions[delta.request_id, delta.index]
            assert completion.finish_reason is None, "a delta after the last one"
            completion.extend(delta)

    def finish(self) -> None:
        for _ in range(MAX_STEPS):
            if not self.is_busy:
                break
            self.step()
        stats = self.engine.stats
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
        for (request_id, index), completion in self.completions.items():
            self.check(self.requests[request_id], index, completion)

    def check(self, origin: GenerationRequest, index: int, said: Completion) -> None:
        wanted = expected(origin, index, self.limits.max_context)
        assert said.finish_reason is not None, "never finished"
        failed = said.finish_reason is FinishReason.ERROR and self.executor.errors
        if said.finish_reason is FinishReason.ABORT or failed:
            assert said.token_ids == wanted.token_ids[: len(said.token_ids)]
            assert said.logprobs == wanted.logprobs[: len(said.logprobs)]
            assert said.prompt_logprobs == wanted.prompt_logprobs[: len(said.prompt_logprobs)]
            return
        assert said.token_ids == wanted.token_ids
        assert said.logprobs == wanted.logprobs
        assert said.prompt_logprobs == wanted.prompt_logprobs
        assert said.embedding == wanted.embedding
        assert said.finish_reason is wanted.finish_reason
        assert said.stop_token_id == wanted.stop_token_id
        assert 0 <= said.num_cached_tokens < len(origin.prompt_token_ids)


class PipelinedRun(Run):
    """Up to `depth` steps in flight: at random the next is planned or the oldest answers."""

    def __init__(self, limits: SchedulerConfig, rng: random.Random, depth: int) -> None:
        super().__init__(limits)
        self.runner = StepRunner(self.scheduler, self.executor, step_timeout_s=1.0)
        self.rng, self.depth = rng, depth
        self.num_preempted_unknown = self.num_on_top = 0

    @property
    def is_busy(self) -> bool:
        return self.engine.has_unfinished or self.runner.num_in_flight > 0

    def advance(self) -> list[GenerationDelta]:
        num_in_flight = self.runner.num_in_flight
        if not num_in_flight:
            # With requests left and none in flight, there is always something to compute.
            assert self.runner.submit() == self.engine.has_unfinished
            return []
        if num_in_flight < self.depth and self.rng.random() < 0.8 and self.runner.submit():
            self.num_on_top += 1
            self.num_preempted_unknown += sum(
                request.status is RequestStatus.PREEMPTED and request.num_pending_tokens > 0
                for request in self.scheduler._requests.values()
            )
            return []
        return self.runner.collect()


class RestartedRun(PipelinedRun):
    """Now and then all workers are replaced by others that know nothing."""

    num_restarts = 0

    def advance(self) -> list[GenerationDelta]:
        # Few enough for a long prompt in small steps to get through.
        if self.num_restarts < 6 and self.rng.random() < 0.08:
            self.num_restarts += 1
            former, self.executor = self.executor, SimulatedExecutor(self.limits)
            self.executor.errors, self.executor.errors_from = former.errors, former.errors_from
            self.runner.restart(self.executor)
            self.scheduler.check_invariants()
        return super().advance()


def random_request(
    rng: random.Random, name: str, max_context: int, *, copies: bool = False
) -> GenerationRequest:
    """Prompts share prefixes often; parameters cover everything the engine itself acts on.

    Most of those that copy repeat themselves, so that drafts are worth making.
    """
    shared = [(i * i + 3) % 11 for i in range(rng.choice((0, 3, 8, 12)))]
    prompt = shared + [rng.randrange(3) for _ in range(rng.randint(1, 9))]
    pooling = rng.choice((None,) * 8 + (Pooling.LAST, Pooling.MEAN))
    min_tokens = rng.choice((0, 0, 2))
    return request(
        name,
        prompt[: max_context - 1],
        pooling=pooling,
        priority=rng.choice((0, 0, 0, 1, -1)),
        cache_salt=rng.choice(("", "", "salt")),
        n=1 if pooling else rng.choice((1, 1, 2, 4)),
        max_tokens=rng.choice((0, 1, 2, 5, 9, 14)),
        min_tokens=min_tokens,
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=rng.choice(((), (), (3, 5))),
        seed=rng.randrange(3) + (COPYING if copies and rng.random() < 0.8 else 0),
        logprobs=rng.choice((None, 0)),
        prompt_logprobs=rng.choice((None, None, 0)),
    )


def random_limits(rng: random.Random, *, speculates: bool = False) -> SchedulerConfig:
    block_size = rng.choice((1, 2, 4))
    speculation = None
    if speculates:
        min_ngram = rng.choice((1, 2))
        speculation = SpeculationConfig(
            num_tokens=rng.choice((1, 2, 5, 9)),
            min_ngram=min_ngram,
            max_ngram=min_ngram + rng.choice((0, 2)),
        )
    return config(
        block_size=block_size,
        num_blocks=rng.choice((9, 10, 14, 60)) * 4 // block_size,
        max_context=36,
        max_step_tokens=rng.choice((1, 3, 7, 40)),
        max_running_requests=rng.choice((1, 3, 8)),
        prefix_caching=rng.random() < 0.7,
        speculation=speculation,
    )


def random_run(
    seed: int,
    depth: int = 1,
    *,
    speculates: bool = False,
    kind: type[PipelinedRun] = PipelinedRun,
) -> Run:
    """Requests arrive and some are aborted between steps, in an order drawn from the seed."""
    rng = random.Random(seed)
    limits = random_limits(rng, speculates=speculates)
    run = Run(limits) if depth == 1 else kind(limits, random.Random(seed), depth)
    if depth == 2 and rng.random() < 0.2:
        run.executor.errors_from[rng.randrange(8)] = rng.randrange(1, 12)
    abort_rate = rng.choice((0.0, 0.0, 0.05))
    for number in range(rng.randint(1, 10)):
        run.add(random_request(rng, f"r{number}", run.limits.max_context, copies=speculates))
        for _ in range(rng.choice((0, 0, 1, 4))):
            run.step()
            if rng.random() < abort_rate * 4:
                victim = rng.choice(list(run.completions))
                run.abort(victim[0], rng.choice((None, victim[1])))
    while abort_rate and run.is_busy:
        run.step()
        if rng.random() < abort_rate:
            run.abort(*rng.choice(list(run.completions)))
    run.finish()
    return run


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
