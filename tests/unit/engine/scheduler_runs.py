"""Random workloads of one engine, each stream checked against what its tokens alone say."""

from __future__ import annotations

import random

from simulated_executor import COPYING, EOS, SimulatedExecutor, config, expected, request

from replicas.api import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    Pooling,
)
from replicas.engine.request import RequestStatus
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.step_runner import StepRunner
from replicas.engine.sync_engine import Completion, SyncEngine
from tests.support.resumption import resumed

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


class MovedRun(PipelinedRun):
    """Now and then the engine is lost, and its requests go on in another one."""

    num_moves = num_moved = 0

    def advance(self) -> list[GenerationDelta]:
        if self.num_moves < 6 and self.rng.random() < 0.08:
            self.move()
        return super().advance()

    def move(self) -> None:
        self.num_moves += 1
        former, self.executor = self.executor, SimulatedExecutor(self.limits)
        self.scheduler = Scheduler(self.limits, EOS)
        self.engine = SyncEngine(self.scheduler, self.executor)
        self.runner = StepRunner(self.scheduler, self.executor, step_timeout_s=1.0)
        for request_id, origin in self.requests.items():
            told = [self.completions[request_id, index] for index in range(origin.params.n)]
            rest = resumed(origin, told)
            if rest is not None:
                self.num_moved += any(choice.token_ids for choice in rest.resumed)
                self.engine.add(rest)
        self.scheduler.check_invariants()
        assert not former.errors


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
    if depth == 2 and kind is not MovedRun and rng.random() < 0.2:
        run.executor.errors_from[rng.randrange(8)] = rng.randrange(1, 12)
    work_through(run, rng, max_requests=10, copies=speculates)
    return run


def work_through(run: Run, rng: random.Random, *, max_requests: int, copies: bool) -> None:
    """Requests arrive and some are aborted between steps, until all have ended."""
    abort_rate = rng.choice((0.0, 0.0, 0.05))
    for number in range(rng.randint(1, max_requests)):
        run.add(random_request(rng, f"r{number}", run.limits.max_context, copies=copies))
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
