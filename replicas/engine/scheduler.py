"""The engine's brain: requests in, step plans out; step results in, deltas out.

There are no prefill and decode phases: every request advances `num_computed_tokens` towards the
tokens it has, under a budget of query tokens per step. This file owns the life of requests; which
tokens a step computes is decided in `step_planner.py`, what a result means in
`output_processor.py`. Pure: no clock, no thread, no I/O. A step may be planned while others are in
flight: it takes for granted that each of their sampling requests gets one token and goes on. Where
one ended instead, the later step's token for it is discarded. Answers are taken in the order of
the plans. Every choice gets exactly one delta with a finish reason.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

from cluster.base.errors import InternalError, PenstockError
from replicas.api import FinishReason, GenerationDelta, GenerationRequest, ReplicaStats
from replicas.engine.arrival import check_arrival, check_fits
from replicas.engine.faults import as_penstock_error
from replicas.engine.output_processor import OutputProcessor, error_delta, first_word
from replicas.engine.prefix_cache import HashChain
from replicas.engine.request import (
    EngineRequest,
    KeyCounter,
    RequestStatus,
    make_choices,
    make_families,
)
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_invariants import check_planner, check_request
from replicas.engine.scheduler_output import RequestResult, SchedulerOutput, StepOutput
from replicas.engine.step_planner import StepPlanner

log = logging.getLogger(__name__)


class Scheduler:
    """All live requests of one engine. Not thread-safe.

    Args:
        config: limits.
        eos_token_ids: the model's end-of-sequence tokens.
        keys: of choices; shared by schedulers that may hand requests to each other.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        eos_token_ids: Iterable[int] = (),
        keys: KeyCounter | None = None,
    ) -> None:
        self.config = config
        eos = tuple(eos_token_ids)
        self._planner = StepPlanner(config, eos)
        self._outputs = OutputProcessor(eos)
        self._requests: dict[int, EngineRequest] = {}
        self._keys_by_id: dict[str, dict[int, int]] = {}
        self._keys = keys or KeyCounter()
        self._step = 0
        self._in_flight: deque[int] = deque()
        self._generated_tokens = 0
        self._draft_tokens = 0
        self._accepted_draft_tokens = 0
        self.num_discarded_tokens = 0
        """Tokens sampled for choices that had ended by then."""

    @property
    def num_unfinished(self) -> int:
        """Choices that have not ended."""
        return len(self._requests)

    @property
    def waits_for_answers(self) -> bool:
        """Whether steps are in flight whose answers the next plan is better made with."""
        return bool(self._in_flight) and self._planner.waits_for_answers

    @property
    def oldest_waiting_arrival_s(self) -> float | None:
        """Arrival of the choice that has waited longest for its first step."""
        return self._planner.waiting.oldest_arrival_s

    def knows(self, request_id: str) -> bool:
        """Whether a choice of this request has not ended."""
        return request_id in self._keys_by_id

    def num_cached_tokens(self, request: GenerationRequest, chain: HashChain) -> int:
        """Prompt tokens of a request that is not here that would come from the prefix cache.

        Args:
            chain: of its prompt, shared by all schedulers that are asked.
        """
        return self._planner.kv.num_cached_tokens(request.prompt_token_ids, chain)

    def add(self, request: GenerationRequest, arrival_s: float = 0.0) -> None:
        """Queue a request; it answers with deltas until each choice had its last one.

        Args:
            arrival_s: now, on the caller's clock; only reported back.

        Raises:
            PenstockError: it is refused, see `check_fits` and `check_arrival`.
        """
        waiting = self._planner.waiting
        check_fits(request, self.config)
        check_arrival(
            request, self.config, is_known=self.knows(request.request_id), num_waiting=len(waiting)
        )
        first_key = self._keys.take(len(request.choices))
        choices = make_choices(request, first_key, arrival_s, self.config.max_context)
        self._keys_by_id[request.request_id] = {choice.index: choice.key for choice in choices}
        self._requests.update((choice.key, choice) for choice in choices)
        for family in make_families(choices):
            waiting.add_family(family)

    def abort(self, request_id: str, index: int | None = None) -> list[GenerationDelta]:
        """End one choice, or all of a request, at once; its blocks are free on return.

        Returns:
            The last delta of every choice that ended; none for an unknown id.
        """
        keys = self._keys_by_id.get(request_id, {})
        deltas = []
        for key in [key for i, key in keys.items() if index is None or i == index]:
            request = self._requests[key]
            deltas.append(
                GenerationDelta(
                    request_id=request_id,
                    index=request.index,
                    finish_reason=FinishReason.ABORT,
                    num_cached_tokens=first_word(request),
                )
            )
            self._finish(request)
        return deltas

    def fail_all(self, error: PenstockError) -> list[GenerationDelta]:
        """End every choice, running or waiting: the replica is lost, and this is why."""
        requests = list(self._requests.values())
        for request in requests:
            self._finish(request)
        return [
            error_delta(request.request_id, request.index, error, replica_lost=True)
            for request in requests
        ]

    def schedule(self, step: int | None = None) -> SchedulerOutput | None:
        """Plan the next step; it has to be executed.

        Args:
            step: its number, larger than that of every plan before; None: the next one.

        Returns:
            None when no request is left, or what is left depends on a step in flight, or would get
            further with its answer (see `waits_for_answers`).

        Raises:
            InternalError: requests are left and none can be scheduled (a fault of ours).
        """
        if not self._requests or self.waits_for_answers:
            return None
        plan = self._planner.plan(self._step + 1 if step is None else step)
        if plan is None:
            if not self._in_flight:
                raise InternalError(f"None of {len(self._requests)} requests can be scheduled.")
            return None
        self._step = plan.step
        self._in_flight.append(plan.step)
        return plan

    def update_from_output(
        self, plan: SchedulerOutput, output: StepOutput
    ) -> list[GenerationDelta]:
        """Take in the answer to `plan`, the oldest one in flight.

        What it says about requests that ended meanwhile is discarded.

        Raises:
            InternalError: `output` answers another plan, or an older plan has no answer yet.
        """
        if output.step != plan.step:
            raise InternalError(f"Step {plan.step} was answered with step {output.step}.")
        if not self._in_flight or self._in_flight.popleft() != plan.step:
            raise InternalError(f"Step {plan.step} is not the oldest one in flight.")
        results = {result.key: result for result in output.results}
        deltas: list[GenerationDelta] = []
        columns = zip(
            plan.keys,
            plan.num_computed_tokens,
            plan.num_scheduled_tokens,
            plan.samples,
            strict=True,
        )
        for at, (key, start, num_scheduled, sampled) in enumerate(columns):
            request, result = self._requests.get(key), results.get(key)
            if request is None:
                self.num_discarded_tokens += sampled
                continue
            num_rejected = self._settle_draft(request, plan.draft(at), result)
            query = range(start, start + num_scheduled - num_rejected)
            request.num_steps_in_flight -= 1
            request.num_pending_tokens -= sampled
            # A preempted request has no KV any more, and is not let in again before this answer.
            if request.status is RequestStatus.RUNNING:
                request.num_answered_tokens = query.stop
            try:
                delta = self._outputs.process(request, result, query, sampled=sampled)
            except Exception as error:
                # The fault boundary of one request: whatever went wrong, the others go on.
                deltas.append(self._fail(request, as_penstock_error(error)))
                continue
            if delta is not None:
                self._generated_tokens += len(delta.token_ids)
            self._planner.speculator.learn(request)
            self._conclude(request, delta, deltas)
        return deltas

    def _settle_draft(
        self, request: EngineRequest, draft: tuple[int, ...], result: RequestResult | None
    ) -> int:
        """A step that checked a draft has answered: how many of its tokens count as not computed.

        What it wrote to the cache for them is overwritten when their positions are computed.
        """
        if not draft:
            return 0
        num_accepted = max(0, len(result.token_ids) - 1) if result is not None else 0
        self._draft_tokens += len(draft)
        self._accepted_draft_tokens += num_accepted
        num_rejected = len(draft) - num_accepted
        request.num_draft_tokens = 0
        request.num_computed_tokens -= num_rejected
        return num_rejected

    def restart(self, *, keeps_cache: bool = False) -> None:
        """The workers have forgotten their rows: every request waits again, with its tokens.

        Steps in flight will have no answers. What they sampled was told to nobody and is sampled
        anew, the same.

        Args:
            keeps_cache: the workers are the same and still hold what answered steps computed.
        """
        self._in_flight.clear()
        for request in self._requests.values():
            request.num_steps_in_flight = 0
            request.num_pending_tokens = request.num_draft_tokens = 0
        self._planner.restart(keeps_cache=keeps_cache)

    def hand_over(self) -> list[list[EngineRequest]]:
        """Give up every request, with its tokens and nothing else, for another scheduler.

        Returns:
            Families for `adopt`: a choice and those that wait for it to compute their prompt.
        """
        self.restart()
        families = self._planner.waiting.take_all()
        for request in self._requests.values():
            self._planner.speculator.forget(request)
        self._requests.clear()
        self._keys_by_id.clear()
        return families

    def adopt(self, family: list[EngineRequest]) -> None:
        """Take over choices that another scheduler, with the same keys and limits, has given up."""
        for choice in family:
            self._requests[choice.key] = choice
            self._keys_by_id.setdefault(choice.request_id, {})[choice.index] = choice.key
        self._planner.waiting.add_family(family)

    def stats(self) -> ReplicaStats:
        """The load now."""
        planner = self._planner
        return ReplicaStats(
            step=self._step,
            num_running=len(planner.running),
            num_waiting=len(planner.waiting),
            num_waiting_tokens=planner.waiting.num_tokens,
            kv_blocks_total=planner.kv.num_blocks,
            kv_blocks_free=planner.kv.num_free_blocks,
            prefix_hit_tokens=planner.prefix_hit_tokens,
            prefix_query_tokens=planner.prefix_query_tokens,
            num_preemptions=planner.num_preemptions,
            generated_tokens=self._generated_tokens,
            draft_tokens=self._draft_tokens,
            accepted_draft_tokens=self._accepted_draft_tokens,
        )

    def check_invariants(self) -> None:
        """For tests: blocks and queues agree with the live requests.

        Raises:
            InternalError: what is wrong.
        """
        check_planner(self._planner, self._requests.values())
        for request in self._requests.values():
            check_request(request, self._planner, self.config, len(self._in_flight))

    def _conclude(
        self,
        request: EngineRequest,
        delta: GenerationDelta | None,
        deltas: list[GenerationDelta],
    ) -> None:
        """What follows from a sound result: cached blocks, served forks, the end."""
        planner = self._planner
        planner.kv.register_computed(request)
        if delta is not None:
            deltas.append(delta)
        if planner.waiting.has_forks(request):
            if delta is not None:
                request.kept_scores.extend(delta.prompt_logprobs)
            if request.num_answered_tokens >= request.num_prompt_tokens:
                deltas.extend(self._serve_forks(request))
        if delta is not None and delta.finish_reason is not None:
            self._finish(request)

    def _serve_forks(self, parent: EngineRequest) -> list[GenerationDelta]:
        """Hand the computed prompt to waiting choices, and its scores to their callers."""
        scores, parent.kept_scores = tuple(parent.kept_scores), []
        forks = self._planner.serve_forks(parent)
        if not scores:
            return []
        for fork in forks:
            fork.num_scored_tokens = len(scores)
        return [
            GenerationDelta(
                request_id=fork.request_id,
                index=fork.index,
                prompt_logprobs=scores,
                num_cached_tokens=first_word(fork),
            )
            for fork in forks
        ]

    def _fail(self, request: EngineRequest, error: PenstockError) -> GenerationDelta:
        name, index = request.request_id, request.index
        log.warning("request %s choice %d failed: %s", name, index, error, exc_info=error)
        self._finish(request)
        return error_delta(request.request_id, request.index, error)

    def _finish(self, request: EngineRequest) -> None:
        self._planner.remove(request)
        del self._requests[request.key]
        keys = self._keys_by_id[request.request_id]
        del keys[request.index]
        if not keys:
            del self._keys_by_id[request.request_id]
